"""A ConvNeXt-like image classifier (Liu et al. 2022, arXiv:2201.03545) in NNX with GroupNorm (Wu and He 2018,
arXiv:1803.08494): depthwise 7 x 7 convolutions, inverted bottlenecks, layer scale."""

import jax.numpy as jnp
from flax import nnx

from forwards import weights

CLASSES, WIDTH = 10, 16


class Block(nnx.Module):
    def __init__(self, rngs):
        self.depthwise = nnx.Conv(WIDTH, WIDTH, (7, 7), feature_group_count=WIDTH, rngs=rngs)
        self.norm = nnx.GroupNorm(WIDTH, num_groups=4, rngs=rngs)
        self.expand = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.project = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.scale = nnx.Param(0.5 + 0.1 * rngs.params.normal((WIDTH,)))

    def __call__(self, x):
        return x + self.scale * self.project(nnx.gelu(self.expand(self.norm(self.depthwise(x)))))


class ConvNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, WIDTH, (4, 4), strides=4, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, images):
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


def make(seed=0):
    return weights.nnx_module(ConvNet, seed), None
