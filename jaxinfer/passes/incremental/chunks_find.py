"""Finds where a forward cuts time into chunks: [.., T, ..] reshaped to [.., N, Q, ..], and back again later.

What lies between the reshapes that cut and those that join is a region. It works on whole chunks of Q rows, so none of
it can be made row by row; it becomes one equation (see chunks), outside which everything stays row by row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jax

from jaxinfer.axes import factors_of
from jaxinfer.axes.factors import reshape_groups
from jaxinfer.errors import NotCausalError
from jaxinfer.graph import Equation, Node

if TYPE_CHECKING:
    from jaxinfer.passes.incremental.causality import Timing

Labels = tuple[str, ...]  # for each dim of a value in a region: "N", "Q", "-" for neither, "?" where that isn't known


@dataclass(eq=False)
class Region:
    """What is between cutting and joining. Blocks are values [.., N, Q, ..]: `dim` is N's place, Q's comes next."""

    count: int  # N
    size: int  # Q
    source: str  # where the first cut stands
    equations: list[Equation] = field(default_factory=list)
    cuts: list[tuple[Node, Node, int]] = field(default_factory=list)  # (rows, block, dim)
    joins: list[tuple[Node, Node, int]] = field(default_factory=list)  # (block, rows, dim)
    labels: dict[Node, Labels] = field(default_factory=dict)  # of the values inside
    into: "Region | None" = None  # the region that this one turned out to be part of


class Regions:
    """The regions of a graph, taken equation by equation."""

    def __init__(self, timing: "Timing", short: bool = False):
        """
        Args:
            short: whether rows reshaped to [.., 1, Q, ..] are cut as well, into the only chunk that they fill.
        """
        self._timing, self._short = timing, short
        self.one_chunk = False  # whether there was such a reshape
        self._of: dict[Node, Region] = {}  # the values inside
        self._labels: dict[Node, Labels] = {}
        self._taken: list[tuple[Equation, Region]] = []
        self.found: list[Region] = []  # also those that became part of others

    def takes(self, equation: Equation) -> bool:
        """Whether an equation cuts time, works on chunks, or joins them."""
        inside = [n for n in equation.inputs if n in self._of]
        if inside:
            region = self._joined(equation, inside)
            if not self._join(equation, region):
                self._add(equation, region, _labels(equation, self._labels))
            return True
        return equation.name == "reshape" and self._cut(equation)

    def finished(self, outputs: Sequence[Node]) -> list[Region]:
        """All regions with their equations, of which some are joined again.

        Raises:
            NotCausalError: an output is still in chunks.
        """
        for number, node in enumerate(outputs):
            if node in self._of:
                raise NotCausalError(
                    f"output {number} of shape {list(node.shape)} is made of chunks of {self._root(node).size} rows "
                    f"(cut at {self._root(node).source}), and no reshape joins them to rows again; an output must "
                    "have a row for each row of the input"
                )
        for equation, region in self._taken:
            _last(region).equations.append(equation)
        return [r for r in self.found if r.into is None and r.joins]

    def _root(self, node: Node) -> Region:
        return _last(self._of[node])

    def _joined(self, equation: Equation, inside: Sequence[Node]) -> Region:
        """The region that an equation lies in: those of all its operands become one."""
        region = self._root(inside[0])
        for node in equation.inputs:
            if node in self._timing.dims:
                raise NotCausalError(
                    f"{equation} combines rows cut into chunks of {region.size} (at {region.source}) with rows that "
                    "aren't; cut both, or join the chunks first"
                )
        for node in inside[1:]:
            other = self._root(node)
            if other is region:
                continue
            if (other.count, other.size) != (region.count, region.size):
                raise NotCausalError(
                    f"{equation} combines chunks of {region.size} rows (cut at {region.source}) with chunks of "
                    f"{other.size} (cut at {other.source}); only chunks of one size can be derived"
                )
            other.into = region
            region.cuts += other.cuts
            region.joins += other.joins
        return region

    def _add(self, equation: Equation, region: Region, labels: Sequence[Labels]) -> None:
        self._taken.append((equation, region))
        for node, of in zip(equation.outputs, labels, strict=True):
            self._of[node], self._labels[node] = region, of

    def _cut(self, equation: Equation) -> bool:
        """Takes a reshape that splits a dim of time in two or more, of which the first counts chunks."""
        (rows, *_), (out,) = equation.inputs, equation.outputs
        times = self._timing.of(rows)
        if len(times) != 1 or equation.params.get("dimensions") is not None:
            return False
        (dim,) = times
        theirs = self._parts(rows, dim, out)
        if len(theirs) < 2:
            return False
        if self._timing.ahead[rows] > 0:
            raise NotCausalError(f"{equation} cuts rows into chunks that look {self._timing.ahead[rows]} rows ahead")
        count = out.shape[theirs[0]]
        region = Region(count, rows.shape[dim] // count, equation.source, labels=self._labels)
        self.found.append(region)
        shape = (*rows.shape[:dim], count, region.size, *rows.shape[dim + 1 :])
        block = out if shape == out.shape else Node(shape, rows.dtype, rows.weak)
        region.cuts.append((rows, block, dim))
        labels = tuple("N" if d == theirs[0] else "Q" if d in theirs else "-" for d in range(len(out.shape)))
        self._of[out], self._labels[out] = region, labels
        if block is not out:
            self._taken.append((reshaped(block, out, equation.source), region))
        return True

    def _parts(self, rows: Node, dim: int, out: Node) -> list[int]:
        """The dims that a reshape makes of a dim of time."""
        groups = reshape_groups(rows.shape, out.shape)
        parts = next((to for mine, to in groups if mine == [dim]), [])
        if len(parts) == 1 and rows.shape[dim] >= self._timing.capacity:
            (last,) = parts
            if _ones(out, last) > _ones(rows, dim) and out.shape[last - 1] == 1:
                self.one_chunk = True
                return [last - 1, last] if self._short else parts
        return parts

    def _join(self, equation: Equation, region: Region) -> bool:
        """Takes a reshape that makes rows of chunks again. By sizes where dims aren't known: the proof tells."""
        if equation.name != "reshape" or equation.params.get("dimensions") is not None:
            return False
        (block, *_), (rows,) = equation.inputs, equation.outputs
        labels = self._labels[block]
        for mine, theirs in reshape_groups(block.shape, rows.shape):
            fewer = _ones(block, mine[0]) > _ones(rows, theirs[0]) and block.shape[mine[0] - 1] == 1
            if region.count == 1 and fewer:
                mine = [mine[0] - 1, *mine]
            first, rest = mine[0], mine[1:]
            sizes = (block.shape[first], math.prod(block.shape[d] for d in rest))
            named = labels[first] in "N?" and all(labels[d] in "Q?" for d in rest)
            if len(theirs) == 1 and rest and sizes == (region.count, region.size) and named:
                (dim,) = theirs
                shape = (*rows.shape[:dim], *sizes, *rows.shape[dim + 1 :])
                end = block if shape == block.shape else Node(shape, rows.dtype, rows.weak)
                if end is not block:
                    self._taken.append((reshaped(block, end, equation.source), region))
                region.joins.append((end, rows, dim))
                self._timing.dims[rows], self._timing.ahead[rows] = frozenset({dim}), 0
                return True
        return False


def _ones(node: Node, dim: int) -> int:
    """How many dims of size 1 come before a dim."""
    return sum(n == 1 for n in node.shape[:dim])


def reshaped(node: Node, out: Node, source: str) -> Equation:
    """The equation that makes `out` of a value in another shape."""
    params = {"new_sizes": out.shape, "dimensions": None, "sharding": None}
    out.equation = Equation(jax.lax.reshape_p, params, (node,), (out,), source)
    return out.equation


def _last(region: Region) -> Region:
    while region.into is not None:
        region = region.into
    return region


def _labels(equation: Equation, known: dict[Node, Labels]) -> list[Labels]:
    """Labels of the results' dims, from those of the operands that lie in the region."""
    inside = [(n, known[n]) for n in equation.inputs if n in known]
    if equation.name == "reshape":
        ((node, labels),) = inside
        found = ["-" if n > 1 else "?" for n in equation.outputs[0].shape]
        for mine, theirs in reshape_groups(node.shape, equation.outputs[0].shape):
            of = {labels[d] for d in mine}
            for d in theirs:
                found[d] = labels[mine[0]] if len(mine) == len(theirs) == 1 else "-" if of == {"-"} else "?"
        return [tuple(found)]
    if equation.name == "scan":  # over chunks, nearly always; what its body makes isn't looked into here
        return [("?",) * len(n.shape) for n in equation.outputs]
    factors = factors_of(equation)
    of_factor: dict[int, str] = {}
    for node, dims in zip(equation.inputs, factors.inputs, strict=True):
        for factor, label in zip(dims, known.get(node, ()), strict=False):
            if factor is not None and of_factor.get(factor, "?") in "?-" and label != "?":
                of_factor[factor] = label
    return [tuple("?" if f is None else of_factor.get(f, "?") for f in dims) for dims in factors.outputs]
