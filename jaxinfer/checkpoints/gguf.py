"""GGUF checkpoints: one mapped file that holds weights, configuration, tokenizer and chat template."""

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.checkpoints.base import Checkpoint, TensorInfo, drop_pages
from jaxinfer.checkpoints.gguf_config import read_config
from jaxinfer.checkpoints.gguf_format import Header
from jaxinfer.checkpoints.gguf_quants import SUPPORTED, dequantize
from jaxinfer.errors import CheckpointError
from jaxinfer.text.tokenizer import Tokenizer

ROPE_FACTORS = "rope_freqs.weight"


class GGUFCheckpoint(Checkpoint):
    """A GGUF file, version 2 or 3, little endian, in one part.

    `metadata` has the file's own pairs; `config` says the same as a config.json would. Llama 3's `rope_freqs.weight` is
    configuration in the shape of a tensor: it becomes `config["rope_scaling"]` and is not among `tensors`. Q and K
    projections of Llama are stored with their rows permuted for rotation in adjacent pairs; `read` returns what is
    stored (`jaxinfer.models.weights.unpermute_rope` undoes it).

    Raises:
        CheckpointError: no such file, or a damaged, hostile or unsupported one.
    """

    format = "gguf"
    naming = "gguf"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._map, self._bytes = _mapped(self.path)
        self._size = len(self._bytes)
        try:
            header = Header(self.path, self._bytes)
            self.metadata: dict[str, Any] = header.metadata
            self.tensors: Mapping[str, TensorInfo] = header.tensors
            self._refuse_parts()
            factors = self.read(ROPE_FACTORS, np.float32) if ROPE_FACTORS in header.tensors else None
            self.config = self._located(read_config, self.metadata, header.tensors, factors)
            header.tensors.pop(ROPE_FACTORS, None)
        except BaseException:
            self.close()
            raise

    def read(self, name: str, dtype: Any) -> np.ndarray:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: no tensor {name!r} among the {len(self.tensors)} stored")
        if info.dtype not in SUPPORTED:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is stored as {info.dtype}, which is not supported; "
                f"{', '.join(SUPPORTED)} are. Take another quantisation, or make one with llama.cpp's llama-quantize."
            )
        if self._bytes is None:
            raise CheckpointError(f"{self.path}: closed, so {name!r} can't be read; open the checkpoint again")
        # Touching a mapped page past the end of a file that was cut meanwhile would kill the process with SIGBUS.
        if self._map is not None and (size := self._map.size()) < self._size:
            raise CheckpointError(f"{self.path}: was {self._size} bytes when opened, is {size} now; open it again")
        try:
            return dequantize(self._bytes[info.offset : info.offset + info.nbytes], info.dtype, info.shape, dtype)
        except TypeError as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} can't be read as {np.dtype(dtype)}: {error}") from None

    def release(self, name: str) -> None:
        if self._map is not None:
            drop_pages(self._map, self.tensors[name].offset, self.tensors[name].nbytes)

    def load_tokenizer(self) -> Tokenizer | None:
        if self.metadata.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
            return None
        return self._located(Tokenizer.from_gguf, self.metadata)

    def close(self) -> None:
        # The mapping itself goes when the last array that views it does.
        self._map = self._bytes = None

    def _located(self, function: Any, *args: Any) -> Any:
        """function(*args), whose CheckpointErrors don't know the file, with the file named."""
        try:
            return function(*args)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from None

    def _refuse_parts(self) -> None:
        parts = self.metadata.get("split.count", 1)
        if parts not in (0, 1):
            raise CheckpointError(
                f"{self.path}: one of {parts} parts; only whole files are read. "
                "Join them with llama.cpp's `llama-gguf-split --merge`."
            )


def _mapped(path: Path) -> tuple[mmap.mmap | None, np.ndarray]:
    """The whole file as read-only uint8 [bytes]; pages are read when they are touched."""
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) == 0:  # which can't be mapped
                return None, np.zeros(0, np.uint8)
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be opened: {error.strerror}") from None
    return mapping, np.frombuffer(mapping, np.uint8)
