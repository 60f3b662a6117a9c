"""Runs a Graph in NumPy, primitive after primitive by what each is defined to be.

A reference that compiles nothing: a program of XLA takes longer to make than all that these graphs compute. Of a
composite only its tracing is JAX's. Whoever uses this compares a few graphs with XLA as well.
"""

import functools
import string

import jax
import numpy as np
from jax import lax

from jaxinfer.graph import Composite, flatten


def computed(graph, inputs):
    """The outputs of a graph. Each value must have the shape and the dtype that its node tells."""
    values = dict(zip(graph.inputs, map(np.asarray, inputs), strict=True))

    def read(node):
        return np.asarray(node.value, node.dtype) if node.constant else values[node]

    for equation in graph.equations:
        operands = [read(n) for n in equation.inputs]
        if isinstance(equation.primitive, Composite):
            results = run(functools.partial(equation.primitive.bind, **equation.params), *operands)
        else:
            results = [PRIMITIVES[equation.name](*operands, **equation.params)]
        for node, result in zip(equation.outputs, results, strict=True):
            value = values[node] = np.asarray(result)
            assert (value.shape, value.dtype) == (node.shape, node.dtype), f"{equation} made {value.dtype}{value.shape}"
    return [read(node) for node in graph.outputs]


def run(function, *inputs):
    """The leaves of what a function of JAX returns, from its trace."""
    return computed(flatten(jax.make_jaxpr(function)(*inputs)), jax.tree.leaves(inputs))


def _plain(function):
    return lambda *operands, **_: function(*operands)


def _broadcast_in_dim(x, *, shape, broadcast_dimensions, **_):
    placed = [1] * len(shape)
    for n, d in zip(x.shape, broadcast_dimensions, strict=True):
        placed[d] = n
    return np.broadcast_to(x.reshape(placed), shape)


def _pad(x, fill, *, padding_config):
    assert all(min(c) >= 0 for c in padding_config)
    wide = [
        (lo, n + max(n - 1, 0) * inside, hi, inside)
        for n, (lo, hi, inside) in zip(x.shape, padding_config, strict=True)
    ]
    into = np.full([lo + n + hi for lo, n, hi, _ in wide], fill, x.dtype)
    into[tuple(slice(lo, lo + n, inside + 1) for lo, n, _, inside in wide)] = x
    return into


def _slice(x, *, start_indices, limit_indices, strides):
    strides = strides or (1,) * x.ndim
    return x[tuple(slice(*part) for part in zip(start_indices, limit_indices, strides, strict=True))]


def _dynamic_slice(x, *starts, slice_sizes):
    starts = [int(np.clip(s, 0, n - k)) for s, n, k in zip(starts, x.shape, slice_sizes, strict=True)]
    return x[tuple(slice(s, s + k) for s, k in zip(starts, slice_sizes, strict=True))]


def _gather(x, indices, *, dimension_numbers, slice_sizes, mode, **_):
    """Of the whole operand, which starts at 0 wherever it is told to; vmap of a dynamic slice makes it."""
    assert tuple(slice_sizes) == x.shape and mode == lax.GatherScatterMode.CLIP
    offsets = tuple(map(int, dimension_numbers.offset_dims))
    sizes = iter(indices.shape[:-1])
    shape = [x.shape[offsets.index(d)] if d in offsets else next(sizes) for d in range(x.ndim + indices.ndim - 1)]
    return _broadcast_in_dim(x, shape=shape, broadcast_dimensions=offsets)


def _dot_general(x, y, *, dimension_numbers, preferred_element_type, **_):
    (x_sums, y_sums), (x_batch, y_batch) = dimension_numbers
    letters = iter(string.ascii_letters)
    x_names = [next(letters) for _ in x.shape]
    y_names = [next(letters) for _ in y.shape]
    for a, b in zip([*x_sums, *x_batch], [*y_sums, *y_batch], strict=True):
        y_names[b] = x_names[a]
    batch = [x_names[d] for d in x_batch]
    free = [c for names, sums in ((x_names, x_sums), (y_names, y_sums)) for d, c in enumerate(names) if d not in sums]
    out = batch + [c for c in free if c not in batch]
    result = np.einsum(f"{''.join(x_names)},{''.join(y_names)}->{''.join(out)}", x, y)
    return result.astype(preferred_element_type or result.dtype)


def _fft(x, *, fft_type, fft_lengths):
    (n,) = fft_lengths
    return getattr(np.fft, fft_type.name.lower())(x, n)


PRIMITIVES = {
    "abs": _plain(np.abs),
    "add": _plain(np.add),
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": lambda *x, dimension: np.concatenate(x, dimension),
    "convert_element_type": lambda x, *, new_dtype, **_: x.astype(new_dtype),
    "div": _plain(np.divide),
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "exp": _plain(np.exp),
    "fft": _fft,
    "gather": _gather,
    "iota": lambda *, dtype, shape, dimension, **_: np.indices(shape, dtype)[dimension],
    "log1p": _plain(np.log1p),
    "logistic": _plain(lambda x: 1 / (1 + np.exp(-x))),
    "max": _plain(np.maximum),
    "mul": _plain(np.multiply),
    "ne": _plain(np.not_equal),
    "neg": _plain(np.negative),
    "or": _plain(np.bitwise_or),
    "pad": _pad,
    "real": _plain(np.real),
    "reduce_prod": lambda x, *, axes, **_: np.prod(x, tuple(axes), x.dtype),
    "reduce_sum": lambda x, *, axes, **_: np.sum(x, tuple(axes), x.dtype),
    "rev": lambda x, *, dimensions: np.flip(x, dimensions),
    "select_n": lambda which, no, yes: np.where(which, yes, no),
    "slice": _slice,
    "squeeze": lambda x, *, dimensions: np.squeeze(x, tuple(dimensions)),
    "sub": _plain(np.subtract),
    "tanh": _plain(np.tanh),
    "transpose": lambda x, *, permutation: np.transpose(x, permutation),
}
