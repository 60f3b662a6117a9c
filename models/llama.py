"""Llama (Touvron et al. 2023, arXiv:2302.13971) and its later versions: a plain forward over a full sequence.

RMSNorm before each block, rotary positions (Su et al. 2021, arXiv:2104.09864) on halves, grouped queries
(Ainslie et al. 2023, arXiv:2305.13245), SwiGLU. No cache and no step: those are derived.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.errors import CheckpointError
from jaxinfer.models import Architecture
from jaxinfer.models.config import IGNORED, ROPE_KEYS, Field, RopeScaling, read_config, read_rope
from jaxinfer.models.layers import Array, Embedding, Linear, RMSNorm
from jaxinfer.models.weights import Weight, unpermute_rope


@dataclass(frozen=True)
class Config:
    """The fields of a Llama config.json, under its own names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads = {self.num_attention_heads} must be a multiple of num_key_value_heads = "
                f"{self.num_key_value_heads}: each key head serves as many query heads."
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim = {self.head_dim} must be even: rotary positions turn pairs of features.")


def rope_frequencies(config: Config) -> Array:
    """Angle per position of each rotated pair: float32 [head_dim / 2]."""
    powers = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = config.rope_theta**-powers
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    # "llama3" (Llama 3.1 model card): long wavelengths are stretched by `factor`, short ones kept, blended in between.
    wavelength = 2 * math.pi / frequencies
    original = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = jnp.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return frequencies * (smooth + (1 - smooth) / scaling.factor)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary positions on halves. x: [batch, time, ..., head_dim]; cos, sin: [time, head_dim / 2]"""
    shape = (1, x.shape[1], *(1,) * (x.ndim - 3), x.shape[-1] // 2)
    cos, sin = cos.reshape(shape).astype(x.dtype), sin.reshape(shape).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nnx.Module):
    """Causal attention with `num_key_value_heads` groups of query heads."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs | None):
        self.groups, self.dim = config.num_key_value_heads, config.head_dim
        self.heads = config.num_attention_heads
        wide, narrow = self.heads * self.dim, self.groups * self.dim
        keywords: dict[str, Any] = {"bias": config.attention_bias, "dtype": dtype, "rngs": rngs}
        self.q_proj = Linear(config.hidden_size, wide, **keywords)
        self.k_proj = Linear(config.hidden_size, narrow, **keywords)
        self.v_proj = Linear(config.hidden_size, narrow, **keywords)
        self.o_proj = Linear(wide, config.hidden_size, **keywords)

    def __call__(self, x: Array, cos: Array, sin: Array) -> Array:
        batch, time, _ = x.shape
        q = self.q_proj(x).reshape(batch, time, self.groups, self.heads // self.groups, self.dim)
        k = self.k_proj(x).reshape(batch, time, self.groups, self.dim)
        v = self.v_proj(x).reshape(batch, time, self.groups, self.dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        scores = jnp.einsum("btgrd,bsgd->bgrts", q, k) * (1 / math.sqrt(self.dim))
        causal = jnp.arange(time)[:, None] >= jnp.arange(time)[None, :]
        scores = jnp.where(causal[None, None, None], scores.astype(jnp.float32), -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        mixed = jnp.einsum("bgrts,bsgd->btgrd", weights, v)
        return self.o_proj(mixed.reshape(batch, time, self.heads * self.dim))


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs | None):
        keywords: dict[str, Any] = {"bias": config.mlp_bias, "dtype": dtype, "rngs": rngs}
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, **keywords)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, **keywords)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, **keywords)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """One pre-norm block."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs | None):
        norm: dict[str, Any] = {"eps": config.rms_norm_eps, "dtype": dtype, "rngs": rngs}
        self.input_layernorm = RMSNorm(config.hidden_size, **norm)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, **norm)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, cos: Array, sin: Array) -> Array:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nnx.Module):
    """Embedding, layers and final norm: what checkpoints keep under `model.`"""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs | None):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Array, cos: Array, sin: Array) -> Array:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class Llama(nnx.Module):
    """tokens: Int[Array, "batch time"] -> logits: Float[Array, "batch time vocab"]"""

    def __init__(self, config: Config, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None):
        self.config = config
        self.model = Decoder(config, dtype=dtype, rngs=rngs)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)
        )

    def __call__(self, tokens: Array) -> Array:
        positions = jnp.arange(tokens.shape[1], dtype=jnp.float32)
        angles = positions[:, None] * rope_frequencies(self.config)[None, :]
        x = self.model(tokens, jnp.cos(angles), jnp.sin(angles))
        return self.model.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x)


def _head_dim(fields: Mapping[str, Any]) -> int:
    size, heads = fields["hidden_size"], fields["num_attention_heads"]
    if size % heads:
        raise CheckpointError(f"hidden_size = {size} is no multiple of num_attention_heads = {heads}; give head_dim.")
    return size // heads


# Defaults are those of transformers' LlamaConfig.
_FIELDS = {
    "model_type": Field(str, choices=("llama",), keep=False),
    "vocab_size": Field(int),
    "hidden_size": Field(int),
    "intermediate_size": Field(int),
    "num_hidden_layers": Field(int, maximum=4096),
    "num_attention_heads": Field(int),
    "num_key_value_heads": Field(int, lambda fields: fields["num_attention_heads"]),
    "head_dim": Field(int, _head_dim),
    "max_position_embeddings": Field(int, 2048),
    "rms_norm_eps": Field(float, 1e-6, minimum=0, maximum=1),
    "tie_word_embeddings": Field(bool, False),
    "attention_bias": Field(bool, False),
    "mlp_bias": Field(bool, False),
    "hidden_act": Field(str, "silu", choices=("silu", "swish"), keep=False),
    "rope_interleaved": Field(bool, False, choices=(False,), keep=False),
}
# pretraining_tp only split matrix products in training; is_llama_config marks a conversion from another library.
_IGNORED = IGNORED | ROPE_KEYS | {"pretraining_tp", "is_llama_config"}


def read(mapping: Mapping[str, Any]) -> Config:
    """A Llama config.json -> Config; raises CheckpointError for what is unknown or not supported."""
    theta, scaling = read_rope(mapping)
    return read_config(Config, mapping, _FIELDS, ignored=_IGNORED, rope_theta=theta, rope_scaling=scaling)


def _unpermute_q(array: Any, config: Config) -> Any:
    return unpermute_rope(array, config.num_attention_heads)


def _unpermute_k(array: Any, config: Config) -> Any:
    return unpermute_rope(array, config.num_key_value_heads)


# Part of a layer in Hugging Face checkpoints, the same in GGUF, what undoes llama.cpp's order of q and k.
_PARTS = (
    ("self_attn.q_proj", "attn_q", _unpermute_q),
    ("self_attn.k_proj", "attn_k", _unpermute_k),
    ("self_attn.v_proj", "attn_v", None),
    ("self_attn.o_proj", "attn_output", None),
    ("mlp.gate_proj", "ffn_gate", None),
    ("mlp.up_proj", "ffn_up", None),
    ("mlp.down_proj", "ffn_down", None),
    ("input_layernorm", "attn_norm", None),
    ("post_attention_layernorm", "ffn_norm", None),
)
WEIGHTS = (
    Weight("model.embed_tokens.weight", "model.embed_tokens.weight", "token_embd.weight"),
    *(
        Weight(f"{name}.{kind}", f"{name}.{kind}", f"blk.{{i}}.{gguf}.{kind}", undo)
        for part, gguf, undo in _PARTS
        for name in [f"model.layers.{{i}}.{part}"]
        for kind in ("weight", "bias")
    ),
    Weight("model.norm.weight", "model.norm.weight", "output_norm.weight"),
    Weight("lm_head.weight", "lm_head.weight", "output.weight", tied_to="model.embed_tokens.weight"),
)

ARCHITECTURE = Architecture(
    name="llama",
    kind="LanguageModel",
    config=read,
    module=Llama,
    weights=WEIGHTS,
    # Tables of old checkpoints that follow from rope_theta.
    ignore=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
