"""Host memory that batches are stacked in, used again and again.

A fresh array of some megabytes costs its page faults each time, and numpy's own arrays lie on 16 bytes, from where
XLA:CPU has to copy them; on 64 it takes them where they are. For 32 images of 128 x 128 x 3 float32 that is 0.3 ms in
place of 1.9 ms.
"""

import threading
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

_ALIGN = 64  # bytes
_SPARE = 3  # arrays kept of each shape: one runs, one is prepared, one is being cut into rows


class Staging:
    """Arrays to fill. Whoever takes one gives it back when no device reads it any more, or just drops it."""

    def __init__(self) -> None:
        self._spare: defaultdict[tuple[tuple[int, ...], np.dtype], list[np.ndarray]] = defaultdict(list)
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array with anything in it."""
        with self._lock:
            if spare := self._spare[shape, dtype]:
                return spare.pop()
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        memory = np.empty(count + _ALIGN, np.uint8)
        start = -memory.ctypes.data % _ALIGN
        return memory[start : start + count].view(dtype).reshape(shape)

    def give(self, arrays: Sequence[np.ndarray]) -> None:
        """Takes arrays back."""
        with self._lock:
            for array in arrays:
                spare = self._spare[array.shape, array.dtype]
                if len(spare) < _SPARE:
                    spare.append(array)
