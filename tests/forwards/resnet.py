"""ResNet (He et al. 2015, arXiv:1512.03385) in linen: convolutions, BatchNorm with its running statistics, projection
shortcuts, global average pooling."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from forwards import weights

CLASSES, STAGES = 10, (8, 16)


class ResidualBlock(nn.Module):
    filters: int
    strides: tuple[int, int]
    norm: type

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(nn.Conv(self.filters, (3, 3), self.strides, use_bias=False)(x)))
        y = self.norm()(nn.Conv(self.filters, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = self.norm(name="norm_proj")(nn.Conv(self.filters, (1, 1), self.strides, use_bias=False)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu(norm()(nn.Conv(STAGES[0], (5, 5), (2, 2), use_bias=False)(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, filters in enumerate(STAGES):
            for block in range(2):
                strides = (2, 2) if stage > 0 and block == 0 else (1, 1)
                x = ResidualBlock(filters, strides, norm)(x)
        return nn.Dense(CLASSES)(jnp.mean(x, axis=(1, 2)))


def make(seed=0):
    module = ResNet()
    return module, weights.init(module, ((1, 16, 16, 3), "float32"), seed=seed)
