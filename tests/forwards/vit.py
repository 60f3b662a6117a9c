"""ViT (Dosovitskiy et al. 2020, arXiv:2010.11929) in NNX: patches by a strided convolution, a class token, pre-norm
encoder blocks."""

import jax.numpy as jnp
from flax import nnx

from forwards import weights

CLASSES, WIDTH, HEADS, PATCH, SIDE = 10, 32, 4, 4, 16


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=HEADS, in_features=WIDTH, decode=False, deterministic=True, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.fc1, self.fc2 = nnx.Linear(WIDTH, 64, rngs=rngs), nnx.Linear(64, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(nnx.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nnx.Module):
    def __init__(self, rngs):
        self.patches = nnx.Conv(3, WIDTH, (PATCH, PATCH), strides=(PATCH, PATCH), padding="VALID", rngs=rngs)
        self.cls = nnx.Param(rngs.params.normal((1, 1, WIDTH)))
        self.position = nnx.Param(rngs.params.normal((1, (SIDE // PATCH) ** 2 + 1, WIDTH)) * 0.5)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, images):
        x = self.patches(images)
        batch = x.shape[0]
        x = x.reshape(batch, -1, WIDTH)
        x = jnp.concatenate([jnp.tile(self.cls[...], (batch, 1, 1)), x], axis=1) + self.position[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def make(seed=0):
    return weights.nnx_module(VisionTransformer, seed), None
