"""Normed queries and keys after Qwen3 (arXiv:2505.09388) and OLMo 2 (arXiv:2501.00656): an RMSNorm over each head of q
and k before rotary positions, one group of keys, all in einsums over [batch, heads, time, dim]."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS, DIM, LAYERS = 55, 40, 5, 8, 2


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1.0):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    def layer():
        return {
            "q": normal(WIDTH, HEADS, DIM, fan_in=WIDTH),
            "k": normal(WIDTH, DIM, fan_in=WIDTH),
            "v": normal(WIDTH, DIM, fan_in=WIDTH),
            "q_norm": 2 + normal(DIM),
            "k_norm": 1 + normal(DIM, fan_in=16),
            "o": normal(HEADS, DIM, WIDTH, fan_in=WIDTH),
            "up": normal(WIDTH, 3 * WIDTH, fan_in=WIDTH),
            "down": normal(3 * WIDTH, WIDTH, fan_in=3 * WIDTH),
        }

    return forward, {"embed": normal(VOCAB, WIDTH), "layers": [layer() for _ in range(LAYERS)]}


def norm(x, weight=1.0):
    return weight * x / jnp.linalg.norm(x, axis=-1, keepdims=True) * np.sqrt(x.shape[-1])


def rotary(x, angles):
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * jnp.cos(angles) - b * jnp.sin(angles), a * jnp.sin(angles) + b * jnp.cos(angles)], -1)


def forward(params, tokens):
    time = tokens.shape[1]
    angles = jnp.arange(time)[:, None] * 1e6 ** -jnp.linspace(0, 1, DIM // 2, endpoint=False)
    visible = jnp.arange(time) <= jnp.arange(time)[:, None]
    x = params["embed"][tokens]
    for p in params["layers"]:
        h = norm(x)
        q = rotary(norm(jnp.einsum("btw,whd->bhtd", h, p["q"]), p["q_norm"]), angles)
        k = rotary(norm(h @ p["k"], p["k_norm"]), angles)
        scores = jnp.einsum("bhtd,bsd->bhts", q, k) / np.sqrt(DIM)
        weights = jax.nn.softmax(scores, axis=-1, where=visible)
        x = x + jnp.einsum("bhts,bsd,hdw->btw", weights, h @ p["v"], p["o"])
        x = x + jnp.square(jax.nn.relu(norm(x) @ p["up"])) @ p["down"]
    return norm(x) @ params["embed"].T / np.sqrt(WIDTH)
