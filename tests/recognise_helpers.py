"""Scans as users write them, and what their tests share."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy_graph import computed, run

from jaxinfer.graph import Equation, Graph, evaluate, flatten
from jaxinfer.passes.recognise import recognise


def uniform(*shape, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    values = rng.uniform(0.2, 0.9, shape)
    if np.issubdtype(dtype, np.complexfloating):
        values = values * np.exp(1j * rng.uniform(0, 3, shape))
    return values.astype(dtype)


def graphs(function, *inputs):
    graph = flatten(jax.make_jaxpr(function)(*inputs))
    return graph, recognise(graph)


def found(graph: Graph, name: str = "associative_scan") -> list[Equation]:
    return [e for e in graph.equations if e.name == name]


def make(node, axis: int | None, rows: int, seed: int):
    """Numbers for a node, with another number of rows."""
    shape = tuple(rows if d == axis else n for d, n in enumerate(node.shape))
    return uniform(*shape, seed=seed) > 0.5 if node.dtype == bool else uniform(*shape, seed=seed, dtype=node.dtype)


def assert_close(all_got, all_expected, rtol=1e-5):
    """As near as the largest number of each array allows."""
    for got, expected in zip(all_got, all_expected, strict=True):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * float(np.max(np.abs(expected), initial=0)))


def assert_same_values(new: Graph, graph: Graph, inputs, rtol=1e-5):
    """Every equation of `new` is bound by JAX, which looks at its parameters and shapes; the numbers are NumPy's."""
    assert_close(run(lambda *x: evaluate(new, x), *inputs), computed(graph, inputs), rtol)


def assert_xla_agrees(function, inputs, rtol=1e-5):
    """The forward and its rewritten graph, both compiled; and both against NumPy, which the other tests go by."""
    graph, new = graphs(function, *inputs)
    both = jax.jit(lambda *x: (jax.tree.leaves(function(*x)), evaluate(new, x)))(*inputs)
    for results in (*both, computed(new, inputs)):
        assert_close(results, computed(graph, inputs), rtol)


def affine(left, right):
    return left[0] * right[0], right[0] * left[1] + right[1]


def mamba(a, b):
    return lax.associative_scan(affine, (a, b))[1]


def log_mean(left, right):  # of (logsumexp, count), a tree of a dict
    return {"log": jnp.logaddexp(left["log"], right["log"]), "n": left["n"] + right["n"]}


def last_valid(left, right):
    return jnp.where(right[1], right[0], left[0]), left[1] | right[1]


def unscaled_quaternion(left, right):  # works along the last dim, by slices of it
    lw, lv, rw, rv = left[..., :1], left[..., 1:], right[..., :1], right[..., 1:]
    w = lw * rw - jnp.sum(lv * rv, -1, keepdims=True)
    return jnp.concatenate([w, lw * rv + rw * lv + jnp.cross(lv, rv)], -1)


# name -> function, inputs for T rows, [(axes, reverse, carried) of each scan that is found]
SCANS = {
    "mamba": (mamba, lambda t: [uniform(t, 3, 2), uniform(t, 3, 2, seed=1)], [((0, 0), False, (1,))]),
    "both results": (
        lambda a, b: lax.associative_scan(affine, (a, b)),
        lambda t: [uniform(t, 3), uniform(t, 3, seed=1)],
        [((0, 0), False, (0, 1))],
    ),
    "batch first": (
        lambda a, b: lax.associative_scan(affine, (a, b), axis=1)[1],
        lambda t: [uniform(2, t, 3), uniform(2, t, 3, seed=1)],
        [((1, 1), False, (1,))],
    ),
    "complex diagonal": (
        lambda lam, b: mamba(jnp.broadcast_to(lam, b.shape), b).real,
        lambda t: [uniform(3, dtype=np.complex64), uniform(t, 3, dtype=np.complex64, seed=1)],
        [((0, 0), False, (1,))],
    ),
    "jnp.add": (lambda x: lax.associative_scan(jnp.add, x), lambda t: [uniform(t, 3)], [((0,), False, (0,))]),
    "maximum, last axis": (
        lambda x: lax.associative_scan(jnp.maximum, x, axis=-1),
        lambda t: [uniform(3, t)],
        [((1,), False, (0,))],
    ),
    "reverse": (
        lambda a, b: lax.associative_scan(affine, (a, b), reverse=True)[1],
        lambda t: [uniform(t, 3), uniform(t, 3, seed=1)],
        [((0, 0), True, (1,))],
    ),
    "dict": (
        lambda x: lax.associative_scan(log_mean, {"log": x, "n": jnp.ones(x.shape)})["log"],
        lambda t: [uniform(t, 3)],
        [((0,), False, (0,))],  # the counts aren't read
    ),
    "booleans": (
        lambda x, m: lax.associative_scan(last_valid, (x, m)),
        lambda t: [uniform(t), uniform(t, seed=1) > 0.5],
        [((0, 0), False, (0, 1))],
    ),
    "matrices": (lambda x: lax.associative_scan(jnp.matmul, x), lambda t: [uniform(t, 3, 3)], [((0,), False, (0,))]),
    "einsum": (
        lambda x: lax.associative_scan(lambda a, b: jnp.einsum("tij,tjk->tik", a, b), x),
        lambda t: [uniform(t, 3, 3)],
        [((0,), False, (0,))],
    ),
    "vmapped operator": (
        lambda x: lax.associative_scan(jax.vmap(lambda a, b: a @ b), x),
        lambda t: [uniform(t, 3, 3)],
        [((0,), False, (0,))],
    ),
    "quaternions": (
        lambda x: lax.associative_scan(unscaled_quaternion, x),
        lambda t: [uniform(t, 4)],
        [((0,), False, (0,))],
    ),
    "weights in the operator": (
        lambda x, w: lax.associative_scan(lambda a, b: jnp.logaddexp(a * jnp.exp(w), b * jnp.exp(w)) / jnp.exp(w), x),
        lambda t: [uniform(t, 3), uniform(3)],
        [((0,), False, (0,))],
    ),
    "constant array in the operator": (
        lambda x: lax.associative_scan(lambda a, b: a + b - np.arange(3, dtype=np.float32), x),
        lambda t: [uniform(t, 3)],
        [((0,), False, (0,))],
    ),
    "vmap over batch": (
        jax.vmap(mamba),
        lambda t: [uniform(2, t, 3), uniform(2, t, 3, seed=1)],
        [((1, 1), False, (1,))],
    ),
    "vmap, decay shared": (
        jax.vmap(mamba, (None, 0)),
        lambda t: [uniform(t, 3), uniform(2, t, 3, seed=1)],
        [((0, 1), False, (1,))],
    ),
    "vmap of matrices": (
        jax.vmap(lambda x: lax.associative_scan(jnp.matmul, x)),
        lambda t: [uniform(2, t, 3, 3)],
        [((1,), False, (0,))],
    ),
    "vmap over channels": (
        jax.vmap(mamba, in_axes=1, out_axes=1),
        lambda t: [uniform(t, 3), uniform(t, 3, seed=1)],
        [((1, 1), False, (1,))],
    ),
    "vmap over unlike dims": (
        jax.vmap(mamba, (1, 2), 2),
        lambda t: [uniform(t, 2, 3), uniform(t, 3, 2, seed=1)],
        [((1, 1), False, (1,))],
    ),
    "vmap, input shared": (
        jax.vmap(mamba, (0, None)),
        lambda t: [uniform(2, t, 3), uniform(t, 3, seed=1)],
        [((1, 1), False, (1,))],
    ),
    "vmap of matrices over channels": (
        jax.vmap(lambda x: lax.associative_scan(jnp.matmul, x), 1, 1),
        lambda t: [uniform(t, 2, 3, 3)],
        [((1,), False, (0,))],
    ),
    "vmap of vmap, reverse": (
        jax.vmap(jax.vmap(lambda a, b: lax.associative_scan(affine, (a, b), reverse=True)[1], 1, 1)),
        lambda t: [uniform(2, t, 3), uniform(2, t, 3, seed=1)],
        [((2, 2), True, (1,))],
    ),
    "vmap of layers over channels": (
        jax.vmap(lambda a, b: [b := jnp.tanh(mamba(a, b)) for _ in range(3)][-1], 1, 1),
        lambda t: [uniform(t, 3), uniform(t, 3, seed=1)],
        [((1, 1), False, (1,)), ((0, 1), False, (1,)), ((0, 1), False, (1,))],  # what tanh gives is [channel, time]
    ),
    "jitted": (
        jax.jit(lambda a, b: jnp.tanh(mamba(a, jax.nn.silu(b)))),
        lambda t: [uniform(t, 3), uniform(t, 3, seed=1)],
        [((0, 0), False, (1,))],
    ),
    "one line, three layers": (
        lambda a, b: [b := jnp.tanh(mamba(a, b)) for _ in range(3)][-1],
        lambda t: [uniform(t, 3), uniform(t, 3, seed=1)],
        [((0, 0), False, (1,))] * 3,
    ),
    "scan of a scan": (
        lambda x: lax.associative_scan(jnp.add, lax.associative_scan(jnp.maximum, x), reverse=True),
        lambda t: [uniform(t, 3)],
        [((0,), False, (0,)), ((0,), True, (0,))],
    ),
    "two independent results": (
        lambda x, y: lax.associative_scan(lambda a, b: (a[0] + b[0], jnp.maximum(a[1], b[1])), (x, y)),
        lambda t: [uniform(t, 3), uniform(t, 3, seed=1)],
        [((0,), False, (0,)), ((0,), False, (0,))],
    ),
}
