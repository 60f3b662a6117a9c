"""The batch proof: row i of every output depends on row i of the inputs alone, in the same way for every row.

Forward over a flattened graph goes where the rows lie in every value (states.Rows). An equation keeps that if its
factor rule says that the dim of the rows is one factor, without shift, on every operand and result that has rows; a
value that has none must be constant along it. Everything else is mixed (states.Mixed) from there on, and a mixed output
is a refusal that names the first equation that mixed it. Merged dims, index arithmetic and loops: places and loops.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.axes import words
from jaxinfer.axes.factors import Factors, factors_of, known_primitives
from jaxinfer.axes.sizes import Bodies, compare
from jaxinfer.axes.states import FREE, HERE, Free, Index, Mixed, Rows, Sizes, State, merged
from jaxinfer.graph import Equation, Graph, Node, uncollected

# (walk, equation, states of the operands) -> states of the results, or None to go on with the factor rule.
Special = Callable[["Walk", Equation, Sequence[State]], "list[State] | None"]
SPECIAL: dict[str, Special] = {}
_IDEMPOTENT = ("max", "min", "and", "or")
WITH_BODIES = frozenset(("scan", "while", "cond", "custom_linear_solve"))


def special(*names: str) -> Callable[[Special], Special]:
    """Registers what knows more of a primitive than its factors tell."""

    def register(function: Special) -> Special:
        SPECIAL.update(dict.fromkeys(names, function))
        return function

    return register


@dataclass(frozen=True)
class Verdict:
    """What was proved of one axis."""

    axis: str
    rows: int  # how many there were in the trace
    outputs: tuple[State, ...]
    mixed: Mixed | None  # the reason why it isn't proved
    equations: int = 0

    @property
    def independent(self) -> bool:
        return self.mixed is None


class Walk:
    """One pass over a graph, for one axis."""

    def __init__(self, axis: str, sizes: Sizes, bodies: Bodies):
        self.axis, self.sizes, self.bodies = axis, sizes, bodies
        self.rows = sizes.rows
        self.states: dict[Node, State] = {}
        self.graphs: list[Graph] = []
        self._mixed: dict[Any, Mixed] = {}
        self.equations = 0

    def run(self, graph: Graph, inputs: Sequence[State]) -> list[State]:
        """The states of a graph's outputs under those of its inputs."""
        states = self.states
        states.update(zip(graph.inputs, inputs, strict=True))
        self.graphs.append(graph)
        for equation in graph.equations:
            found = self._transfer(equation, [self.of(n) for n in equation.inputs])
            states.update(zip(equation.outputs, found, strict=True))
        self.equations += len(graph.equations)
        self.graphs.pop()
        return [self.of(node) for node in graph.outputs]

    def of(self, node: Node) -> State:
        """The state of a value that was reached, or of a constant."""
        if not node.constant:
            return self.states[node]
        return self._constant(node) if node in self.sizes.odd or self.sizes.grown(node) else FREE

    def mix(self, equation: Equation, text: str | None = None, dim: int | None = None) -> list[State]:
        """All results of an equation mixed, and why: by default what the equation does, in words."""
        if equation not in self._mixed:
            text = text or words.mixing(equation, self.axis, self.graphs[-1], dim)
            self._mixed[equation] = Mixed(equation, text, len(self._mixed))
        return [self._mixed[equation]] * len(equation.outputs)

    def blame(self, equation: Equation, instead: Mixed) -> list[State]:
        """Results mixed by an equation that says it better than what came first."""
        text = words.mixing(equation, self.axis, self.graphs[-1])
        self._mixed.setdefault(equation, Mixed(equation, text, instead.order))
        return self.mix(equation)

    def single_mix(self, equation: Equation, text: str) -> Mixed:
        """The same, as one state."""
        (state, *_) = self.mix(equation, text)
        assert isinstance(state, Mixed)
        return state

    def _transfer(self, equation: Equation, inputs: list[State]) -> list[State]:
        if (
            all(s is FREE for s in inputs)
            and equation.name not in WITH_BODIES
            and equation not in self.sizes.odd
            and not any(map(self.sizes.grown, equation.outputs))
        ):
            return [FREE] * len(equation.outputs)
        handler = SPECIAL.get(equation.name)
        found = handler(self, equation, inputs) if handler is not None else None
        if found is not None:
            return found
        mixed = merged(inputs)
        if mixed is not None:
            return [mixed] * len(equation.outputs)
        if equation in self.sizes.odd and equation.name in known_primitives():
            return self.mix(
                equation, f"depends on how many rows of '{self.axis}' there are: {self.sizes.odd[equation]}"
            )
        if any(s == HERE for s in inputs):
            several = any(s != HERE if isinstance(s, Rows) else isinstance(s, Free) and s.uniform for s in inputs)
            if several or any(map(self.sizes.grown, equation.outputs)):
                return self.mix(equation, f"combines one row of '{self.axis}' with all of them inside a scan over rows")
            return [HERE] * len(equation.outputs)
        if any(isinstance(s, Rows) for s in inputs):
            return self._rows(equation, inputs, factors_of(equation))
        return self._free(equation, inputs)

    def _free(self, equation: Equation, inputs: Sequence[State]) -> list[State]:
        """No operand has rows: results must be constant along the dims that grow with their number."""
        factors = factors_of(equation)
        if self._counts(equation, inputs, factors):
            return self._counted(equation)
        results: list[State] = []
        for node, dims in zip(equation.outputs, factors.outputs, strict=True):
            grown = self.sizes.grown(node)
            for d in grown:
                if dims[d] is None or d in factors.indexed or not self._constant_along(dims[d], inputs, factors):
                    return self._placed(equation, d, len(grown))
            results.append(Free(frozenset(grown)) if grown else FREE)
        return results

    def _constant_along(self, factor: int | None, inputs: Sequence[State], factors: Factors) -> bool:
        """Whether every operand that has a factor is constant along it."""
        for number, (state, dims) in enumerate(zip(inputs, factors.inputs, strict=True)):
            for e, f in enumerate(dims):
                if f == factor and not (
                    isinstance(state, Free) and e in state.uniform and (number, e) not in factors.halo
                ):
                    return False
        return factor not in factors.cumulative

    def _counts(self, equation: Equation, inputs: Sequence[State], factors: Factors) -> bool:
        """Whether a dim that grows with the number of rows is summed up, so that the result tells that number."""
        if factors.movement or factors.reduction in _IDEMPOTENT:
            return False
        for state, dims in zip(inputs, factors.inputs, strict=True):
            for e in state.uniform if isinstance(state, Free) else ():
                if dims[e] is None or not all(dims[e] in out for out in factors.outputs):
                    return True
        return False

    def _counted(self, equation: Equation) -> list[State]:
        return self.mix(equation, f"counts the rows of '{self.axis}': its result depends on how many there are")

    def _placed(self, equation: Equation, dim: int, grown: int) -> list[State]:
        """A value made for every row that differs from row to row though it comes from none."""
        if "random" in equation.name or equation.name.startswith(("rng", "threefry")):
            text = f"draws random bits for all rows of '{self.axis}' at once: what a row gets depends on its place"
        elif equation.name == "iota":
            text = f"numbers the rows of '{self.axis}': what is made of it depends on a row's place"
        else:
            text = f"makes a value that differs from row to row of '{self.axis}' but comes from none of them"
        mixed = self.single_mix(equation, text)
        if equation.name == "iota" and grown == 1 and equation.outputs[0].shape[dim] == self.rows:
            return [Index(dim, mixed)]
        return [mixed] * len(equation.outputs)

    def _rows(self, equation: Equation, inputs: Sequence[State], factors: Factors) -> list[State]:
        """At least one operand has rows: all dims of rows must be one factor, and every result must have it."""
        found: tuple[int, int, int, int] | None = None  # factor, outer, inner, size
        for number, (state, dims) in enumerate(zip(inputs, factors.inputs, strict=True)):
            if not isinstance(state, Rows):
                continue
            factor = dims[state.dim]
            if factor is None or factor in factors.cumulative or (number, state.dim) in factors.halo:
                return self.mix(equation, dim=state.dim)
            here = factor, state.outer, state.inner, equation.inputs[number].shape[state.dim]
            if found not in (None, here):
                return self.mix(equation, f"combines different rows of '{self.axis}' with each other", state.dim)
            found = here
        assert found is not None
        factor, outer, inner, size = found
        if not self._others_constant(factor, inputs, factors) or self._counts(
            equation, self._but(factor, inputs, factors), factors
        ):
            return self.mix(equation, f"combines the rows of '{self.axis}' with values that depend on a row's place")
        results: list[State] = []
        for node, dims in zip(equation.outputs, factors.outputs, strict=True):
            places = [d for d, f in enumerate(dims) if f == factor]
            if len(places) != 1 or node.shape[places[0]] != size:
                return self.mix(equation, dim=next(s.dim for s in inputs if isinstance(s, Rows)))
            if self.sizes.grown(node) - {places[0]}:
                return self.mix(equation, f"pairs every row of '{self.axis}' with every other")
            results.append(Rows(places[0], outer, inner))
        return results

    def _others_constant(self, factor: int, inputs: Sequence[State], factors: Factors) -> bool:
        return all(
            isinstance(state, Rows)
            or (isinstance(state, Free) and e in state.uniform and (number, e) not in factors.halo)
            for number, (state, dims) in enumerate(zip(inputs, factors.inputs, strict=True))
            for e, f in enumerate(dims)
            if f == factor
        )

    @staticmethod
    def _but(factor: int, inputs: Sequence[State], factors: Factors) -> list[State]:
        """States without the uniform dims that go along with the rows."""
        return [
            Free(frozenset(e for e in s.uniform if dims[e] != factor)) if isinstance(s, Free) else s
            for s, dims in zip(inputs, factors.inputs, strict=True)
        ]

    def _constant(self, node: Node) -> State:
        if node in self.sizes.odd:
            where = next((e for e in self.graphs[-1].equations if node in e.inputs), None)
            if node not in self._mixed:
                text = f"depends on how many rows of '{self.axis}' there are: {self.sizes.odd[node]}"
                self._mixed[node] = Mixed(where, text, len(self._mixed))
            return self._mixed[node]
        grown = self.sizes.grown(node)
        if not grown:
            return FREE
        value = np.asarray(node.value)
        varying = [d for d in grown if not np.array_equal(value, np.broadcast_to(value.take([0], d), value.shape))]
        if not varying:
            return Free(frozenset(grown))
        where = next((e for e in self.graphs[-1].equations if node in e.inputs), None)
        if node not in self._mixed:
            text = f"reads a constant that differs from row to row of '{self.axis}' but comes from none of them"
            self._mixed[node] = Mixed(where, text, len(self._mixed))
        if value.ndim == 1 and value.dtype.kind in "iu" and np.array_equal(value, np.arange(self.rows)):
            return Index(0, self._mixed[node])
        return self._mixed[node]


@uncollected()
def prove(
    axis: str,
    rows: int,
    graph: Graph,
    sources: Sequence[int | None],
    other: Graph | None = None,
    other_rows: int = 0,
) -> Verdict:
    """Proves that rows along an axis don't mix, or finds the first equation that mixes them.

    Args:
        rows: size of the axis in this graph's trace; a number that no other dim is a multiple of.
        sources: for each input of the graph the dim that is the axis, None for one that all rows share.
        other, other_rows: the same forward traced at another number of rows; without it a dependence on that number
            isn't found.
    """
    from jaxinfer.axes import loops, places  # what they register needs this module

    del loops, places
    bodies = Bodies()
    sizes, parting = (Sizes(rows), None) if other is None else compare(graph, other, rows, other_rows, bodies)
    if parting is not None:
        sizes = Sizes(rows)
    walk = Walk(axis, sizes, bodies)
    outputs = walk.run(graph, [FREE if dim is None else Rows(dim) for dim in sources])
    mixed = merged(outputs)
    if mixed is None and parting is not None:
        text = (
            f"isn't there at another size of '{axis}': the forward takes another way for another number of rows (a "
            "Python branch or loop over x.shape), so what is proved at one size says nothing about the others"
        )
        mixed = Mixed(parting, text, 0)
    return Verdict(axis, rows, tuple(outputs), mixed, walk.equations)
