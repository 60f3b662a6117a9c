"""A GPT whose matrix products see tokens as one list [batch * time, width] and unfold it for attention only, as kernels
of the GPT-2 days wanted it."""

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS, LAYERS = 43, 32, 4, 2


def make(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1.0):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan_in), jnp.float32)

    def layer():
        return [
            normal(WIDTH, 3 * WIDTH, fan_in=WIDTH),
            normal(WIDTH, WIDTH, fan_in=WIDTH),
            normal(WIDTH, 4 * WIDTH, fan_in=WIDTH),
            normal(4 * WIDTH, WIDTH, fan_in=4 * WIDTH),
        ]

    params = (normal(VOCAB, WIDTH), normal(128, WIDTH), [layer() for _ in range(LAYERS)])
    return forward, params


def norm(x):
    return (x - x.mean(1, keepdims=True)) / (x.std(1, keepdims=True) + 1e-5)


def forward(params, tokens):
    embed, position, layers = params
    batch, time = tokens.shape
    x = jnp.take(embed, tokens.reshape(-1), axis=0) + jnp.tile(position[:time], (batch, 1))
    bias = -1e10 * (1 - jnp.tri(time))
    for qkv, out, up, down in layers:
        heads = (norm(x) @ qkv).reshape(batch, time, 3, HEADS, WIDTH // HEADS).transpose(2, 0, 3, 1, 4)
        # [3, batch * heads, time, dim]: one batched product over all heads of all rows
        q, k, v = heads.reshape(3, batch * HEADS, time, WIDTH // HEADS)
        weights = jax.nn.softmax(q @ k.swapaxes(1, 2) / np.sqrt(WIDTH // HEADS) + bias)
        mixed = (weights @ v).reshape(batch, HEADS, time, -1).transpose(0, 2, 1, 3).reshape(batch * time, WIDTH)
        x = x + mixed @ out
        x = x + jax.nn.gelu(norm(x) @ up) @ down
    return (norm(x) @ embed.T).reshape(batch, time, VOCAB) / np.sqrt(WIDTH)
