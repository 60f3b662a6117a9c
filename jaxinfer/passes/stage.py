"""Staging: a Graph is split into what weights alone decide (the prelude, run once at load) and the rest (main).

What is staged, by a rule that keeps memory from growing. A static value (one that no input reaches) which the call
reads is made at load if it is

- made of weights and at most 64 KiB, or
- no larger, together with the others made of the same weights, than those weights that the call then no longer reads,
  which are dropped: W' for W, bfloat16 for float32, the transpose for what was transposed; or
- made of no weights, at most `table_bytes` large, and took functions such as cos or exp: a table of positions.

Otherwise the call makes it as the forward does, from operands that are judged by the same rule. Views (broadcasts,
reshapes, iota) and casts to a wider dtype are always made in the call: they cost nothing there. So no T x T mask, no
broadcast and no second form of an embedding that is also read as it is are ever kept.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, field

from jaxinfer.graph import Equation, Graph, Node, uncollected
from jaxinfer.passes.keys import constant_key, digest, equation_key
from jaxinfer.passes.report import MOVES, VIEWS, Note
from jaxinfer.passes.rewriting import Rewriter, nbytes, part, static_nodes

SMALL = 64 << 10
TABLE_BYTES = 1 << 20


@dataclass(eq=False)
class Staged:
    """A graph split in two. With `values = evaluate(prelude, params)`,

        evaluate(main, [*(params[i] for i in kept), *values, *inputs])

    equals evaluating the graph that was split on [*params, *inputs].
    """

    prelude: Graph  # params -> staged values
    main: Graph  # (kept params, staged values, inputs) -> outputs
    kept: tuple[int, ...]  # which params main still reads; the others can be dropped from memory
    keys: tuple[Hashable, ...]  # names each staged value by how it is made: equal keys of two graphs mean equal values
    notes: list[Note] = field(default_factory=list)


def stage(
    graph: Graph,
    params: int,
    *,
    table_bytes: int = TABLE_BYTES,
    varies: Callable[[Node], bool] | None = None,
    only: Collection[Hashable] | None = None,
) -> Staged:
    """Splits a graph by what its weights alone decide; see the module for the rule.

    Args:
        graph: its first `params` inputs are the weights. Not changed.
        table_bytes: the largest table made of no weights that is kept.
        varies: values that differ between the graphs that will share a prelude; neither they nor what is made of
            them is staged.
        only: stage exactly those static values whose keys are in here (of another graph's `Staged.keys`), whatever
            their size.
    """
    with uncollected():
        splitter = _Splitter(graph, params, table_bytes, varies, only)
        splitter.settle_all()
        return splitter.split()


class _Splitter:
    def __init__(
        self,
        graph: Graph,
        params: int,
        table_bytes: int,
        varies: Callable[[Node], bool] | None,
        only: Collection[Hashable] | None,
    ):
        self.graph, self.params, self.table_bytes, self.only = graph, params, table_bytes, only
        self.static = static_nodes(graph, params)
        self.staged: dict[Node, None] = {}  # in order of discovery
        self.kept: set[Node] = set()  # weights that main reads
        self.refused: set[Node] = set()
        self.leaves: dict[Node, int] = {}  # node -> bits of the weights it is made of
        self.level: dict[Node, int] = {}  # 0: moves only, 1: arithmetic, 2: functions, sums, products
        self.varying: set[Node] = set()
        self.keys: dict[Node, bytes] = {}
        self._weights: list[Node] = []
        self._analyse(varies)

    def _analyse(self, varies: Callable[[Node], bool] | None) -> None:
        for number, node in enumerate(self.graph.inputs[: self.params]):
            self.keys[node] = digest(b"param", str(number).encode())
            self._leaf(node)
            self.level[node] = 0
        for equation in self.graph.equations:
            if not all(n in self.static for n in equation.outputs):
                continue
            for node in equation.inputs:
                if node.constant and node not in self.keys:
                    self.keys[node] = constant_key(node)
                    self._leaf(node)
                    self.level[node] = 0
            leaves, level = 0, _level(equation)
            for node in equation.inputs:
                leaves |= self.leaves[node]
                level = max(level, self.level[node])
            key = equation_key(equation, [self.keys[n] for n in equation.inputs])
            varying = any(n in self.varying for n in equation.inputs)
            for number, node in enumerate(equation.outputs):
                self.leaves[node], self.level[node], self.keys[node] = leaves, level, key + number.to_bytes(2, "big")
                if varying or (varies is not None and varies(node)):
                    self.varying.add(node)

    def _leaf(self, node: Node) -> None:
        self.leaves[node] = 0
        if node.shape or not node.constant:  # a weight or a captured array, not a literal
            self.leaves[node] = 1 << len(self._weights)
            self._weights.append(node)

    def settle_all(self) -> None:
        """Decides every static value that the call reads, again until no group of staged values grows memory."""
        for equation in self.graph.equations:
            if not all(n in self.static for n in equation.outputs):
                for node in equation.inputs:
                    self._settle(node)
        for node in self.graph.outputs:
            self._settle(node)
        while self.only is None and (growing := self._growing()):
            for node in growing:
                self.refused.add(node)
                del self.staged[node]
                assert node.equation is not None
                for operand in node.equation.inputs:
                    self._settle(operand)

    def _settle(self, node: Node) -> None:
        waiting = [node]
        while waiting:
            node = waiting.pop()
            if node.constant or node not in self.static or node in self.staged or node in self.kept:
                continue
            if node.equation is None:
                self.kept.add(node)
            elif self._wanted(node):
                self.staged[node] = None
            else:
                self.refused.add(node)
                waiting += [n for n in node.equation.inputs if n not in self.refused]

    def _wanted(self, node: Node) -> bool:
        equation = node.equation
        assert equation is not None
        widened = equation.name == "convert_element_type" and nbytes([node]) > nbytes(equation.inputs)
        if node in self.refused or node in self.varying or equation.name in VIEWS or widened:
            return False
        if self.only is not None:
            return self.keys[node] in self.only
        size = nbytes([node])
        if not self.leaves[node]:
            return size <= self.table_bytes and self.level[node] == 2
        return True  # if it is large, judged with the others that are made of the same weights

    def _growing(self) -> list[Node]:
        """From each group of values whose staging would grow memory, the one that is least worth keeping."""
        still_read = 0
        for node in self.kept:
            still_read |= self.leaves[node]
        found = []
        for members in self._groups():
            bits = 0
            for node in members:
                bits |= self.leaves[node]
            dropped = [self._weights[i] for i in _set_bits(bits & ~still_read)]
            if nbytes(members) > nbytes(dropped):
                found.append(min(members, key=lambda n: (self.level[n], -nbytes([n]))))
        return found

    def _groups(self) -> Iterable[list[Node]]:
        """Large staged values, together where they are made of the same large weights."""
        parent = list(range(len(self._weights)))

        def root(i: int) -> int:
            while parent[i] != i:
                parent[i] = i = parent[parent[i]]
            return i

        members = [n for n in self.staged if self.leaves[n] and nbytes([n]) > SMALL]
        for node in members:
            first, *others = _set_bits(self.leaves[node])
            for other in others:
                parent[root(other)] = root(first)
        groups: dict[int, list[Node]] = {}
        for node in members:
            groups.setdefault(root(next(_set_bits(self.leaves[node]))), []).append(node)
        return groups.values()

    def split(self) -> Staged:
        """The two graphs."""
        values = tuple(self.staged)
        prelude = part(self.graph, self.graph.inputs[: self.params], values)
        rewriter = Rewriter(self.graph)
        fresh = [Node(n.shape, n.dtype, n.weak) for n in values]
        for old, new in zip(values, fresh, strict=True):
            rewriter.replace(old, lambda _, new=new: new)
        rest = rewriter.copied()
        weights, inputs = self.graph.inputs[: self.params], self.graph.inputs[self.params :]
        read = {n for e in rest.equations for n in e.inputs} | set(rest.outputs)
        kept = tuple(i for i, node in enumerate(weights) if node in read)
        main = Graph((*(weights[i] for i in kept), *fresh, *inputs), rest.outputs, rest.equations)
        return Staged(prelude, main, kept, tuple(self.keys[n] for n in values), self._notes(prelude, kept))

    def _notes(self, prelude: Graph, kept: tuple[int, ...]) -> list[Note]:
        weights = self.graph.inputs[: self.params]
        dropped = [n for i, n in enumerate(weights) if i not in set(kept)]
        notes = []
        if dropped or prelude.outputs:
            made = f"{len(prelude.outputs)} values ({nbytes(prelude.outputs):,} bytes) made at load"
            notes.append(Note(f"{made}, {len(dropped)} weights ({nbytes(dropped):,} bytes) dropped"))
        for node in prelude.outputs:
            assert node.equation is not None
            notes.append(
                Note(f"{node.dtype}{list(node.shape)} made at load, by {node.equation.name}", node.equation.source)
            )
        for node in self.refused:
            made_by, size = node.equation, nbytes([node])
            if made_by and self.level[node] and made_by.name not in VIEWS and node not in self.varying and size > SMALL:
                what = f"{made_by.name}{list(node.shape)} stays in the call: kept, it would take {size:,} bytes more"
                notes.append(Note(what, made_by.source))
        return notes


def _set_bits(bits: int) -> Iterator[int]:
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low


_ARITHMETIC = frozenset(
    {"add", "and", "clamp", "convert_element_type", "div", "eq", "ge", "gt", "le", "lt", "max", "min", "mul", "ne",
     "neg", "not", "or", "rem", "select_n", "sign", "sub", "abs", "floor", "ceil", "round", "square", "integer_pow"}
)  # fmt: skip


def _level(equation: Equation) -> int:
    if equation.name in VIEWS or equation.name in MOVES:
        return 0
    return 1 if equation.name in _ARITHMETIC else 2
