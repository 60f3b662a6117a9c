"""What a step must compute of each value, found backward from its outputs.

A demand gives a view of each dim: the k new rows, the last of them, all rows so far, or the dim as it is. A value that
is demanded only as "all rows so far" is memory: it is stored as state, or made again from what is stored (see cut).
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass

from jaxinfer.errors import NotCausalError
from jaxinfer.graph import Equation, Graph, Node
from jaxinfer.passes.incremental.causality import Timing


class View(enum.Enum):
    """What is wanted of one dim."""

    WHOLE = "whole"  # as it is in the forward
    ROWS = "rows"  # rows pos .. pos + k: the chunk's
    LAST = "last"  # row pos + n - 1: the chunk's last real one
    PREFIX = "prefix"  # rows 0 .. L: everything so far


Views = tuple[View, ...]
Demand = tuple[Node, Views]


@dataclass(eq=False)
class Demands:
    """Everything a step computes."""

    views: dict[Node, set[Views]]  # what is wanted of each value
    memory: dict[Demand, Equation | None]  # demands met from state, or made again from state; who first asked
    roots: set[Demand]  # those of them that new rows ask for, not only other memory


def whole(node: Node) -> Views:
    """The view of a value as it is."""
    return (View.WHOLE,) * len(node.shape)


def storable(demand: Demand, timing: Timing) -> bool:
    """Whether a memory demand can be state: rows along one time dim, everything else as it is."""
    node, views = demand
    return len(timing.of(node)) == 1 and sum(v is not View.WHOLE for v in views) == 1


def appended(demand: Demand) -> Views:
    """The rows that a step adds to a stored value."""
    return tuple(View.ROWS if v is View.PREFIX else v for v in demand[1])


def is_memory(node: Node, views: Views, timing: Timing) -> bool:
    """Whether only rows so far are wanted, of a value that depends on the rows of the input."""
    times = timing.of(node)
    return bool(times) and all(views[d] is View.PREFIX for d in times)


def demands_of(
    graph: Graph,
    timing: Timing,
    last: bool,
    store: Callable[[Demand], bool],
    recompute: Callable[[Demand], bool],
) -> Demands:
    """Propagates the demand for the outputs' new rows (or last row) back to the inputs.

    Args:
        store: whether a memory demand is kept as state, which asks for its new rows.
        recompute: whether a memory demand is made again, which asks its operands for all rows so far.
    """
    found = Demands({}, {}, set())
    asked_by: dict[Demand, Equation | None] = {}
    row = View.LAST if last else View.ROWS

    def ask(node: Node, views: Views, by: Equation | None) -> None:
        found.views.setdefault(node, set()).add(views)
        asked_by.setdefault((node, views), by)

    for node in graph.outputs:
        ask(node, tuple(row if d in timing.of(node) else View.WHOLE for d in range(len(node.shape))), None)
    for node, equation in _backward(graph):
        wanted = found.views.get(node, set())
        for views in [v for v in wanted if is_memory(node, v, timing)]:
            demand = (node, views)
            found.memory[demand] = asked_by[demand]
            if store(demand):
                ask(node, appended(demand), asked_by[demand])
        for views in _computed(node, wanted):
            demand = (node, views)
            if equation is None or (demand in found.memory and not recompute(demand)):
                continue
            for operand, asked in operand_views(equation, node, views, timing):
                ask(operand, asked, equation)
                if demand not in found.memory and is_memory(operand, asked, timing):
                    found.roots.add((operand, asked))
    return found


def _backward(graph: Graph) -> list[tuple[Node, Equation | None]]:
    """Nodes, each after everything that reads it."""
    inside: list[tuple[Node, Equation | None]] = [(n, e) for e in reversed(graph.equations) for n in e.outputs]
    return [*inside, *((node, None) for node in graph.inputs)]


def _computed(node: Node, wanted: set[Views]) -> list[Views]:
    """Views that need work of their own: the last row is sliced from the rows where those are made anyway."""
    return sorted((v for v in wanted if last_to_rows(v) not in wanted or View.LAST not in v), key=str)


def last_to_rows(views: Views) -> Views:
    """The same view with all new rows instead of the last."""
    return tuple(View.ROWS if v is View.LAST else v for v in views)


def operand_views(equation: Equation, node: Node, views: Views, timing: Timing) -> list[tuple[Node, Views]]:
    """What one result's view asks of each operand.

    A value that no row of the input reaches may be made whole and sliced; then its operands are asked whole.
    """
    factors = timing.factors[equation]
    outputs = factors.outputs[equation.outputs.index(node)]
    dynamic = node in timing.dims
    by_factor: dict[int | None, View] = {}
    for factor, view in zip(outputs, views, strict=True):
        if view is View.WHOLE:
            continue
        if factor is None:
            if dynamic:
                raise NotCausalError(f"{equation} can't be made row by row")
            return [(operand, whole(operand)) for operand in equation.inputs]
        by_factor[factor] = view
    for factor in timing.summed.get(equation, ()):
        by_factor[factor] = View.PREFIX
    return [
        (operand, tuple(View.WHOLE if f is None else by_factor.get(f, View.WHOLE) for f in dims))
        for operand, dims in zip(equation.inputs, factors.inputs, strict=True)
    ]


def sliced_from_whole(equation: Equation, node: Node, views: Views, timing: Timing) -> bool:
    """Whether a view of a value that no row reaches is made by slicing the whole of it."""
    if node in timing.dims:
        return False
    outputs = timing.factors[equation].outputs[equation.outputs.index(node)]
    return any(v is not View.WHOLE and f is None for v, f in zip(views, outputs, strict=True))
