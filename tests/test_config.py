"""Strict reading of config.json, for both model types and both spellings of rotary positions."""

import math
from typing import Any

import pytest

from jaxinfer import models
from jaxinfer.errors import CheckpointError
from jaxinfer.models.config import RopeScaling, read_rope

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
BERT: dict[str, Any] = {**LLAMA, "model_type": "bert"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MISSING = object()


def read(base: dict[str, Any], **changes: Any) -> Any:
    mapping = {key: value for key, value in {**base, **changes}.items() if value is not MISSING}
    return models.find(mapping).config(mapping)


def test_llama_defaults_are_those_of_transformers():
    config = read(LLAMA)
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert (config.max_position_embeddings, config.rms_norm_eps) == (2048, 1e-6)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    assert not (config.tie_word_embeddings or config.attention_bias or config.mlp_bias)


def test_bert_defaults_are_those_of_transformers():
    config = read(BERT)
    assert (config.max_position_embeddings, config.type_vocab_size) == (512, 2)
    assert (config.layer_norm_eps, config.hidden_act) == (1e-12, "gelu")


def test_configs_are_hashable():
    assert hash(read(LLAMA, rope_scaling=LLAMA3)) == hash(read(LLAMA, rope_scaling=dict(LLAMA3)))


def test_null_is_absent():
    assert read(LLAMA, num_key_value_heads=None, head_dim=None, rope_scaling=None, quantization_config=None) == read(
        LLAMA
    )


def test_what_is_known_to_be_harmless_is_ignored():
    harmless = {"torch_dtype": "bfloat16", "use_cache": True, "eos_token_id": [1, 2], "pretraining_tp": 1}
    assert read(LLAMA, **harmless) == read(LLAMA)
    assert read(BERT, gradient_checkpointing=False, hidden_dropout_prob=0.1, directionality="bidi") == read(BERT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_scale": 2}, "'logit_scale' = 2"),
        ({"vocab_size": MISSING}, "lacks 'vocab_size'"),
        ({"hidden_size": "32"}, "'hidden_size' must be of type int, got '32'"),
        ({"hidden_size": 32.0}, "'hidden_size' must be of type int"),
        ({"hidden_size": True}, "'hidden_size' must be of type int, got True"),
        ({"hidden_size": 0}, r"'hidden_size' must be in \[1, "),
        ({"vocab_size": 2**40}, "'vocab_size' must be in"),
        ({"num_hidden_layers": 10**9}, r"'num_hidden_layers' must be in \[1, 4096\]"),
        ({"num_attention_heads": 5}, "hidden_size = 32"),
    ],
)
@pytest.mark.parametrize("base", [LLAMA, BERT], ids=["llama", "bert"])
def test_refused_by_both(base: dict[str, Any], changes: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=message):
        read(base, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "'hidden_act' = 'gelu' is not supported; supported: 'silu', 'swish'"),
        ({"attention_bias": 1}, "'attention_bias' must be of type bool, got 1"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads = 3"),
        ({"head_dim": 7}, "head_dim = 7 must be even"),
        ({"rms_norm_eps": math.nan}, "'rms_norm_eps' must be in"),
        ({"rope_interleaved": True}, "'rope_interleaved' = True is not supported"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config' = {'bits': 4}, which is not supported"),
        ({"sliding_window": 4096}, "'sliding_window'"),
    ],
)
def test_refused_by_llama(changes: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=message):
        read(LLAMA, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "silu"}, "supported: 'gelu', 'gelu_new', 'gelu_pytorch_tanh', 'relu'"),
        ({"position_embedding_type": "relative_key"}, "supported: 'absolute'"),
        ({"is_decoder": True}, "'is_decoder' = True is not supported"),
    ],
)
def test_refused_by_bert(changes: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=message):
        read(BERT, **changes)


def test_unknown_architecture_is_named_with_those_supported():
    with pytest.raises(CheckpointError, match=r"'mamba' is not supported; supported: bert, llama"):
        models.find({"model_type": "mamba"})
    with pytest.raises(CheckpointError, match="None is not supported"):
        models.find({})


def test_both_spellings_of_rotary_positions_agree():
    old = read_rope({"rope_theta": 5e5, "rope_scaling": LLAMA3})
    new = read_rope({"rope_parameters": {"rope_theta": 5e5, **LLAMA3}})
    oldest = read_rope({"rope_theta": 500000, "rope_scaling": {"type": "llama3", **LLAMA3}})
    assert old == new == oldest == (5e5, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
    assert read_rope({"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}) == (100.0, None)
    assert read_rope({"rope_scaling": {"type": "linear", "factor": 2}}) == (10000.0, RopeScaling("linear", 2.0))
    assert read_rope({"rope_parameters": {"rope_type": "default"}, "rope_theta": 7.0}) == (7.0, None)


def test_both_spellings_at_once_must_agree():
    both = {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}}
    assert read_rope(both)[0] == 5e5
    with pytest.raises(CheckpointError, match="twice and they disagree"):
        read_rope({**both, "rope_scaling": {**LLAMA3, "factor": 32.0}})
    with pytest.raises(CheckpointError, match="twice and they disagree"):
        read_rope({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, "'yarn' is not supported; supported: 'default', 'linear', 'llama3'"),
        ({"type": "dynamic", "factor": 4.0}, "'dynamic' is not supported"),
        ({"type": "linear", "rope_type": "llama3", "factor": 4.0}, "type 'linear' and rope_type 'llama3'"),
        ({"rope_type": "linear"}, "lacks 'rope_scaling.factor'"),
        ({"rope_type": "linear", "factor": 0}, "'rope_scaling.factor' must be in"),
        ({"rope_type": "linear", "factor": "4"}, "must be of type float, got '4'"),
        ({"rope_type": "linear", "factor": 4.0, "attention_factor": 2.0}, "unknown key.* 'attention_factor'"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "needs high_freq_factor > low_freq_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ([4.0], "must be an object or null"),
    ],
)
def test_refused_rotary_positions(scaling: Any, message: str):
    with pytest.raises(CheckpointError, match=message):
        read_rope({"rope_scaling": scaling})
