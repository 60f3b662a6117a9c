"""Run: one evaluation of a step for one sequence, value by value in the views that are demanded."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from jaxinfer.graph import Equation, Node
from jaxinfer.passes.incremental import chunks, convolution, emit, running
from jaxinfer.passes.incremental.demand import Demands, How, last_to_rows, operand_views, sliced_from_whole
from jaxinfer.passes.incremental.emit import Array, Window
from jaxinfer.passes.incremental.unwritten import may_spoil
from jaxinfer.passes.incremental.views import Demand, Kind, View, Views, fresh, kinds

if TYPE_CHECKING:
    from jaxinfer.passes.incremental.step import Step


class Run:
    """One evaluation: the values made so far, by view."""

    def __init__(self, step: "Step", demands: Demands, at: Window, given: dict[Node, Any], state: list[Array]):
        self.step, self.demands, self.at, self.given, self.state = step, demands, at, given, state
        self.values: dict[Demand, Array] = {}
        specs = list(enumerate(step.state_specs))
        self.rows_of = {(s.demand[0], kinds(s.demand[1])): i for i, s in specs if s.demand is not None}
        self.whole_of = {s.node: i for i, s in specs if s.demand is None}

    def get(self, node: Node, views: Views) -> Array:
        if node.constant:
            if (node, views) not in self.values:
                self.values[node, views] = self.at.slice(jnp.asarray(node.value, node.dtype), views)
            return self.values[node, views]
        made = self.demands.serving(node, views)
        return self.at.narrow(self.values[node, made], made, views)

    def serve(self, node: Node, equation: Equation | None) -> None:
        """Makes every demanded view of a value: the chunk's rows first, since state and last rows come from them."""
        for views, how in self.demands.made.get(node, {}).items():
            demand = (node, views)
            if demand in self.values:
                continue
            if how is How.REMEMBER:
                self.values[demand] = self._remember(node, views)
            elif how is How.REQUEST:
                self.values[demand] = self.state[self.whole_of[node]]
            elif how is How.LAST_ROW:
                self.values[demand] = self.at.last(self.get(node, last_to_rows(views)), views)
            elif equation is None:
                self.values[demand] = self._input(node, views)
            else:
                self._compute(equation, node, views)

    def _remember(self, node: Node, views: Views) -> Array:
        i = self.rows_of[node, kinds(views)]
        spec = self.step.state_specs[i]
        self.state[i], value = spec.append(self.state[i], self.get(node, fresh(views)), self.at)
        if spec.rows is None:
            return value
        held = tuple(View(Kind.ROWS, -spec.rows, 0) if v.kind is Kind.ROWS else v for v in views)
        return self.at.narrow(value, held, views)

    def _input(self, node: Node, views: Views) -> Array:
        value = self.given[node]
        if node not in self.step.sources:
            return self.at.slice(value, views)
        return self.at.last(value, views)  # the rows themselves, or the last of them

    def _compute(self, equation: Equation, node: Node, views: Views) -> None:
        timing, at = self.step.timing, self.at
        asked = operand_views(equation, node, views, timing)
        operands = [self.get(n, v) for n, v in asked]
        if equation in timing.running:
            self._continue(equation, operands)
            return
        if sliced_from_whole(equation, node, views, timing):
            results = _bound(equation, equation.primitive.bind(*operands, **equation.params))
            self.values[node, views] = at.slice(results[equation.outputs.index(node)], views)
            return
        factors, given = timing.factors[equation], [v for _, v in asked]
        if equation.name == convolution.NAME:
            (out,), signal = equation.outputs, next(i for i, n in enumerate(equation.inputs) if n in timing.dims)
            view = views[equation.params["time"]]
            self.values[out, views] = convolution.emit_long(equation, operands, signal, view, at)
            return
        if summed := timing.summed.get(equation):
            windows = any(reach.window is not None for reach in summed.values())
            end = at.pos + at.n + at.beyond + max(reach.gap for reach in summed.values())
            ends = [end if windows or may_spoil(self.demands, timing, n, v) else None for n, v in asked]
            operands = emit.neutralised(equation, operands, given, factors, summed, at, ends)
        result = emit.bind(equation, operands, given, at.sizes(node, views), views, at, factors)
        for out, value in zip(equation.outputs, _bound(equation, result), strict=True):
            # All results of one equation have the same factors here, so they come out in the same view.
            if out is node or views in self.demands.made.get(out, {}):
                self.values.setdefault((out, views), value)

    def _continue(self, equation: Equation, operands: Sequence[Array]) -> None:
        places = [self.whole_of[node] for node in self.step.carried(equation)]
        before = [self.state[i] for i in places]
        if equation.name == chunks.NAME:
            results, carries = chunks.run(equation, self.step.within(equation), operands, before, self.at)
        else:
            results, carries = running.run(equation, operands, before, self.at)
        for i, carry in zip(places, carries, strict=True):
            self.state[i] = carry.astype(self.state[i].dtype)
        for out, value in zip(equation.outputs, results, strict=True):
            for made, how in self.demands.made.get(out, {}).items():
                if how is How.COMPUTE:
                    self.values[out, made] = value


def _bound(equation: Equation, result: Any) -> Sequence[Array]:
    return result if equation.primitive.multiple_results else (result,)
