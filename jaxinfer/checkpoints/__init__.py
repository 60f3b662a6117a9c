"""Readers of checkpoints as their authors ship them. Nothing here imports JAX: `jaxinfer inspect` must start fast."""

import os
import stat
from pathlib import Path

from jaxinfer.checkpoints.base import Checkpoint, TensorInfo
from jaxinfer.errors import CheckpointError

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]

_SUPPORTED = (
    "Supported: a folder with config.json and model.safetensors (or model.safetensors.index.json and its shards), "
    "or a .gguf file."
)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens the checkpoint at `path`: a GGUF file (by name or magic), or a Hugging Face folder.

    Raises:
        CheckpointError: nothing there, a format that is not supported, or a damaged or hostile file.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise CheckpointError(f"no checkpoint at {str(path)!r}: {error}. {_SUPPORTED}") from None
    if stat.S_ISDIR(mode):
        return _open_folder(path)
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{str(path)!r} is neither a file nor a folder. {_SUPPORTED}")
    if path.suffix.lower() == ".gguf" or _magic(path) == b"GGUF":
        from jaxinfer.checkpoints.gguf import GGUFCheckpoint

        return GGUFCheckpoint(path)
    if path.suffix == ".safetensors" or path.name == "config.json":
        raise CheckpointError(f"{str(path)!r} is one file of a checkpoint: give its folder, {str(path.parent)!r}.")
    raise CheckpointError(f"{str(path)!r} is not a checkpoint in a known format. {_SUPPORTED}")


def _open_folder(path: Path) -> Checkpoint:
    if (path / "config.json").exists():
        from jaxinfer.checkpoints.huggingface import HFCheckpoint

        return HFCheckpoint(path)
    files = sorted(path.glob("*.gguf"))
    hint = f" It holds {files[0].name!r}: give the path of that file." if files else ""
    raise CheckpointError(f"the folder {str(path)!r} has no config.json.{hint} {_SUPPORTED}")


def _magic(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError as error:
        raise CheckpointError(f"can't read {str(path)!r}: {error}") from None
