"""Chunks: a forward's work on time cut into chunks of Q rows, as one equation that continues from its state.

The training form of Mamba-2, RetNet, gated linear attention: quadratic within a chunk, a state from chunk to chunk. A
step at position `pos` has the rows since the current chunk began (at most Q - 1 are remembered, as windows of whatever
is cheapest to make the operands of), adds its own, fills the chunks up and runs the forward's own work on them. What
fills them is a repeated row: no result of a real row depends on it, as was proved. The state that goes from chunk to
chunk is derived by the same step along the axis of chunks; it moves on where a chunk is complete after the n real rows.
A row costs the work of one chunk wherever it stands.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from jaxinfer.axes import Factors
from jaxinfer.graph import Composite, Equation, Graph, Node, evaluate
from jaxinfer.passes.incremental import chunks_prove
from jaxinfer.passes.incremental.chunks_apart import own_rows
from jaxinfer.passes.incremental.chunks_find import Region
from jaxinfer.passes.incremental.emit import Array, Window

if TYPE_CHECKING:
    from jaxinfer.passes.incremental.causality import Timing
    from jaxinfer.passes.incremental.step import Step

NAME = "chunks"


@dataclass(frozen=True, eq=False)
class Chunks:
    """A region that was proved causal. An equation's operands are `cuts` of rows, then what else the region reads."""

    timing: "Timing"  # of the region alone, along the axis of chunks; of a single chunk, within it
    count: int  # N
    size: int  # Q
    cuts: tuple[int, ...]  # for each operand of rows, the dim of them; the first inputs of the graph are their blocks
    joins: tuple[int, ...]  # the same of each result
    own: tuple[bool, ...]  # for each operand of rows, whether a row of it matters to no other
    before: int  # rows before a step's own that its chunk may have: Q - 1, or what the sequence has room for

    @property
    def graph(self) -> Graph:
        return self.timing.graph

    @property
    def sources(self) -> tuple[Node, ...]:
        """The blocks."""
        return self.graph.inputs[: len(self.cuts)]

    def cut(self, rows: Array, dim: int) -> Array:
        """[.., n Q, ..] -> [.., n, Q, ..]"""
        return rows.reshape((*rows.shape[:dim], -1, self.size, *rows.shape[dim + 1 :]))

    def join(self, block: Array, dim: int) -> Array:
        """[.., n, Q, ..] -> [.., n Q, ..]"""
        return block.reshape((*block.shape[:dim], -1, *block.shape[dim + 2 :]))


def lower(*operands: Array, chunks: Chunks) -> list[Array]:
    """The forward's own work, on all its chunks."""
    many = len(chunks.cuts)
    blocks = map(chunks.cut, operands[:many], chunks.cuts)
    return list(map(chunks.join, evaluate(chunks.graph, [*blocks, *operands[many:]]), chunks.joins))


CHUNKS = Composite(NAME, lower)


def equation_of(region: Region, timing: "Timing", prove: Any, assume_causal: bool) -> tuple[Equation, Factors]:
    """The equation that stands for a region in the outer graph, of which `timing` tells; and its factors there.

    Raises:
        NotCausalError: the region isn't proved causal.
    """
    graph, reads = chunks_prove.alone(region, timing)
    inner = chunks_prove.proved(region, graph, prove, assume_causal=assume_causal)
    cuts, joins = (tuple(dim for _, _, dim in ends) for ends in (region.cuts, region.joins))
    rows = [node for node, _, _ in region.cuts]
    own = own_rows(inner, region) if region.count > 1 else (False,) * len(cuts)
    before = min(region.size, timing.capacity) - 1
    params = {"chunks": Chunks(inner, region.count, region.size, cuts, joins, own, before)}
    outputs = tuple(node for _, node, _ in region.joins)
    equation = Equation(CHUNKS, params, (*rows, *reads), outputs, region.source)
    for node in outputs:
        node.equation = equation

    def dims(node: Node, time: int | None) -> tuple[int | None, ...]:
        return tuple(0 if d == time else None for d in range(len(node.shape)))

    inputs = (*map(dims, rows, cuts), *(dims(node, None) for node in reads))
    halo = {(i, dim): (-before, 0) for i, dim in enumerate(cuts) if before and not own[i]}
    return equation, Factors(inputs, tuple(map(dims, outputs, joins)), halo=halo, cumulative={0: "forward"})


def carries_of(equation: Equation, step: "Step | None") -> list[Node]:
    """Shape and dtype of what one chunk hands to the next: the state of the region's own step."""
    count, specs = equation.params["chunks"].count, () if step is None else step.state_specs
    return [Node(spec.shape(count), spec.node.dtype, equation=equation) for spec in specs]


def run(
    equation: Equation, step: "Step | None", operands: Sequence[Array], carries: Sequence[Array], at: Window
) -> tuple[list[Array], list[Array]]:
    """(results for the k rows, carries after the chunks that are complete after the n real ones)

    step: the region's own; None for a single chunk, which the sequence doesn't outgrow.
    operands: each operand's k rows and, unless they are its own affair, `before` of them; what else is read, whole.
    """
    chunks: Chunks = equation.params["chunks"]
    size, many = chunks.size, len(chunks.cuts)
    count = min(chunks.count, (at.k + 2 * size - 2) // size)  # chunks that k rows may touch: 1 for k = 1
    begun = at.pos % size  # rows that the current chunk has already
    # Past the last real row the last one again, not zeros: rows like others, whose work gives no NaN to be masked.
    index = jnp.minimum(jnp.arange(count * size, dtype=jnp.int32) - begun, jnp.maximum(at.n, 1) - 1)
    blocks = [
        chunks.cut(jnp.take(rows, index + (0 if own else chunks.before), axis=dim, mode="clip"), dim)
        for rows, dim, own in zip(operands[:many], chunks.cuts, chunks.own, strict=True)
    ]
    if step is None:
        results, after = evaluate(chunks.graph, [*blocks, *operands[many:]]), []
    else:
        within = Window(count, chunks.count, at.pos // size, (begun + at.n) // size, beyond=1)
        results, after = step.run_one(operands[many:], blocks, within, tuple(carries), last=False)
    wanted = begun + jnp.arange(at.k, dtype=jnp.int32)  # past the last chunk there are none
    rows = [
        jnp.take(chunks.join(block, dim), wanted, axis=dim, mode="clip")
        for block, dim in zip(results, chunks.joins, strict=True)
    ]
    return rows, list(after)
