"""Forwards that cut time into chunks: what is causal is derived and decodes, what reads too much is refused."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxinfer as ji

pytestmark = pytest.mark.jax_defaults

Array = jax.Array
T, Q, FEATURES = 14, 4, 5  # 14 rows are padded to 4 chunks


def made(work: Callable[[Array], Array], size: int = Q) -> Callable[[dict[str, Array], Array], Array]:
    """A forward over rows [time, features]: padded, cut to [chunks, size, features], worked on, joined and cut off."""

    def forward(params: dict[str, Array], x: Array) -> Array:
        time = x.shape[0]
        blocks = jnp.pad(jnp.tanh(x @ params["w"]), ((0, -time % size), (0, 0))).reshape(-1, size, FEATURES)
        return x + work(blocks).reshape(-1, FEATURES)[:time]

    return forward


def later(x: Array) -> Array:
    """Each chunk's value moved to the next chunk; zeros for the first."""
    return jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])


def within(x: Array, shift: int = 0) -> Array:
    """Attention within each chunk."""
    seen = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool), shift)
    scores = jnp.where(seen, x @ x.swapaxes(-1, -2), -jnp.inf)
    return jax.nn.softmax(scores) @ x


def states(x: Array) -> Array:
    """[chunks, features, features]"""
    return jnp.einsum("nqf,nqg->nfg", x, jnp.cos(x))


def scanned(x: Array, body: Callable[[Array, Array], tuple[Array, Array]], **how: bool) -> Array:
    return lax.scan(body, jnp.zeros((FEATURES, FEATURES)), x, **how)[1]


def retention(state: Array, x: Array) -> tuple[Array, Array]:
    decay = 0.9 ** jnp.arange(x.shape[0])[:, None]
    y = within(x[None])[0] + decay * (x @ state)
    return 0.9 ** x.shape[0] * state + x.T @ (x * decay[::-1]), y


def by_index(x: Array) -> Array:
    def body(state: Array, n: Array) -> tuple[Array, Array]:
        return retention(state, x[n])

    return lax.scan(body, jnp.zeros((FEATURES, FEATURES)), jnp.arange(x.shape[0]))[1]


def before(x: Array) -> Array:
    """Attention to the chunk and the one before, whose rows the scan carries."""

    def body(old: Array, x: Array) -> tuple[Array, Array]:
        both = jnp.concatenate([old, x])
        seen = jnp.arange(2 * Q)[None] <= Q + jnp.arange(Q)[:, None]
        return x, jax.nn.softmax(jnp.where(seen, x @ both.T, -1e9)) @ both

    return lax.scan(body, jnp.zeros((Q, FEATURES)), x)[1]


def pairs(x: Array, decays: Callable[[Array], Array], shift: int = -1) -> Array:
    """What earlier chunks leave, by a product with decays between all pairs of chunks; c <= z + shift are seen."""
    t = jnp.arange(x.shape[0])
    seen = t[None, :] <= t[:, None] + shift
    left = jnp.einsum("zc,cfg->zfg", jnp.where(seen, decays(x), 0.0), states(x))
    return within(x) + x @ left


def constant(x: Array) -> Array:
    t = jnp.arange(x.shape[0])
    return 0.8 ** jnp.maximum(t[:, None] - t[None, :], 0)


def segments(x: Array, stable: bool) -> Array:
    """exp of sums of what each chunk decays by, [chunks + 1] squared, over the states with one in front."""
    decay = jnp.pad(-jnp.square(x).sum((1, 2)) / 9, (1, 0))
    n = len(decay)
    if stable:
        each = jnp.where(jnp.tril(jnp.ones((n, n), bool), -1), decay[:, None], 0.0)
        sums = jnp.cumsum(each, axis=0)
    else:
        sums = jnp.cumsum(decay)[:, None] - jnp.cumsum(decay)[None, :]
    matrix = jnp.exp(jnp.where(jnp.tril(jnp.ones((n, n), bool)), sums, -jnp.inf))
    left = jnp.einsum("zc,cfg->zfg", matrix, jnp.concatenate([jnp.ones((1, FEATURES, FEATURES)), states(x)]))
    return within(x) + x @ left[:-1]


def summed(x: Array) -> Array:
    """As `segments`, stable, with a sum of elementwise products in place of the matrix product."""
    left = jnp.concatenate([jnp.zeros((1, FEATURES, FEATURES)), states(x)])
    n = len(left)
    decay = jnp.pad(-jnp.square(x).sum((1, 2)) / 9, (1, 0))
    each = jnp.where(jnp.tril(jnp.ones((n, n), bool), -1), decay[:, None], 0.0)
    matrix = jnp.exp(jnp.where(jnp.tril(jnp.ones((n, n), bool)), jnp.cumsum(each, axis=0), -jnp.inf)).T
    return within(x) + x @ (matrix[..., None, None] * left[:, None]).sum(0)[:-1]


def delta(x: Array) -> Array:
    """The delta rule: a chunk's rows correct each other by forward substitution."""
    k = x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)
    beta = jax.nn.sigmoid(x.sum(-1, keepdims=True))
    a = jnp.eye(x.shape[1]) + jnp.tril(beta * k @ k.swapaxes(-1, -2), -1)
    solve = partial(jax.scipy.linalg.solve_triangular, a, lower=True, unit_diagonal=True)

    def body(state: Array, rows: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, u, w = rows
        new = u - w @ state
        return state + k.T @ new, q @ state + jnp.tril(q @ k.T) @ new

    rows = (x, k, solve(beta * jnp.sin(x)), solve(beta * k))
    return lax.scan(body, jnp.zeros((FEATURES, FEATURES)), rows)[1]


def halves(x: Array) -> Array:
    """Chunks of 4 rows cut again in two halves: within a half, and from half to half."""
    x = x.reshape(-1, 2, 2, FEATURES)
    own = jnp.where(jnp.tril(jnp.ones((2, 2), bool)), jnp.einsum("nmqf,nmsf->nmqs", x, x), 0.0) @ x
    sums = jnp.cumsum(x.sum(2), axis=1)
    old = jnp.pad(sums, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    return own + old[:, :, None] + later(x.sum((1, 2)))[:, None, None]


def strided(x: Array) -> Array:
    """Attention among the rows at the same place of their chunks."""
    seen = jnp.tril(jnp.ones((x.shape[0], x.shape[0]), bool))
    scores = jnp.where(seen, jnp.einsum("nqf,mqf->qnm", x, x), -jnp.inf)
    return jnp.einsum("qnm,mqf->nqf", jax.nn.softmax(scores), x)


def linear(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
    return left[0] * right[0], left[1] * right[0] + right[1]


def associative(x: Array) -> Array:
    decays = jnp.broadcast_to(jnp.exp(-jnp.square(x).mean((1, 2)))[:, None, None], (len(x), FEATURES, FEATURES))
    return within(x) + x @ later(lax.associative_scan(linear, (decays, states(x)))[1])


CAUSAL = {
    "within": within,
    "scan": lambda x: scanned(x, retention),
    "scan by index": by_index,
    "scan, the old chunk carried": before,
    "map": lambda x: lax.map(lambda rows: within(rows[None])[0], x),
    "cumsum, moved": lambda x: within(x) + x @ later(jnp.cumsum(states(x), 0)),
    "cumsum, less its own": lambda x: within(x) + x @ (jnp.cumsum(s := states(x), 0) - s),
    "associative scan": associative,
    "old rows": lambda x: within(x) + later(x) + later(later(x)),
    "the old chunk's mean": lambda x: x + later(x.mean(1))[:, None],
    "running sums": lambda x: jnp.cumsum(x, 1) + later(jnp.cumsum(x.sum(1), 0))[:, None],
    "constant decays": lambda x: pairs(x, constant),
    "segment sums": partial(segments, stable=False),
    "stable segment sums": partial(segments, stable=True),
    "cut again": halves,
    "strided": strided,
    "delta rule": delta,
    "sums of products": summed,
    "every place has its weight": lambda x: x * jnp.cos(jnp.arange(x.size)).reshape(x.shape) + later(x),
}
LEAKS = {
    "the chunk's sum": lambda x: x + x.sum(1, keepdims=True),
    "one row ahead": lambda x: within(x, 1),
    "its own state": lambda x: scanned(x, lambda s, x: (s + x.T @ x, x @ (s + x.T @ x))),
    "the chunk's maximum": lambda x: scanned(x, lambda s, x: (s + x.T @ x, x @ s - x.max(0))),
    "backwards": lambda x: scanned(x, retention, reverse=True),
    "cumsum, not moved": lambda x: within(x) + x @ jnp.cumsum(states(x), 0),
    "moved the wrong way": lambda x: x + jnp.concatenate([x[1:], x[:1] * 0]),
    "rolled": lambda x: x + jnp.roll(x, 1, axis=0),
    "moved there and back": lambda x: x @ jnp.pad(later(jnp.cumsum(states(x), 0))[1:], ((0, 1), (0, 0), (0, 0))),
    "pairs with its own": lambda x: pairs(x, constant, shift=0),
    "pairs of moved chunks": lambda x: (
        x @ jnp.einsum("zc,cfg->zfg", jnp.tril(jnp.ones((len(x), len(x))), 1), later(states(x)))
    ),
    "the chunk's decay": lambda x: within(x) * jnp.exp(jnp.cumsum(x, 1)[:, -1:]),
    "a solution from below": lambda x: jax.scipy.linalg.solve_triangular(jnp.triu(x @ x.swapaxes(-1, -2)) + 4, x),
    "turned within": lambda x: x[:, ::-1],
    "cut again, the half's sum": lambda x: x + x.reshape(-1, 2, 2, FEATURES).sum(2).repeat(2, 1).reshape(x.shape),
    "every chunk's mean": lambda x: x - x.mean((0, 1)),
    "joined another way": lambda x: x.swapaxes(0, 1),
}


def unoptimised(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiling takes most of the time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def rows_of(length: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, length, FEATURES)).astype(np.float32)


PARAMS = {"w": jnp.asarray(np.random.default_rng(7).standard_normal((FEATURES, FEATURES)) / 2, jnp.float32)}


def decodes(forward: Callable[[dict[str, Array], Array], Array], step: ji.Step, length: int, k: int) -> None:
    """Chunks of random real lengths 0 to k, padded with other content, in slots whose state held something else."""
    rows, random = rows_of(length), np.random.default_rng(k)
    whole = unoptimised(forward)
    full = np.stack([np.asarray(whole(PARAMS, r)) for r in rows])
    run = unoptimised(lambda given, at, n, state: step(jax.tree.leaves(PARAMS), [given], at, state, n))
    state, done = jax.tree.map(lambda a: a + 3, step.init(2)), np.zeros(2, np.int32)
    while (done < length).any():
        counts = np.minimum(random.integers(0, k + 1, 2), length - done).astype(np.int32)
        chunk = np.full((2, k, FEATURES), 7, np.float32)
        for i in range(2):
            chunk[i, : counts[i]] = rows[i, done[i] : done[i] + counts[i]]
        (out,), after = run(chunk, done, counts, state)
        for i in range(2):
            got, want = np.asarray(out)[i, : counts[i]], full[i, done[i] : done[i] + counts[i]]
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(full).max())
            if counts[i] == 0 and done[i]:
                for a, b in zip(state, after, strict=True):
                    np.testing.assert_array_equal(np.asarray(a)[i], np.asarray(b)[i])
        state, done = after, done + counts


def looks_ahead(forward: Callable[[dict[str, Array], Array], Array]) -> bool:
    """By brute force: whether an output changes with what comes later."""
    run, (rows, other, _) = unoptimised(forward), rows_of(T)
    full = np.asarray(run(PARAMS, rows))
    for t in range(T - 1):
        changed = np.asarray(run(PARAMS, np.concatenate([rows[: t + 1], other[t + 1 :]])))
        if np.abs(changed - full)[: t + 1].max() > 1e-4 * np.abs(full).max():
            return True
    return False


def program(forward: Callable[[dict[str, Array], Array], Array]) -> ji.Program:
    return ji.trace(forward, PARAMS, ji.spec(f"time {FEATURES}", "float32"))


@pytest.mark.parametrize("name", CAUSAL)
def test_what_is_causal_decodes(name: str):
    forward = made(CAUSAL[name])
    assert not looks_ahead(forward)
    step = ji.incremental(program(forward), length=T)
    assert f"chunks of {Q} rows" in step.explain() and step.bytes_per_token == 0
    for k in (1, 3, 9) if name == "scan" else (6,):
        decodes(forward, step, T, k)


# Where nothing but a mask over pairs of chunks hides the only chunk from itself, that isn't seen.
SHORT = [
    pytest.param(name, 3, marks=() if name in ("scan", "cumsum, moved") else pytest.mark.heavy)
    for name in CAUSAL
    if name != "constant decays"
] + [("scan", Q), ("stable segment sums", Q)]


@pytest.mark.parametrize(("name", "length"), SHORT)
def test_a_sequence_of_one_chunk_decodes(name: str, length: int):
    """Padded to a chunk, or just as long."""
    forward = made(CAUSAL[name])
    decodes(forward, ji.incremental(program(forward), length=length), length, 2)


@pytest.mark.parametrize("name", LEAKS)
def test_what_reads_too_much_is_refused(name: str):
    forward = made(LEAKS[name])
    assert looks_ahead(forward)
    with pytest.raises(ji.NotCausalError):
        ji.incremental(program(forward), length=T)
