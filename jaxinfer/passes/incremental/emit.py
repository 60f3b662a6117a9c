"""Evaluates the demanded views of a graph inside a JAX trace: the step for one sequence.

Every primitive is bound again on operands whose viewed dims have other sizes; of its parameters only those change that
spell a shape.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.axes import Factors
from jaxinfer.graph import Equation, Node
from jaxinfer.passes.incremental.demand import View, Views

Array = jax.Array


@dataclass(frozen=True)
class Window:
    """Where a step stands: k rows from `pos`, of which the first n are real, in a state of `length` rows."""

    k: int
    length: int
    pos: Array  # int32 scalar
    n: Array  # int32 scalar

    def size(self, view: View, whole: int) -> int:
        """Size of a viewed dim."""
        return {View.WHOLE: whole, View.ROWS: self.k, View.LAST: 1, View.PREFIX: self.length}[view]

    def sizes(self, node: Node, views: Views) -> tuple[int, ...]:
        """Shape of a viewed value."""
        return tuple(self.size(v, n) for v, n in zip(views, node.shape, strict=True))

    def indices(self, view: View) -> Array:
        """Rows of the whole forward that a view holds: int32 [size]."""
        if view is View.PREFIX:
            return jnp.arange(self.length, dtype=jnp.int32)
        if view is View.ROWS:
            return self.pos + jnp.arange(self.k, dtype=jnp.int32)
        return jnp.reshape(self.pos + jnp.maximum(self.n - 1, 0), (1,))

    def slice(self, value: Array, views: Views) -> Array:
        """A view of a value at hand in whole (a parameter or constant, or made whole)."""
        for d, view in enumerate(views):
            if view is View.PREFIX:
                value = jax.lax.slice_in_dim(value, 0, min(self.length, value.shape[d]), axis=d)
            elif view is not View.WHOLE:
                # Rows past the end belong to padding of the chunk: clip rather than shift the window back.
                value = jnp.take(value, self.indices(view), axis=d, mode="clip")
        return value

    def last(self, rows: Array, views: Views) -> Array:
        """The last real row out of the chunk's rows; `views` has LAST where `rows` has ROWS."""
        for d, view in enumerate(views):
            if view is View.LAST:
                rows = jax.lax.dynamic_slice_in_dim(rows, jnp.maximum(self.n - 1, 0), 1, axis=d)
        return rows


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
    if equation.name == "dot_general" and _should_swap(equation, asked):
        return _swapped_dot(equation, operands)
    params = dict(equation.params)
    resize = _RESIZE.get(equation.name)
    if resize is not None:
        params.update(resize(equation, factors, operands, sizes, views))
    return equation.primitive.bind(*operands, **params)


def _should_swap(equation: Equation, asked: Sequence[Views]) -> bool:
    """Whether memory stands on the side of a product where XLA:CPU would transpose a copy of it at every step.

    Stored as [batch, time, features], memory is read as it lies as the left side where features are contracted (K), and
    as the right side where time is (V).
    """
    remembered = [View.PREFIX in v and View.ROWS not in v and View.LAST not in v for v in asked]
    if remembered == [True, False]:
        return asked[0][equation.params["dimension_numbers"][0][0][0]] is View.PREFIX
    if remembered == [False, True]:
        return asked[1][equation.params["dimension_numbers"][0][1][0]] is not View.PREFIX
    return False


def _swapped_dot(equation: Equation, operands: Sequence[Array]) -> Array:
    """dot(a, b) as transpose(dot(b, a))."""
    (a_sum, b_sum), (a_batch, b_batch) = equation.params["dimension_numbers"]
    params = {**equation.params, "dimension_numbers": ((b_sum, a_sum), (b_batch, a_batch))}
    precision = params.get("precision")
    params["precision"] = precision[::-1] if isinstance(precision, tuple) else precision
    product = equation.primitive.bind(*operands[::-1], **params)
    batch = len(a_batch)
    free_b = operands[1].ndim - batch - len(b_sum)
    order = (*range(batch), *range(batch + free_b, product.ndim), *range(batch, batch + free_b))
    return jnp.transpose(product, order)


def _iota(equation: Equation, sizes: tuple[int, ...], views: Views, at: Window) -> Array:
    dimension, dtype = equation.params["dimension"], equation.params["dtype"]
    if views[dimension] is View.WHOLE:
        return jax.lax.broadcasted_iota(dtype, sizes, dimension)
    indices = at.indices(views[dimension]).astype(dtype)
    return jax.lax.broadcast_in_dim(indices, sizes, (dimension,))


def _broadcast_in_dim(equation: Equation, factors: Factors, operands: Any, sizes: Any, views: Any) -> Mapping[str, Any]:
    return {"shape": sizes}


def _reshape(equation: Equation, factors: Factors, operands: Any, sizes: Any, views: Any) -> Mapping[str, Any]:
    return {"new_sizes": sizes}


def _slice(equation: Equation, factors: Factors, operands: Any, sizes: Any, views: Any) -> Mapping[str, Any]:
    pairs = zip(views, sizes, equation.params["limit_indices"], strict=True)
    return {"limit_indices": tuple(limit if v is View.WHOLE else size for v, size, limit in pairs)}


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
