"""Model architectures: plain Flax NNX forward passes, one file an architecture.

Each is a forward over a full batch and a full sequence: no cache, no sharding, no batching code. They get no privilege
that a user's own function lacks.
"""

if __name__ != "jaxinfer.models":
    raise ImportError(
        f"this package is jaxinfer.models and must be imported as that, not as {__name__!r}: "
        "a second copy of its classes would not be equal to the first"
    )

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxinfer.errors import CheckpointError


@dataclass(frozen=True)
class Architecture:
    """What loading a checkpoint needs to know of one file in this package."""

    name: str
    kind: Literal["LanguageModel", "Encoder"]
    config: Callable[[Mapping[str, Any]], Any]  # a config.json's dict -> Config; unknown keys are errors
    module: Callable[..., Any]  # (config, dtype=, rngs=) -> nnx.Module
    weights: Sequence[Any]  # rows of models.weights.Weight
    ignore: Sequence[str] = ()  # regexes of stored names that hold nothing to load


# model_type of config.json -> module of this package; each module has ARCHITECTURE.
_MODULES = {"llama": "llama", "bert": "bert"}


def supported() -> list[str]:
    """The model types that can be loaded."""
    return sorted(_MODULES)


def find(config: Mapping[str, Any]) -> Architecture:
    """The architecture that config.json's `model_type` names.

    Raises:
        CheckpointError: an unsupported model type; the message lists those supported.
    """
    model_type = config.get("model_type")
    if model_type not in _MODULES:
        raise CheckpointError(
            f"architecture {model_type!r} is not supported; supported: {', '.join(supported())}. "
            "Write it as a plain forward pass and use ji.LanguageModel(forward, params) instead."
        )
    return importlib.import_module(f"jaxinfer.models.{_MODULES[model_type]}").ARCHITECTURE
