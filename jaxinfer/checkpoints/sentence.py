"""How an encoder's hidden states become a sentence vector, as the files of sentence-transformers say."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.checkpoints.huggingface import exists, read_json
from jaxinfer.errors import CheckpointError

POOLINGS = ("mean", "cls", "max")
# 1_Pooling/config.json: the older spelling has a flag a mode, the newer one names the mode.
_FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max"}


@dataclass(frozen=True)
class SentenceConfig:
    """Pooling of an encoder. The defaults are what sentence-transformers takes for a folder without its files."""

    pooling: str = "mean"  # one of POOLINGS
    normalize: bool = False  # L2, after pooling
    max_length: int | None = None  # longer texts lose their last tokens; None: they are refused
    lower_case: bool = False  # before tokenizing

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise CheckpointError(f"pooling {self.pooling!r} is not supported; supported: {', '.join(POOLINGS)}.")


def read_sentence_config(folder: Path) -> SentenceConfig:
    """Reads modules.json, the pooling it names, and sentence_bert_config.json.

    Raises:
        CheckpointError: a kind of module, pooling or prompt that is not supported, or a damaged file.
    """
    if not exists(folder / "modules.json"):
        return SentenceConfig()
    kinds, pooling = [], "mean"
    for module in read_json(folder, "modules.json", kind=list):
        if not isinstance(module, dict) or not all(isinstance(module.get(key), str) for key in ("type", "path")):
            raise CheckpointError(
                f"{folder / 'modules.json'}: every module needs a type and a path, got {module!r:.80}."
            )
        kinds.append(module["type"].rpartition(".")[2])
        if kinds[-1] == "Pooling":
            pooling = _pooling(read_json(folder, module["path"], "config.json"))
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise CheckpointError(
            f"{folder / 'modules.json'} asks for {' -> '.join(kinds)}; "
            "supported: Transformer -> Pooling [-> Normalize]."
        )
    _refuse_prompts(folder)
    options = read_json(folder, "sentence_bert_config.json") if exists(folder / "sentence_bert_config.json") else {}
    limit = options.get("max_seq_length")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise CheckpointError(f"sentence_bert_config.json: max_seq_length must be an integer >= 1, got {limit!r:.80}.")
    return SentenceConfig(pooling, "Normalize" in kinds, limit, options.get("do_lower_case") is True)


def _pooling(config: Mapping[str, Any]) -> str:
    if "pooling_mode" in config:
        return str(config["pooling_mode"])
    flags = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    if len(flags) != 1 or flags[0] not in _FLAGS:
        raise CheckpointError(
            f"pooling {' + '.join(flags) or 'of no mode'} is not supported; supported: {', '.join(_FLAGS)}."
        )
    return _FLAGS[flags[0]]


def _refuse_prompts(folder: Path) -> None:
    name = "config_sentence_transformers.json"
    prompt = read_json(folder, name).get("default_prompt_name") if exists(folder / name) else None
    if prompt is not None:
        raise CheckpointError(f"{name} puts the prompt {prompt!r:.80} before every text, which is not supported.")
