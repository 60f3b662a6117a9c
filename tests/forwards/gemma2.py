"""Gemma 2 (arXiv:2408.00118): alternate sliding windows and full attention, softcaps, repeated K/V heads, interleaved
rotary positions, norms before and after."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS, GROUPS, DIM, WINDOW = 59, 32, 4, 2, 8, 7


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) * 0.25, jnp.float32)

    def layer():
        return {
            "norms": normal(4, WIDTH),
            "q": normal(WIDTH, HEADS * DIM),
            "kv": normal(WIDTH, 2 * GROUPS * DIM),
            "o": normal(HEADS * DIM, WIDTH),
            "gate": normal(WIDTH, 64),
            "up": normal(WIDTH, 64),
            "down": normal(64, WIDTH),
        }

    return forward, {"embed": normal(VOCAB, WIDTH), "layers": [layer() for _ in range(4)], "norm": normal(WIDTH)}


def norm(x, weight):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * (1 + weight)


def rope(x):
    frequencies = 10_000 ** (-jnp.arange(0, DIM, 2) / DIM)
    angles = jnp.arange(x.shape[1])[:, None] * frequencies
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def forward(params, tokens):
    batch, time = tokens.shape
    x = params["embed"][tokens] * np.sqrt(WIDTH)
    i, j = jnp.arange(time)[:, None], jnp.arange(time)[None, :]
    for number, layer in enumerate(params["layers"]):
        h = norm(x, layer["norms"][0])
        q = rope((h @ layer["q"]).reshape(batch, time, HEADS, DIM))
        k, v = jnp.split((h @ layer["kv"]).reshape(batch, time, 2 * GROUPS, DIM), 2, axis=2)
        k, v = (jnp.repeat(a, HEADS // GROUPS, axis=2) for a in (rope(k), v))
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(DIM)
        scores = 50 * jnp.tanh(scores / 50)
        mask = (j <= i) & (i - j < WINDOW) if number % 2 == 0 else j <= i
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, -1), v).reshape(batch, time, -1)
        x = x + norm(mixed @ layer["o"], layer["norms"][1])
        h = norm(x, layer["norms"][2])
        x = x + norm((jax.nn.gelu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"], layer["norms"][3])
    logits = norm(x, params["norm"]) @ params["embed"].T
    return 30 * jnp.tanh(logits / 30)
