"""Step: the incremental form of a causal Program, usable by itself or inside a user's own jit."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.errors import RequestError
from jaxinfer.graph import Equation, Graph, Node, evaluate, needed
from jaxinfer.passes.incremental import chunks, running
from jaxinfer.passes.incremental.causality import Timing
from jaxinfer.passes.incremental.cut import choose_state
from jaxinfer.passes.incremental.demand import Demands, How, demands_of
from jaxinfer.passes.incremental.emit import Array, Window
from jaxinfer.passes.incremental.run import Run
from jaxinfer.passes.incremental.state import rows_spec, whole_spec
from jaxinfer.passes.incremental.views import LAST, ROWS, WHOLE, Demand, Kind, Place, Views, kinds

State = tuple[Array, ...]


class Step:
    """The step of one causal forward: k new rows in, their outputs and the state after them out.

    `step(params, rows, positions, state)` works on slots, each a sequence at a position of its own. k = 1 decodes, a
    larger k prefills; both are the same derivation. Made by `ji.incremental`.
    """

    def __init__(
        self, timing: Timing, stored: frozenset[Place], sources: Sequence[Node], requests: Sequence[Node] = ()
    ):
        self.timing, self.graph, self.capacity = timing, timing.graph, timing.capacity
        self.sources = tuple(sources)  # inputs made of rows in time
        self.requests = tuple(requests)  # inputs that a sequence has once, as a whole; the others are parameters
        self._stored = stored
        remembered = [(n, v) for n, plan in self._rows.made.items() for v, how in plan.items() if how is How.REMEMBER]
        readers = self.graph.consumers()
        kept = [rows_spec(readers, timing, d, _rows_kept(d[1])) for d in remembered]
        over = [e for e in self.graph.equations if e in self._running]
        inner = [(e, e.params["chunks"]) for e in over if e.name == chunks.NAME]
        self._within = {e: Step(c.timing, choose_state(c.timing), c.sources) for e, c in inner if c.count > 1}
        self._carried = {
            e: chunks.carries_of(e, self.within(e)) if e.name == chunks.NAME else running.carries_of(e) for e in over
        }
        kept += [whole_spec(node) for nodes in self._carried.values() for node in nodes]
        self._requested = tuple(n for n, plan in self._rows.made.items() if How.REQUEST in plan.values())
        kept += [whole_spec(node) for node in self._requested]
        self.state_specs = tuple(sorted(kept, key=lambda s: _number(s.node)))
        self._cleared = [
            i
            for i, s in enumerate(self.state_specs)
            if (s.grows or s.node.equation in self._within) and jnp.issubdtype(s.node.dtype, jnp.inexact)
        ]

    @cached_property
    def _rows(self) -> Demands:
        return self._demands(last=False)

    @cached_property
    def _last(self) -> Demands:
        return self._demands(last=True, also=[s.demand for s in self.state_specs if s.demand is not None])

    def _demands(self, last: bool, also: Sequence[Demand] = ()) -> Demands:
        stored = self._stored
        return demands_of(
            self.timing,
            last,
            store=lambda d: (d[0], kinds(d[1])) in stored,
            recompute=lambda d: (d[0], kinds(d[1])) not in stored,
            also=also,
        )

    @cached_property
    def _running(self) -> frozenset[Equation]:
        """The running equations that some output needs."""
        made = self._rows.made
        return frozenset(e for e in self.timing.running if any(n in made for n in e.outputs))

    @property
    def bytes_per_token(self) -> int:
        """State that one token of one sequence adds, in bytes."""
        return sum(s.bytes_per_row for s in self.state_specs)

    @property
    def bytes_per_sequence(self) -> int:
        """State that a sequence takes whatever its length, in bytes: windows and running carries."""
        return sum(s.fixed_bytes for s in self.state_specs)

    def init(self, slots: int, length: int | None = None) -> State:
        """An empty state: [slots, ...] zeros for each stored value, with room for `length` rows (all by default)."""
        return tuple(jnp.zeros(s.shape, s.dtype) for s in self.abstract_state(slots, length))

    def abstract_state(self, slots: int, length: int | None = None) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of `init`'s arrays."""
        length = self.capacity if length is None else length
        if not 0 < length <= self.capacity:
            raise RequestError(f"a state holds 1 to {self.capacity} rows (the length it was derived at), got {length}")
        return tuple(jax.ShapeDtypeStruct((slots, *s.shape(length)), s.node.dtype) for s in self.state_specs)

    def begin(self, params: Any, inputs: Any, state: State) -> State:
        """Puts what the request alone decides (an encoder's output, cross-attention's keys and values) into the state.

        Args:
            params: as for the step.
            inputs: the whole inputs of every slot, in the order of `requests`, with a leading slots dim.
            state: of any content; only the request's part of it is replaced.
        """
        part = Graph((*self._params, *self.requests), self._requested, needed(self._requested, self.graph.equations))
        params, inputs = self._leaves("params", params, len(self._params)), jax.tree.leaves(inputs)
        values = jax.vmap(lambda given: evaluate(part, [*params, *given]))(inputs)
        after = list(state)
        places = {spec.node: i for i, spec in enumerate(self.state_specs)}
        for node, value in zip(self._requested, values, strict=True):
            after[places[node]] = value
        return tuple(after)

    @property
    def _params(self) -> list[Node]:
        return [n for n in self.graph.inputs if n not in self.sources and n not in self.requests]

    def __call__(
        self,
        params: Any,
        rows: Any,
        positions: Array,
        state: State,
        counts: Array | None = None,
        *,
        last: bool = False,
        reach: int | None = None,
        starts: bool = True,
    ) -> tuple[tuple[Array, ...], State]:
        """Runs k new rows in every slot.

        Args:
            params: the program's parameters, as a tree or as its leaves.
            rows: the inputs that have the time axis (one, a list, or as the specs nest them), with a leading slots dim:
                each of the source's shape with k rows in time.
            positions: int32 [slots], the index of each slot's first new row; 0 starts a sequence.
            counts: int32 [slots], how many of the k rows are real; the others leave no trace. All by default.
            last: return only each slot's last real row (k = 1 in the outputs) instead of all k.
            reach: read only the first so many rows of the state, where every position + count is known to be at most
                that; all that it has room for by default.
            starts: whether a slot may start a sequence in this call. False spares a look at what to clear.

        Returns:
            The outputs with a leading slots dim, and the state after the rows.
        """
        params, rows = self._leaves("params", params, len(self._params)), self._leaves("rows", rows, len(self.sources))
        k = rows[0].shape[1 + next(iter(self.timing.dims[self.sources[0]]))]
        counts = jnp.full(positions.shape, k, jnp.int32) if counts is None else counts

        def one(rows: Sequence[Array], pos: Array, n: Array, state: State) -> tuple[tuple[Array, ...], State]:
            room = self._room(state)
            return self.run_one(params, rows, Window(k, min(reach or room, room), pos, n), state, last=last)

        state = self._restarted(state, (positions == 0) & (counts > 0)) if starts else state
        return jax.vmap(one)(tuple(rows), positions, counts, state)

    def _leaves(self, what: str, tree: Any, wanted: int) -> list[Any]:
        """What was given for some inputs, flat."""
        leaves = jax.tree.leaves(tree)
        if len(leaves) != wanted:
            raise RequestError(f"the step takes {wanted} arrays as {what}, got {len(leaves)}")
        return leaves

    def _restarted(self, state: State, starts: Array) -> State:
        """The state with what other sequences left made 0 in the slots where one starts.

        A product of masked weights with rows that aren't written yet takes 0 times what they hold, and 0 times NaN is
        NaN. The rows are cleared here, once a sequence, since a mask on them would copy them in every step.
        """
        after = list(state)
        if self._cleared:

            def cleared(arrays: list[Array]) -> list[Array]:
                return [jnp.where(starts.reshape(-1, *(1,) * (a.ndim - 1)), jnp.zeros_like(a), a) for a in arrays]

            kept = jax.lax.cond(jnp.any(starts), cleared, list, [state[i] for i in self._cleared])
            for i, array in zip(self._cleared, kept, strict=True):
                after[i] = array
        return tuple(after)

    def _room(self, state: State) -> int:
        """Rows that one slot's state has room for."""
        rooms = [a.shape[s.template.index(None)] for s, a in zip(self.state_specs, state, strict=True) if s.grows]
        return rooms[0] if rooms else self.capacity

    def carried(self, equation: Equation) -> list[Node]:
        """What a running equation hands on, as the state's nodes."""
        return self._carried[equation]

    def within(self, equation: Equation) -> "Step | None":
        """The step along the axis of chunks of an equation that works on them; None where there is one chunk."""
        return self._within.get(equation)

    def run_one(
        self, params: Sequence[Any], rows: Sequence[Array], at: Window, state: State, *, last: bool
    ) -> tuple[tuple[Array, ...], State]:
        """The step of one sequence; what `__call__` maps over slots."""
        demands = self._last if last else self._rows
        given = dict(zip(self._params, params, strict=True)) | dict(zip(self.sources, rows, strict=True))
        run = Run(self, demands, at, given, list(state))
        for node in self.graph.inputs:
            run.serve(node, None)
        for equation in self.graph.equations:
            for node in equation.outputs:
                run.serve(node, equation)
        row = LAST if last else ROWS
        outputs = [
            run.get(n, tuple(row if d in self.timing.of(n) else WHOLE for d in range(len(n.shape))))
            for n in self.graph.outputs
        ]
        return tuple(outputs), tuple(run.state)

    def explain(self) -> str:
        """What is kept of each token, and on what assumptions."""
        fixed = f" and {self.bytes_per_sequence} a sequence" if self.bytes_per_sequence else ""
        lines = [f"state: {len(self.state_specs)} values, {self.bytes_per_token} bytes a token{fixed}"]
        lines += [f"  {spec}" for spec in self.state_specs]
        lines += [f"assumed: {a}" for a in self.timing.assumptions]
        lines += [f"note: {n}" for n in self.timing.notes]
        return "\n".join(lines)

    __str__ = explain


def _number(node: Node) -> int:
    return -1 if node.equation is None else node.equation.number


def _rows_kept(views: Views) -> int | None:
    """Rows that a memory demand needs of earlier steps; None for all."""
    return None if Kind.PREFIX in kinds(views) else max(-v.lo for v in views)
