"""An inference runtime that derives batching, decoding and executables from a plain forward pass.

Names are imported when they are first used, so that `import jaxinfer` costs nothing that isn't needed.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxinfer import errors

__version__ = "0.1.0"

# Public name -> the module that has it. Each is used in README or a notebook.
_HOME = {
    "Completion": "jaxinfer.language",
    "Delta": "jaxinfer.language",
    "Encoder": "jaxinfer.encoder",
    "Engine": "jaxinfer.runtime.engine",
    "Executable": "jaxinfer.executable",
    "LanguageModel": "jaxinfer.language",
    "Plan": "jaxinfer.sharding.plan",
    "Program": "jaxinfer.program",
    "Spec": "jaxinfer.specs",
    "Step": "jaxinfer.passes.incremental",
    "compile": "jaxinfer.compiling",
    "fit_buckets": "jaxinfer.bucket_fit",
    "fit_ladder": "jaxinfer.bucket_fit",
    "incremental": "jaxinfer.passes.incremental",
    "load": "jaxinfer.loading",
    "plan": "jaxinfer.sharding.planning",
    "spec": "jaxinfer.specs",
    "trace": "jaxinfer.tracing",
}
_ERRORS = errors.__all__
__all__ = sorted([*_HOME, *_ERRORS])  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from jaxinfer.bucket_fit import fit_buckets, fit_ladder
    from jaxinfer.compiling import compile
    from jaxinfer.encoder import Encoder
    from jaxinfer.errors import (
        BatchMixingError,
        CheckpointError,
        DeadlineExceededError,
        EngineClosedError,
        JaxInferError,
        NonFiniteError,
        NotCausalError,
        PlanError,
        QueueFullError,
        ReplicaError,
        RequestError,
        TraceError,
    )
    from jaxinfer.executable import Executable
    from jaxinfer.language import Completion, Delta, LanguageModel
    from jaxinfer.loading import load
    from jaxinfer.passes.incremental import Step, incremental
    from jaxinfer.program import Program
    from jaxinfer.runtime.engine import Engine
    from jaxinfer.sharding.plan import Plan
    from jaxinfer.sharding.planning import plan
    from jaxinfer.specs import Spec, spec
    from jaxinfer.tracing import trace


def __getattr__(name: str) -> Any:
    home = _HOME.get(name, "jaxinfer.errors" if name in _ERRORS else None)
    if home is None:
        raise AttributeError(f"module 'jaxinfer' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
