"""Long convolutions y[t] = sum over s <= t of x[s] h[t - s], as long as the sequence: every input is kept.

They have no exact state of bounded size; one row costs O(t), as in any engine that doesn't approximate the filter.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxinfer.axes import Factors
from jaxinfer.errors import NotCausalError
from jaxinfer.graph import Equation, Node
from jaxinfer.passes.incremental.emit import Array, Window
from jaxinfer.passes.incremental.views import Kind, View

NAME = "long_convolution"


def factors_of_long(equation: Equation, rows: Sequence[Node]) -> tuple[Factors, int, int]:
    """(factors, the reduced factor of the signal's time, the factor of the result's time)

    `rows`: the operands that depend on rows in time; one of the two, which is then the signal.
    """
    if len(rows) != 1:
        raise NotCausalError(f"{equation}: signal and filter both depend on the rows; only one of them may")
    time, rank, out = equation.params["time"], equation.params["rank"], equation.outputs[0]
    inputs = []
    for node, dims in zip(equation.inputs, (equation.params["x_dims"], equation.params["h_dims"]), strict=True):
        pairs = zip(node.shape, dims, strict=True)
        here: list[int | None] = [d if d is not None and n == out.shape[d] else None for n, d in pairs]
        here[dims.index(time)] = rank if node is rows[0] else None
        inputs.append(tuple(here))
    return Factors(tuple(inputs), (tuple(range(rank)),), reduction="sum"), rank, time


def emit_long(equation: Equation, operands: Sequence[Array], signal: int, view: View, at: Window) -> Array:
    """The result's rows that `view` asks for. operands: the signal's rows so far, the filter whole."""
    params = equation.params
    time = params["time"]
    dims = (params["x_dims"], params["h_dims"])
    here = dims[signal].index(time)
    length = operands[signal].shape[here]
    real = jnp.arange(length) < at.pos + at.n + at.beyond
    mask = real.reshape([-1 if d == here else 1 for d in range(operands[signal].ndim)])
    x = jnp.where(jnp.broadcast_to(mask, operands[signal].shape), operands[signal], 0)
    index = at.indices(view, equation.outputs[0].shape[time])
    if at.size(view, 0) == 1 or view.kind is Kind.LAST:
        h = _spread(operands[1 - signal], dims[1 - signal], params["rank"])
        back = index[0] - jnp.arange(length)
        taken = jnp.take(h, back, axis=time, mode="clip")
        exists = ((back >= 0) & (back < h.shape[time])).reshape([-1 if d == time else 1 for d in range(h.ndim)])
        product = _spread(x, dims[signal], params["rank"]) * jnp.where(jnp.broadcast_to(exists, taken.shape), taken, 0)
        return jnp.sum(product, axis=time, keepdims=True).astype(params["dtype"])
    filter_time = dims[1 - signal].index(time)
    h = operands[1 - signal]
    h = jax.lax.slice_in_dim(h, 0, min(length, h.shape[filter_time]), axis=filter_time)
    pair = (x, h) if signal == 0 else (h, x)
    (whole,) = equation.primitive.bind(*pair, **params)
    return jnp.take(whole, index, axis=time, mode="clip")


def _spread(value: Array, dims: Sequence[int | None], rank: int) -> Array:
    """An operand with the result's dims, of size 1 where it has none; a dim of size 1 that the result lacks goes."""
    places = [-1 if d is None else d for d in dims]
    order = sorted(range(len(dims)), key=places.__getitem__)
    sizes = {places[i]: value.shape[i] for i in order}
    return jnp.transpose(value, order).reshape([sizes.get(d, 1) for d in range(rank)])
