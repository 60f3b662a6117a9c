"""One .safetensors file, parsed from a memory map.

Layout (https://huggingface.co/docs/safetensors): 8 bytes N, little endian; N bytes of JSON, name -> {dtype, shape,
data_offsets}; data. The file is hostile input: every number is checked, as Python's unbounded integers, before
numpy sees it.
"""

import json
import math
import mmap
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from jaxinfer.checkpoints.base import TensorInfo, drop_pages
from jaxinfer.errors import CheckpointError

J = TypeVar("J", dict, list)

# The format allows 100 MB of header; JSON of that size costs gigabytes as Python objects, and 32 MiB hold some 300,000
# tensors, ten times what the largest published shards have.
MAX_HEADER_BYTES = 32 << 20
MAX_RANK = 16

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}


class SafetensorsFile:
    """An open file: its tensors' places, and views of their data."""

    def __init__(self, path: Path):
        self.path = path
        # O_NONBLOCK: opening a FIFO must not hang before it can be refused.
        try:
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise CheckpointError(f"can't open {str(path)!r}: {error.strerror or error}") from None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{str(path)!r} is not a regular file.")
            self._size = status.st_size
            if self._size < 8:
                raise CheckpointError(f"{str(path)!r} is cut short: {self._size} bytes, and a header needs 8.")
            self._map = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)  # goes when the last view of it does
        finally:
            os.close(fd)
        self.tensors: Mapping[str, TensorInfo] = self._parse()

    def view(self, info: TensorInfo) -> np.ndarray:
        """The tensor as stored: read-only, of `info.shape`, a view of the mapped file."""
        # A page past the end of a file that shrank after it was opened kills the process with SIGBUS.
        if self._map.size() < info.offset + info.nbytes:  # the file's size now, not the map's
            raise CheckpointError(f"{str(self.path)!r} was cut short after it was opened; {info.name!r} is lost.")
        dtype = DTYPES[info.dtype]
        flat = np.frombuffer(self._map, dtype, info.nbytes // dtype.itemsize, info.offset)
        return flat.reshape(info.shape)

    def release(self, info: TensorInfo) -> None:
        """Drops the whole pages of the tensor from resident memory."""
        drop_pages(self._map, info.offset, info.nbytes)

    def _fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{str(self.path)!r} is damaged or not safetensors: {message}")

    def _parse(self) -> dict[str, TensorInfo]:
        length = int.from_bytes(self._map[:8], "little")
        if self._map[:8] == b"version ":
            raise CheckpointError(
                f"{str(self.path)!r} is a Git LFS pointer, not the weights: run `git lfs pull` there."
            )
        if length > MAX_HEADER_BYTES:
            raise self._fail(f"header of {length} bytes; the limit is {MAX_HEADER_BYTES}.")
        start = 8 + length
        if start > self._size:
            raise self._fail(f"header of {length} bytes in a file of {self._size}; it is cut short.")
        header = parse_json(self._map[8:start], f"the header of {str(self.path)!r}")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._fail("__metadata__ must map strings to strings.")
        tensors = {name: self._parse_entry(name, entry, start) for name, entry in header.items()}
        self._check_cover(tensors, start)
        return tensors

    def _parse_entry(self, name: str, entry: Any, start: int) -> TensorInfo:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._fail(f"the entry of {name!r} must hold dtype, shape and data_offsets, got {entry!r:.80}.")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(
                f"{str(self.path)!r}: tensor {name!r} has dtype {dtype!r:.80}; supported: {', '.join(DTYPES)}."
            )
        if not _are_sizes(shape) or len(shape) > MAX_RANK:
            raise self._fail(f"the shape of {name!r} must be at most {MAX_RANK} integers >= 0, got {shape!r:.80}.")
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._fail(f"data_offsets of {name!r} must be [begin, end], got {offsets!r:.80}.")
        itemsize, (begin, end) = DTYPES[dtype].itemsize, offsets
        # numpy refuses shapes whose nonzero dims alone overflow, even when another dim is 0.
        if math.prod(max(size, 1) for size in shape) * itemsize >= 2**63:
            raise self._fail(f"the shape of {name!r} is too large: {shape!r:.80}.")
        if math.prod(shape) * itemsize != end - begin:
            raise self._fail(
                f"{name!r} is {dtype}{shape}, which needs another size than the {end - begin} bytes given."
            )
        return TensorInfo(name, tuple(shape), dtype, end - begin, self.path, start + begin)

    def _check_cover(self, tensors: Mapping[str, TensorInfo], start: int) -> None:
        """No byte of the data belongs to two tensors or to none."""
        at = start
        for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
            if info.offset != at:
                what = "overlaps the tensor before it" if info.offset < at else "leaves a gap before it"
                raise self._fail(f"{info.name!r} begins at byte {info.offset} and {what}, which ends at {at}.")
            at += info.nbytes
        if at > self._size:
            raise self._fail(f"its tensors need {at} bytes and the file has {self._size}; it is cut short.")
        if at < self._size:
            raise self._fail(f"{self._size - at} bytes follow the last tensor.")


def parse_json(data: bytes, what: str, kind: type[J] = dict) -> J:
    """JSON of untrusted bytes: UTF-8, no key twice, an object (dict) or an array (list).

    Raises:
        CheckpointError: names `what`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CheckpointError(f"{what} has the key {twice!r:.80} twice.")
        return found

    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError and integers of thousands of digits
        raise CheckpointError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(found, kind):
        raise CheckpointError(f"{what} must hold a JSON {kind.__name__}, got {type(found).__name__}.")
    return found


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
