"""Learned attention sinks after gpt-oss (arXiv:2508.10925): a logit of each head's own joins the softmax as one more
column and is then dropped; windows in every other layer; a forward over ONE sequence [time]."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS, GROUPS, DIM, LAYERS, WINDOW = 59, 32, 4, 2, 8, 2, 5


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1.0):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    def layer():
        return {
            "norm": 1 + normal(WIDTH, fan_in=100),
            "qkv": normal(WIDTH, (HEADS + 2 * GROUPS) * DIM, fan_in=WIDTH),
            "qkv_bias": normal((HEADS + 2 * GROUPS) * DIM, fan_in=10),
            "sinks": normal(HEADS),
            "out": normal(HEADS * DIM, WIDTH, fan_in=WIDTH),
        }

    return forward, {
        "embed": normal(VOCAB, WIDTH),
        "layers": [layer() for _ in range(LAYERS)],
        "head": normal(WIDTH, VOCAB, fan_in=WIDTH),
    }


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale


def rotary(x):
    """x [time, ..., dim]"""
    angles = jnp.arange(x.shape[0])[:, None] * 150_000.0 ** (-jnp.arange(0, DIM, 2) / DIM)
    cos, sin = (f(angles).reshape(x.shape[0], *(1,) * (x.ndim - 2), DIM // 2) for f in (jnp.cos, jnp.sin))
    x1, x2 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def sdpa(q, k, v, sinks, window):
    """q [time, groups, heads a group, dim], k and v [time, groups, dim]"""
    time, groups, repeats, dim = q.shape
    qk = jnp.einsum("qhmd,khd->hmqk", q, k) * dim**-0.5
    mask = jnp.triu(jnp.full((time, time), -jnp.inf), k=1)
    if window:
        mask += jnp.tril(jnp.full((time, time), -jnp.inf), k=-window)
    qk += mask[None, None]
    sink = jnp.broadcast_to(sinks.reshape(groups, repeats, 1, 1), (groups, repeats, time, 1))
    weights = jax.nn.softmax(jnp.concatenate([qk, sink], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("hmqk,khd->qhmd", weights, v).reshape(time, -1)


def forward(params, tokens):
    x = params["embed"][tokens]
    time = x.shape[0]
    for number, p in enumerate(params["layers"]):
        qkv = rms_norm(x, p["norm"]) @ p["qkv"] + p["qkv_bias"]
        q, k, v = jnp.split(qkv, [HEADS * DIM, (HEADS + GROUPS) * DIM], axis=-1)
        q = rotary(q.reshape(time, GROUPS, HEADS // GROUPS, DIM))
        k, v = rotary(k.reshape(time, GROUPS, DIM)), v.reshape(time, GROUPS, DIM)
        x = x + sdpa(q, k, v, p["sinks"], WINDOW if number % 2 == 0 else 0) @ p["out"]
    return rms_norm(x, 1.0) @ params["head"]
