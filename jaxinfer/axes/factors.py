"""Factor rules: for each primitive, which dims of its operands and results are the same axis.

A factor is an index that the equation iterates. A dim of an operand and a dim of a result with the same factor are
aligned: index i of one goes with index i (+ shift) of the other. A factor that no result has is reduced. A dim without
a factor (None) is blocked: the equation needs it whole. What no rule understands is blocked, which is always safe.
"""

import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxinfer.graph import Equation, Node

Dims = tuple[int | None, ...]


@dataclass(frozen=True)
class Factors:
    """The factor of each dim, for every operand and every result of one equation."""

    inputs: tuple[Dims, ...]
    outputs: tuple[Dims, ...]
    reduction: str | None = None  # how reduced factors combine: "dot", "sum", "max", "min", "and", "or", "prod"
    movement: bool = False  # only moves, broadcasts or applies an elementwise function: cheap enough to do again
    indexed: dict[int, int] = field(default_factory=dict)  # result dim of an iota -> 0, where values count along it

    @property
    def reduced(self) -> frozenset[int]:
        """Factors that operands have and no result has."""
        kept = {f for dims in self.outputs for f in dims}
        return frozenset(f for dims in self.inputs for f in dims if f is not None and f not in kept)


Rule = Callable[[Equation], Factors | None]
_RULES: dict[str, Rule] = {}


def factors_of(equation: Equation) -> Factors:
    """The factors of an equation; all blocked where its primitive or one of its parameters isn't understood."""
    rule = _RULES.get(equation.name)
    found = rule(equation) if rule is not None else None
    return found or blocked(equation)


def known_primitives() -> frozenset[str]:
    """Names of the primitives that have a rule."""
    return frozenset(_RULES)


def blocked(equation: Equation) -> Factors:
    """Every dim needed whole."""
    inputs, outputs = (tuple((None,) * len(n.shape) for n in side) for side in (equation.inputs, equation.outputs))
    return Factors(inputs, outputs)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of these primitives."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in _RULES:
                raise ValueError(f"{name} has a rule already")
            _RULES[name] = function
        return function

    return register


def align(reference: Node, node: Node) -> Dims:
    """Factors of an operand that is elementwise with the result: size 1 against more is a broadcast, so no factor."""
    if not node.shape:
        return ()
    pairs = enumerate(zip(node.shape, reference.shape, strict=True))
    return tuple(d if mine == theirs else None for d, (mine, theirs) in pairs)


# fmt: off
ELEMENTWISE = (
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e",
    "bessel_i1e", "cbrt", "ceil", "clamp", "clz", "complex", "conj", "convert_element_type", "copy", "copy_p",
    "cos", "cosh", "digamma", "div", "eq", "eq_to", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor",
    "ge", "gt", "igamma", "igammac", "imag", "integer_pow", "is_finite", "le", "le_to", "lgamma", "log", "log1p",
    "logistic", "lt", "lt_to", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "population_count",
    "pow", "real", "reduce_precision", "regularized_incomplete_beta", "rem", "round", "rsqrt", "select_n",
    "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "xor", "optimization_barrier", "name",
)
# fmt: on


@rule(*ELEMENTWISE)
def _elementwise(equation: Equation) -> Factors:
    if equation.name == "optimization_barrier":  # results pair with operands one to one
        base, inputs = 0, []
        for node in equation.inputs:
            inputs.append(tuple(range(base, base + len(node.shape))))
            base += len(node.shape)
        return Factors(tuple(inputs), tuple(inputs), movement=True)
    out = equation.outputs[0]
    inputs = tuple(align(out, node) for node in equation.inputs)
    return Factors(inputs, (tuple(range(len(out.shape))),), movement=True)


@rule("broadcast_in_dim")
def _broadcast_in_dim(equation: Equation) -> Factors:
    operand, out = equation.inputs[0], equation.outputs[0]
    if len(equation.inputs) > 1:
        return blocked(equation)
    to = equation.params["broadcast_dimensions"]
    inputs = tuple(d if n == out.shape[d] else None for n, d in zip(operand.shape, to, strict=True))
    return Factors((inputs,), (tuple(range(len(out.shape))),), movement=True)


@rule("transpose")
def _transpose(equation: Equation) -> Factors:
    order = equation.params["permutation"]
    return Factors((tuple(range(len(order))),), (tuple(order),), movement=True)


@rule("squeeze")
def _squeeze(equation: Equation) -> Factors:
    dims = range(len(equation.inputs[0].shape))
    gone = equation.params["dimensions"]
    inputs = tuple(None if d in gone else d for d in dims)
    return Factors((inputs,), (tuple(d for d in dims if d not in gone),), movement=True)


@rule("expand_dims")
def _expand_dims(equation: Equation) -> Factors:
    out, new = equation.outputs[0], equation.params["dimensions"]
    kept = tuple(d for d in range(len(out.shape)) if d not in new)
    return Factors((kept,), (tuple(range(len(out.shape))),), movement=True)


@rule("reshape")
def _reshape(equation: Equation) -> Factors | None:
    if equation.params.get("dimensions") is not None:
        return None
    before, after = equation.inputs[0].shape, equation.outputs[0].shape
    inputs: list[int | None] = [None] * len(before)
    outputs: list[int | None] = [None] * len(after)
    for number, (mine, theirs) in enumerate(reshape_groups(before, after)):
        if len(mine) == len(theirs) == 1:  # dims that stay as they are; merged and split ones are blocked
            inputs[mine[0]] = outputs[theirs[0]] = number
    return Factors((tuple(inputs),), (tuple(outputs),), movement=True)


def reshape_groups(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of dims with equal products, in order; dims of size 1 belong to none."""
    mine = [d for d, n in enumerate(before) if n != 1]
    theirs = [d for d, n in enumerate(after) if n != 1]
    if 0 in before:
        return []
    groups: list[tuple[list[int], list[int]]] = []
    while mine and theirs:
        left, right = [mine.pop(0)], [theirs.pop(0)]
        a, b = before[left[0]], after[right[0]]
        while a != b:
            if a < b:
                left.append(mine.pop(0))
                a *= before[left[-1]]
            else:
                right.append(theirs.pop(0))
                b *= after[right[-1]]
        groups.append((left, right))
    return groups


_REDUCTIONS = {
    "reduce_sum": "sum",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_and": "and",
    "reduce_or": "or",
    "reduce_prod": "prod",
    "argmax": "max",
    "argmin": "min",
}


@rule(*_REDUCTIONS)
def _reduce(equation: Equation) -> Factors:
    axes = equation.params["axes"]
    dims = tuple(range(len(equation.inputs[0].shape)))
    kept = tuple(d for d in dims if d not in axes)
    return Factors((dims,), (kept,), reduction=_REDUCTIONS[equation.name])


@rule("dot_general")
def _dot_general(equation: Equation) -> Factors:
    (left_sum, right_sum), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = (list(n.shape) for n in equation.inputs)
    names = iter(range(len(left) + len(right)))
    lhs: list[Any] = [None] * len(left)
    rhs: list[Any] = [None] * len(right)
    for a, b in [*zip(left_batch, right_batch, strict=True), *zip(left_sum, right_sum, strict=True)]:
        lhs[a] = rhs[b] = next(names)
    out = [lhs[d] for d in left_batch]
    for dims, dims_sum, dims_batch in ((lhs, left_sum, left_batch), (rhs, right_sum, right_batch)):
        for d in range(len(dims)):
            if d not in dims_sum and d not in dims_batch:
                dims[d] = next(names)
                out.append(dims[d])
    return Factors((tuple(lhs), tuple(rhs)), (tuple(out),), reduction="dot")


@rule("iota")
def _iota(equation: Equation) -> Factors:
    out = equation.outputs[0]
    return Factors((), (tuple(range(len(out.shape))),), movement=True, indexed={equation.params["dimension"]: 0})


def _all_but(equation: Equation, *axes: int, movement: bool = False) -> Factors:
    """Aligned dims on every operand and result, except `axes`, which are needed whole."""
    dims = tuple(None if d in axes else d for d in range(len(equation.outputs[0].shape)))
    return Factors((dims,) * len(equation.inputs), (dims,) * len(equation.outputs), movement=movement)


@rule("concatenate")
def _concatenate(equation: Equation) -> Factors:
    return _all_but(equation, equation.params["dimension"], movement=True)


@rule("stack")
def _stack(equation: Equation) -> Factors:
    out, axis = equation.outputs[0], equation.params["axis"]
    dims = tuple(range(len(out.shape)))
    kept = tuple(d for d in dims if d != axis)
    return Factors((kept,) * len(equation.inputs), (dims,), movement=True)


@rule("unstack")
def _unstack(equation: Equation) -> Factors:
    axis = equation.params["axis"]
    dims = tuple(None if d == axis else d for d in range(len(equation.inputs[0].shape)))
    kept = tuple(d for d in dims if d is not None)
    return Factors((dims,), (kept,) * len(equation.outputs), movement=True)


@rule("split")
def _split(equation: Equation) -> Factors:
    return _all_but(equation, equation.params["axis"], movement=True)


@rule("rev")
def _rev(equation: Equation) -> Factors:
    return _all_but(equation, *equation.params["dimensions"], movement=True)


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(equation: Equation) -> Factors:
    return _all_but(equation, equation.params["axis"])


@rule("sort")
def _sort(equation: Equation) -> Factors:
    return _all_but(equation, equation.params["dimension"])


@rule("top_k")
def _top_k(equation: Equation) -> Factors | None:
    rank = len(equation.inputs[0].shape)
    if equation.params.get("axis", rank - 1) not in (-1, rank - 1):
        return None
    return _all_but(equation, rank - 1)


@rule("slice")
def _slice(equation: Equation) -> Factors:
    source, out = equation.inputs[0], equation.outputs[0]
    strides = equation.params["strides"] or (1,) * len(source.shape)
    # A slice that starts at 0 keeps indices: row i of the result is row i of the operand.
    kept = tuple(
        d if start == 0 and (step == 1 or out.shape[d] == source.shape[d]) else None
        for d, (start, step) in enumerate(zip(equation.params["start_indices"], strides, strict=True))
    )
    return Factors((kept,), (kept,), movement=True)


@rule("pad")
def _pad(equation: Equation) -> Factors:
    kept = tuple(None if any(c) else d for d, c in enumerate(equation.params["padding_config"]))
    return Factors((kept, ()), (kept,), movement=True)


@rule("dynamic_slice")
def _dynamic_slice(equation: Equation) -> Factors:
    source, out = equation.inputs[0], equation.outputs[0]
    kept = tuple(d if a == b else None for d, (a, b) in enumerate(zip(source.shape, out.shape, strict=True)))
    return Factors((kept, *((),) * (len(equation.inputs) - 1)), (kept,), movement=True)


@rule("gather")
def _gather(equation: Equation) -> Factors | None:
    source, indices = equation.inputs
    out = equation.outputs[0]
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    results: list[int | None] = [None] * len(out.shape)
    operand: list[int | None] = [None] * len(source.shape)
    index: list[int | None] = [None] * len(indices.shape)
    batch_dims = [d for d in range(len(out.shape)) if d not in numbers.offset_dims]
    for factor, d in enumerate(batch_dims):
        results[d] = index[factor] = factor
    base = len(batch_dims)
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    for number, d in enumerate(k for k in range(len(source.shape)) if k not in dropped):
        if sizes[d] == source.shape[d] and d not in numbers.start_index_map:
            operand[d] = results[numbers.offset_dims[number]] = base + number
    for mine, theirs in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        operand[mine] = index[theirs]
    return Factors((tuple(operand), tuple(index)), (tuple(results),), movement=True)


def describe(factors: Factors) -> str:
    """Einsum-like, for messages and tests: "ab,bc->ac"; a blocked dim is "_"."""

    def side(dims: Dims) -> str:
        return "".join("_" if f is None else string.ascii_letters[f % 52] for f in dims)

    return f"{','.join(map(side, factors.inputs))}->{','.join(map(side, factors.outputs))}"
