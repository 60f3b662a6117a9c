"""Layers shared by the architectures. Attribute names and weight layouts follow Hugging Face checkpoints, so a module's
state path is the name of the tensor that fills it, and no weight is transposed on its way in."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array


def _normal(rngs: nnx.Rngs | None, shape: tuple[int, ...], dtype: Any) -> nnx.Param:
    # Without rngs the values don't matter: shapes alone are wanted, and 200 draws take a second to trace.
    return nnx.Param(jnp.zeros(shape, dtype) if rngs is None else jax.random.normal(rngs.params(), shape, dtype) * 0.02)


class Linear(nnx.Module):
    """y = x W^T + b, with weight [out, in] as checkpoints store it."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool = False, dtype: Any = jnp.float32, rngs: nnx.Rngs | None):
        self.weight = _normal(rngs, (n_out, n_in), dtype)
        self.bias = nnx.Param(jnp.zeros((n_out,), dtype)) if bias else None

    def __call__(self, x: Array) -> Array:
        """x: [..., in] -> [..., out]"""
        y = jnp.einsum("...i,oi->...o", x, self.weight[...])
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...], y.shape)


class Embedding(nnx.Module):
    """Table [vocab, features]."""

    def __init__(self, vocab: int, features: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None):
        self.weight = _normal(rngs, (vocab, features), dtype)

    def __call__(self, ids: Array) -> Array:
        """ids: int [...] -> [..., features]"""
        return jnp.take(self.weight[...], ids, axis=0, mode="clip")

    def attend(self, x: Array) -> Array:
        """Scores against every row, for tied output embeddings: [..., features] -> [..., vocab]"""
        return jnp.einsum("...i,oi->...o", x, self.weight[...])


class RMSNorm(nnx.Module):
    """Zhang & Sennrich 2019; statistics in float32 whatever the dtype of x, as Llama computes them."""

    def __init__(self, features: int, *, eps: float, dtype: Any = jnp.float32, rngs: nnx.Rngs | None):
        del rngs
        self.weight = nnx.Param(jnp.ones((features,), dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype) * jnp.broadcast_to(self.weight[...], x.shape)


class LayerNorm(nnx.Module):
    """Ba et al. 2016; statistics in float32."""

    def __init__(self, features: int, *, eps: float, dtype: Any = jnp.float32, rngs: nnx.Rngs | None):
        del rngs
        self.weight = nnx.Param(jnp.ones((features,), dtype))
        self.bias = nnx.Param(jnp.zeros((features,), dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        weight, bias = (jnp.broadcast_to(p[...], x.shape) for p in (self.weight, self.bias))
        return (centred * scale).astype(x.dtype) * weight + bias
