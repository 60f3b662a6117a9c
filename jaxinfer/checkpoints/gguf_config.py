"""GGUF metadata translated into what a Hugging Face config.json would say of the same model."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxinfer.errors import CheckpointError

# llama.* keys that carry nothing which the config lacks
IGNORED = frozenset({"tensor_data_layout", "rope.scaling.finetuned", "expert_used_count", "vocab_size"})
# What Llama 3.1 to 3.3 were released with (Llama 3.1 model card); `factor` is 8 or 32
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_config(metadata: Mapping[str, Any], tensors: Mapping[str, Any], factors: np.ndarray | None) -> dict[str, Any]:
    """The config of a GGUF file.

    An architecture that has no translation yet gives only a `model_type` that names it and matches no supported one
    (general.architecture alone could: GGUF's "bert" too), so that it is refused by name. A `llama.` key with no
    translation is kept under its own name, for the strict reader of configs to refuse.

    Args:
        tensors: those stored, by name, with a `.shape`.
        factors: rope_freqs.weight, float32 [head_dim / 2], if stored.

    Raises:
        CheckpointError: a key that is missing, or of the wrong type.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"metadata `general.architecture` must be a string, got {architecture!r}")
    if architecture != "llama":
        return {"model_type": f"{architecture} (GGUF)"}
    fields = _Fields(metadata, "llama.")
    if fields.integer("expert_count", 0):
        return {"model_type": "mixtral (GGUF)"}
    config = _shapes(fields, tensors)
    config["rope_theta"] = fields.real("rope.freq_base", 10000.0)
    config["rope_scaling"] = _rope_scaling(fields, config, factors)
    for name in ("bos", "eos"):
        config[f"{name}_token_id"] = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return config | fields.rest()


def _shapes(fields: "_Fields", tensors: Mapping[str, Any]) -> dict[str, Any]:
    heads, hidden = fields.integer("attention.head_count"), fields.integer("embedding_length")
    if heads < 1 or hidden < 1:
        raise CheckpointError(f"metadata says {heads} heads and a hidden size of {hidden}; both must be at least 1")
    head_dim = fields.integer("attention.key_length", hidden // heads)
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError("a Llama checkpoint holds the matrix token_embd.weight; this one doesn't")
    for key in ("rope.dimension_count", "attention.value_length"):
        if (value := fields.integer(key, head_dim)) != head_dim:
            raise CheckpointError(f"metadata `llama.{key}` is {value}; only the head size, {head_dim}, is supported")
    return {
        "model_type": "llama",
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": fields.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.integer("context_length"),
        "rms_norm_eps": fields.real("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        # llama.cpp stores an output projection only where it is not the embedding
        "tie_word_embeddings": "output.weight" not in tensors,
    }


def _rope_scaling(fields: "_Fields", config: dict[str, Any], factors: np.ndarray | None) -> dict[str, Any] | None:
    kind = fields.get("rope.scaling.type", str, "none")
    factor = fields.real("rope.scaling.factor", 0.0)
    legacy = fields.real("rope.scale_linear", 0.0)
    original = fields.integer("rope.scaling.original_context_length", 0)
    if factors is not None and not np.all(factors == 1):
        if kind != "none":
            raise CheckpointError(f"rope_freqs.weight beside `llama.rope.scaling.type` {kind!r} is not supported")
        return _llama3_scaling(config, factors)
    if kind == "none":
        return {"rope_type": "linear", "factor": legacy} if legacy not in (0.0, 1.0) else None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor or 1.0}
    if original:
        scaling["original_max_position_embeddings"] = original
    return None if scaling == {"rope_type": "linear", "factor": 1.0} else scaling


def _llama3_scaling(config: dict[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """Llama 3's scaling, of which GGUF stores only the result: what each frequency is divided by.

    Its largest entry is `factor`; the rest must be what follows from that and Llama 3's other constants.
    """
    scaling = {"rope_type": "llama3", "factor": round(float(factors.max()), 4), **LLAMA3}
    exponents = np.arange(0, config["head_dim"], 2) / config["head_dim"]
    turns = LLAMA3["original_max_position_embeddings"] * config["rope_theta"] ** -exponents / (2 * math.pi)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / (smooth + (1 - smooth) / scaling["factor"])
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise CheckpointError(
            f"rope_freqs.weight {factors.shape} is not Llama 3's scaling by {scaling['factor']} for head size "
            f"{config['head_dim']} and rope theta {config['rope_theta']}, and no other table of factors is supported. "
            "Load the model from its Hugging Face folder instead."
        )
    return scaling


class _Fields:
    """Typed reads of metadata below a prefix, which remember what was read."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str):
        self._metadata, self._prefix = metadata, prefix
        self._seen = set(IGNORED)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        self._seen.add(key)
        value = self._metadata.get(self._prefix + key, default)
        if isinstance(value, np.ndarray) and value.size and np.all(value == value[0]):
            value = value[0].item()  # one for each layer, all the same
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            got = "none" if value is None else repr(value)
            raise CheckpointError(f"metadata `{self._prefix}{key}` must be one {kind.__name__}, got {got}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        return self.get(key, int, default)

    def real(self, key: str, default: float | None = None) -> float:
        # Stored as float32: its shortest spelling is what the author wrote (1e-05, not 9.999999747378752e-06).
        return float(str(np.float32(self.get(key, float, default))))

    def rest(self) -> dict[str, Any]:
        """What was not read, under its own name."""
        prefixed = {key: value for key, value in self._metadata.items() if key.startswith(self._prefix)}
        return {key: value for key, value in prefixed.items() if key.removeprefix(self._prefix) not in self._seen}
