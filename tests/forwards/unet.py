"""A denoising U-Net after DDPM (Ho et al. 2020, arXiv:2006.11239) in linen: GroupNorm, a time embedding added in every
block, self-attention at the bottom, skip connections by concatenation, nearest-neighbour upsampling."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from forwards import weights

WIDTHS = (8, 16)


class Block(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, time):
        h = nn.Conv(self.features, (3, 3))(nn.swish(nn.GroupNorm(4)(x)))
        h = h + nn.Dense(self.features)(nn.swish(time))[:, None, None, :]
        h = nn.Conv(self.features, (3, 3))(nn.swish(nn.GroupNorm(4)(h)))
        return h + (x if x.shape[-1] == self.features else nn.Dense(self.features)(x))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x, timestep):
        angles = timestep[:, None] * jnp.exp(-jnp.log(10_000.0) * jnp.arange(8) / 8)
        time = nn.Dense(32)(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1))
        h = nn.Conv(WIDTHS[0], (3, 3))(x)
        skips = []
        for features in WIDTHS:
            h = Block(features)(h, time)
            skips.append(h)
            h = nn.avg_pool(h, (2, 2), strides=(2, 2))
        h = Block(WIDTHS[-1])(h, time)
        batch, height, width, channels = h.shape
        flat = nn.GroupNorm(4)(h).reshape(batch, height * width, channels)
        h = h + nn.MultiHeadDotProductAttention(2)(flat, flat).reshape(h.shape)
        for features in reversed(WIDTHS):
            h = jax.image.resize(h, (h.shape[0], 2 * h.shape[1], 2 * h.shape[2], h.shape[3]), "nearest")
            h = Block(features)(jnp.concatenate([h, skips.pop()], axis=-1), time)
        return nn.Conv(3, (3, 3))(nn.swish(nn.GroupNorm(4)(h)))


def make(seed=0):
    module = UNet()
    return module, weights.init(module, ((1, 16, 16, 3), "float32"), ((1,), "float32"), seed=seed)
