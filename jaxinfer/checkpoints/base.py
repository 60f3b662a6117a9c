"""What every checkpoint format gives: a config, named tensors, and reads straight into the wanted dtype."""

import abc
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

if TYPE_CHECKING:
    from jaxinfer.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies, without its data."""

    name: str  # as stored
    shape: tuple[int, ...]  # row-major (numpy) order, e.g. [out, in]
    dtype: str  # as stored: "F32", "F16", "BF16", "I64", ... or a GGUF type such as "Q4_K"
    nbytes: int  # as stored
    file: Path
    offset: int  # of the first byte, from the start of `file`


class Checkpoint(abc.ABC):
    """An open checkpoint. Opening reads headers only; `read` touches the pages of one tensor.

    Files are hostile input: whatever is damaged, cut short or pointing elsewhere is a CheckpointError, on opening or in
    `read`. Also a context manager.
    """

    path: Path  # what was opened: a folder, or a file
    format: Literal["huggingface", "gguf"]
    naming: Literal["hf", "gguf"]  # the column of a weight table that the tensors' names follow
    config: dict[str, Any]  # in config.json's spelling, whatever the format
    tensors: Mapping[str, TensorInfo]

    @abc.abstractmethod
    def read(self, name: str, dtype: Any) -> np.ndarray:
        """The tensor `name`, of its `TensorInfo.shape`, in `dtype`.

        Read-only, and a view of the mapped file, where the stored dtype is `dtype`; else converted, or dequantised
        straight into `dtype`.

        Raises:
            CheckpointError: no such tensor, or its data can't be read as `dtype`.
        """

    @abc.abstractmethod
    def load_tokenizer(self) -> "Tokenizer | None":
        """The checkpoint's own tokenizer, or None where it has none."""

    @abc.abstractmethod
    def close(self) -> None:
        """Lets go of the mapped files. Arrays that `read` returned stay valid."""

    def release(self, name: str) -> None:  # noqa: B027  (a hint; a format may do nothing)
        """Tells the system that the pages of `name` aren't needed now, so that loading doesn't keep the whole file in
        resident memory. Arrays that `read` returned stay valid."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(info.nbytes for info in self.tensors.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Uninitialised memory aligned to 64 bytes, which JAX's CPU backend takes over without a copy."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def converted(stored: np.ndarray, dtype: Any) -> np.ndarray:
    """A cast into fresh aligned memory. NaN and overflow show in the values, where `check` looks."""
    out = aligned_empty(stored.shape, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, stored, casting="unsafe")
    return out


def drop_pages(mapped: mmap.mmap, offset: int, nbytes: int) -> None:
    """Takes the whole pages within [offset, offset + nbytes) of a read-only map out of resident memory; they are read
    again when they are touched again."""
    start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (offset + nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED, start, length)
