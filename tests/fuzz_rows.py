"""Random small programs over a batch: steps that keep rows apart by construction, and steps that mix them.

A program is a list of (step, seed). Every step takes values from a pool and adds one to it; every value of the pool
holds the batch in its dim 0. All values of the pool are returned, so that each claim about one of them is checked.
"""

import random
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
# A step: (value [batch, ...], randomness) -> value [batch, ...]
Step = Callable[[Array, random.Random], Array]

FEATURES = (3, 4)
APART: dict[str, Step] = {}
MIXING: dict[str, Step] = {}


def apart(function: Step) -> Step:
    APART[function.__name__.strip("_")] = function
    return function


def mixing(function: Step) -> Step:
    MIXING[function.__name__.strip("_")] = function
    return function


def build(steps: Sequence[tuple[str, int]]) -> Callable[[Array, Array], list[Array]]:
    """The program: (x: Float[batch, 3, 4], ids: Int[batch]) -> the values of its pool."""

    def program(x: Array, ids: Array) -> list[Array]:
        pool = [x, embedded(ids)]
        for name, seed in steps:
            rng = random.Random(seed)
            step = APART.get(name) or MIXING[name]
            value = rng.choice(pool[-3:])
            result = TWO[name](value, rng.choice(pool[-3:]), rng) if name in TWO else step(value, rng)
            pool.append(bounded(result))
        return pool[2:] or pool

    return program


def bounded(value: Array) -> Array:
    """Finite floats of moderate size and rank 1 to 4, so that any step can follow."""
    if jnp.iscomplexobj(value):
        value = jnp.real(value)
    value = jnp.tanh(jnp.nan_to_num(value.astype(jnp.float32)) / 4)
    while value.ndim > 4:
        value = value.sum(1)
    while value.size // value.shape[0] > 48:
        value = value[:, : value.shape[1] // 2] if value.shape[1] > 1 else value.max(1)
    return value


def embedded(ids: Array) -> Array:
    return weights(1, (5, 4))[ids % 5]


def weights(seed: int, shape: tuple[int, ...]) -> Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def widened(x: Array, rank: int = 2) -> Array:
    """At least so many dims behind the batch."""
    while x.ndim < rank + 1:
        x = x[..., None] * weights(x.ndim, (3,))
    return x


def some_axis(x: Array, rng: random.Random) -> int:
    return rng.randrange(1, x.ndim)


def own_index(x: Array, size: int) -> Array:
    """Int[batch], made of each row alone; some out of range."""
    return jnp.floor(x.reshape(x.shape[0], -1).sum(1) * 3).astype(jnp.int32) % (size + 2) - 1


# --- steps that keep rows apart -------------------------------------------------------------------------------------


@apart
def unary(x, rng):
    functions = (
        jnp.sin, jnp.exp, jnp.abs, jax.nn.gelu, jax.nn.silu, jnp.square, lax.rsqrt, jnp.floor, jnp.sign, lax.erf,
        jax.nn.softplus, jnp.cbrt, jnp.isfinite, lambda v: lax.reduce_precision(v, 5, 7), lax.logistic,
        lambda v: lax.population_count(v.astype(jnp.int32)), lambda v: lax.integer_pow(v, 3), jnp.expm1, jnp.log1p,
        lambda v: lax.clamp(-0.5, v, 0.5), lambda v: v.astype(jnp.bfloat16), lambda v: lax.digamma(v + 2),
        lambda v: jnp.round(v, 1), lambda v: ~(v > 0), lax.stop_gradient, lambda v: lax.optimization_barrier((v, v))[0],
    )  # fmt: skip
    return rng.choice(functions)(x)


@apart
def with_parameter(x, rng):
    w = weights(rng.randrange(9), (x.shape[-1],) if x.ndim > 1 else ())
    return rng.choice((jnp.add, jnp.multiply, jnp.maximum, jnp.arctan2, lax.rem if x.ndim < 1 else jnp.subtract))(x, w)


@apart
def where(x, rng):
    return jnp.where(x > rng.uniform(-1, 1), x, rng.choice((0.0, -x, jnp.zeros(x.shape))))


@apart
def reduction(x, rng):
    if x.ndim == 1:
        return x
    axis = some_axis(x, rng)
    functions = (jnp.sum, jnp.max, jnp.min, jnp.prod, jnp.mean, jnp.var, jnp.argmax, jnp.argmin, jnp.any)
    keep = rng.random() < 0.5
    return rng.choice(functions)(x, axis=axis, keepdims=keep)


@apart
def general_reduction(x, rng):
    if x.ndim == 1:
        return x
    return lax.reduce(x, np.float32(0), lambda a, b: a + b * 1.5, (some_axis(x, rng),))


@apart
def softmax(x, rng):
    x = widened(x, 1)
    return jax.nn.softmax(x, axis=some_axis(x, rng))


@apart
def layer_norm(x, rng):
    x = widened(x, 1)
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-3)


@apart
def dense(x, rng):
    x = widened(x, 1)
    return jnp.tensordot(x, weights(rng.randrange(9), (x.shape[-1], rng.choice((3, 4)))), 1)


@apart
def dense_on_the_right(x, rng):
    """The batch ends up last and is moved back."""
    x = widened(x, 1)
    return jnp.moveaxis(jnp.tensordot(weights(3, (4, x.shape[-1])), x, ((1,), (x.ndim - 1,))), 1, 0)


@apart
def attention(x, rng):
    x = widened(x)
    x = x.reshape(x.shape[0], x.shape[1], -1)
    return jax.nn.softmax(jnp.einsum("btd,bsd->bts", x, x) / 2, -1) @ x


@apart
def transposed(x, rng):
    x = widened(x)
    order = list(range(1, x.ndim))
    rng.shuffle(order)
    return jnp.transpose(x, (0, *order))


@apart
def batch_elsewhere(x, rng):
    """The batch is moved to another dim, something is done there, and it is moved back."""
    x = widened(x)
    d = some_axis(x, rng)
    return jnp.moveaxis(jnp.cumsum(jnp.moveaxis(x, 0, d), axis=0), d, 0)


@apart
def merged(x, rng):
    """[batch, time, d] -> [batch * time, d] -> back, and the other way round."""
    x = widened(x)
    b, t = x.shape[:2]
    flat = x.reshape(b * t, -1) if rng.random() < 0.5 else jnp.swapaxes(x, 0, 1).reshape(t * b, -1)
    flat = flat @ weights(2, (flat.shape[-1], 3)) + jnp.tile(weights(4, (3,)), (flat.shape[0], 1))
    if rng.random() < 0.5:
        return x.reshape(b * t, -1).reshape(b, t, -1).sum(-1)
    return jnp.swapaxes(x, 0, 1).reshape(t * b, -1).reshape(t, b, -1).swapaxes(0, 1)


@apart
def merged_positions(x, rng):
    """Positions are added after the merge: a shared value that lies like rows."""
    x = widened(x)
    b, t = x.shape[:2]
    place = jnp.broadcast_to(weights(5, (t, 1)), (b, t, 1)).reshape(b * t, 1)
    return (x.reshape(b * t, -1) + place).reshape(x.shape)


@apart
def heads(x, rng):
    x = dense(x, rng) if x.ndim > 1 else widened(x, 1)
    x = x @ weights(6, (x.shape[-1], 4))
    split = x.reshape(*x.shape[:-1], 2, 2)
    return jnp.swapaxes(split, -1, -2).reshape(*x.shape[:-1], 4)


@apart
def first_of_each(x, rng):
    """Every t-th row of merged rows."""
    x = widened(x)
    b, t = x.shape[:2]
    return x.reshape(b * t, -1)[rng.randrange(t) :: t]


@apart
def twice(x, rng):
    """[x, x] along the batch and apart again, as classifier-free guidance does."""
    both = jnp.concatenate([x, -x], 0) * 2
    a, b = jnp.split(both, 2) if rng.random() < 0.5 else (both[: x.shape[0]], both[x.shape[0] :])
    return a + 2 * b


@apart
def repeated(x, rng):
    x = widened(x, 1)
    many = jnp.repeat(x, 3, axis=0) if rng.random() < 0.5 else jnp.tile(x, (2, *(1,) * (x.ndim - 1)))
    n = many.shape[0] // x.shape[0]
    return many.reshape(x.shape[0], n, -1).sum(1) if n == 3 else many.reshape(n, *x.shape).sum(0)


@apart
def sliced(x, rng):
    x = widened(x, 1)
    d = some_axis(x, rng)
    index = [slice(None)] * x.ndim
    index[d] = rng.choice(
        (slice(1, None), slice(None, None, 2), slice(None, None, -1), slice(None, 1), slice(-1, None))
    )
    return x[tuple(index)]


@apart
def flipped(x, rng):
    x = widened(x, 1)
    return lax.rev(x, (some_axis(x, rng),))


@apart
def rolled(x, rng):
    x = widened(x, 1)
    return jnp.roll(x, rng.choice((1, -1)), axis=some_axis(x, rng))


@apart
def padded(x, rng):
    x = widened(x, 1)
    config = [(0, 0, 0)] * x.ndim
    config[some_axis(x, rng)] = rng.choice(((1, 0, 0), (0, 2, 0), (0, 0, 1), (-1, 1, 0), (1, -1, 0)))
    return lax.pad(x, np.float32(0.5), config)


@apart
def joined(x, rng):
    x = widened(x, 1)
    other = jnp.zeros(x.shape) if rng.random() < 0.5 else jnp.cos(x)
    d = some_axis(x, rng)
    return jnp.concatenate([x, other], d) if rng.random() < 0.7 else jnp.stack([x, other], d)


@apart
def class_token(x, rng):
    x = widened(x)
    token = jnp.broadcast_to(weights(7, x.shape[2:]), (x.shape[0], 1, *x.shape[2:]))
    return jnp.concatenate([token, x], 1)


@apart
def split(x, rng):
    x = widened(x, 1)
    d = some_axis(x, rng)
    if x.shape[d] < 2:
        return x
    first, *_ = jnp.split(x, [1], axis=d)
    return first


@apart
def cumulative(x, rng):
    x = widened(x, 1)
    function = rng.choice((lax.cumsum, lax.cumprod, lax.cummax, lax.cummin, lax.cumlogsumexp))
    return function(x, axis=some_axis(x, rng), reverse=rng.random() < 0.5)


@apart
def prefix_tree(x, rng):
    x = widened(x, 1)
    return lax.associative_scan(jnp.add, x, axis=some_axis(x, rng), reverse=rng.random() < 0.5)


@apart
def sorted_features(x, rng):
    x = widened(x, 1)
    d = some_axis(x, rng)
    kind = rng.randrange(4)
    if kind == 0:
        return jnp.sort(x, axis=d)
    if kind == 1:
        return jnp.argsort(x, axis=d)
    if kind == 2:
        return lax.sort((x, -x), dimension=d, num_keys=1)[1]
    return lax.top_k(x, 1)[rng.randrange(2)]


@apart
def picked(x, rng):
    """Features by constant places."""
    x = widened(x, 1)
    d = some_axis(x, rng)
    places = jnp.asarray([rng.randrange(-1, x.shape[d] + 1) for _ in range(2)])
    return jnp.take(x, places, axis=d, mode=rng.choice(("clip", "fill", "wrap")))


@apart
def picked_by_row(x, rng):
    """Features by places that each row computes: vmapped gather, take_along_axis, or x[arange(batch), i]."""
    x = widened(x, 1)
    i = own_index(x, x.shape[1])
    kind = rng.randrange(4)
    if kind == 0:
        return x[jnp.arange(x.shape[0]), i]
    if kind == 1:
        shape = (x.shape[0], *(1,) * (x.ndim - 1))
        return jnp.take_along_axis(x, i.reshape(shape), axis=1, mode=rng.choice(("clip", "fill")))
    if kind == 2:
        return jax.vmap(lambda row, k: lax.dynamic_index_in_dim(row, k))(x, i)
    return x.at[jnp.arange(x.shape[0]), i].get(mode=rng.choice(("clip", "fill")))


@apart
def looked_up(x, rng):
    return jnp.take(weights(8, (6, 3)), own_index(x, 6), axis=0, mode=rng.choice(("clip", "fill", "wrap")))


@apart
def written(x, rng):
    """Features overwritten at constant places."""
    x = widened(x, 1)
    at = x.at[:, rng.randrange(x.shape[1])]
    mode = rng.choice(("clip", "drop", "promise_in_bounds"))
    return getattr(at, rng.choice(("set", "add", "multiply", "min", "max")))(0.5, mode=mode)


@apart
def written_by_row(x, rng):
    """Features overwritten where each row says."""
    x = widened(x, 1)
    i = own_index(x, x.shape[1])
    mode = rng.choice(("clip", "drop"))
    name = rng.choice(("set", "add", "multiply", "min", "max"))
    if rng.random() < 0.5:
        return getattr(x.at[jnp.arange(x.shape[0]), i], name)(x.sum(1) if rng.random() < 0.5 else 0.25, mode=mode)
    return jax.vmap(lambda row, k: getattr(row.at[k], name)(0.25, mode=mode))(x, i)


@apart
def one_hot(x, rng):
    return jax.nn.one_hot(own_index(x, 4), 4)


@apart
def updated(x, rng):
    x = widened(x, 1)
    piece = jnp.ones((x.shape[0], 1, *x.shape[2:]))
    return lax.dynamic_update_slice(x, piece, (0, rng.randrange(3), *(0,) * (x.ndim - 2)))


@apart
def dynamic_slice(x, rng):
    x = widened(x, 1)
    return lax.dynamic_slice(x, (0, rng.randrange(3), *(0,) * (x.ndim - 2)), (x.shape[0], 1, *x.shape[2:]))


@apart
def convolution(x, rng):
    x = widened(x)
    x = x.reshape(x.shape[0], x.shape[1], -1)
    groups = x.shape[1] if rng.random() < 0.3 else 1
    kernel = weights(9, (x.shape[1] * (2 if groups > 1 else 1), x.shape[1] // groups, 2))
    return lax.conv_general_dilated(
        x, kernel, (rng.choice((1, 2)),), rng.choice(("SAME", [(1, 0)])), feature_group_count=groups,
        rhs_dilation=(rng.choice((1, 2)),),
    )  # fmt: skip


@apart
def convolution_per_row(x, rng):
    """vmap of a convolution: the batch becomes a block of its batch dim."""
    x = widened(x)
    x = x.reshape(x.shape[0], 1, x.shape[1], -1)
    kernel = weights(10, (2, x.shape[2], 2))
    return jax.vmap(lambda row: lax.conv_general_dilated(row, kernel, (1,), "SAME"))(x)[:, 0]


@apart
def pooled(x, rng):
    x = widened(x)
    shape = (1, 2, *(1,) * (x.ndim - 2))
    kind = rng.randrange(4)
    if kind == 0:
        return lax.reduce_window(x, -np.inf, lax.max, shape, shape, "SAME")
    if kind == 1:
        return lax.reduce_window(x, np.float32(0), lax.add, shape, (1,) * x.ndim, "VALID" if x.shape[1] > 1 else "SAME")
    if kind == 2:
        return lax.reduce_window(x, np.float32(1), lax.mul, shape, shape, "SAME")
    return jax.grad(lambda v: lax.reduce_window(v, -np.inf, lax.max, shape, shape, "SAME").sum())(x)


@apart
def gradient(x, rng):
    """Of a sum over everything: the sum itself is dead code."""
    return jax.grad(lambda v: jnp.sum(jnp.tanh(v) * v))(x)


@apart
def spectrum(x, rng):
    x = widened(x, 1)
    kind = rng.randrange(3)
    if kind == 0:
        return jnp.abs(jnp.fft.rfft(x))
    return jnp.real(jnp.fft.fft(x)) if kind == 1 else jnp.fft.irfft(jnp.fft.rfft(x, n=4), n=4)


@apart
def linear_algebra(x, rng):
    x = widened(x)
    x = x.reshape(x.shape[0], x.shape[1], -1)
    a = jnp.einsum("btd,bsd->bts", x, x) + 2 * jnp.eye(x.shape[1])
    kind = rng.randrange(6)
    if kind == 0:
        return jnp.linalg.cholesky(a)
    if kind == 1:
        return lax.linalg.triangular_solve(a, x, left_side=True, lower=True)
    if kind == 2:
        return jnp.linalg.solve(a, x)
    if kind == 3:
        return jnp.linalg.eigvalsh(a)
    if kind == 4:
        return jnp.linalg.det(a)
    shared = weights(11, (x.shape[1], x.shape[1])) + 3 * jnp.eye(x.shape[1])
    return jax.vmap(lambda v: lax.linalg.triangular_solve(shared, v, left_side=True, lower=True))(x)


@apart
def scanned(x, rng):
    """A recurrence over a dim of features, with rows in the carry."""
    x = widened(x)
    first = jnp.zeros((x.shape[0], *x.shape[2:])) if rng.random() < 0.5 else x[:, 0]
    last, ys = lax.scan(
        lambda h, row: (jnp.tanh(h * 0.5 + row), h - row), first, jnp.moveaxis(x, 1, 0), reverse=rng.random() < 0.5
    )
    return last if rng.random() < 0.5 else jnp.moveaxis(ys, 0, 1)


@apart
def layers(x, rng):
    """Layers under a scan over stacked weights."""
    x = widened(x, 1)
    w = weights(12, (3, x.shape[-1], x.shape[-1]))
    return lax.scan(lambda h, one: (jnp.tanh(h @ one), None), x, w)[0]


@apart
def row_by_row(x, rng):
    return lax.map(lambda row: jnp.sort(row.reshape(-1)) * row.sum() + weights(13, ()), x)


@apart
def loop(x, rng):
    return lax.fori_loop(0, 3, lambda i, v: v * 0.9 + i, x)


@apart
def loop_with_data(x, rng):
    """A bound that XLA can't see, so that it stays a while loop."""
    return lax.fori_loop(0, jnp.asarray(3) + (weights(14, ()) > 9).astype(int), lambda i, v: jnp.sin(v) + i, x)


@apart
def until_done(x, rng):
    """vmap of a while loop: every row goes on until it is done itself."""
    start = jnp.abs(x.reshape(x.shape[0], -1)[:, 0]) + 0.1

    def one(v):
        return lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] * 1.5 + 0.1, c[1] + 1), (v, 0))

    grown, steps = jax.vmap(one)(start)
    return grown + steps


@apart
def branch(x, rng):
    return lax.cond(weights(15, ()) > 0, lambda v: jnp.sin(v), lambda v: jnp.zeros_like(v), x)


@apart
def branch_by_row(x, rng):
    return jax.vmap(lambda row: lax.cond(row.sum() > 0, lambda v: v * 2, lambda v: v - 1, row))(x)


@apart
def calls(x, rng):
    @jax.custom_jvp
    def f(v):
        return jnp.sin(v)

    f.defjvp(lambda p, t: (f(*p), t[0]))
    return rng.choice((f, jax.jit(jnp.cos), jax.checkpoint(lambda v: jnp.sin(jnp.sin(v)))))(x)


@apart
def counted_features(x, rng):
    x = widened(x, 1)
    return x + lax.broadcasted_iota(jnp.float32, x.shape, 1) * 0.1


@apart
def expand(x, rng):
    return jnp.broadcast_to(x[:, None], (x.shape[0], 2, *x.shape[1:]))


@apart
def bits(x, rng):
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint16), jnp.float32)


@apart
def uniform_values(x, rng):
    """Values made for every row that no row enters."""
    ones = jnp.ones((x.shape[0], 3)).at[:, 1].set(2.0)
    return jnp.concatenate([ones, x.reshape(x.shape[0], -1)], 1) if rng.random() < 0.5 else ones


def _two(x: Array, y: Array, rng: random.Random) -> Array:
    """Two values of the pool."""
    x, y = x.reshape(x.shape[0], -1), y.reshape(y.shape[0], -1)
    kind = rng.randrange(4)
    if kind == 0:
        return jnp.concatenate([x, y], 1)
    if kind == 1:
        return jnp.einsum("bi,bj->bij", x, y)
    if kind == 2:
        n = min(x.shape[1], y.shape[1])
        return jnp.where(x[:, :n] > y[:, :n], x[:, :n], y[:, :n])
    return x * y[:, :1]


TWO = {"two": _two, "two_mixed": lambda x, y, rng: x.reshape(x.shape[0], -1)[::-1] * y.reshape(y.shape[0], -1)[:, :1]}
APART["two"] = lambda x, rng: x
MIXING["two_mixed"] = lambda x, rng: x


# --- steps that mix rows, or let a row depend on its place or on the number of rows -----------------------------------


@mixing
def batch_mean(x, rng):
    return x - x.mean(0)


@mixing
def batch_softmax(x, rng):
    return jax.nn.softmax(x, axis=0)


@mixing
def batch_order(x, rng):
    return rng.choice(
        (lambda v: v[::-1], lambda v: jnp.sort(v, 0), lambda v: jnp.roll(v, 1, 0), lambda v: jnp.cumsum(v, 0))
    )(x)


@mixing
def batch_count(x, rng):
    return rng.choice(
        (lambda v: v / v.shape[0], lambda v: v + jnp.ones(v.shape[0]).sum(), lambda v: v * (v.shape[0] > 12))
    )(x)


@mixing
def batch_place(x, rng):
    places = jnp.arange(x.shape[0]).reshape(-1, *(1,) * (x.ndim - 1))
    return x + rng.choice((places, places == 0, np.arange(x.shape[0]).reshape(places.shape), places % 2))


@mixing
def batch_product(x, rng):
    flat = x.reshape(x.shape[0], -1)
    return jax.nn.softmax(flat @ flat.T) @ flat if rng.random() < 0.5 else (flat @ flat.T).sum(1)


@mixing
def batch_gather(x, rng):
    i = jnp.clip(own_index(x, x.shape[0]), 0, x.shape[0] - 1)
    return rng.choice((lambda: x[i], lambda: x[0] + x, lambda: x[jnp.arange(x.shape[0]) - 1], lambda: x[-1:] * x))()


@mixing
def batch_scatter(x, rng):
    i = jnp.clip(own_index(x, x.shape[0]), 0, x.shape[0] - 1)
    return rng.choice((lambda: x.at[i].add(1.0), lambda: x.at[0].set(2.0), lambda: jnp.zeros_like(x).at[i].set(x)))()


@mixing
def batch_regrouped(x, rng):
    """Reshaped so that elements change rows."""
    x = widened(x, 1)
    return rng.choice(
        (
            lambda: x.reshape(-1)[::-1].reshape(x.shape),
            lambda: x.reshape(x.shape[0], -1).T.reshape(x.shape),
            lambda: jnp.roll(x.reshape(-1, x.shape[-1]), 1, 0).reshape(x.shape),
            lambda: jnp.swapaxes(x.reshape(x.shape[0], -1), 0, 1).reshape(-1).reshape(x.shape),
        )
    )()


@mixing
def batch_scan(x, rng):
    return lax.scan(lambda h, row: (h + row, h), jnp.zeros(x.shape[1:]), x)[1]


@mixing
def batch_window(x, rng):
    flat = x.reshape(x.shape[0], -1)
    return rng.choice(
        (
            lambda: lax.reduce_window(flat, np.float32(0), lax.add, (2, 1), (1, 1), "SAME"),
            lambda: lax.conv_general_dilated(flat.T[:, None], weights(1, (1, 1, 3)), (1,), "SAME")[:, 0].T,
            lambda: jnp.concatenate([flat[1:], flat[:1]]),
            lambda: lax.pad(flat, np.float32(0), [(1, -1, 0), (0, 0, 0)]),
            lambda: jnp.real(jnp.fft.fft(flat, axis=0)),
        )
    )()


@mixing
def batch_loop(x, rng):
    return lax.while_loop(lambda v: v.sum() < 5, lambda v: jnp.abs(v) + 0.3, x)


@mixing
def batch_branch(x, rng):
    return lax.cond(x.sum() > 0, lambda v: v + 1, lambda v: v * 3, x)


@mixing
def batch_random(x, rng):
    return x + jax.random.normal(jax.random.key(rng.randrange(9)), x.shape)


@mixing
def twice_mixed(x, rng):
    """[x, -x] taken apart at another place."""
    both = jnp.concatenate([x, -x], 0)
    return rng.choice((lambda: both[1 : x.shape[0] + 1], lambda: both[::2], lambda: jnp.flip(both, 0)[: x.shape[0]]))()


@mixing
def counted_in_scan(x, rng):
    """lax.map's look, but a counter is carried from row to row."""
    return lax.scan(lambda i, row: (i + 1, row * i), 0, x)[1]
