"""Equations whose rows continue from the row before: scans over time, running sums, associative scans.

Their state is what the last row left. Position 0 starts from the forward's own beginning, whatever the state holds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import _jax
from jaxinfer.graph import Equation, Node
from jaxinfer.passes.incremental.emit import Window

Array = jax.Array
Carries = Sequence[Array]

_COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    "cumsum": jnp.add,
    "cumprod": jnp.multiply,
    "cummax": jnp.maximum,
    "cummin": jnp.minimum,
    "cumlogsumexp": jnp.logaddexp,
    "first_row": lambda carry, rows: jnp.broadcast_to(carry, rows.shape),
}
KNOWN = frozenset(("scan", "associative_scan", *_COMBINE))


def carries_of(equation: Equation) -> list[Node]:
    """Shape and dtype of what one row hands to the next."""
    if equation.name == "scan":
        parts = _jax.scan_parts(equation.params)
        like = [n.shape for n in equation.outputs[: parts.carry]]
        nodes = equation.outputs[: parts.carry]
    elif equation.name == "associative_scan":
        nodes = tuple(equation.outputs[i] for i in equation.params["carried"])
        axes = [equation.params["axes"][i] for i in equation.params["carried"]]
        like = [_one_row(n.shape, axis) for n, axis in zip(nodes, axes, strict=True)]
    else:
        nodes = equation.outputs
        like = [_one_row(nodes[0].shape, equation.params["axis"])]
    return [Node(shape, n.dtype, equation=equation) for shape, n in zip(like, nodes, strict=True)]


def run(equation: Equation, operands: Sequence[Array], carries: Carries, at: Window) -> tuple[list[Array], list[Array]]:
    """(results for the chunk's k rows, carries after its n real ones)"""
    if equation.name == "scan":
        return _scan(equation, operands, carries, at)
    if equation.name == "associative_scan":
        return _associative(equation, operands, carries, at)
    axis = equation.params["axis"]
    rows: Any = equation.primitive.bind(*operands, **equation.params)
    result = _continued(at, rows, _COMBINE[equation.name](carries[0], rows))
    return [result], [_last(result, carries[0], axis, at)]


def _one_row(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], 1, *shape[axis + 1 :])


def _continued(at: Window, start: Array, continued: Array) -> Array:
    """A sequence's first rows start anew."""
    return jnp.where(at.pos == 0, start, continued.astype(start.dtype))


def _last(rows: Array, before: Array, axis: int, at: Window) -> Array:
    """The last real row; what was before where there is none."""
    row = jax.lax.dynamic_slice_in_dim(rows, jnp.maximum(at.n - 1, 0), 1, axis=axis)
    return jnp.where(at.n > 0, row, before)


def _associative(
    equation: Equation, operands: Sequence[Array], carries: Carries, at: Window
) -> tuple[list[Array], list[Array]]:
    params = equation.params
    count, axes, carried = params["count"], params["axes"], params["carried"]
    rows = list(equation.primitive.bind(*operands, **params))
    left = list(rows)  # stands in for what isn't carried: nothing that is read depends on it
    for i, carry in zip(carried, carries, strict=True):
        left[i] = jnp.broadcast_to(carry, rows[i].shape)
    joined = params["operator"](left, rows, list(operands[count:]))
    results = [_continued(at, a, b) for a, b in zip(rows, joined, strict=True)]
    return results, [_last(results[i], carry, axes[i], at) for i, carry in zip(carried, carries, strict=True)]


def _scan(
    equation: Equation, operands: Sequence[Array], carries: Carries, at: Window
) -> tuple[list[Array], list[Array]]:
    parts = _jax.scan_parts(equation.params)
    consts = operands[: parts.consts]
    first, stacks = operands[parts.consts : parts.consts + parts.carry], operands[parts.consts + parts.carry :]
    start = [_continued(at, a, b) for a, b in zip(first, carries, strict=True)]

    def step(carry: tuple[Array, list[Array]], elements: list[Array]) -> tuple[tuple[Array, list[Array]], list[Array]]:
        i, values = carry
        results = _jax.evaluate(parts.body, *consts, *values, *elements)
        moved = [jnp.where(i < at.n, new, old) for new, old in zip(results, values, strict=False)]
        return (i + 1, moved), results[parts.carry :]

    (_, after), rows = jax.lax.scan(step, (jnp.int32(0), start), list(stacks), length=at.k)
    after = [jnp.where(at.n > 0, a, before) for a, before in zip(after, carries, strict=True)]
    return [*after, *rows], after
