"""Shared by the tests of checkpoints and models."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinfer import models
from jaxinfer.checkpoints import Checkpoint, open_checkpoint
from jaxinfer.models.weights import load_params


def fixtures() -> Path:
    """Where scripts/make_fixtures.py wrote: a fresh set if $JAXINFER_FIXTURES names one, else the committed one."""
    return Path(os.environ.get("JAXINFER_FIXTURES", Path(__file__).parent / "fixtures"))


def load_module(path: Path, dtype: Any = jnp.float32, **options: Any) -> tuple[Any, nnx.Module]:
    """(config, NNX module with the checkpoint's weights)"""
    with open_checkpoint(path) as checkpoint:
        architecture = models.find(checkpoint.config)
        config = architecture.config(checkpoint.config)
        abstract = nnx.eval_shape(lambda: architecture.module(config, dtype=dtype, rngs=nnx.Rngs(0)))
        graph, state = nnx.split(abstract)
        shapes = nnx.to_pure_dict(state)
        table, ignore = architecture.weights, architecture.ignore
        params = load_params(shapes, checkpoint, table, config, dtype, ignore=ignore, **options)
    nnx.replace_by_pure_dict(state, params)
    return config, nnx.merge(graph, state)


def raw_safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A .safetensors file of any header: bytes as they are, else as JSON. `length` is what it claims to have."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def write_folder(folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None) -> Path:
    """A Hugging Face folder of these tensors."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} if config is None else config))
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def open_tensors(folder: Path, tensors: Mapping[str, np.ndarray]) -> Checkpoint:
    return open_checkpoint(write_folder(folder, tensors))
