"""What a step must compute of each value, found backward from its outputs.

A demand gives a view of each dim (see views). What is wanted of rows before the chunk's own is memory: it is stored as
state, or made again from what is stored (see cut). All wants of one value that differ only in how many rows they reach
back are served by one array, their hull.
"""

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jaxinfer.errors import NotCausalError
from jaxinfer.graph import Equation, Node
from jaxinfer.passes.incremental.causality import Reach, Timing
from jaxinfer.passes.incremental.views import (
    LAST,
    PREFIX,
    ROWS,
    WHOLE,
    Demand,
    Kind,
    Kinds,
    View,
    Views,
    fresh,
    holds,
    hull,
    kinds,
    whole,
)


class How(enum.Enum):
    """Where a view of a value comes from; in the order in which views of one value are made."""

    COMPUTE = 0  # by its equation, or given as the step's argument
    REMEMBER = 1  # the state, with the chunk's own rows added
    LAST_ROW = 2  # the last real one of the rows at hand
    REQUEST = 3  # the state, where it was put when the sequence began


Plan = dict[Views, How]
Wanted = dict[Views, Equation | None]  # and who asked first; None for an output


@dataclass(eq=False)
class Demands:
    """Everything a step computes."""

    made: dict[Node, Plan] = field(default_factory=dict)  # in the order in which they are made
    memory: dict[Demand, Equation | None] = field(default_factory=dict)  # wants of earlier rows, and who asked first
    roots: set[Demand] = field(default_factory=set)  # what the chunk's own rows ask for of it

    def serving(self, node: Node, views: Views) -> Views:
        """The view that is made of a value and holds this one."""
        made = self.made[node]
        return views if views in made else next(v for v in made if holds(v, views))


def storable(demand: Demand, timing: Timing) -> bool:
    """Whether a memory demand can be state: rows along one time dim, everything else as it is."""
    node, views = demand
    rows = [(d, v) for d, v in enumerate(views) if v.kind is not Kind.WHOLE]
    if len(timing.of(node)) != 1 or len(rows) != 1 or timing.ahead[node] > 0:
        return False
    ((d, view),) = rows
    return node.shape[d] == timing.capacity if view.kind is Kind.PREFIX else view.hi <= 0  # with rows of time alone


def is_memory(node: Node, views: Views, timing: Timing) -> bool:
    """Whether only rows so far or shifted ones are wanted, of a value that depends on the rows of the input."""
    times = timing.of(node)
    for d in times:
        if views[d].kind is not Kind.PREFIX and views[d] in (ROWS, LAST, WHOLE):
            return False
    return bool(times)


def repeatable(demand: Demand, timing: Timing) -> bool:
    """Whether a memory demand may be made again from its operands.

    By movement and elementwise work; by more only where rows ahead are wanted of a value, which no state can have.
    """
    node, views = demand
    equation = node.equation
    if equation is None or equation in timing.running:
        return False
    factors = timing.factors[equation]
    if Kind.PREFIX in kinds(views):
        return factors.movement and all(high <= 0 for _, high in factors.halo.values())
    return factors.movement or not storable(demand, timing)


def demands_of(
    timing: Timing,
    last: bool,
    store: Callable[[Demand], bool],
    recompute: Callable[[Demand], bool],
    also: Sequence[Demand] = (),
) -> Demands:
    """Propagates the demand for the outputs' new rows (or last row) back to the inputs.

    Args:
        store: whether a memory demand is kept as state, which asks for its new rows.
        recompute: whether a memory demand is made again, which asks its operands for earlier rows.
        also: wanted beside the outputs: memory to keep up though nothing in this step may read it.
    """
    search = _Search(timing, store, recompute)
    row = LAST if last else ROWS
    for node in timing.graph.outputs:
        search.ask(node, tuple(row if d in timing.of(node) else WHOLE for d in range(len(node.shape))), None)
    for node, views in also:
        search.ask(node, views, None)
    for equation in reversed(timing.graph.equations):
        for node in equation.outputs:
            search.visit(node, equation)
    for node in timing.graph.inputs:
        search.visit(node, None)
    return search.found


class _Search:
    """The wants of values not yet visited; a value is visited after all that reads it."""

    def __init__(self, timing: Timing, store: Callable[[Demand], bool], recompute: Callable[[Demand], bool]):
        self.timing, self.store, self.recompute = timing, store, recompute
        self.found = Demands()
        self.asked: dict[Node, Wanted] = {}

    def ask(self, node: Node, views: Views, by: Equation | None) -> None:
        self.asked.setdefault(node, {}).setdefault(views, by)

    def visit(self, node: Node, equation: Equation | None) -> None:
        """Settles where every view that is wanted of a value comes from, and asks its operands for it."""
        wanted = self.asked.pop(node, None)
        if wanted is None:
            return
        plan: Plan = {}
        done: set[Kinds] = set()
        if len(wanted) == 1:  # nearly always
            (views,) = wanted
            done.add(kinds(views))
            self._settle(node, equation, kinds(views), plan, wanted)
        while len(wanted) > 1 and (groups := {k for k in map(kinds, wanted) if k not in done}):
            # What is settled may ask for the chunk's own rows of the same value, whose turn is last.
            group = min(groups, key=lambda g: (max(g, default=Kind.WHOLE), Kind.LAST not in g))
            done.add(group)
            self._settle(node, equation, group, plan, wanted)
        self.found.made[node] = plan if len(plan) == 1 else dict(sorted(plan.items(), key=lambda i: i[1].value))

    def _settle(self, node: Node, equation: Equation | None, group: Kinds, plan: Plan, wanted: Wanted) -> None:
        """Settles what is wanted of a value in one combination of kinds."""
        views = hull([v for v in wanted if kinds(v) == group])
        if Kind.LAST in group:
            rows = last_to_rows(views)
            if kinds(rows) in map(kinds, wanted) or _by_rows(equation, self.timing):
                plan[views] = How.LAST_ROW
                wanted.setdefault(rows, next(by for v, by in wanted.items() if kinds(v) == group))
                return
        if node in self.timing.requests and not any(group) and _worth_keeping(node, equation):
            plan[views] = How.REQUEST
        elif is_memory(node, views, self.timing):
            self._memory(node, equation, views, plan, wanted)
        else:
            self._compute(node, equation, views, plan)

    def _memory(self, node: Node, equation: Equation | None, views: Views, plan: Plan, wanted: Wanted) -> None:
        demand = (node, views)
        by = self.found.memory[demand] = next(by for v, by in wanted.items() if kinds(v) == kinds(views))
        if self.recompute(demand):
            self._compute(node, equation, views, plan)
        if self.store(demand):
            plan[views] = How.REMEMBER
            if kinds(fresh(views)) == kinds(views):  # a window: its own group, so nobody else makes the new rows
                self._compute(node, equation, fresh(views), plan)
            else:
                wanted.setdefault(fresh(views), by)

    def _compute(self, node: Node, equation: Equation | None, views: Views, plan: Plan) -> None:
        plan[views] = How.COMPUTE
        if equation is None:
            return
        memory = is_memory(node, views, self.timing)
        for operand, asked in operand_views(equation, node, views, self.timing):
            self.ask(operand, asked, equation)
            if not memory and is_memory(operand, asked, self.timing):
                self.found.roots.add((operand, asked))


def _worth_keeping(node: Node, equation: Equation | None) -> bool:
    """Whether a value that the request decides is kept as it is: what only spreads a smaller one out is made again."""
    sizes = [math.prod(n.shape) for n in equation.inputs] if equation is not None else []
    return equation is None or equation.name != "broadcast_in_dim" or math.prod(node.shape) <= max(sizes)


def _by_rows(equation: Equation | None, timing: Timing) -> bool:
    """Whether the last row is made as one of the rows: what shifts or runs along time knows no row by itself."""
    return equation is not None and (equation in timing.running or bool(timing.factors[equation].halo))


def last_to_rows(views: Views) -> Views:
    """The same view with all new rows instead of the last."""
    return tuple(ROWS if v == LAST else v for v in views)


def operand_views(equation: Equation, node: Node, views: Views, timing: Timing) -> list[tuple[Node, Views]]:
    """What one result's view asks of each operand.

    A value that no row of the input reaches may be made whole and sliced; then its operands are asked whole.
    """
    number = 0 if len(equation.outputs) == 1 else equation.outputs.index(node)
    key = (timing.kind_of(equation), number, views)
    asked = timing.asked.get(key)
    if asked is None:
        asked = timing.asked[key] = _operand_views(equation, node, views, timing)
    return list(zip(equation.inputs, asked, strict=True))


def _operand_views(equation: Equation, node: Node, views: Views, timing: Timing) -> tuple[Views, ...]:
    """The views alone, which are the same for all equations of a kind (see Timing.kind_of)."""
    factors = timing.factors[equation]
    if sliced_from_whole(equation, node, views, timing):
        return tuple(map(whole, equation.inputs))
    by_factor: dict[int, View] = {}
    for factor, view in zip(factors.outputs[equation.outputs.index(node)], views, strict=True):
        if view.kind is not Kind.WHOLE:
            if factor is None:
                raise NotCausalError(f"{equation} can't be made row by row")
            if equation in timing.running and factor not in factors.cumulative and view != PREFIX:
                raise NotCausalError(
                    f"{equation} runs along time, and rows of another dim of it are wanted one by one: values of pairs "
                    "of rows have no running state of bounded size"
                )
            by_factor[factor] = view
    for factor, reach in timing.summed.get(equation, {}).items():
        by_factor[factor] = _rows_reached(reach, by_factor)
    return tuple(
        tuple(_asked(equation, number, d, f, by_factor, timing) for d, f in enumerate(dims))
        for number, dims in enumerate(factors.inputs)
    )


def _asked(
    equation: Equation, number: int, dim: int, factor: int | None, views: dict[int, View], timing: Timing
) -> View:
    """What the view of a factor asks of an operand's dim."""
    if factor is None or factor not in views:
        return WHOLE
    view = views[factor]
    halo = timing.factors[equation].halo.get((number, dim), (0, 0))
    node = equation.inputs[number]
    if view.kind is Kind.PREFIX and node in timing.dims:
        return View(Kind.PREFIX, *timing.extent.get((node, dim), (0, 0)))
    if view.kind is Kind.PREFIX and equation.name == "concatenate" and view != PREFIX:
        return WHOLE  # rows that aren't time, joined on
    return view.shifted(*halo)


def _rows_reached(reach: Reach, by_factor: dict[int, View]) -> View:
    """Which rows of a reduced time dim matter: everything so far, or a window before the rows of the result."""
    behind = WHOLE if reach.behind is None else by_factor.get(reach.behind, WHOLE)
    if reach.window is None or behind.kind in (Kind.PREFIX, Kind.WHOLE):
        return View(Kind.PREFIX, *reach.extent)
    return View(Kind.ROWS, behind.lo - reach.window, behind.hi)


def sliced_from_whole(equation: Equation, node: Node, views: Views, timing: Timing) -> bool:
    """Whether a view of a value that no row reaches is made by slicing the whole of it."""
    if node in timing.dims:
        return False
    factors = timing.factors[equation]
    viewed = [(f, v) for f, v in zip(factors.outputs[equation.outputs.index(node)], views, strict=True) if v != WHOLE]
    if any(f is None or f in factors.cumulative for f, _ in viewed):
        return True
    shifted = {dims[d] for (i, d) in factors.halo for dims in [factors.inputs[i]]}
    return any(f in shifted and (equation.name != "slice" or v.kind is Kind.PREFIX) for f, v in viewed)
