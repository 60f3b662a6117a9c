"""Derives the incremental step of a causal Program: its KV cache, its prefill and its decoding, from the forward alone.

flatten -> prove (time dims, causality) -> choose_state (what is remembered) -> Step (evaluates demanded views)
"""

from typing import Any

import jax

from jaxinfer import specs
from jaxinfer.errors import TraceError
from jaxinfer.graph import flatten
from jaxinfer.passes.incremental.causality import prove
from jaxinfer.passes.incremental.cut import choose_state
from jaxinfer.passes.incremental.step import State, StateSpec, Step
from jaxinfer.program import Program

__all__ = ["State", "StateSpec", "Step", "incremental"]


def incremental(
    program: Program, axis: str = "time", *, length: int | None = None, assume_causal: bool = False
) -> Step:
    """The incremental step of a causal program.

    Args:
        program: inputs whose spec has `axis` are rows in time; other named dims are batch, served as slots.
        axis: the named dim that is time.
        length: rows that a sequence may have at most; the derivation is made at this size. By default the size of the
            program's own analysis trace, which suits only short tests.
        assume_causal: accept a missing proof (never a leak that was found).

    Raises:
        NotCausalError: a later row can reach an earlier output, or no proof was found; names the equation.
        TraceError: no input has such an axis.
    """
    if axis not in program.axes:
        raise TraceError(f"{program.name} has no axis {axis!r} to step along; its named dims are {list(program.axes)}")
    length = program.analysis_sizes[axis] if length is None else length
    traced = program.at({name: length if name == axis else 1 for name in program.axes})
    graph = flatten(traced.jaxpr)
    held = len(jax.tree.leaves(program.abstract_params))
    leaves: list[Any] = specs.leaves(program.inputs)
    sources = {
        node: leaf.dims.index(axis) for node, leaf in zip(graph.inputs[held:], leaves, strict=True) if axis in leaf.dims
    }
    timing = prove(graph, sources, length, assume_causal=assume_causal)
    return Step(graph, timing, choose_state(graph, timing), list(sources), length)
