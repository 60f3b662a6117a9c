"""Derives the incremental step of a causal Program: its KV cache, its prefill and its decoding, from the forward alone.

flatten -> prove (time dims, causality) -> choose_state (what is remembered) -> Step (evaluates demanded views)
"""

from collections.abc import Mapping
from typing import Any

import jax

from jaxinfer import specs
from jaxinfer.errors import TraceError
from jaxinfer.graph import flatten, uncollected
from jaxinfer.passes.incremental import first_row
from jaxinfer.passes.incremental.absorb import absorb
from jaxinfer.passes.incremental.causality import prove
from jaxinfer.passes.incremental.cut import choose_state
from jaxinfer.passes.incremental.state import StateSpec
from jaxinfer.passes.incremental.step import State, Step
from jaxinfer.passes.incremental.updates import settled
from jaxinfer.passes.recognise import recognise
from jaxinfer.program import Program

__all__ = ["State", "StateSpec", "Step", "incremental"]


def incremental(
    program: Program,
    axis: str = "time",
    *,
    length: int | None = None,
    sizes: Mapping[str, int] | None = None,
    assume_causal: bool = False,
) -> Step:
    """The incremental step of a causal program.

    Args:
        program: inputs whose spec has `axis` are rows in time. Their other named dims are batch, served as slots. An
            input without `axis` is the request's: a sequence has it once, as a whole (an encoder's tokens or image),
            and what depends on it alone is computed once, by `Step.begin`.
        axis: the named dim that is time.
        length: rows that a sequence may have at most; the derivation is made at this size. By default the size of the
            program's own analysis trace, which suits only short tests.
        sizes: of the named dims that only the request's inputs have.
        assume_causal: accept a missing proof (never a leak that was found).

    Raises:
        NotCausalError: a later row can reach an earlier output, or no proof was found; names the equation.
        TraceError: no input has such an axis, or `sizes` names a dim that no request's input has.
    """
    if axis not in program.axes:
        raise TraceError(f"{program.name} has no axis {axis!r} to step along; its named dims are {list(program.axes)}")
    leaves: list[Any] = specs.leaves(program.inputs)
    slots = {name for leaf in leaves if axis in leaf.names for name in leaf.names} - {axis}
    given = {name: program.analysis_sizes[name] for name in program.axes if name not in slots} | dict(sizes or {})
    for name in sizes or {}:
        if name not in program.axes or name in slots | {axis}:
            raise TraceError(f"sizes names {name!r}, which is no named dim of a request's inputs of {program.name}")
    length = given[axis] if length is None else length
    graph = flatten(program.at({**given, **dict.fromkeys(slots, 1), axis: length}).jaxpr)
    held = len(jax.tree.leaves(program.abstract_params))
    inputs = list(zip(graph.inputs[held:], leaves, strict=True))
    sources = {node: leaf.dims.index(axis) for node, leaf in inputs if axis in leaf.dims}
    requests = [node for node, _ in inputs if node not in sources]
    with uncollected():
        graph = settled(absorb(recognise(graph), list(sources)), list(sources))
        graph = first_row.spread(graph, list(sources), length)
        timing = prove(graph, sources, length, requests=requests, assume_causal=assume_causal)
        return Step(timing, choose_state(timing), list(sources), requests)
