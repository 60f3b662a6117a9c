"""Chunkwise gated linear attention as `gla_chunked`, but for one slip: within a chunk the keys' decays are divided by
those of the whole chunk, to keep them in range, and the queries' aren't. So each row reads its whole chunk's gates."""

import jax
import jax.numpy as jnp
import numpy as np

from forwards import gla_chunked
from forwards.gla_chunked import CHUNK, HEADS, KEY, VALUE, WIDTH, norm

VOCAB = gla_chunked.VOCAB


def make(seed=0):
    return forward, gla_chunked.make(seed)[1]


def chunkwise(q, k, v, log_alpha):
    """q, k, log_alpha [batch, time, heads, key]; v [batch, time, heads, value] -> [batch, time, heads, value]"""
    batch, time, heads, _ = q.shape
    pad = -time % CHUNK

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)))
        return x.reshape(batch, (time + pad) // CHUNK, CHUNK, heads, -1).transpose(1, 0, 3, 2, 4)

    def chunk(state, rows):
        q, k, v, log_alpha = rows  # [batch, heads, chunk, key or value]
        b = jnp.cumsum(log_alpha, axis=2)
        whole = b[:, :, -1:]
        scores = jnp.tril((q * jnp.exp(b)) @ (k * jnp.exp(whole - b)).swapaxes(-1, -2))
        out = scores @ v + (q * jnp.exp(b)) @ state
        state = jnp.exp(whole).swapaxes(-1, -2) * state + (k * jnp.exp(whole - b)).swapaxes(-1, -2) @ v
        return state, out

    state = jnp.zeros((batch, heads, q.shape[-1], v.shape[-1]), v.dtype)
    _, out = jax.lax.scan(chunk, state, (cut(q), cut(k), cut(v), cut(log_alpha)))
    return out.transpose(1, 0, 3, 2, 4).reshape(batch, time + pad, heads, -1)[:, :time]


def attention(p, x):
    q = jnp.einsum("btw,whk->bthk", x, p["q"])
    k = jnp.einsum("btw,whk->bthk", x, p["k"]) * KEY**-0.5
    v = jnp.einsum("btw,whv->bthv", x, p["v"])
    log_alpha = jax.nn.log_sigmoid(jnp.einsum("btw,whk->bthk", x, p["alpha"])) / 4
    y = norm(chunkwise(q, k, v, log_alpha)).reshape(*x.shape[:2], HEADS * VALUE)
    return (jax.nn.swish(x @ p["gate"]) * y) @ p["out"]


def forward(params, tokens):
    x = params["embed"][tokens]
    for p in params["layers"]:
        x = x + attention(p, norm(x))
        x = x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]
    return norm(x) @ params["embed"].T / np.sqrt(WIDTH)
