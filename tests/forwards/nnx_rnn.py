"""A GRU language model of NNX's own parts, with a residual around each layer."""

import jax.numpy as jnp
from flax import nnx

from forwards import weights

VOCAB, WIDTH, LAYERS = 33, 24, 2


class LanguageModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.layers = nnx.List([nnx.RNN(nnx.GRUCell(WIDTH, WIDTH, rngs=rngs)) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x, initial_carry=jnp.zeros((len(x), WIDTH)))
        return self.head(x)


def make(seed=0):
    return weights.nnx_module(LanguageModel, seed), None
