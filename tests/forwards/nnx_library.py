"""A decoder of Flax NNX's own parts, with jax.nn.dot_product_attention(is_causal=True)."""

import jax
import jax.numpy as jnp
from flax import nnx

from forwards import weights

VOCAB = 43


class Block(nnx.Module):
    def __init__(self, width, heads, rngs):
        self.heads = heads
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.LinearGeneral(width, (3, heads, width // heads), rngs=rngs)
        self.out = nnx.LinearGeneral((heads, width // heads), width, axis=(-2, -1), rngs=rngs)
        self.mlp = nnx.Sequential(nnx.Linear(width, 64, rngs=rngs), jax.nn.relu, nnx.Linear(64, width, rngs=rngs))

    def __call__(self, x):
        q, k, v = jnp.moveaxis(self.qkv(self.norm(x)), 2, 0)
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(x)


class Decoder(nnx.Module):
    def __init__(self, rngs, width=24, heads=3):
        self.embed = nnx.Embed(VOCAB, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(2)])
        self.position = nnx.Embed(128, width, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(x) / self.embed.features**0.5


def make(seed=0):
    return weights.nnx_module(Decoder, seed), None
