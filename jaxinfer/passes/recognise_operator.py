"""Operator: what a user gave to associative_scan, as a graph that runs at any number of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from jaxinfer.axes.factors import factors_of
from jaxinfer.graph import Equation, Graph, Node, evaluate
from jaxinfer.passes.recognise_cut import Cut, params_at

Array = jax.Array


@dataclass(frozen=True, eq=False)
class Operator:
    """An associative operator, elementwise along the rows that it combines.

    graph: inputs are the left operands, the right operands, the extras; outputs are the results.
    dims: the dim of each value that holds rows; the others have none.
    axes: that dim of each operand.
    """

    graph: Graph
    dims: Mapping[Node, int]
    axes: tuple[int, ...]

    def __call__(self, left: Sequence[Array], right: Sequence[Array], extras: Sequence[Array] = ()) -> list[Array]:
        """Combines rows of `left` with those of `right`, all arrays with one number of rows along `axes`."""
        rows = left[0].shape[self.axes[0]]
        for array, axis in zip([*left, *right], self.axes * 2, strict=True):
            if array.shape[axis] != rows:
                raise ValueError(f"operands need one number of rows, got {array.shape[axis]} and {rows}")
        return evaluate(self.at(rows), [*left, *right, *extras])

    def at(self, rows: int) -> Graph:
        """The graph for another number of rows; its nodes keep the shapes of the trace."""
        return Graph(self.graph.inputs, self.graph.outputs, [self._resized(e, rows) for e in self.graph.equations])

    def _resized(self, equation: Equation, rows: int) -> Equation:
        out = equation.outputs[0]
        if out not in self.dims:
            return equation
        params = params_at(equation, self.dims[out], rows)
        return Equation(equation.primitive, params, equation.inputs, equation.outputs, equation.source)

    @cached_property
    def classes(self) -> tuple[tuple[int | None, ...], ...]:
        """For each input of the graph, for each dim: the factor that it shares with other dims however often the
        operator is applied; 0 for the rows, None where the operator mixes."""
        aligned = _Alignment(self.graph)
        count = len(self.axes)
        for j, out in enumerate(self.graph.outputs):  # results become operands of the next application
            for side in (j, count + j):
                for d in range(len(out.shape)):
                    aligned.join((out, d), (self.graph.inputs[side], d))
        names: dict[Any, int | None] = {aligned.root((self.graph.inputs[0], self.axes[0])): 0}
        mixed, found = aligned.mixed(), []
        for node in self.graph.inputs:
            roots = [aligned.root((node, d)) for d in range(len(node.shape))]
            for root in roots:
                names.setdefault(root, None if root in mixed else len(names))
            found.append(tuple(names[root] for root in roots))
        return tuple(found)


class _Alignment:
    """Union-find of (value, dim): dims that go together index by index."""

    def __init__(self, graph: Graph) -> None:
        self.parent: dict[tuple[Node, int], tuple[Node, int]] = {}
        self._mixing: set[tuple[Node, int]] = set()
        for equation in graph.equations:
            self._add(equation)

    def root(self, dim: tuple[Node, int]) -> tuple[Node, int]:
        while (up := self.parent.get(dim, dim)) != dim:
            dim = up
        return dim

    def join(self, a: tuple[Node, int], b: tuple[Node, int]) -> None:
        self.parent[self.root(a)] = self.root(b)

    def mixed(self) -> set[tuple[Node, int]]:
        """Roots of dims that some equation mixes, or that meet another dim of the same value."""
        roots = {self.root(d) for d in self._mixing}
        seen: set[tuple[Node, Any]] = set()
        for node, d in list(self.parent):
            key = (node, self.root((node, d)))
            if key in seen:
                roots.add(key[1])
            seen.add(key)
        return roots

    def _add(self, equation: Equation) -> None:
        factors = factors_of(equation)
        first: dict[int, tuple[Node, int]] = {}
        sides = [
            *zip(equation.inputs, factors.inputs, strict=True),
            *zip(equation.outputs, factors.outputs, strict=True),
        ]
        for i, (node, dims) in enumerate(sides):
            for d, factor in enumerate(dims):
                here = (node, d)
                self.parent.setdefault(here, here)
                halo = i < len(equation.inputs) and factors.halo.get((i, d), (0, 0)) != (0, 0)
                mixes = factor is None or factor in factors.reduced or factor in factors.cumulative
                if mixes or halo or (i >= len(equation.inputs) and d in factors.indexed):
                    self._mixing.add(here)
                if factor is not None:
                    self.join(here, first.setdefault(factor, here))


def operator_of(
    left: Sequence[Node], right: Sequence[Node], extras: Sequence[Node], results: Sequence[Node], cut: Cut
) -> Operator:
    """A graph of its own made from what was cut out; its nodes are new."""
    new: dict[Node, Node] = {}

    def copied(node: Node) -> Node:
        return node if node.constant else new.setdefault(node, Node(node.shape, node.dtype, node.weak))

    equations = []
    for equation in sorted(cut.equations, key=lambda e: e.number):
        inputs, outputs = (tuple(map(copied, side)) for side in (equation.inputs, equation.outputs))
        made = Equation(equation.primitive, equation.params, inputs, outputs, equation.source, len(equations))
        for node in outputs:
            node.equation = made
        equations.append(made)
    graph = Graph(tuple(map(copied, [*left, *right, *extras])), tuple(map(copied, results)), equations)
    dims = {new[n]: d for n, d in cut.dims.items() if n in new}
    return Operator(graph, dims, tuple(cut.dims[n] for n in results))
