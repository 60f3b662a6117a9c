"""U-Net as first published (Ronneberger et al. 2015, arXiv:1505.04597) in Haiku: max pooling down, transposed
convolutions up, crops of the skip connections since convolutions aren't padded; a forward over any
even enough image."""

import haiku as hk
import jax
import jax.numpy as jnp

from forwards import weights


def double_conv(x, channels):
    for _ in range(2):
        x = jax.nn.relu(hk.Conv2D(channels, 3, padding="VALID")(x))
    return x


def crop(x, like):
    top, left = ((x.shape[d] - like.shape[d]) // 2 for d in (1, 2))
    return jax.lax.dynamic_slice_in_dim(x[:, top : top + like.shape[1]], left, like.shape[2], axis=2)


def segment(x):
    x = double_conv(x, 6)
    skip = x
    x = double_conv(hk.max_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"), 12)
    x = hk.Conv2DTranspose(6, 2, stride=2)(x)
    x = double_conv(jnp.concatenate([crop(skip, x), x], axis=-1), 6)
    return jax.nn.log_softmax(hk.Conv2D(2, 1)(x))


def make(seed=0):
    model = hk.without_apply_rng(hk.transform(segment))
    return model.apply, weights.init(model, ((1, 20, 20, 1), "float32"), seed=seed)
