"""The files of a bundle: written beside the target and moved there whole, read back against their digests.

A bundle is a folder, not one file: its weights are a plain .safetensors that any tool can open and that is mapped, not
unpacked; a start reads only the programs that it needs; and its manifest can be read.

    manifest.json            see bundle_manifest
    weights.safetensors      "weight 0", "weight 1", ... in the manifest's order
    program-0.xla            machine code of the first program; native.load
    program-0.stablehlo      the same program, serialised by jax.export
    prelude-0.xla, ...       what makes weights from parameters
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinfer.checkpoints.safetensors_file import DTYPES, SafetensorsFile
from jaxinfer.errors import CheckpointError

MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextlib.contextmanager
def replaced(path: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `path` when the block ends well and is gone if it doesn't.

    Raises:
        CheckpointError: there is something at `path` already that mustn't be overwritten, or the disk fails.
    """
    if path.exists() or path.is_symlink():
        if not overwrite:
            raise CheckpointError(f"{str(path)!r} exists; choose another path, or save(path, overwrite=True).")
        if not (path / MANIFEST).is_file() or path.is_symlink():
            raise CheckpointError(f"{str(path)!r} is no bundle, so it is not overwritten; choose another path.")
    fresh, old = (path.with_name(f".{path.name}.{secrets.token_hex(6)}.{what}") for what in ("new", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        yield fresh
        _sync(fresh)
        if path.exists():
            # A folder can't be swapped in one step: for a moment there is no bundle, but never half of one.
            path.rename(old)
        fresh.rename(path)
        _sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"the bundle can't be written to {str(path)!r}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    if os.name == "nt":  # folders can't be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: Path, data: bytes) -> str:
    """Writes a file to the disk itself; returns its SHA-256."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def read(path: Path, digest: str | None = None, limit: int = 16 << 30) -> bytes:
    """A whole file.

    Raises:
        CheckpointError: missing, no regular file, larger than `limit` bytes, or with another SHA-256.
    """
    try:
        # O_NONBLOCK: opening a FIFO must not hang before it can be refused.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            if not path.is_file():
                raise CheckpointError(f"{str(path)!r} is not a regular file.")
            data = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"can't read {str(path)!r}: {error.strerror or error}.") from None
    if len(data) > limit:
        raise CheckpointError(f"{str(path)!r} has more than the {limit} bytes that such a file may have.")
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointError(f"{str(path)!r} is damaged: its SHA-256 is not the manifest's.")
    return data


def write_weights(path: Path, weights: Sequence[jax.Array]) -> list[str]:
    """One .safetensors file, written one array at a time; returns the SHA-256 of each.

    A dtype that the format lacks is stored as its bytes; the manifest knows the dtype.
    """
    header, at = {}, 0
    for number, weight in enumerate(weights):
        dtype = _NAMES.get(np.dtype(weight.dtype))
        nbytes = weight.size * weight.dtype.itemsize
        shape = list(weight.shape) if dtype else [nbytes]
        header[f"weight {number}"] = {"dtype": dtype or "U8", "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    digests = []
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights:
            data = _bytes(np.ascontiguousarray(np.asarray(weight)))
            file.write(data)
            digests.append(hashlib.sha256(data).hexdigest())
        file.flush()
        os.fsync(file.fileno())
    return digests


def read_weights(path: Path, wanted: Sequence[tuple[jax.ShapeDtypeStruct, str]], device: Any) -> list[jax.Array]:
    """The arrays of `write_weights`, put on a device one at a time.

    Raises:
        CheckpointError: damaged, or others than those wanted.
    """
    file = SafetensorsFile(path)
    names = [f"weight {number}" for number in range(len(wanted))]
    if set(file.tensors) != set(names):
        raise CheckpointError(f"{str(path)!r} holds {len(file.tensors)} tensors, not the manifest's {len(wanted)}.")
    found = []
    for name, (struct, digest) in zip(names, wanted, strict=True):
        info = file.tensors[name]
        dtype = _NAMES.get(np.dtype(struct.dtype))
        shape = struct.shape if dtype else (struct.size * struct.dtype.itemsize,)
        if (info.dtype, info.shape) != (dtype or "U8", shape):
            raise CheckpointError(
                f"{str(path)!r}: {name!r} is {info.dtype}{list(info.shape)}, and the manifest says "
                f"{struct.dtype}{list(struct.shape)}."
            )
        data = np.array(file.view(info))  # a copy: what is checked is what is used, whatever becomes of the file
        if hashlib.sha256(_bytes(data)).hexdigest() != digest:
            raise CheckpointError(f"{str(path)!r} is damaged: the SHA-256 of {name!r} is not the manifest's.")
        found.append(jax.device_put(data.view(struct.dtype).reshape(struct.shape), device))
        file.release(info)
    return found


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType]
