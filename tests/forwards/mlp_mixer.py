"""MLP-Mixer (Tolstikhin et al. 2021, arXiv:2105.01601) in Equinox, for ONE image, mapped over the batch with vmap."""

import equinox as eqx
import jax
import jax.numpy as jnp

from forwards import weights

CLASSES, WIDTH, PATCH, SIDE = 10, 16, 4, 16
PATCHES = (SIDE // PATCH) ** 2


class Mixer(eqx.Module):
    embed: eqx.nn.Conv2d
    tokens: list[eqx.nn.MLP]
    channels: list[eqx.nn.MLP]
    norms: list[eqx.nn.LayerNorm]
    head: eqx.nn.Linear

    def __init__(self, key, depth=2):
        embed, head, *keys = jax.random.split(key, 2 + 2 * depth)
        self.embed = eqx.nn.Conv2d(3, WIDTH, PATCH, stride=PATCH, key=embed)
        self.tokens = [eqx.nn.MLP(PATCHES, PATCHES, 24, 1, jax.nn.gelu, key=k) for k in keys[:depth]]
        self.channels = [eqx.nn.MLP(WIDTH, WIDTH, 32, 1, jax.nn.gelu, key=k) for k in keys[depth:]]
        self.norms = [eqx.nn.LayerNorm((WIDTH, PATCHES)) for _ in range(2 * depth + 1)]
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=head)

    def __call__(self, image):
        x = self.embed(image).reshape(WIDTH, PATCHES)
        for i, (token, channel) in enumerate(zip(self.tokens, self.channels, strict=True)):
            x = x + jax.vmap(token)(self.norms[2 * i](x))
            x = x + jax.vmap(channel, in_axes=1, out_axes=1)(self.norms[2 * i + 1](x))
        return self.head(jnp.mean(self.norms[-1](x), axis=1))


def make(seed=0):
    params, static = weights.equinox_module(Mixer, seed)
    return lambda params, images: jax.vmap(eqx.combine(params, static))(images), params
