"""Cuts the operator of an associative scan out of the first place where it was applied.

Backward from a result to the rows that it combined, by the factor rules. A rule that mixes rows, or a parameter that
spells a shape in a way not known here, ends the attempt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxinfer.axes.factors import ELEMENTWISE, factors_of
from jaxinfer.graph import Equation, Node


class Unrecognised(Exception):
    """What stands here isn't the idiom; the equations stay as they are."""


# Parameters that spell the shape of the first result, or of the operand's part that is taken.
_SHAPE = {
    "broadcast_in_dim": "shape",
    "reshape": "new_sizes",
    "iota": "shape",
    "slice": "limit_indices",
    "dynamic_slice": "slice_sizes",
}
# Primitives whose parameters say nothing of a dim that is aligned; besides, everything elementwise.
# fmt: off
_UNSIZED = frozenset((
    "transpose", "squeeze", "expand_dims", "dot_general", "concatenate", "pad", "rev", "stack", "unstack", "split",
    "sort", "top_k", "argmax", "argmin", "reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or",
    "reduce_prod", "reduce_xor", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp",
))
# fmt: on


def params_at(equation: Equation, dim: int, rows: int) -> dict[str, Any]:
    """An equation's parameters when `dim` of its result has another number of rows.

    Raises:
        Unrecognised: they can't be told.
    """
    name = _SHAPE.get(equation.name)
    if name is None:
        if equation.name not in _UNSIZED and equation.name not in ELEMENTWISE:
            raise Unrecognised(f"{equation} can't be made at another number of rows")
        return equation.params
    sizes = tuple(rows if d == dim else n for d, n in enumerate(equation.params[name]))
    return {**equation.params, name: sizes}


@dataclass
class Cut:
    """The equations between rows and what was made of them."""

    dims: dict[Node, int]  # the scanned dim of each value that has one
    equations: set[Equation]
    ends: set[Node]  # where rows come in
    extras: set[Node]  # other values that are read


def cut(out: Node, dim: int, is_end: Callable[[Node, int], bool]) -> Cut:
    """Everything that has rows, from a result back to the ends.

    Args:
        is_end: whether rows of the scan come in at a value, as this dim of it.

    Raises:
        Unrecognised: rows mix, or come from elsewhere.
    """
    found = Cut({out: dim}, set(), set(), set())
    todo = [out]
    while todo:
        node = todo.pop()
        if node.shape[found.dims[node]] != out.shape[dim]:
            raise Unrecognised("some rows are left out")
        if is_end(node, found.dims[node]):
            found.ends.add(node)
            continue
        equation = node.equation
        if equation is None or equation.scope:
            raise Unrecognised("rows of a value from outside of the scan")
        found.equations.add(equation)
        for operand, d in _aligned(equation, node, found.dims[node]):
            if d is None:
                found.extras.add(operand)
            elif operand not in found.dims:
                found.dims[operand] = d
                todo.append(operand)
            elif found.dims[operand] != d:
                raise Unrecognised(f"{equation} takes rows along two dims")
    _check_extras(found)
    return found


def _aligned(equation: Equation, node: Node, dim: int) -> list[tuple[Node, int | None]]:
    """Each operand with the dim of it that goes with a dim of a result."""
    factors = factors_of(equation)
    factor = factors.outputs[equation.outputs.index(node)][dim]
    if factor is None or factor in factors.cumulative or dim in factors.indexed:
        raise Unrecognised(f"{equation} mixes rows")
    params_at(equation, dim, 1)
    found: list[tuple[Node, int | None]] = []
    for i, (operand, dims) in enumerate(zip(equation.inputs, factors.inputs, strict=True)):
        mine = [d for d, f in enumerate(dims) if f == factor]
        if len(mine) > 1 or any(factors.halo.get((i, d), (0, 0)) != (0, 0) for d in mine):
            raise Unrecognised(f"{equation} mixes rows")
        found.append((operand, mine[0] if mine else None))
    return found


def _check_extras(found: Cut) -> None:
    """Values that the operator reads besides rows must not be made of rows."""
    start = min((n.equation.number for n in found.ends if n.equation is not None), default=None)
    if start is None:
        raise Unrecognised("the operator reads no rows")
    todo, seen = list(found.extras), set(found.extras)
    while todo:
        node = todo.pop()
        if node in found.dims:
            raise Unrecognised("the operator reads rows both one by one and together")
        equation = node.equation
        if equation is None:
            continue
        if equation in found.equations or (equation.scope and equation.name == "slice"):  # of this scan's rows
            raise Unrecognised(f"{equation} mixes rows")
        if equation.number > start:
            todo += [n for n in equation.inputs if n not in seen]
            seen.update(equation.inputs)
