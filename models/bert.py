"""BERT encoders (Devlin et al. 2018, arXiv:1810.04805): a plain forward over whole sequences.

Learned absolute positions, bidirectional attention, LayerNorm after each residual sum. The pooler and the heads of
pre-training are not loaded: sentence vectors are pooled from the last hidden state.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.errors import CheckpointError, RequestError
from jaxinfer.models import Architecture
from jaxinfer.models.config import IGNORED, Field, read_config
from jaxinfer.models.layers import Array, Embedding, LayerNorm, Linear
from jaxinfer.models.weights import Weight

# Names of transformers' ACT2FN. "gelu" is exact (Hendrycks & Gimpel 2016, arXiv:1606.08415), the others its tanh form.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@dataclass(frozen=True)
class Config:
    """The fields of a BERT config.json, under its own names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    hidden_act: str

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                f"hidden_size = {self.hidden_size} must be a multiple of "
                f"num_attention_heads = {self.num_attention_heads}."
            )


class Embeddings(nnx.Module):
    """Word + position + token type (always 0: one segment), normalised."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs | None):
        keywords: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size, **keywords)
        self.position_embeddings = Embedding(config.max_position_embeddings, config.hidden_size, **keywords)
        self.token_type_embeddings = Embedding(config.type_vocab_size, config.hidden_size, **keywords)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, **keywords)

    def __call__(self, tokens: Array) -> Array:
        words = self.word_embeddings(tokens)
        fixed = self.position_embeddings.weight[: tokens.shape[1]] + self.token_type_embeddings.weight[:1]
        return self.LayerNorm(words + fixed[None])


class SelfAttention(nnx.Module):
    """Scaled dot products of all pairs; keys whose mask is 0 get no weight."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs | None):
        self.heads = config.num_attention_heads
        keywords: dict[str, Any] = {"bias": True, "dtype": dtype, "rngs": rngs}
        self.query = Linear(config.hidden_size, config.hidden_size, **keywords)
        self.key = Linear(config.hidden_size, config.hidden_size, **keywords)
        self.value = Linear(config.hidden_size, config.hidden_size, **keywords)

    def __call__(self, x: Array, mask: Array) -> Array:
        batch, length, features = x.shape
        shape = (batch, length, self.heads, features // self.heads)
        q, k, v = (project(x).reshape(shape) for project in (self.query, self.key, self.value))
        scores = jnp.einsum("bthd,bshd->bhts", q, k).astype(jnp.float32) * (1 / math.sqrt(shape[-1]))
        # The lowest finite value, not -inf: a row that is all padding has to stay free of NaN.
        scores = jnp.where(mask[:, None, None, :] != 0, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(batch, length, features)


class Output(nnx.Module):
    """Projects a block's result, adds the block's input, normalises."""

    def __init__(self, config: Config, n_in: int, *, dtype: Any, rngs: nnx.Rngs | None):
        self.dense = Linear(n_in, config.hidden_size, bias=True, dtype=dtype, rngs=rngs)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, residual: Array) -> Array:
        return self.LayerNorm(self.dense(x) + residual)


class Attention(nnx.Module):
    """Self-attention block."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs | None):
        self.self = SelfAttention(config, dtype=dtype, rngs=rngs)  # the checkpoint's name
        self.output = Output(config, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, mask: Array) -> Array:
        return self.output(self.self(x, mask), x)


class Intermediate(nnx.Module):
    """Widens and bends."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs | None):
        self.act = config.hidden_act
        self.dense = Linear(config.hidden_size, config.intermediate_size, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return ACTIVATIONS[self.act](self.dense(x))


class Layer(nnx.Module):
    """One post-norm block."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs | None):
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.intermediate = Intermediate(config, dtype=dtype, rngs=rngs)
        self.output = Output(config, config.intermediate_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, mask: Array) -> Array:
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class Stack(nnx.Module):
    """The layers: what checkpoints keep under `encoder.`"""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs | None):
        self.layer = nnx.List([Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: Array, mask: Array) -> Array:
        for layer in self.layer:
            x = layer(x, mask)
        return x


class Bert(nnx.Module):
    """tokens: Int[Array, "batch length"], mask: Int[Array, "batch length"] -> hidden: Float[Array, "batch length d"]

    mask is 1 at tokens and 0 at padding, on either side. Positions count from the first column, padding included, as in
    the reference: pad on the right where vectors must not depend on padding.
    """

    def __init__(self, config: Config, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None):
        self.config = config
        self.embeddings = Embeddings(config, dtype=dtype, rngs=rngs)
        self.encoder = Stack(config, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Array, mask: Array) -> Array:
        limit = self.config.max_position_embeddings
        if tokens.shape[1] > limit:
            raise RequestError(f"{tokens.shape[1]} tokens; this model has positions for {limit}. Shorten the text.")
        return self.encoder(self.embeddings(tokens), mask)


# Defaults are those of transformers' BertConfig.
_FIELDS = {
    "model_type": Field(str, choices=("bert",), keep=False),
    "vocab_size": Field(int),
    "hidden_size": Field(int),
    "intermediate_size": Field(int),
    "num_hidden_layers": Field(int, maximum=4096),
    "num_attention_heads": Field(int),
    "max_position_embeddings": Field(int, 512),
    "type_vocab_size": Field(int, 2),
    "layer_norm_eps": Field(float, 1e-12, minimum=0, maximum=1),
    "hidden_act": Field(str, "gelu", choices=tuple(ACTIVATIONS)),
    "position_embedding_type": Field(str, "absolute", choices=("absolute",), keep=False),
    "is_decoder": Field(bool, False, choices=(False,), keep=False),
    "add_cross_attention": Field(bool, False, choices=(False,), keep=False),
}
# tie_word_embeddings and the pooler's sizes are about parts that are not loaded; directionality is always "bidi".
_IGNORED = IGNORED | {
    *("tie_word_embeddings", "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers"),
    *("pooler_size_per_head", "pooler_type"),
}


def read(mapping: Mapping[str, Any]) -> Config:
    """A BERT config.json -> Config; raises CheckpointError for what is unknown or not supported."""
    return read_config(Config, mapping, _FIELDS, ignored=_IGNORED)


_LAYER = "encoder.layer.{i}"
_DENSE = (
    *(f"{_LAYER}.attention.self.{part}" for part in ("query", "key", "value")),
    *(f"{_LAYER}.{part}.dense" for part in ("attention.output", "intermediate", "output")),
)
_NORMS = ("embeddings.LayerNorm", f"{_LAYER}.attention.output.LayerNorm", f"{_LAYER}.output.LayerNorm")
_TABLES = tuple(f"embeddings.{part}_embeddings.weight" for part in ("word", "position", "token_type"))
# target -> name in a checkpoint of BertModel. Those converted from TensorFlow call a norm's parameters gamma and beta.
_NAMES = (
    *((name, name) for name in _TABLES),
    *((f"{name}.{kind}", f"{name}.{kind}") for name in (*_DENSE, *_NORMS) for kind in ("weight", "bias")),
    *((f"{name}.{kind}", f"{name}.{old}") for name in _NORMS for kind, old in (("weight", "gamma"), ("bias", "beta"))),
)
# Checkpoints of a BertModel inside another class put everything under "bert."
WEIGHTS = tuple(Weight(target, prefix + name) for prefix in ("", "bert.") for target, name in _NAMES)

ARCHITECTURE = Architecture(
    name="bert",
    kind="Encoder",
    config=read,
    module=Bert,
    weights=WEIGHTS,
    ignore=(
        r"(bert\.)?embeddings\.position_ids",  # 0, 1, 2, ...
        r"(bert\.)?pooler\.dense\.(weight|bias)",
        r"cls\.(predictions|seq_relationship)\..*",  # heads of pre-training
    ),
)
