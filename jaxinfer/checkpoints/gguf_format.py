"""The GGUF container, versions 2 and 3: metadata and tensor table, parsed as hostile input.

Layout, all little endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, counts of tensors
and metadata pairs; the pairs; the tensor table; padding to `general.alignment`; tensor data.

No length read from the file is trusted: each is held against the bytes that are left before anything is allocated, so
parsing takes memory in proportion to the file's real size at most.
"""

import math
import struct
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jaxinfer.checkpoints.base import TensorInfo
from jaxinfer.checkpoints.gguf_quants import TYPES
from jaxinfer.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
MAX_KEY = (1 << 16) - 1  # bytes of a metadata key, by the specification
MAX_NAME = 64  # bytes of a tensor's name, by the specification
MAX_PAIRS, MAX_TENSORS = 1 << 16, 1 << 20  # 100 times what the largest files known to us hold
MAX_STRINGS = 1 << 22  # strings in one array: 8 times the longest list of merges known to us
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16

STRING, ARRAY = 8, 9
SCALARS: dict[int, np.dtype] = {
    number: np.dtype(code)
    for number, code in enumerate(["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None, "<u8", "<i8", "<f8"])
    if code
}
# The least bytes that one entry can take: key length, one character, type, one-byte value; and
# name length, no characters, count of dims, type, offset.
LEAST_PAIR, LEAST_TENSOR = 8 + 1 + 4 + 1, 8 + 4 + 4 + 8


class Header:
    """Parses a whole header on construction.

    Attributes:
        version: 2 or 3.
        metadata: str, bool, int and float; lists of str; numeric arrays as numpy arrays (a list of Python numbers would
            take up to 36 times the memory that the file takes).
        tensors: what is stored, by name, in the table's order.

    Raises:
        CheckpointError: anything broken, with the file, the offset in it, and the rule.
    """

    def __init__(self, path: Path, data: np.ndarray):
        """data: uint8 [bytes], the whole file"""
        self.path = path
        self._data = data
        self._view = data.data
        self._at = 0
        if bytes(self._take(4, "the magic")) != MAGIC:
            self._fail(0, f"a GGUF file begins with {MAGIC!r}", f"{bytes(self._view[:4])!r}")
        self.version = self._version()
        n_tensors, n_pairs = self._number("<u8"), self._number("<u8")
        self.metadata: dict[str, Any] = {}
        self._bounded(n_pairs, MAX_PAIRS, LEAST_PAIR, "metadata pairs")
        for _ in range(n_pairs):
            self._pair()
        self._bounded(n_tensors, MAX_TENSORS, LEAST_TENSOR, "tensors")
        self._table = [self._entry() for _ in range(n_tensors)]
        self.tensors = self._locate()
        self._view.release()

    def _fail(self, at: int, rule: str, got: str) -> NoReturn:
        raise CheckpointError(
            f"{self.path}: not a valid GGUF file at byte {at}: {rule}; got {got}. "
            "The file may be damaged or cut short: fetch it again."
        )

    def _take(self, count: int, what: str) -> memoryview:
        left = len(self._view) - self._at
        if count > left:
            self._fail(self._at, f"{what} must lie inside the file, of {len(self._view)} bytes", f"{count} bytes")
        self._at += count
        return self._view[self._at - count : self._at]

    def _bounded(self, count: int, limit: int | None, least: int, what: str) -> None:
        """Refuses more than `limit` entries, or more than the file has room for at `least` bytes each."""
        room = (len(self._view) - self._at) // least
        if count > room:
            self._fail(self._at, f"the rest of the file has room for at most {room} {what}", f"{count}")
        if limit is not None and count > limit:
            self._fail(self._at, f"at most {limit} {what} are read", f"{count}")

    def _number(self, code: str) -> Any:
        dtype = np.dtype(code)
        return np.frombuffer(self._take(dtype.itemsize, "a number"), dtype)[0].item()

    def _string(self, limit: int | None, what: str) -> str:
        at = self._at
        (length,) = struct.unpack("<Q", self._take(8, f"the length of {what}"))
        if limit is not None and length > limit:
            self._fail(at, f"{what} takes at most {limit} bytes", f"{length}")
        try:
            return str(self._take(length, what), "utf-8")
        except UnicodeDecodeError as error:
            self._fail(at, f"{what} must be UTF-8", str(error))

    def _version(self) -> int:
        version = self._number("<u4")
        if version in VERSIONS:
            return version
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in VERSIONS:
            raise CheckpointError(
                f"{self.path}: a big-endian GGUF file (version {swapped}); only little-endian ones are read. "
                "Convert it with llama.cpp's gguf_convert_endian.py."
            )
        raise CheckpointError(
            f"{self.path}: GGUF version {version} is not supported; versions {VERSIONS} are. "
            "Convert the checkpoint again with a current llama.cpp."
        )

    def _pair(self) -> None:
        at = self._at
        key = self._string(MAX_KEY, "a metadata key")
        if not key or key in self.metadata:
            self._fail(at, "metadata keys are unique and not empty", repr(key))
        self.metadata[key] = self._value(key, self._number("<u4"))

    def _value(self, key: str, kind: int) -> Any:
        if kind in SCALARS:
            return self._scalars(key, kind, 1)[0].item()
        if kind == STRING:
            return self._string(None, f"the value of {key!r}")
        if kind != ARRAY:
            self._fail(self._at - 4, f"{key!r} has a value type from 0 to 12", f"{kind}")
        kind, at = self._number("<u4"), self._at
        count = self._number("<u8")
        if kind == STRING:
            self._bounded(count, MAX_STRINGS, 8, f"strings of {key!r}")
            return self._strings(key, count)
        if kind not in SCALARS:
            self._fail(at - 4, f"{key!r} is an array of scalars or strings (types 0 to 8, 10 to 12)", f"type {kind}")
        return self._scalars(key, kind, count)

    def _strings(self, key: str, count: int) -> list[str]:
        # `_string` spelled out: a vocabulary and its merges are 100,000 strings and more, here 3x faster
        view, at, end, length_at = self._view, self._at, len(self._view), struct.Struct("<Q").unpack_from
        strings = []
        for _ in range(count):
            stop = at + 8 + length_at(view, at)[0] if at + 8 <= end else end + 1
            if stop > end:
                self._fail(at, f"the strings of {key!r} end inside the file, of {end} bytes", f"an end at byte {stop}")
            try:
                strings.append(str(view[at + 8 : stop], "utf-8"))
            except UnicodeDecodeError as error:
                self._fail(at, f"the strings of {key!r} are UTF-8", str(error))
            at = stop
        self._at = at
        return strings

    def _scalars(self, key: str, kind: int, count: int) -> np.ndarray:
        at, dtype = self._at, SCALARS[kind]
        self._bounded(count, None, dtype.itemsize, f"values of {key!r}")
        raw = self._take(count * dtype.itemsize, f"the values of {key!r}")
        if dtype == np.bool_ and count and np.frombuffer(raw, np.uint8).max() > 1:
            self._fail(at, f"{key!r} is a bool, a byte of 0 or 1", "another byte")
        return np.frombuffer(raw, dtype).copy()  # a copy, so that metadata doesn't keep the file mapped

    def _entry(self) -> tuple[int, str, tuple[int, ...], int, int]:
        """(where it is in the file, name, row-major shape, type, offset) of a tensor"""
        at = self._at
        name = self._string(MAX_NAME, "a tensor's name")
        n_dims = self._number("<u4")
        if n_dims > MAX_DIMS:
            self._fail(at, f"tensor {name!r} has at most {MAX_DIMS} dims", f"{n_dims}")
        shape = tuple(self._number("<u8") for _ in range(n_dims))[::-1]  # stored fastest dim first
        if 0 in shape:
            self._fail(at, f"each dim of tensor {name!r} is at least 1", f"{shape}")
        return at, name, shape, self._number("<u4"), self._number("<u8")

    def _locate(self) -> dict[str, TensorInfo]:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            rule = f"general.alignment is a power of two from 8 to {MAX_ALIGNMENT}"
            self._fail(self._at, rule, f"{alignment!r}")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        end = start
        for at, name, shape, kind, offset in sorted(self._table, key=lambda entry: entry[4]):
            if kind not in TYPES:
                self._fail(at, f"tensor {name!r} has a known type: {[t.name for t in TYPES.values()]}", f"type {kind}")
            type_ = TYPES[kind]
            if (shape[-1] if shape else 1) % type_.block:
                self._fail(at, f"rows of tensor {name!r}, {type_.name}, are multiples of {type_.block}", f"{shape}")
            nbytes = math.prod(shape) // type_.block * type_.nbytes
            if name in tensors:
                self._fail(at, "tensor names are unique", repr(name))
            if offset % alignment:
                self._fail(at, f"the offset of tensor {name!r} is a multiple of {alignment}", f"{offset}")
            if start + offset < end:
                rule = f"tensor {name!r} begins after the one before it, which ends at byte {end}"
                self._fail(at, rule, f"{start + offset}")
            end = start + offset + nbytes
            if end > len(self._view):
                rule = f"tensor {name!r} ({nbytes} bytes) ends inside the file, of {len(self._view)} bytes"
                self._fail(at, rule, f"an end at byte {end}")
            tensors[name] = TensorInfo(name, shape, type_.name, nbytes, self.path, start + offset)
        return {name: tensors[name] for _, name, *_ in self._table}
