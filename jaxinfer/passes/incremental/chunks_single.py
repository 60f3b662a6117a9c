"""A region of a single chunk, without what only later chunks would read: proved and run by itself, with no state."""

import jax
import jax.numpy as jnp

from jaxinfer import _jax
from jaxinfer.graph import Equation, Graph, Node, in_place_of, needed
from jaxinfer.passes.incremental.unroll import unrolled


def single(graph: Graph) -> Graph:
    """The same graph with its scans over the one chunk as their bodies, and values cut out of joined ones taken from
    where they were before. Nothing of the chunk's own state is left then where only the next chunk would begin with it.
    """
    used = {n for e in graph.equations for n in e.inputs} | set(graph.outputs)
    equations: list[Equation] = []
    for equation in graph.equations:
        if equation.name == "scan" and _jax.scan_parts(equation.params).length == 1:
            equations += unrolled(equation, used)
        else:
            equations += _shorter(equation) or [equation]
    return Graph(graph.inputs, graph.outputs, needed(graph.outputs, equations))


def _shorter(equation: Equation) -> list[Equation] | None:
    """What makes the same of fewer operands: of none what is empty, a slice of the one piece that it lies in."""
    if all(0 in n.shape for n in equation.outputs):
        empty = [jax.ShapeDtypeStruct(n.shape, n.dtype) for n in equation.outputs]
        return in_place_of(equation.outputs, lambda: [jnp.zeros(e.shape, e.dtype) for e in empty], (), equation.source)
    if equation.name != "slice" or any(s != 1 for s in equation.params["strides"] or ()):
        return None
    (joined,), (out,) = equation.inputs, equation.outputs
    starts, made = equation.params["start_indices"], joined.equation
    if made is None or made.name not in ("concatenate", "pad"):
        return None
    changed = [d for d, n in enumerate(out.shape) if n != joined.shape[d]]
    if len(changed) != 1:
        return None
    (dim,) = changed
    piece = _piece(made, dim, starts[dim], starts[dim] + out.shape[dim])
    if piece is None:
        return None
    node, first = piece

    def run(value: jax.Array) -> list[jax.Array]:
        if value.ndim == 0:
            return [jnp.full(out.shape, value)]
        return [jax.lax.slice_in_dim(value, first, first + out.shape[dim], axis=dim)]

    return in_place_of((out,), run, (node,), equation.source)


def _piece(made: Equation, dim: int, start: int, end: int) -> tuple[Node, int] | None:
    """(the piece that holds rows start .. end of a joined value, where they begin in it); a padding is a scalar."""
    if made.name == "pad":
        config = made.params["padding_config"]
        low, high, inside = config[dim]
        if any(any(c) for d, c in enumerate(config) if d != dim) or low < 0 or high < 0 or inside:
            return None
        last = low + made.inputs[0].shape[dim]
        if low <= start and end <= last:
            return made.inputs[0], start - low
        return (made.inputs[1], 0) if end <= low or start >= last else None
    if made.params["dimension"] != dim:
        return None
    begin = 0
    for node in made.inputs:
        if begin <= start and end <= begin + node.shape[dim]:
            return node, start - begin
        begin += node.shape[dim]
    return None
