"""Gated linear attention (Yang et al. 2023, arXiv:2312.06635) in its chunkwise form, as it is trained: quadratic within
chunks of 8 rows, `lax.scan` over the chunks with the state as carry, each key's channel decaying by its own gate."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS, KEY, VALUE, LAYERS, CHUNK = 47, 32, 2, 6, 10, 2, 8


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1.0):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    def layer():
        return {
            "q": normal(WIDTH, HEADS, KEY, fan_in=WIDTH),
            "k": normal(WIDTH, HEADS, KEY, fan_in=WIDTH),
            "v": normal(WIDTH, HEADS, VALUE, fan_in=WIDTH),
            "alpha": normal(WIDTH, HEADS, KEY, fan_in=WIDTH),
            "gate": normal(WIDTH, HEADS * VALUE, fan_in=WIDTH),
            "out": normal(HEADS * VALUE, WIDTH, fan_in=WIDTH),
            "up": normal(WIDTH, 2 * WIDTH, fan_in=WIDTH),
            "down": normal(2 * WIDTH, WIDTH, fan_in=2 * WIDTH),
        }

    return forward, {"embed": normal(VOCAB, WIDTH), "layers": [layer() for _ in range(LAYERS)]}


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


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
        scores = jnp.tril((q * jnp.exp(b)) @ (k * jnp.exp(-b)).swapaxes(-1, -2))
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
