"""A GRU language model in Equinox: eqx.nn.GRUCell under `lax.scan` for one sequence, vmap over the batch."""

import equinox as eqx
import jax
import jax.numpy as jnp

from forwards import weights

VOCAB, WIDTH, HIDDEN = 29, 20, 24


class LanguageModel(eqx.Module):
    embed: eqx.nn.Embedding
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, key):
        embed, cell, head = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(VOCAB, WIDTH, key=embed)
        self.cell = eqx.nn.GRUCell(WIDTH, HIDDEN, key=cell)
        self.head = eqx.nn.Linear(HIDDEN, VOCAB, key=head)

    def __call__(self, tokens):
        def step(hidden, token):
            hidden = self.cell(self.embed(token), hidden)
            return hidden, self.head(hidden)

        return jax.lax.scan(step, jnp.zeros(HIDDEN), tokens)[1]


def make(seed=0):
    params, static = weights.equinox_module(LanguageModel, seed)
    return lambda params, tokens: jax.vmap(eqx.combine(params, static))(tokens), params
