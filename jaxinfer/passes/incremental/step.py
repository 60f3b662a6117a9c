"""Step: the incremental form of a causal Program, usable by itself or inside a user's own jit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.errors import RequestError
from jaxinfer.graph import Equation, Graph, Node
from jaxinfer.passes.incremental import emit
from jaxinfer.passes.incremental.causality import Timing
from jaxinfer.passes.incremental.demand import (
    Demand,
    Demands,
    View,
    appended,
    demands_of,
    last_to_rows,
    operand_views,
    sliced_from_whole,
)
from jaxinfer.passes.incremental.emit import Array, Window

State = tuple[Array, ...]


@dataclass(frozen=True)
class StateSpec:
    """One array of the state: a value of the forward, a row for each token, stored in the order its reader wants."""

    demand: Demand
    order: tuple[int, ...]  # storage dim -> dim of the value
    time: int  # which storage dim is time

    @property
    def node(self) -> Node:
        return self.demand[0]

    @property
    def bytes_per_row(self) -> int:
        """Bytes that one token adds."""
        return math.prod(n for d, n in enumerate(self.shape(1))) * self.node.dtype.itemsize

    def shape(self, length: int) -> tuple[int, ...]:
        """Shape for one slot that holds `length` rows."""
        return tuple(length if i == self.time else self.node.shape[d] for i, d in enumerate(self.order))

    def append(self, stored: Array, rows: Array, at: Window) -> Array:
        """Writes the chunk's n real rows at `pos`; rows past n or past the end are dropped, never shifted."""
        rows = jnp.transpose(rows, self.order)
        if at.k == 1:
            # A second row, dropped: XLA turns a scatter of one row into a dynamic-update-slice, fuses that into each
            # reader, and then copies the whole state twice a step.
            rows = jnp.concatenate([rows, rows], axis=self.time)
        chunk = jnp.arange(rows.shape[self.time], dtype=jnp.int32)
        index = jnp.where(chunk < at.n, at.pos + chunk, stored.shape[self.time])
        where = (slice(None),) * self.time + (index,)
        return stored.at[where].set(rows, mode="drop")

    def read(self, stored: Array, length: int) -> Array:
        """The first `length` rows, in the value's own order of dims."""
        rows = jax.lax.slice_in_dim(stored, 0, length, axis=self.time)
        return jnp.transpose(rows, np.argsort(self.order).tolist())

    def __str__(self) -> str:
        dims = " ".join("time" if i == self.time else str(self.node.shape[d]) for i, d in enumerate(self.order))
        made = f"{self.node.equation}" if self.node.equation else "the input"
        return f"{self.node.dtype}[{dims}]: {self.bytes_per_row} bytes a token, from {made}"


class Step:
    """The step of one causal forward: k new rows in, their outputs and the state after them out.

    `step(params, rows, positions, state)` works on slots, each a sequence at a position of its own. k = 1 decodes, a
    larger k prefills; both are the same derivation. Made by `ji.incremental`.
    """

    def __init__(self, graph: Graph, timing: Timing, stored: frozenset[Demand], sources: Sequence[Node], capacity: int):
        self.graph, self.timing, self.capacity = graph, timing, capacity
        self.sources = tuple(sources)  # inputs made of rows in time; the other inputs are parameters
        self._stored = stored
        ordered = sorted(stored, key=lambda d: (_number(d[0]), str(d[1])))
        self.state_specs = tuple(_state_spec(graph, timing, d) for d in ordered)

    @cached_property
    def _rows(self) -> Demands:
        return self._demands(last=False)

    @cached_property
    def _last(self) -> Demands:
        return self._demands(last=True)

    def _demands(self, last: bool) -> Demands:
        return demands_of(
            self.graph,
            self.timing,
            last,
            store=lambda d: d in self._stored,
            recompute=lambda d: d not in self._stored,
        )

    @property
    def bytes_per_token(self) -> int:
        """State that one token of one sequence adds, in bytes."""
        return sum(s.bytes_per_row for s in self.state_specs)

    def init(self, slots: int, length: int | None = None) -> State:
        """An empty state: [slots, ...] zeros for each stored value, with room for `length` rows (all by default)."""
        return tuple(jnp.zeros(s.shape, s.dtype) for s in self.abstract_state(slots, length))

    def abstract_state(self, slots: int, length: int | None = None) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of `init`'s arrays."""
        length = self.capacity if length is None else length
        if not 0 < length <= self.capacity:
            raise RequestError(f"a state holds 1 to {self.capacity} rows (the length it was derived at), got {length}")
        return tuple(jax.ShapeDtypeStruct((slots, *s.shape(length)), s.node.dtype) for s in self.state_specs)

    def __call__(
        self,
        params: Sequence[Any],
        rows: Sequence[Array],
        positions: Array,
        state: State,
        counts: Array | None = None,
        *,
        last: bool = False,
        reach: int | None = None,
    ) -> tuple[tuple[Array, ...], State]:
        """Runs k new rows in every slot.

        Args:
            params: the flat parameters, in the order of the graph's inputs less the sources.
            rows: for each source, its rows with a leading slots dim: the source's shape with k rows in time.
            positions: int32 [slots], the index of each slot's first new row; 0 starts a sequence.
            counts: int32 [slots], how many of the k rows are real; the others leave no trace. All by default.
            last: return only each slot's last real row (k = 1 in the outputs) instead of all k.
            reach: read only the first so many rows of the state, where every position + count is known to be at most
                that; all that it has room for by default.

        Returns:
            The outputs with a leading slots dim, and the state after the rows.
        """
        k = rows[0].shape[1 + next(iter(self.timing.dims[self.sources[0]]))]
        counts = jnp.full(positions.shape, k, jnp.int32) if counts is None else counts

        def one(rows: Sequence[Array], pos: Array, n: Array, state: State) -> tuple[tuple[Array, ...], State]:
            room = self._room(state)
            return self.run_one(params, rows, Window(k, min(reach or room, room), pos, n), state, last=last)

        return jax.vmap(one)(tuple(rows), positions, counts, state)

    def _room(self, state: State) -> int:
        """Rows that one slot's state has room for."""
        return state[0].shape[self.state_specs[0].time] if self.state_specs else self.capacity

    def run_one(
        self, params: Sequence[Any], rows: Sequence[Array], at: Window, state: State, *, last: bool
    ) -> tuple[tuple[Array, ...], State]:
        """The step of one sequence; what `__call__` maps over slots."""
        demands = self._last if last else self._rows
        held = iter(params)
        given = {n: rows[self.sources.index(n)] if n in self.sources else next(held) for n in self.graph.inputs}
        run = _Run(self, demands, at, given, list(state))
        for node in self.graph.inputs:
            run.serve(node, None)
        for equation in self.graph.equations:
            for node in equation.outputs:
                run.serve(node, equation)
        row = View.LAST if last else View.ROWS
        outputs = [
            run.get(n, tuple(row if d in self.timing.of(n) else View.WHOLE for d in range(len(n.shape))))
            for n in self.graph.outputs
        ]
        return tuple(outputs), tuple(run.state)

    def explain(self) -> str:
        """What is kept of each token, and on what assumptions."""
        lines = [f"state: {len(self.state_specs)} values, {self.bytes_per_token} bytes a token"]
        lines += [f"  {spec}" for spec in self.state_specs]
        lines += [f"assumed: {a}" for a in self.timing.assumptions]
        return "\n".join(lines)

    __str__ = explain


class _Run:
    """One evaluation: the values made so far, by view."""

    def __init__(self, step: Step, demands: Demands, at: Window, given: dict[Node, Any], state: list[Array]):
        self.step, self.demands, self.at, self.given, self.state = step, demands, at, given, state
        self.values: dict[Demand, Array] = {}
        self.slot_of = {spec.demand: i for i, spec in enumerate(step.state_specs)}

    def get(self, node: Node, views: tuple[View, ...]) -> Array:
        if (node, views) not in self.values:
            self.values[node, views] = self.at.slice(jnp.asarray(node.value, node.dtype), views)  # a constant
        return self.values[node, views]

    def serve(self, node: Node, equation: Equation | None) -> None:
        """Makes every demanded view of a value: the chunk's rows first, since state and last rows come from them."""
        for views in sorted(self.demands.views.get(node, ()), key=_rows_first):
            demand = (node, views)
            if demand in self.values:
                continue
            if demand in self.slot_of:
                self.values[demand] = self._remember(demand)
            elif View.LAST in views and (node, last_to_rows(views)) in self.values:
                self.values[demand] = self.at.last(self.values[node, last_to_rows(views)], views)
            elif equation is None:
                self.values[demand] = self._input(node, views)
            else:
                self._compute(equation, node, views)

    def _remember(self, demand: Demand) -> Array:
        i = self.slot_of[demand]
        spec = self.step.state_specs[i]
        self.state[i] = spec.append(self.state[i], self.values[demand[0], appended(demand)], self.at)
        return spec.read(self.state[i], self.at.length)

    def _input(self, node: Node, views: tuple[View, ...]) -> Array:
        value = self.given[node]
        if node not in self.step.sources:
            return self.at.slice(value, views)
        return self.at.last(value, views)  # the rows themselves, or the last of them

    def _compute(self, equation: Equation, node: Node, views: tuple[View, ...]) -> None:
        timing = self.step.timing
        asked = operand_views(equation, node, views, timing)
        operands = [self.get(n, v) for n, v in asked]
        if sliced_from_whole(equation, node, views, timing):
            results = _bound(equation, equation.primitive.bind(*operands, **equation.params))
            self.values[node, views] = self.at.slice(results[equation.outputs.index(node)], views)
            return
        sizes = self.at.sizes(node, views)
        result = emit.bind(equation, operands, [v for _, v in asked], sizes, views, self.at, timing.factors[equation])
        for out, value in zip(equation.outputs, _bound(equation, result), strict=True):
            # All results of one equation have the same factors here, so they come out in the same view.
            if out is node or views in self.demands.views.get(out, ()):
                self.values.setdefault((out, views), value)


def _bound(equation: Equation, result: Any) -> Sequence[Array]:
    return result if equation.primitive.multiple_results else (result,)


def _number(node: Node) -> int:
    return -1 if node.equation is None else node.equation.number


def _rows_first(views: tuple[View, ...]) -> tuple[int, str]:
    rank = 0 if View.ROWS in views else 1 if View.LAST in views else 2
    return (3 if View.PREFIX in views and rank == 2 else rank, str(views))


def _state_spec(graph: Graph, timing: Timing, demand: Demand) -> StateSpec:
    """Storage order: the batch dims of the contraction that reads the value, then time, then the rest.

    A batched matrix product then reads rows without moving them: with [group, time, dim] in place of
    [time, group, dim] for K a decode step of 30 layers took 31 ms instead of 53.
    """
    node = demand[0]
    (time,) = timing.of(node)
    first = [d for d in _reader_batch(graph, timing, node) if d != time]
    rest = [d for d in range(len(node.shape)) if d != time and d not in first]
    return StateSpec(demand, (*first, time, *rest), len(first))


def _reader_batch(graph: Graph, timing: Timing, node: Node) -> list[int]:
    """Dims of a value that are batch dims of the first contraction it reaches by movement alone."""
    frontier = [(node, tuple(range(len(node.shape))))]  # (value, which dim of ours each of its dims is, -1 for none)
    readers = graph.consumers()
    seen = {node}
    while frontier:
        here, ours = frontier.pop(0)
        for equation in readers.get(here, ()):
            factors = timing.factors[equation]
            dims = factors.inputs[equation.inputs.index(here)]
            mine = {f: ours[d] for d, f in enumerate(dims) if f is not None and ours[d] >= 0}
            if factors.reduction == "dot":
                both = set(factors.inputs[0]) & set(factors.inputs[1]) & set(factors.outputs[0])
                return [mine[f] for f in factors.outputs[0] if f in both and f in mine]
            for out, kept in zip(equation.outputs, factors.outputs, strict=True):
                if factors.movement and out not in seen:
                    seen.add(out)
                    frontier.append((out, tuple(-1 if f is None else mine.get(f, -1) for f in kept)))
    return []
