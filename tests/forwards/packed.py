"""Packed documents (as in T5's and PaLM's input pipelines): token 0 starts a document; attention stays within it and
positions count from its start, both computed from the tokens by cumulative sums."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS = 11, 32, 4  # so few tokens that several documents fit into a short sequence


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1.0):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    params = {
        "embed": normal(VOCAB, WIDTH),
        "position": normal(128, WIDTH),
        "qkv": normal(WIDTH, 3, HEADS, WIDTH // HEADS, fan_in=WIDTH),
        "out": normal(HEADS, WIDTH // HEADS, WIDTH, fan_in=WIDTH),
        "head": normal(WIDTH, VOCAB, fan_in=WIDTH),
    }
    return forward, params


def forward(params, tokens):
    time = tokens.shape[1]
    starts = tokens == 0
    document = jnp.cumsum(starts, axis=1)
    index = jnp.arange(time)
    position = index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    x = params["embed"][tokens] + params["position"][position]
    q, k, v = jnp.moveaxis(jnp.einsum("btw,wnhd->btnhd", x, params["qkv"]), 2, 0)
    same = document[:, :, None] == document[:, None, :]
    mask = (same & (index[:, None] >= index[None, :]))[:, None]
    scores = jnp.where(mask, jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(WIDTH // HEADS), -1e9)
    x = x + jnp.einsum("bhts,bshd,hdw->btw", jax.nn.softmax(scores), v, params["out"])
    return jnp.tanh(x) @ params["head"]
