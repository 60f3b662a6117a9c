"""The first row as a reference (x - x[:1]): what depends on it alone is handed from row to row, as a running result.

A slice of row 0 has no row of its own for each row that reads it. So an equation `first_row` spreads x's row 0 over all
rows, what the forward makes of that row alone is made of each (jax.vmap), and where it met the other rows by
broadcasting, it meets them row by row. The values are the same; which dim is time is left to the proof.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxinfer.axes import Factors
from jaxinfer.axes.factors import ELEMENTWISE
from jaxinfer.graph import Composite, Equation, Graph, Node, evaluate, in_place_of, needed

NAME = "first_row"

Array = jax.Array


def _lower(x: Array, axis: int) -> Array:
    return jnp.broadcast_to(jax.lax.slice_in_dim(x, 0, 1, axis=axis), x.shape)


FIRST_ROW = Composite(NAME, _lower, multiple_results=False)


def factors_of_first(equation: Equation) -> Factors:
    """Row by row, from the first on."""
    dims = tuple(range(len(equation.outputs[0].shape)))
    return Factors((dims,), (dims,), cumulative={equation.params["axis"]: "forward"})


def spread(graph: Graph, rows: Sequence[Node], length: int) -> Graph:
    """The graph with first rows made row by row where all that reads them lets them be; `rows` are `length` long."""
    reached, equations, outputs = set(rows), graph.equations, set(graph.outputs)
    for equation in equations:
        if not reached.isdisjoint(equation.inputs):
            reached.update(equation.outputs)
    for cut in graph.equations:
        if cut.name == "slice" and cut.inputs[0] in reached and (axis := _axis(cut, length)) is not None:
            equations = _spread(cut, axis, equations, reached, outputs) or equations
    return graph if equations is graph.equations else Graph(graph.inputs, graph.outputs, needed(outputs, equations))


def _axis(cut: Equation, length: int) -> int | None:
    """The dim of that length of which a slice takes index 0 alone, and all of the others; None if it does otherwise."""
    before, after = cut.inputs[0].shape, cut.outputs[0].shape
    part = [d for d, (n, m) in enumerate(zip(before, after, strict=True)) if n != m]
    alone = len(part) == 1 and not any(cut.params["start_indices"])
    return part[0] if alone and before[part[0]] == length and after[part[0]] == 1 else None


def _spread(
    cut: Equation, axis: int, equations: Sequence[Equation], reached: set[Node], outputs: set[Node]
) -> list[Equation] | None:
    """The equations with one first row spread; None where it meets the rows otherwise than by broadcasting."""
    (x,), (first,) = cut.inputs, cut.outputs
    rows = Node(x.shape, x.dtype, x.weak)
    rows.equation = Equation(FIRST_ROW, {"axis": axis}, (x,), (rows,), cut.source)
    made, inner, after, fresh = {first}, [], [], {rows}
    meetings: list[tuple[Equation, tuple[Node, ...]]] = []  # what is to read other operands
    for equation in equations:
        after.append(equation)
        if equation is cut:
            after.append(rows.equation)
        if made.isdisjoint(equation.inputs):
            continue
        alone = all(n in made or n not in reached for n in equation.inputs)
        meets = {i: _meets(equation, i, x.shape[axis], alone) for i, n in enumerate(equation.inputs) if n in made}
        if alone and None in meets.values():
            made.update(equation.outputs)
            inner.append(equation)
            continue
        after.pop()
        inputs = list(equation.inputs)
        for number, dim in meets.items():
            if dim is None:
                return None
            value, broadcast = inputs[number], alone
            shape = tuple(x.shape[axis] if d == dim else n for d, n in enumerate(value.shape))
            inputs[number] = equation.outputs[0] if broadcast else Node(shape, value.dtype, value.weak)
            place = _broadcast(equation, dim) if broadcast else _stretch(dim)
            after += _each(value, inner, rows, first, axis, place, inputs[number])
            fresh.add(inputs[number])
        if not alone:
            after.append(equation)
            meetings.append((equation, tuple(inputs)))
    if made & outputs or len(fresh) == 1:
        return None
    for equation, operands in meetings:
        equation.inputs = operands
    reached.update(fresh)
    return after


def _meets(equation: Equation, number: int, length: int, alone: bool) -> int | None:
    """The dim of the result along which an operand made of one row is repeated for every row; None for no such."""
    value, out = equation.inputs[number], equation.outputs[0]
    if equation.name == "broadcast_in_dim" and len(equation.inputs) == 1:
        to = equation.params["broadcast_dimensions"]
        new = [d for d, n in enumerate(out.shape) if n == length and (d not in to or value.shape[to.index(d)] == 1)]
        return new[0] if new else None
    if alone or equation.name not in ELEMENTWISE or len(value.shape) != len(out.shape) or len(equation.outputs) > 1:
        return None
    new = [d for d, n in enumerate(out.shape) if n == length and value.shape[d] == 1]
    return new[0] if len(new) == 1 else None


def _stretch(dim: int) -> Callable[[Array], Array]:
    """[length, ...value's shape] -> the value's shape with length rows in a dim that was of size 1"""
    return lambda each: jnp.moveaxis(jnp.squeeze(each, 1 + dim), 0, dim)


def _broadcast(equation: Equation, dim: int) -> Callable[[Array], Array]:
    """[length, ...value's shape] -> what the equation makes of the value, of each row its own"""
    to, shape = equation.params["broadcast_dimensions"], equation.outputs[0].shape

    def place(each: Array) -> Array:
        each = jnp.squeeze(each, tuple(1 + i for i, d in enumerate(to) if d == dim))
        places = [dim, *(d for d in to if d != dim)]
        order = sorted(range(len(places)), key=places.__getitem__)
        return jax.lax.broadcast_in_dim(jnp.transpose(each, order), shape, sorted(places))

    return place


def _each(
    value: Node,
    inner: Sequence[Equation],
    rows: Node,
    first: Node,
    axis: int,
    place: Callable[[Array], Array],
    result: Node,
) -> list[Equation]:
    """Equations of `result`: the value made of every row of `rows` in place of the first one, put in place."""
    part = needed([value], inner)
    own = {first, *(n for e in part for n in e.outputs)}
    given = list(dict.fromkeys(n for e in part for n in e.inputs if n not in own and not n.constant))
    graph = Graph((first, *given), (value,), part)

    def made(rows: Array, *given: Array) -> list[Array]:
        one = jnp.expand_dims(jnp.moveaxis(rows, axis, 0), 1 + axis)
        (each,) = jax.vmap(lambda row: evaluate(graph, [row, *given]))(one)
        return [place(each)]

    return in_place_of([result], made, [rows, *given], rows.equation.source if rows.equation else "")
