"""Evaluates the demanded views of a graph inside a JAX trace: the step for one sequence.

Every primitive is bound again on operands whose viewed dims have other sizes; of its parameters only those change that
spell a shape.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.axes import Factors
from jaxinfer.graph import Equation, Node
from jaxinfer.passes.incremental.views import LAST, ROWS, Kind, View, Views

Array = jax.Array


@dataclass(frozen=True)
class Window:
    """Where a step stands: k rows from `pos`, of which the first n are real, reading `length` rows of what was."""

    k: int
    length: int
    pos: Array  # int32 scalar
    n: Array  # int32 scalar
    beyond: int = 0  # so many rows after the n real ones are read as well, though not kept

    def size(self, view: View, whole: int) -> int:
        """Size of a viewed dim."""
        if view.kind is Kind.ROWS:
            return self.k + view.hi - view.lo
        if view.kind is Kind.PREFIX:
            return view.lo + min(self.length, whole - view.lo - view.hi) + view.hi
        return whole if view.kind is Kind.WHOLE else 1

    def sizes(self, node: Node, views: Views) -> tuple[int, ...]:
        """Shape of a viewed value."""
        return tuple(self.size(v, n) for v, n in zip(views, node.shape, strict=True))

    def indices(self, view: View, whole: int) -> Array:
        """Rows of the whole forward that a view holds: int32 [size]. Some may not exist: below 0, or past the end."""
        if view.kind is Kind.PREFIX:
            index = jnp.arange(self.size(view, whole), dtype=jnp.int32)
            return jnp.where(index < index.size - view.hi, index, index + (whole - index.size)) if view.hi else index
        if view.kind is Kind.ROWS:
            return self.pos + view.lo + jnp.arange(self.size(view, 0), dtype=jnp.int32)
        return jnp.reshape(self.pos + jnp.maximum(self.n - 1, 0), (1,))

    def slice(self, value: Array, views: Views) -> Array:
        """A view of a value at hand in whole (a parameter or constant, or made whole)."""
        for d, view in enumerate(views):
            if view.kind is Kind.PREFIX and not view.hi:
                value = jax.lax.slice_in_dim(value, 0, self.size(view, value.shape[d]), axis=d)
            elif view.kind is not Kind.WHOLE:
                # Rows that don't exist are never used: clip rather than shift the window.
                value = jnp.take(value, self.indices(view, value.shape[d]), axis=d, mode="clip")
        return value

    def narrow(self, value: Array, outer: Views, inner: Views) -> Array:
        """The rows of `inner` out of those of `outer`, which holds them."""
        for d, (have, want) in enumerate(zip(outer, inner, strict=True)):
            if have != want:
                start = want.lo - have.lo
                value = jax.lax.slice_in_dim(value, start, start + self.size(want, 0), axis=d)
        return value

    def last(self, rows: Array, views: Views) -> Array:
        """The last real row out of the chunk's rows; `views` has LAST where `rows` has ROWS."""
        for d, view in enumerate(views):
            if view.kind is Kind.LAST:
                rows = jax.lax.dynamic_slice_in_dim(rows, jnp.maximum(self.n - 1, 0), 1, axis=d)
        return rows

    def within(self, first: int, end: int | Array | None, view: View, dim: int, rows: Array, other: Any) -> Array:
        """`rows` where their index along `dim` is in first .. end, and `other` elsewhere."""
        index = self.indices(view, rows.shape[dim])
        inside = (index >= first) if end is None else (index >= first) & (index < end)
        mask = jnp.broadcast_to(inside.reshape([-1 if d == dim else 1 for d in range(rows.ndim)]), rows.shape)
        return jnp.where(mask, rows, jnp.asarray(other, rows.dtype))


def bind(
    equation: Equation,
    operands: Sequence[Array],
    asked: Sequence[Views],
    sizes: tuple[int, ...],
    views: Views,
    at: Window,
    factors: Factors,
) -> Any:
    """Applies an equation's primitive to viewed operands; returns what the primitive returns.

    Args:
        asked: the view of each operand.
        sizes, views: shape and view of the result.
    """
    if equation.name == "iota":
        return _iota(equation, sizes, views, at)
    if equation.name == "top_k":
        operands = [_at_least(operands[0], equation.params["k"])]
    if equation.name == "dot_general" and _should_swap(equation, asked):
        return _swapped_dot(equation, operands)
    special = _SHIFTED.get(equation.name)
    if special is not None and any(v.kind in (Kind.ROWS, Kind.PREFIX) for v in views):
        return special(equation, operands, asked, sizes, views, at)
    params = dict(equation.params)
    resize = _RESIZE.get(equation.name)
    if resize is not None:
        params.update(resize(equation, factors, operands, sizes, views))
    return equation.primitive.bind(*operands, **params)


def _at_least(rows: Array, k: int) -> Array:
    """The last dim with k elements, of which those added are the least: the forward has as many, masked."""
    short = max(0, k - rows.shape[-1])
    return jax.lax.pad(
        rows, jnp.asarray(_neutral("max", rows.dtype), rows.dtype), [(0, 0, 0)] * (rows.ndim - 1) + [(0, short, 0)]
    )


def _should_swap(equation: Equation, asked: Sequence[Views]) -> bool:
    """Whether memory stands on the side of a product where XLA:CPU would transpose a copy of it at every step.

    Stored as [batch, time, features], memory is read as it lies as the left side where features are contracted (K), and
    as the right side where time is (V).
    """
    remembered = [any(map(_earlier, v)) and not any(v_ in (ROWS, LAST) for v_ in v) for v in asked]
    sums = equation.params["dimension_numbers"][0]
    if remembered == [True, False]:
        return any(_earlier(asked[0][d]) for d in sums[0])
    if remembered == [False, True]:
        return bool(sums[1]) and not any(_earlier(asked[1][d]) for d in sums[1])
    return False


def _earlier(view: View) -> bool:
    return view.kind is Kind.PREFIX or view.lo < 0


def _swapped_dot(equation: Equation, operands: Sequence[Array]) -> Array:
    """dot(a, b) as transpose(dot(b, a))."""
    (a_sum, b_sum), (a_batch, b_batch) = equation.params["dimension_numbers"]
    params = {**equation.params, "dimension_numbers": ((b_sum, a_sum), (b_batch, a_batch))}
    precision = params.get("precision")
    params["precision"] = precision[::-1] if isinstance(precision, tuple) else precision
    product: Any = equation.primitive.bind(*operands[::-1], **params)
    batch = len(a_batch)
    free_b = operands[1].ndim - batch - len(b_sum)
    order = (*range(batch), *range(batch + free_b, product.ndim), *range(batch, batch + free_b))
    return jnp.transpose(product, order)


def _iota(equation: Equation, sizes: tuple[int, ...], views: Views, at: Window) -> Array:
    dimension, dtype = equation.params["dimension"], equation.params["dtype"]
    if views[dimension].kind is Kind.WHOLE:
        return jax.lax.broadcasted_iota(dtype, sizes, dimension)
    indices = at.indices(views[dimension], equation.outputs[0].shape[dimension]).astype(dtype)
    return jax.lax.broadcast_in_dim(indices, sizes, (dimension,))


def _broadcast_in_dim(equation: Equation, factors: Factors, operands: Any, sizes: Any, views: Any) -> Mapping[str, Any]:
    return {"shape": sizes}


def _reshape(equation: Equation, factors: Factors, operands: Any, sizes: Any, views: Any) -> Mapping[str, Any]:
    return {"new_sizes": sizes}


def _slice(equation: Equation, factors: Factors, operands: Any, sizes: Any, views: Any) -> Mapping[str, Any]:
    """Rows were asked for shifted by the start already; a PREFIX has as many as are wanted, from its start on."""
    starts, limits = [], []
    given = (equation.params["start_indices"], equation.params["limit_indices"], sizes, operands[0].shape)
    for view, start, limit, size, room in zip(views, *given, strict=True):
        moved = view.kind in (Kind.ROWS, Kind.LAST)
        starts.append(0 if moved else start)
        limits.append(room if moved else min(start + size, room) if view.kind is Kind.PREFIX else limit)
    return {"start_indices": tuple(starts), "limit_indices": tuple(limits)}


def _dynamic_slice(equation: Equation, factors: Factors, operands: Any, sizes: Any, views: Any) -> Mapping[str, Any]:
    return {"slice_sizes": sizes}


def _gather(equation: Equation, factors: Factors, operands: Any, sizes: Any, views: Any) -> Mapping[str, Any]:
    aligned = zip(factors.inputs[0], operands[0].shape, equation.params["slice_sizes"], strict=True)
    batching = equation.params["dimension_numbers"].operand_batching_dims
    picked = [n if f is not None and d not in batching else size for d, (f, n, size) in enumerate(aligned)]
    return {"slice_sizes": tuple(picked)}


_RESIZE = {
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
}


def _pad(equation: Equation, operands: Any, asked: Any, sizes: Any, views: Views, at: Window) -> Array:
    """Rows that the operand doesn't have are the padding; a PREFIX is padded in front and cut to its length."""
    value, fill = operands
    config = list(equation.params["padding_config"])
    for d, view in enumerate(views):
        if view.kind is Kind.ROWS:
            rows = equation.inputs[0].shape[d]
            value = at.within(0, rows, asked[0][d], d, value, fill)
            config[d] = (0, 0, 0)
        elif view.kind is Kind.PREFIX:
            low = config[d][0]
            config[d] = (low, sizes[d] - low - value.shape[d], 0)
    return jax.lax.pad(value, fill, config)


def _concatenate(equation: Equation, operands: Any, asked: Any, sizes: Any, views: Views, at: Window) -> Array:
    """Each row from the piece that it lies in."""
    axis = equation.params["dimension"]
    if views[axis].kind is not Kind.ROWS:
        joined = jax.lax.concatenate(operands, axis)
        return jax.lax.slice_in_dim(joined, 0, sizes[axis], axis=axis)
    result, end = operands[-1], 0
    for node, piece in zip(equation.inputs[:-1], operands[:-1], strict=True):
        start, end = end, end + node.shape[axis]
        result = at.within(start, end, views[axis], axis, piece, result)
    return result


def _convolution(equation: Equation, operands: Any, asked: Any, sizes: Any, views: Views, at: Window) -> Array:
    """The operand's rows reach back as far as the window does; those that don't exist are the zeros of its padding."""
    value, kernel = operands
    params = dict(equation.params)
    lhs_spec, _, out_spec = params["dimension_numbers"]
    padding = list(params["padding"])
    for number, (a, c) in enumerate(zip(lhs_spec[2:], out_spec[2:], strict=True)):
        if views[c].kind is Kind.ROWS:
            rows = equation.inputs[0].shape[a]
            value = at.within(0, rows, asked[0][a], a, value, 0)
            padding[number] = (0, 0)
    result: Any = equation.primitive.bind(value, kernel, **{**params, "padding": tuple(padding)})
    return result


_SHIFTED = {"pad": _pad, "concatenate": _concatenate, "conv_general_dilated": _convolution}


def neutralised(
    equation: Equation,
    operands: Sequence[Array],
    asked: Sequence[Views],
    factors: Factors,
    times: Collection[int],
    at: Window,
    ends: Sequence[Array | None],
) -> list[Array]:
    """Operands of a reduction over time, with what lies before the first row or past the last that there is made to
    count nothing: a mask of zeros doesn't hide the infinities that a function may make of such rows.

    Args:
        times: the factors that are reduced and time.
        ends: for each operand the row after the last that is seen; None where all of it is finite (see unwritten).
    """
    result = list(operands)
    for number, (dims, end) in enumerate(zip(factors.inputs, ends, strict=True)):
        for d, factor in enumerate(dims):
            view = asked[number][d]
            if factor in times and view.kind in (Kind.ROWS, Kind.PREFIX):
                fill = _neutral(factors.reduction or "sum", result[number].dtype)
                rows = equation.inputs[number].shape[d]
                if view.kind is Kind.ROWS:
                    last = rows if end is None else jnp.minimum(rows, end)
                    result[number] = at.within(0, last, view, d, result[number], fill)
                elif end is not None:
                    joined = at.within(rows - view.hi, None, view, d, result[number], fill) if view.hi else fill
                    result[number] = at.within(0, view.lo + end, view, d, result[number], joined)
    return result


def _neutral(reduction: str, dtype: Any) -> Any:
    """What leaves a reduction as it is."""
    if reduction in ("max", "min"):
        if jnp.issubdtype(dtype, jnp.floating):
            return -jnp.inf if reduction == "max" else jnp.inf
        if jnp.issubdtype(dtype, jnp.bool_):
            return reduction == "min"
        return jnp.iinfo(dtype).min if reduction == "max" else jnp.iinfo(dtype).max
    return {"dot": 0, "sum": 0, "prod": 1, "and": True, "or": False}[reduction]
