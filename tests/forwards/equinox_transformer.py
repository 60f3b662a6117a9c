"""A GPT in Equinox, for ONE sequence [time]: layers mapped over time with vmap, eqx.nn.MultiheadAttention."""

import equinox as eqx
import jax
import jax.numpy as jnp

from forwards import weights

VOCAB, WIDTH, HEADS, LAYERS = 43, 32, 4, 2


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, key):
        attention, mlp = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=attention)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, depth=1, activation=jax.nn.gelu, key=mlp)

    def __call__(self, x, mask):
        h = jax.vmap(self.norm1)(x)
        x = x + self.attention(h, h, h, mask=mask)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm2)(x))


class Transformer(eqx.Module):
    embed: eqx.nn.Embedding
    position: jax.Array
    blocks: list[Block]
    norm: eqx.nn.RMSNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        embed, position, head, *blocks = jax.random.split(key, 3 + LAYERS)
        self.embed = eqx.nn.Embedding(VOCAB, WIDTH, key=embed)
        self.position = jax.random.normal(position, (128, WIDTH)) * 0.5
        self.blocks = [Block(key) for key in blocks]
        self.norm = eqx.nn.RMSNorm(WIDTH)
        self.head = eqx.nn.Linear(WIDTH, VOCAB, key=head)

    def __call__(self, tokens):
        time = len(tokens)
        x = jax.vmap(self.embed)(tokens) + self.position[:time]
        mask = jnp.tril(jnp.ones((time, time), dtype=bool))
        for block in self.blocks:
            x = block(x, mask)
        return jax.vmap(lambda row: self.head(self.norm(row)))(x)


def make(seed=0):
    params, static = weights.equinox_module(Transformer, seed)
    return lambda params, tokens: eqx.combine(params, static)(tokens), params
