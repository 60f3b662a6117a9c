"""A region of chunks with each chunk apart: scans over chunks as their bodies, for all chunks at once."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jax

from jaxinfer import _jax
from jaxinfer.axes import factors_of
from jaxinfer.graph import Equation, Node, copies, in_place_of
from jaxinfer.passes.incremental.chunks_find import Region

if TYPE_CHECKING:
    from jaxinfer.passes.incremental.causality import Timing


@dataclass(frozen=True, eq=False)
class Apart:
    """A copy of a region's graph, in which the carry that each chunk begins with is a value that nothing makes."""

    made: dict[Node, Node]  # value of the graph -> of this copy
    equations: list[Equation]
    makers: dict[Equation, Equation]  # new -> as it is in the graph; none for what a scan's body makes
    starts: list[Node]  # the carries that the chunks begin with
    ends: list[Node]  # those that they end with

    @classmethod
    def of(cls, timing: "Timing") -> "Apart":
        """Of the graph that was proved from chunk to chunk."""
        whole = timing.graph
        apart = cls({n: Node(n.shape, n.dtype, n.weak) for n in whole.inputs}, [], {}, [], [])
        for old, new in zip(whole.equations, copies(whole.equations, apart.made), strict=True):
            if old.name == "scan" and old in timing.running:
                apart.equations.extend(apart._body(new))
            else:
                apart.equations.append(new)
                apart.makers[new] = old
        return apart

    def _body(self, scan: Equation) -> list[Equation]:
        parts = _jax.scan_parts(scan.params)
        first = scan.inputs[parts.consts : parts.consts + parts.carry]
        starts, ends = ([Node((parts.length, *n.shape), n.dtype) for n in first] for _ in range(2))
        self.starts.extend(starts)
        self.ends.extend(ends)
        consts, stacks = scan.inputs[: parts.consts], scan.inputs[parts.consts + parts.carry :]

        def run(*operands: jax.Array) -> list[jax.Array]:
            body = partial(_jax.evaluate, parts.body, *operands[: parts.consts])
            return jax.vmap(body)(*operands[parts.consts :])

        return in_place_of((*ends, *scan.outputs[parts.carry :]), run, (*consts, *starts, *stacks), scan.source)


def own_rows(timing: "Timing", region: Region) -> tuple[bool, ...]:
    """For each cut, whether a row of it matters to no other row's results, as a query does: none need be remembered."""
    apart = Apart.of(timing)
    ends = zip(timing.graph.outputs, region.joins, strict=True)
    outputs = {apart.made[node]: (dim, dim + 1) for node, (_, _, dim) in ends}
    cuts = zip(timing.graph.inputs, region.cuts, strict=False)
    return tuple(_only_own(apart, apart.made[node], dim, outputs) for node, (_, _, dim) in cuts)


def _only_own(apart: Apart, block: Node, dim: int, outputs: dict[Node, tuple[int, int]]) -> bool:
    places = {block: (dim, dim + 1)}  # of N and Q in all that is made of the block
    for equation in apart.equations:
        mine = [(number, node) for number, node in enumerate(equation.inputs) if node in places]
        if not mine:
            continue
        factors = factors_of(equation)
        found = {tuple(factors.inputs[number][d] for d in places[node]) for number, node in mine}
        shifted = any((number, d) in factors.halo for number, node in mine for d in places[node])
        if equation.name == "scan" or shifted or len(found) > 1:
            return False
        (pair,) = found
        for node, dims in zip(equation.outputs, factors.outputs, strict=True):
            if any(f is None or f in factors.cumulative or f not in dims for f in pair):
                return False
            places[node] = (dims.index(pair[0]), dims.index(pair[1]))
    return places.keys().isdisjoint(apart.ends) and all(places.get(n, at) == at for n, at in outputs.items())
