"""A GPT in Haiku: hk.MultiHeadAttention under a lower triangular mask, hk.transform."""

import haiku as hk
import jax
import numpy as np

from forwards import weights

VOCAB, WIDTH, HEADS, LAYERS = 39, 32, 4, 2


def layer_norm(x):
    return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)


def language_model(tokens):
    time = tokens.shape[1]
    init = hk.initializers.VarianceScaling(2 / LAYERS)
    embed = hk.Embed(VOCAB, WIDTH, w_init=hk.initializers.RandomNormal(1.0))
    h = embed(tokens) + hk.get_parameter("position", [128, WIDTH], init=hk.initializers.RandomNormal(0.5))[:time]
    causal = np.tril(np.ones((1, 1, time, time)))
    for _ in range(LAYERS):
        normed = layer_norm(h)
        h = h + hk.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=init)(normed, normed, normed, mask=causal)
        mlp = hk.Sequential([hk.Linear(4 * WIDTH, w_init=init), jax.nn.gelu, hk.Linear(WIDTH, w_init=init)])
        h = h + mlp(layer_norm(h))
    return hk.Linear(VOCAB)(layer_norm(h))


def make(seed=0):
    model = hk.without_apply_rng(hk.transform(language_model))
    return model.apply, weights.init(model, ((1, 4), "int32"), seed=seed)
