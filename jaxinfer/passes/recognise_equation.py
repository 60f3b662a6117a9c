"""The equation that stands for a call of jax.lax.associative_scan: made of the call, run on any number of rows."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.axes.factors import Factors, rule
from jaxinfer.graph import Composite, Equation, Node
from jaxinfer.passes.recognise_cut import Cut
from jaxinfer.passes.recognise_operator import Array, operator_of
from jaxinfer.passes.recognise_tree import SCOPE, Call, Change, Side, resized


def run(*operands: Array, operator: Any, axes: tuple[int, ...], reverse: bool, count: int, carried: Any) -> Any:
    """jax.lax.associative_scan on any number of rows."""
    del carried
    extras = operands[count:]

    def combine(left: list[Array], right: list[Array]) -> list[Array]:
        sides = [[jnp.moveaxis(x, 0, axis) for x, axis in zip(side, axes, strict=True)] for side in (left, right)]
        return [jnp.moveaxis(x, axis, 0) for x, axis in zip(operator(*sides, extras), axes, strict=True)]

    rows = [jnp.moveaxis(x, axis, 0) for x, axis in zip(operands[:count], axes, strict=True)]
    scanned = jax.lax.associative_scan(combine, rows, reverse=reverse)
    return [jnp.moveaxis(x, 0, axis) for x, axis in zip(scanned, axes, strict=True)]


ASSOCIATIVE_SCAN = Composite(SCOPE, run)


@rule(SCOPE, params="operator axes reverse count carried")
def _factors(equation: Equation) -> Factors:
    operator, count = equation.params["operator"], equation.params["count"]
    classes = operator.classes
    inputs = (*classes[:count], *classes[2 * count :])
    way = "reverse" if equation.params["reverse"] else "forward"
    return Factors(inputs, classes[:count], cumulative={0: way})


def scan_equation(call: Call, readers: dict[Node, list[Equation]]) -> Change:
    """The equation of a call, and the value that each of its results takes the place of."""
    number = {side: end for end, side in call.ends.items()}
    order = sorted(call.dims, key=lambda s: _number(number.get((1, s)) or number[0, s]))
    whole = Cut({}, set(), set(), set())
    for found in call.cuts.values():
        whole.dims.update(found.dims)
        whole.equations |= found.equations
        whole.extras |= found.extras
    extras = sorted((n for n in whole.extras if not n.constant), key=_number)
    left, right = ([_end(number, side, s, call) for s in order] for side in (0, 1))
    whole.dims.update({n: call.dims[s] for ends in (left, right) for n, s in zip(ends, order, strict=True)})
    operator = operator_of(left, right, extras, [call.first[s] for s in order], whole)
    operands, ends, reverse = _reversed(call, order, readers)
    outputs = tuple(Node(n.shape, n.dtype) for n in operands)
    params = {
        "operator": operator,
        "axes": tuple(call.dims[s] for s in order),
        "reverse": reverse,
        "count": len(order),
        "carried": _carried(call, order),
    }
    source = next(e.equation.source for e in call.ends if e.equation is not None)
    equation = Equation(ASSOCIATIVE_SCAN, params, (*operands, *extras), outputs, source)
    for node in outputs:
        node.equation = equation
    instead = {old: outputs[i] for i, s in enumerate(order) if (old := ends.get(s)) is not None}
    return Change({min((n.equation for n in instead if n.equation is not None), key=_place): [equation]}, instead)


def _place(equation: Equation) -> int:
    return equation.number


def _end(number: dict[Side, Node], side: int, source: Node, call: Call) -> Node:
    """The slice of an operand on one side, or a value that stands for it where the operator doesn't read it."""
    shape = resized(source.shape, call.dims[source], call.rows // 2)
    return number.get((side, source)) or Node(shape, source.dtype, source.weak)


def _carried(call: Call, order: Sequence[Node]) -> tuple[int, ...]:
    needs = {s: {o for end in call.cuts[s].ends for side, o in [call.ends[end]] if side == 0} for s in order}
    found: set[Node] = set()
    todo = list(call.roots)
    while todo:
        new = needs[todo.pop()] - found
        found |= new
        todo += new
    return tuple(i for i, s in enumerate(order) if s in found)


def _reversed(
    call: Call, order: Sequence[Node], readers: dict[Node, list[Equation]]
) -> tuple[list[Node], dict[Node, Node], bool]:
    """Operands, results by scanned operand, and whether the scan runs from the end: then JAX reverses both itself."""

    def turned(equation: Equation | None, dim: int) -> bool:
        return equation is not None and equation.scope == SCOPE and equation.params.get("dimensions") == (dim,)

    after = {s: readers.get(root, []) for s, root in call.roots.items()}
    inward = all(turned(s.equation, d) for s, d in call.dims.items())
    if not inward or not all(len(found) == 1 and turned(found[0], call.dims[s]) for s, found in after.items()):
        return list(order), call.roots, False
    operands = [s.equation.inputs[0] for s in order if s.equation is not None]
    return operands, {s: found[0].outputs[0] for s, found in after.items()}, True


def _number(node: Node) -> int:
    return -1 if node.equation is None else node.equation.number
