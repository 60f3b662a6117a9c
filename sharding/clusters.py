"""Clusters: values that elementwise work ties together share one layout. Anchors (products, convolutions, look-ups)
stand between them and choose how to compute.

walk the equations, loop bodies included -> join the dims that rules align -> clusters, anchors, and what links them
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxinfer import _jax
from jaxinfer.axes.factors import ELEMENTWISE, factors_of, reshape_groups
from jaxinfer.graph import Equation, Graph, Node, flatten
from jaxinfer.sharding.atoms import Atoms

ANCHORS = frozenset({"dot_general", "conv_general_dilated", "gather"})
_BROADCASTS = frozenset({*ELEMENTWISE, "broadcast_in_dim"})
_LOOPS = frozenset({"scan", "while", "cond"})


class Occurrence(NamedTuple):
    """An equation, and how often a run of the program meets it."""

    equation: Equation
    weight: float


class Bond(NamedTuple):
    """A value and another that stand for each other, dim by dim: across a loop's border, or where one is broadcast."""

    source: Node
    result: Node
    dims: tuple[tuple[int, int], ...]
    weight: float


class Whole(NamedTuple):
    """A dim that an equation needs unsharded (or combines over devices) of an operand in its own cluster."""

    equation: Equation
    node: Node  # whose dim it is
    dim: int
    reduced: bool  # combined after the fact: an all-reduce of the result; else a gather of the operand
    weight: float


@dataclass(eq=False)
class Values:
    """Every value of some graphs, its dims as atoms, and its cluster."""

    atoms: Atoms = field(default_factory=Atoms)
    dims: dict[Node, list[list[int]]] = field(default_factory=dict)
    occurrences: list[Occurrence] = field(default_factory=list)
    anchors: list[Occurrence] = field(default_factory=list)
    bonds: list[Bond] = field(default_factory=list)  # between clusters
    wholes: list[Whole] = field(default_factory=list)
    bodies: dict[tuple[Equation, str], list[Graph]] = field(default_factory=dict)
    kinds: dict[Node, int] = field(default_factory=dict)  # STATIC, WEIGHTS or DATA
    riders: dict[Node, list[Bond]] = field(default_factory=dict)  # of parameters with values that are computed
    _parents: dict[Node, Node] = field(default_factory=dict)

    def of(self, node: Node) -> list[list[int]]:
        """The atoms of each dim."""
        if node not in self.dims:
            self.dims[node] = [[self.atoms.new(n)] if n > 1 else [] for n in node.shape]
        return self.dims[node]

    def leaves(self, node: Node) -> list[list[int]]:
        """The atoms of each dim, as they were split in the end."""
        return [self.atoms.leaves(dim) for dim in self.of(node)]

    def root(self, node: Node) -> Node:
        """Stands for the node's cluster."""
        while (up := self._parents.get(node, node)) is not node:
            self._parents[node] = self._parents.get(up, up)
            node = up
        return node

    def tie(self, a: Node, b: Node) -> None:
        """Puts two values in one cluster."""
        first, second = self.root(a), self.root(b)
        if first is not second:
            self._parents[second] = first

    def join(self, a: Node, dim: int, b: Node, other: int) -> bool:
        """Makes two dims one; False where they are of other sizes or parts."""
        return a.shape[dim] == b.shape[other] and self.atoms.join(self.of(a)[dim], self.of(b)[other])

    def bytes(self, node: Node) -> float:
        """Of the whole value."""
        return math.prod(node.shape) * node.dtype.itemsize


STATIC, WEIGHTS, DATA = range(3)


def values_of(graphs: Sequence[Graph], weights: Sequence[int]) -> Values:
    """The clusters of graphs that share their first inputs.

    Args:
        weights: for each graph, how many of its first inputs are parameters; they are the same arrays in every graph.
    """
    values = Values()
    for graph, held in zip(graphs, weights, strict=True):
        for number, node in enumerate(graph.inputs):
            values.kinds[node] = WEIGHTS if number < held else DATA
            if number < held and graph is not graphs[0]:
                first = graphs[0].inputs[number]
                values.tie(first, node)
                for d in range(len(node.shape)):
                    values.join(first, d, node, d)
        _Walk(values).run(graph, 1.0)
    _settle(values)
    return values


class _Walk:
    """Reads equations in order; small operands are bound once all is joined."""

    def __init__(self, values: Values):
        self.values = values
        self.readers: Counter[Node] = Counter()
        self.computed: set[Node] = set()  # behind an anchor or a loop

    def run(self, graph: Graph, weight: float) -> None:
        kinds = self.values.kinds
        self.readers.update(node for equation in graph.equations for node in dict.fromkeys(equation.inputs))
        for equation in graph.equations:
            behind = equation.name in ANCHORS or equation.name in _LOOPS
            if behind or not self.computed.isdisjoint(equation.inputs):
                self.computed.update(equation.outputs)
            kind = max((self.kind(n) for n in equation.inputs), default=STATIC)
            kinds.update(dict.fromkeys(equation.outputs, kind))
            self.values.occurrences.append(Occurrence(equation, weight))
            if kind == STATIC:
                continue
            if equation.name in _LOOPS:
                self._loop(equation, weight)
            elif equation.name in ANCHORS:
                self.values.anchors.append(Occurrence(equation, weight))
            elif equation.name == "reshape":
                self._reshape(equation, weight)
            else:
                self._joint(equation, weight)

    def kind(self, node: Node) -> int:
        return STATIC if node.constant else self.values.kinds.get(node, STATIC)

    def _reshape(self, equation: Equation, weight: float) -> None:
        values, source, out = self.values, equation.inputs[0], equation.outputs[0]
        values.tie(source, out)
        for mine, theirs in reshape_groups(source.shape, out.shape):
            before = [a for d in mine for a in values.of(source)[d]]
            after = [a for d in theirs for a in values.of(out)[d]]
            if not values.atoms.join(before, after):
                values.wholes += [Whole(equation, source, d, False, weight) for d in mine]

    def _joint(self, equation: Equation, weight: float) -> None:
        values, factors = self.values, factors_of(equation)
        places: dict[int, list[tuple[Node, int]]] = {}
        main = max(equation.outputs, key=lambda n: math.prod(n.shape))
        for node, dims in zip(equation.outputs, factors.outputs, strict=True):
            values.tie(main, node)
            for d, f in enumerate(dims):
                if f is not None and f not in factors.cumulative:
                    places.setdefault(f, []).append((node, d))
        for number, (node, dims) in enumerate(zip(equation.inputs, factors.inputs, strict=True)):
            kind = self.kind(node)
            if kind == STATIC or math.prod(node.shape) == 1:
                continue
            pairs = [
                (d, place)
                for d, f in enumerate(dims)
                if f is not None and (number, d) not in factors.halo
                for place in places.get(f, ())
                if node.shape[d] == place[0].shape[place[1]]
            ]
            rides = kind == WEIGHTS and self.kind(main) == DATA
            if rides or self._apart(equation, node, main):
                bond = tuple((d, place[1]) for d, place in pairs if place[0] is main)
                if rides:
                    values.riders.setdefault(node, []).append(Bond(node, main, bond, weight))
                else:
                    values.bonds.append(Bond(node, main, bond, weight))
                continue
            values.tie(main, node)
            joined = {d for d, place in pairs if values.join(node, d, *place)}
            for d in range(len(node.shape)):
                if d not in joined and node.shape[d] > 1:
                    reduced = dims[d] in factors.reduced and factors.reduction is not None
                    values.wholes.append(Whole(equation, node, d, reduced, weight))

    def _apart(self, equation: Equation, node: Node, main: Node) -> bool:
        """Whether an operand has a layout of its own: one that is broadcast, or a table of positions that all layers
        share and that would tie them together."""
        if equation.name not in _BROADCASTS:
            return False
        table = node.equation is not None and node not in self.computed
        shared = table and main in self.computed and self.readers[node] > 1
        return shared or math.prod(node.shape) < math.prod(main.shape)

    def _loop(self, equation: Equation, weight: float) -> None:
        """The equations of bodies, bound to what goes in and comes out."""
        if equation.name == "cond":
            branches = [flatten(b) for b in equation.params["branches"]]
            self.values.bodies[equation, "branches"] = branches
            for branch in branches:
                self._inside(branch, equation.inputs[1:], equation.outputs, weight)
            return
        if equation.name == "while":
            first, second = equation.params["cond_nconsts"], equation.params["body_nconsts"]
            body, condition = flatten(equation.params["body_jaxpr"]), flatten(equation.params["cond_jaxpr"])
            self.values.bodies[equation, "body_jaxpr"] = [body]
            self.values.bodies[equation, "cond_jaxpr"] = [condition]
            carried = equation.inputs[first + second :]
            self._carry(carried, body.inputs[second:], body.outputs)
            self._inside(body, (*equation.inputs[first : first + second], *carried), equation.outputs, weight)
            self._inside(condition, (*equation.inputs[:first], *carried), (), weight)
            return
        consts, carried = _jax.scan_counts(equation.params)
        body = flatten(equation.params["jaxpr"])
        self.values.bodies[equation, "jaxpr"] = [body]
        before = consts + carried
        self._carry(equation.inputs[consts:before], body.inputs[consts:before], body.outputs[:carried])
        stacked = [n for n in equation.inputs[before:] if n.shape[0] > 1 and self.kind(n) != STATIC]
        self.values.wholes += [Whole(equation, n, 0, False, weight) for n in dict.fromkeys(stacked)]  # rows are indexed
        self._inside(body, equation.inputs, equation.outputs, weight * equation.params["length"], before, carried)

    def _inside(
        self,
        body: Graph,
        operands: Sequence[Node],
        results: Sequence[Node],
        weight: float,
        stacked_in: int | None = None,
        stacked_out: int | None = None,
    ) -> None:
        for number, (outer, inner) in enumerate(zip(operands, body.inputs, strict=True)):
            self.values.kinds[inner] = max(self.values.kinds.get(inner, STATIC), self.kind(outer))
            if outer in self.computed:
                self.computed.add(inner)
            self._pair(outer, inner, int(stacked_in is not None and number >= stacked_in))
        for number, (outer, inner) in enumerate(zip(results, body.outputs, strict=False)):
            self._pair(outer, inner, int(stacked_out is not None and number >= stacked_out))
        self.run(body, weight)

    def _carry(self, operands: Sequence[Node], inner: Sequence[Node], results: Sequence[Node]) -> None:
        for outer, start, end in zip(operands, inner, results, strict=True):
            self.values.kinds[start] = DATA  # whatever it starts as
            self.computed.add(start)
            self._pair(outer, end, 0)

    def _pair(self, outer: Node, inner: Node, skip: int) -> None:
        if outer.constant or inner.constant or not inner.shape:
            return
        self.values.tie(outer, inner)
        for d in range(len(inner.shape)):
            self.values.join(outer, d + skip, inner, d)


def _settle(values: Values) -> None:
    """Splits atoms wherever something that is bound, or meets in an anchor, is split; keeps bonds between clusters."""
    values.bonds = [b for b in values.bonds if values.root(b.source) is not values.root(b.result)]
    bonds = [*values.bonds, *(b for riders in values.riders.values() for b in riders)]
    pairs = [(b.source, d, b.result, e) for b in bonds for d, e in b.dims]
    pairs += [pair for anchor in values.anchors for pair in _meetings(anchor.equation)]
    before = -1
    while before != len(values.atoms.sizes):
        before = len(values.atoms.sizes)
        for a, d, b, e in pairs:
            values.atoms.align(values.of(a)[d], values.of(b)[e])


def _meetings(equation: Equation) -> Iterator[tuple[Node, int, Node, int]]:
    places: dict[int, tuple[Node, int]] = {}
    factors = factors_of(equation)
    sides = [*zip(equation.inputs, factors.inputs, strict=True), *zip(equation.outputs, factors.outputs, strict=True)]
    for node, dims in sides:
        for d, f in enumerate(dims):
            if f is None or node.constant:
                continue
            if f in places and places[f][0].shape[places[f][1]] == node.shape[d]:
                yield (*places[f], node, d)
            places.setdefault(f, (node, d))


def params_of(equation: Equation) -> dict[str, Any]:
    """For signatures: what of an equation's parameters can be compared."""
    return {k: str(v) for k, v in equation.params.items() if k not in ("jaxpr", "branches", "body_jaxpr", "cond_jaxpr")}
