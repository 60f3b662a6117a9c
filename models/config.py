"""Strict reading of config.json: every key is read, checked, or ignored by name. A key that nobody looked at may change
the forward pass, so it is an error."""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxinfer.errors import CheckpointError

C = TypeVar("C")

_REQUIRED: Any = object()


@dataclass(frozen=True)
class Field:
    """How one key of config.json is read. A key that is absent, or null, takes the default."""

    kind: type  # int, float (an int will do), bool or str
    default: Any = _REQUIRED  # a value, or a function of the dict of fields read so far
    choices: tuple[Any, ...] = ()  # the only supported values
    minimum: float = 1  # of an int or float
    maximum: float = 2**31 - 1
    keep: bool = True  # False: checked, and not passed to the Config


# Keys of every model type that say nothing about the forward pass at inference.
IGNORED = frozenset(
    {
        # where the checkpoint comes from
        *("_name_or_path", "architectures", "transformers_version", "transformers.js_config", "unsloth_version"),
        *("_commit_hash", "unsloth_fixed"),
        # the stored dtype: the tensors tell, and the caller picks another
        *("dtype", "torch_dtype", "use_bfloat16", "torchscript"),
        # token ids and text: the tokenizer's
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "unk_token_id"),
        # training
        *("initializer_range", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"),
        *("gradient_checkpointing", "classifier_dropout", "problem_type", "finetuning_task"),
        # heads that aren't loaded
        *("id2label", "label2id", "num_labels"),
        # how transformers runs a model and what it returns
        *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "tokenizer_class"),
        # defaults of generate()
        *("max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p", "num_beams"),
        *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "num_return_sequences"),
    }
)

# Keys of every model type that must be absent, or say that the feature is off.
_OFF = ("quantization_config", "compression_config", "adapter_config", "auto_map", "pruned_heads", "is_encoder_decoder")


def read_config(
    cls: type[C], mapping: Mapping[str, Any], fields: Mapping[str, Field], *, ignored: Set[str] = IGNORED, **given: Any
) -> C:
    """`cls(**values)` of the keys that `fields` describes, in their order; `given` are values read elsewhere.

    Raises:
        CheckpointError: a key that is neither in `fields` nor in `ignored`, a missing key without a default, a value of
            another type or out of range, or one that is not supported.
    """
    for key in _OFF:
        if mapping.get(key):
            raise CheckpointError(f"config.json has {key!r} = {_short(mapping[key])}, which is not supported.")
    unknown = sorted(str(key) for key in mapping.keys() - fields.keys() - ignored - set(_OFF))
    if unknown:
        shown = ", ".join(f"{key!r} = {_short(mapping[key])}" for key in unknown[:5])
        raise CheckpointError(
            f"config.json has {len(unknown)} key(s) unknown to model type {mapping.get('model_type')!r}: {shown}. "
            "Each might change the forward pass; take out those that don't."
        )
    values: dict[str, Any] = {}
    for key, field in fields.items():
        values[key] = _read_field(key, field, mapping.get(key), values)
    kept = {key: value for key, value in values.items() if fields[key].keep}
    return cls(**kept, **given)


def _read_field(key: str, field: Field, raw: Any, values: Mapping[str, Any]) -> Any:
    if raw is not None:
        return check_value(key, raw, field)
    if field.default is _REQUIRED:
        raise CheckpointError(f"config.json lacks {key!r}, which has no default.")
    value = field.default(values) if callable(field.default) else field.default
    return value if value is None else check_value(key, value, field)


def check_value(key: str, raw: Any, field: Field) -> Any:
    """`raw` as `field` wants it, or a CheckpointError that names `key`, the value, and what is supported."""
    number = isinstance(raw, (int, float)) and not isinstance(raw, bool)
    if field.kind is float and number:
        value = float(raw) if abs(raw) <= field.maximum else math.inf
    elif isinstance(raw, field.kind) and (field.kind is not int or number):
        value = raw
    else:
        raise CheckpointError(f"config.json: {key!r} must be of type {field.kind.__name__}, got {_short(raw)}.")
    if field.choices:
        if value not in field.choices:
            supported = ", ".join(repr(choice) for choice in field.choices)
            raise CheckpointError(f"config.json: {key!r} = {_short(raw)} is not supported; supported: {supported}.")
    elif field.kind in (int, float) and not field.minimum <= value <= field.maximum:  # NaN fails too
        limits = f"[{field.minimum:g}, {field.maximum:g}]"
        raise CheckpointError(f"config.json: {key!r} must be in {limits}, got {_short(raw)}.")
    return value


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies beyond the plain ones. `linear` reads `factor` alone."""

    rope_type: str  # "linear" | "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
_THETA = Field(float, 10000.0, maximum=1e12)
_ROPE_TYPE = Field(str, "default", choices=("default", "linear", "llama3"))
_FACTOR = Field(float, minimum=1e-6, maximum=1e6)
_ROPE_FIELDS: dict[str, dict[str, Field]] = {
    "default": {},
    "linear": {"factor": _FACTOR},
    "llama3": {
        "factor": _FACTOR,
        "low_freq_factor": _FACTOR,
        "high_freq_factor": _FACTOR,
        "original_max_position_embeddings": Field(int),
    },
}


def read_rope(mapping: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary positions, from either spelling: `rope_theta` + `rope_scaling`, or the
    `rope_parameters` of transformers 5 that holds both. Where a file has both they must agree.

    Raises:
        CheckpointError: an unknown key or type of scaling, a value out of range, spellings that disagree.
    """
    old_theta, old_scaling = mapping.get("rope_theta"), mapping.get("rope_scaling")
    new = mapping.get("rope_parameters")
    readings = []
    if new is not None:
        readings.append(_read_rope_dict("rope_parameters", new, old_theta))
    if new is None or old_scaling is not None:
        readings.append(_read_rope_dict("rope_scaling", old_scaling or {}, old_theta))
    elif old_theta is not None:  # theta alone repeated at the top
        readings.append((check_value("rope_theta", old_theta, _THETA), readings[0][1]))
    if any(reading != readings[0] for reading in readings):
        raise CheckpointError(
            f"config.json gives rotary positions twice and they disagree: rope_parameters = {_short(new)}, "
            f"rope_theta = {_short(old_theta)}, rope_scaling = {_short(old_scaling)}. Remove one spelling."
        )
    return readings[0]


def _read_rope_dict(key: str, raw: Any, theta: Any) -> tuple[float, RopeScaling | None]:
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"config.json: {key!r} must be an object or null, got {_short(raw)}.")
    kind = _read_field(f"{key}.rope_type", _ROPE_TYPE, raw.get("rope_type", raw.get("type")), {})
    if "type" in raw and raw["type"] != kind:
        raise CheckpointError(f"config.json: {key!r} has type {_short(raw['type'])} and rope_type {kind!r}.")
    fields = _ROPE_FIELDS[kind]
    # partial_rotary_factor is written by transformers 5 for every model; only a full rotation is supported.
    check_value(f"{key}.partial_rotary_factor", raw.get("partial_rotary_factor", 1), Field(float, choices=(1.0,)))
    unknown = raw.keys() - fields.keys() - {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
    if unknown:
        raise CheckpointError(
            f"config.json: {key!r} of type {kind!r} has unknown key(s) {', '.join(sorted(map(repr, unknown)))}; "
            f"known: rope_type, rope_theta{''.join(', ' + name for name in fields)}."
        )
    base = _read_field("rope_theta", _THETA, raw.get("rope_theta", theta), {})
    if not fields:
        return base, None
    scaling = RopeScaling(
        kind, **{name: _read_field(f"{key}.{name}", f, raw.get(name), {}) for name, f in fields.items()}
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise CheckpointError(f"config.json: {key!r} needs high_freq_factor > low_freq_factor, got {_short(raw)}.")
    return base, scaling


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
