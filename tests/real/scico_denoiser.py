"""scico's DnCNN denoisers (github.com/lanl/scico): its own Flax modules, unmodified, with its own msgpack weights.

`scico/__init__` asks for much that a forward doesn't need, and for an older JAX. So the two files that define the
modules are imported as they are from the unpacked wheel, under empty parents of their packages' names.
"""

import importlib
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import jax
from flax import serialization

_PARENTS = ("scico", "scico.flax", "scico.numpy")


def load(folder: Path, variant: str = "6M") -> tuple[Any, dict[str, Any]]:
    """(module, variables) of a variant: 6 or 17 layers, trained for noise L (0.06), M (0.10) or H (0.20) in [0, 1].

    The module takes float32 [batch, height, width, 1] and train=False.
    """
    models = _modules(folder)
    stored = serialization.msgpack_restore((folder / "scico" / "data" / "flax" / f"dncnn{variant}.mpk").read_bytes())
    module = models.DnCNNNet(depth=int(variant[:-1]), channels=1, num_filters=64)
    return module, {"params": stored["params"], "batch_stats": stored["batch_stats"]}


def _modules(folder: Path) -> types.ModuleType:
    """scico.flax._models, from its file."""
    if "scico.flax._models" in sys.modules:
        return sys.modules["scico.flax._models"]
    for name in _PARENTS:
        parent = sys.modules[name] = types.ModuleType(name)
        parent.__path__ = [str(folder.joinpath(*name.split(".")))]
    sys.modules["scico.numpy"].Array = jax.Array  # an annotation there
    with warnings.catch_warnings():  # it changes the filters when imported
        return importlib.import_module("scico.flax._models")
