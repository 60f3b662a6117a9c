"""WaveNet (van den Oord et al. 2016, arXiv:1609.03499) in linen: dilated causal convolutions, gated units, residual and
skip connections."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from forwards import weights

VOCAB, CHANNELS, SKIP, KERNEL, DILATIONS = 32, 16, 24, 2, (1, 2, 4, 8)


class WaveNet(nn.Module):
    @nn.compact
    def __call__(self, samples):
        x = jax.nn.one_hot(samples, VOCAB)
        x = nn.Conv(CHANNELS, (KERNEL,), padding="CAUSAL", kernel_init=nn.initializers.normal(0.7))(x)
        skips = 0
        for dilation in DILATIONS:
            conv = nn.Conv(2 * CHANNELS, (KERNEL,), kernel_dilation=(dilation,), padding="CAUSAL")
            filtered, gate = jnp.split(conv(x), 2, axis=-1)
            h = jnp.tanh(filtered) * nn.sigmoid(gate)
            skips += nn.Conv(SKIP, (1,))(h)
            x = x + nn.Conv(CHANNELS, (1,))(h)
        return nn.Dense(VOCAB)(nn.relu(nn.Dense(SKIP)(nn.relu(skips))))


def make(seed=0):
    module = WaveNet()
    return module, weights.init(module, ((1, 4), "int32"), seed=seed)
