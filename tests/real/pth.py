"""A state dict of torch's format before 1.6 (`torch.save` without a zip): pickles, then the storages one after another.

Read without torch, and without running anything: the pickle may name two constructors and the storages' types."""

import collections
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


class _Storage:
    """Room for what comes at the end of the file."""

    def __init__(self, dtype: np.dtype):
        self.dtype, self.array = dtype, np.zeros(0, dtype)


class _Tensor:
    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self) -> np.ndarray:
        size = self.storage.dtype.itemsize
        view = self.storage.array[self.offset :]
        return np.lib.stride_tricks.as_strided(view, self.shape, [s * size for s in self.strides], writeable=False)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if module == "torch" and name in _DTYPES:
            return name
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a state dict")

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, *_ = pid
        return self.storages.setdefault(key, _Storage(_DTYPES[kind]))


def load(path: Path) -> dict[str, np.ndarray]:
    """Every tensor by name."""
    with path.open("rb") as file:
        magic, _version, _system = (_Unpickler(file).load() for _ in range(3))
        if magic != _MAGIC:
            raise ValueError(f"{path.name} isn't in torch's old format")
        body = _Unpickler(file)
        tensors = body.load()
        for key in _Unpickler(file).load():
            storage = body.storages[key]
            (count,) = np.frombuffer(file.read(8), "<i8")
            storage.array = np.frombuffer(file.read(int(count) * storage.dtype.itemsize), storage.dtype)
        if file.read(1):
            raise ValueError(f"{path.name}: bytes follow the last storage")
    return {name: tensor.array() for name, tensor in tensors.items()}
