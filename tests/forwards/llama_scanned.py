"""Llama 2 (arXiv:2307.09288) as training code for accelerators has it: parameters stacked over layers, the layers under
`lax.scan` with rematerialisation, heads kept grouped instead of repeated."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS, GROUPS, DIM, LAYERS, HIDDEN = 61, 32, 4, 2, 8, 3, 80


def make(seed=0):
    rng = np.random.default_rng(seed)

    def stacked(*shape):
        return jnp.asarray(rng.standard_normal((LAYERS, *shape)) / np.sqrt(shape[0]), jnp.float32)

    layers = {
        "norm1": 1 + stacked(WIDTH),
        "q": stacked(WIDTH, GROUPS, HEADS // GROUPS, DIM),
        "k": stacked(WIDTH, GROUPS, DIM),
        "v": stacked(WIDTH, GROUPS, DIM),
        "o": stacked(HEADS * DIM, WIDTH).reshape(LAYERS, GROUPS, HEADS // GROUPS, DIM, WIDTH),
        "norm2": 1 + stacked(WIDTH),
        "gate": stacked(WIDTH, HIDDEN),
        "up": stacked(WIDTH, HIDDEN),
        "down": stacked(HIDDEN, WIDTH),
    }
    params = {
        "embed": jnp.asarray(rng.standard_normal((VOCAB, WIDTH)), jnp.float32),
        "layers": layers,
        "norm": jnp.asarray(1 + 0.1 * rng.standard_normal(WIDTH), jnp.float32),
        "head": jnp.asarray(rng.standard_normal((WIDTH, VOCAB)) / np.sqrt(WIDTH), jnp.float32),
    }
    return forward, params


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * scale


def rotate(x, sin, cos):
    """x [batch, time, ..., dim], halves rotated against each other."""
    shape = (1, sin.shape[0]) + (1,) * (x.ndim - 3) + (sin.shape[1],)
    sin, cos = sin.reshape(shape), cos.reshape(shape)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def forward(params, tokens):
    time = tokens.shape[1]
    positions = jnp.arange(time, dtype=jnp.float32)
    angles = positions[:, None] * 10_000.0 ** (-jnp.arange(0, DIM, 2, dtype=jnp.float32) / DIM)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    causal = positions[:, None] >= positions[None, :]

    @jax.checkpoint
    def block(x, p):
        h = rms_norm(x, p["norm1"])
        q = rotate(jnp.einsum("btw,wgrd->btgrd", h, p["q"]), sin, cos)
        k = rotate(jnp.einsum("btw,wgd->btgd", h, p["k"]), sin, cos)
        v = jnp.einsum("btw,wgd->btgd", h, p["v"])
        scores = jnp.einsum("btgrd,bsgd->bgrts", q, k) * DIM**-0.5
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1)
        x = x + jnp.einsum("btgrd,grdw->btw", jnp.einsum("bgrts,bsgd->btgrd", weights, v), p["o"])
        h = rms_norm(x, p["norm2"])
        return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"], None

    x, _ = jax.lax.scan(block, params["embed"][tokens], params["layers"])
    return rms_norm(x, params["norm"]) @ params["head"]
