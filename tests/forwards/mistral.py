"""Mistral 7B (Jiang et al. 2023, arXiv:2310.06825) in NNX: a sliding window in every layer, grouped heads."""

import jax
import jax.numpy as jnp
from flax import nnx

from forwards import weights

VOCAB, WIDTH, HEADS, GROUPS, DIM, WINDOW = 41, 32, 4, 2, 8, 6


def rope(x):
    half = jnp.arange(DIM // 2)
    angles = jnp.arange(x.shape[1])[:, None] * 10_000.0 ** (-half / (DIM // 2))
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    left, right = x[..., : DIM // 2], x[..., DIM // 2 :]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.q_proj = nnx.LinearGeneral(WIDTH, (HEADS, DIM), use_bias=False, rngs=rngs)
        self.k_proj = nnx.LinearGeneral(WIDTH, (GROUPS, DIM), use_bias=False, rngs=rngs)
        self.v_proj = nnx.LinearGeneral(WIDTH, (GROUPS, DIM), use_bias=False, rngs=rngs)
        self.o_proj = nnx.LinearGeneral((HEADS, DIM), WIDTH, axis=(-2, -1), use_bias=False, rngs=rngs)

    def __call__(self, x):
        q, k, v = rope(self.q_proj(x)), rope(self.k_proj(x)), self.v_proj(x)
        row, column = jnp.arange(x.shape[1])[:, None], jnp.arange(x.shape[1])[None, :]
        mask = (column <= row) & (column > row - WINDOW)
        return self.o_proj(jax.nn.dot_product_attention(q, k, v, mask=mask[None, None]))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = Attention(rngs)
        self.mlp_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.gate = nnx.Linear(WIDTH, 72, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 72, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(72, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.attention_norm(x))
        h = self.mlp_norm(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class Mistral(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def make(seed=0):
    return weights.nnx_module(Mistral, seed), None
