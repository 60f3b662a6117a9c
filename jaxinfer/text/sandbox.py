"""A Jinja sandbox that bounds time and memory.

Jinja's own sandbox denies the attributes and calls that lead out of a template; it bounds neither time nor memory. Here
both are, in the calling thread, without signals or processes:

- Every step that can repeat or grow something reports to a `Budget`: each turn of a loop and each run of a macro or
  block (by a call put at its head in the syntax tree), each filter, call, `+`, `*`, `**`, `%`, `~`, literal list, tuple
  and dict, and each printed value.
- The budget refuses a value beyond `value_limit`, more than `work_limit` in all, and any step past the deadline.
  What multiplies text (`*`, `%`, format, replace, join, indent, tojson) is refused by prediction, before it takes
  memory. Sizes are printed sizes: `[a, a]` counts `a` twice, as its text would, though memory holds it once.
- Filters and methods of strings that aren't listed here are refused.

So between two reports there is no more than work on one value of bounded size.
"""

import contextvars
import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

__all__ = ["Budget", "Environment", "Instrument", "LimitError", "budget", "check_format"]

MAX_TOKENS = 12_000  # of a template's syntax: up to 1 s to compile; 30 KB of template have about 6,000
SECONDS = 0.5  # to render, of the thread's processor time, so that a busy machine refuses nothing
# Printed characters of one value, and of all together, plus a multiple of what the caller passed in
VALUE_LIMIT, VALUE_FACTOR = 1 << 18, 16
WORK_LIMIT, WORK_FACTOR = 1 << 24, 256
MAX_INT_BITS = 4096
MAX_ARGUMENT = 1 << 16  # of a filter or a string's method: a width, count or precision
MAX_INDENT = 16

FILTERS = frozenset(
    """
    abs batch capitalize count d default dictsort e escape first float forceescape format groupby indent int items
    join last length list lower map max min reject rejectattr replace reverse round safe select selectattr slice
    sort string title trim truncate unique upper wordcount
    """.split()  # noqa: SIM905
)
STR_METHODS = frozenset(
    """
    capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit isidentifier
    islower isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix removesuffix
    replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
    """.split()  # noqa: SIM905
)

budget: contextvars.ContextVar["Budget"] = contextvars.ContextVar("budget")


class LimitError(Exception):
    """A template went past what it may use."""


class Budget:
    """What one rendering may use, and how much of it is left."""

    def __init__(self, given: Any = ()):
        self._deadline = time.thread_time() + SECONDS
        # By id, with the value, so that the id stays its own. Containers don't change in this sandbox.
        self._sizes: dict[int, tuple[int, int, Any]] = {}
        self.value_limit = self.work_limit = 1 << 62
        size, _ = self.measure(given)
        self.value_limit, self.work_limit = VALUE_LIMIT + VALUE_FACTOR * size, WORK_LIMIT + WORK_FACTOR * size

    def spend(self, work: int = 1) -> None:
        """A step that makes `work` characters or entries."""
        self.work_limit -= work
        if self.work_limit < 0:
            raise LimitError("makes too much text in all")
        if time.thread_time() > self._deadline:
            raise LimitError(f"takes more than {SECONDS} s")

    def allow(self, size: int) -> None:
        """A value of `size` printed characters is about to be made."""
        if size > self.value_limit:
            raise LimitError(f"makes a value of {size} characters or more; at most {self.value_limit} are allowed")

    def check(self, value: Any) -> Any:
        """`value`, which was just made, if it may be."""
        self.allow(self.measure(value)[0])
        self.spend(1 + len(value) if isinstance(value, str | list | tuple | dict) else 1)
        return value

    def measure(self, value: Any) -> tuple[int, int]:
        """(printed characters, depth of nesting), roughly."""
        if isinstance(value, str | bytes):
            return len(value), 0
        if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise LimitError(f"makes an integer of more than {MAX_INT_BITS} bits")
        if isinstance(value, Namespace):  # prints what it holds, and changes
            raise LimitError("uses a namespace as a value")
        if not isinstance(value, Mapping | list | tuple | set | frozenset):
            return 8, 0
        if (known := self._sizes.get(id(value))) is not None:
            return known[:2]
        size, depth = 2, 0
        for part in [*value.keys(), *value.values()] if isinstance(value, Mapping) else value:
            part_size, part_depth = self.measure(part)
            size, depth = size + part_size + 2, max(depth, part_depth)
            if size > self.value_limit:
                break  # enough to be refused
        self._sizes[id(value)] = size, depth + 1, value
        return size, depth + 1

    def check_method(self, name: str, value: Any, args: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        """Predicts the size that a method of a string, or the filter of that name, would give."""
        arguments = [*args, *keywords.values()]
        if any(isinstance(argument, int) and abs(argument) > MAX_ARGUMENT for argument in arguments):
            raise LimitError(f"passes {name} a number beyond {MAX_ARGUMENT}")
        text, longest = str(value), max((self.measure(argument)[0] for argument in arguments), default=0)
        if name == "replace":
            found = text.count(str(arguments[0])) if arguments else 0
            self.allow(len(text) + found * longest)
        elif name == "indent":
            widths = [argument for argument in arguments if isinstance(argument, int)]
            self.allow(len(text) + (text.count("\n") + 1) * max(longest, 4, *widths))
        elif name == "format":
            check_format(text)
            self.allow(len(text) + (text.count("{") + text.count("%")) * (longest + 1000))


def check_format(text: str) -> None:
    """Refuses widths of more than three digits, and widths taken from arguments."""
    if re.search(r"[0-9]{4}|\*|\{[^{}]*\{[^{]", text):
        raise LimitError("formats with a width of more than three digits, or one that is an argument")


def _spend(work: int) -> str:
    budget.get().spend(work)
    return ""


def _check(value: Any) -> Any:
    return budget.get().check(value)


def _concat(parts: Sequence[Any]) -> str:
    limits = budget.get()
    limits.allow(sum(limits.measure(part)[0] for part in parts))
    return limits.check("".join(map(str, parts)))


def _finalize(value: Any) -> str:
    limits = budget.get()
    limits.allow(limits.measure(value)[0])
    return limits.check(str(value))


class Instrument(NodeTransformer):
    """Puts reports to the budget into a template's syntax tree."""

    def _call(self, name: str, argument: nodes.Expr, lineno: int) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(name), [argument], [], None, None, lineno=lineno)

    def _body(self, node: Any) -> Any:
        # Constant text is not a printed value, so the head of what may repeat it pays for it.
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node = self.generic_visit(node)
        head = nodes.Output([self._call("report_spend", nodes.Const(1 + text), node.lineno)], lineno=node.lineno)
        node.body = [head, *node.body]
        return node

    def _literal(self, node: Any) -> Any:
        node = self.generic_visit(node)
        stored = isinstance(node, nodes.Tuple) and node.ctx == "store"  # a target of `set` or `for`
        return node if stored else self._call("report_check", node, node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return self._call("report_concat", nodes.List(node.nodes, lineno=node.lineno), node.lineno)

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _body
    visit_List = visit_Tuple = visit_Dict = _literal


class _ChatExtension(jinja2.ext.Extension):
    """Bounds a template's tokens, and knows `{% generation %}`: it marks text for training, here its body as it is."""

    tags = {"generation"}  # noqa: RUF012

    def filter_stream(self, stream: Any) -> Any:
        for count, token in enumerate(stream):
            if count > MAX_TOKENS:
                raise LimitError(f"has more than {MAX_TOKENS} tokens")
            yield token

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox; every operation that can grow a value reports to the `budget` of the context."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **names: Callable[..., Any]):
        """names: further functions for templates to call"""
        extensions = [_ChatExtension, "jinja2.ext.loopcontrols"]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_finalize)
        self.report_spend, self.report_check, self.report_concat = _spend, _check, _concat
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace")} | names
        self.filters = {name: _guarded(name, self.filters[name]) for name in FILTERS}
        self.filters["tojson"] = _guarded("tojson", _tojson)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        limits = budget.get()
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and numbers and left.bit_length() * max(right, 0) > MAX_INT_BITS:
            raise LimitError(f"makes an integer of more than {MAX_INT_BITS} bits")
        if operator == "*" and not numbers:
            value, count = (right, left) if isinstance(left, int) else (left, right)
            limits.allow(limits.measure(value)[0] * max(count, 0) if isinstance(count, int) else 0)
        if operator == "%" and isinstance(left, str):
            limits.check_method("format", left, right if isinstance(right, tuple) else (right,), {})
        return limits.check(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        # Jinja hands out `"...".format` and `format_map` in a wrapper of its own, which `call` can't see through.
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def format(*args: Any, **keywords: Any) -> str:
            budget.get().check_method("format", value.__self__, args, keywords)
            return wrapped(*args, **keywords)

        return format

    def call(self, context: Any, obj: Any, /, *args: Any, **keywords: Any) -> Any:
        if obj is _spend or obj is _check or obj is _concat:
            return obj(*args)
        limits = budget.get()
        limits.spend()
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            name = obj.__name__
            if name not in STR_METHODS:
                raise LimitError(f"calls the string method {name!r}, which is not allowed here")
            args = _joined(owner, args) if name == "join" else args
            limits.check_method(name, owner, args, keywords)
        elif isinstance(owner, int):
            limits.check_method("a method", "", args, keywords)
        result = super().call(context, obj, *args, **keywords)
        return result if isinstance(result, Namespace) else limits.check(result)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that reports to the budget before and after."""
    first = int(hasattr(function, "jinja_pass_arg"))  # Jinja passes its environment or context ahead

    @functools.wraps(function)
    def guard(*args: Any, **keywords: Any) -> Any:
        limits = budget.get()
        limits.spend()
        value, rest = args[first], args[first + 1 :]
        if name == "join":
            (value,) = _joined(keywords.get("d", rest[0] if rest else ""), (value,))
        elif name not in ("d", "default", "tojson"):
            texts = value if isinstance(value, str) else ""
            limits.check_method(name, texts, rest, keywords)
        if name in ("string", "e", "escape", "forceescape"):
            limits.allow(limits.measure(value)[0])
        result = function(*args[:first], value, *rest, **keywords)
        return result if isinstance(result, Iterator) else limits.check(result)

    return guard


def _joined(separator: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The argument of a join, as a list that was measured together with what goes in between."""
    parts = [*args[0]] if args else []
    limits = budget.get()
    limits.allow(limits.measure(parts)[0] + len(parts) * limits.measure(separator)[0])
    return (parts, *args[1:]) if args else args


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML, which would change what the model reads.
    if indent is not None and not (isinstance(indent, int) and indent <= MAX_INDENT):
        raise LimitError(f"indents JSON by more than {MAX_INDENT}")
    limits = budget.get()
    size, depth = limits.measure(value)
    limits.allow(size * (1 + (indent or 0) * depth))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
