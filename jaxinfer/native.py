"""A compiled flat function as bytes: XLA's machine code after a JSON line with the shapes that it takes and returns.

Nothing in it is a pickle. Machine code is code all the same: whoever loads it runs it.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 and the float8 types with numpy
import numpy as np

from jaxinfer import _jax

_MAX_HEADER = 16 << 20  # bytes; some 200,000 arrays


def pack(compiled: Any) -> bytes:
    """The bytes of a function that was compiled in this process: XLA:CPU serialises one that was loaded without its
    code, so keep what it was loaded from.

    Raises:
        ValueError: the backend can't serialise it.
    """
    inputs, outputs = jax.tree.leaves(compiled.in_avals), jax.tree.leaves(compiled.out_info)
    header = {"inputs": described(inputs), "outputs": described(outputs)}
    return json.dumps(header).encode() + b"\n" + _jax.machine_code(compiled)


def load(data: bytes, device: Any) -> Any:
    """The compiled function of `pack`'s bytes, for a device of the same kind.

    Raises:
        ValueError: damaged, or from another build of JAX or XLA.
    """
    inputs, outputs = signature(data)
    return _jax.load_machine_code(data[data.index(b"\n") + 1 :], inputs, outputs, device)


def signature(data: bytes) -> tuple[list[jax.ShapeDtypeStruct], list[jax.ShapeDtypeStruct]]:
    """(inputs, outputs) of `pack`'s bytes.

    Raises:
        ValueError: damaged.
    """
    end = data.find(b"\n", 0, _MAX_HEADER)
    header = json.loads(data[:end]) if end > 0 else None
    if not isinstance(header, dict) or header.keys() != {"inputs", "outputs"}:
        raise ValueError(f"compiled code with an unknown header: {header!s:.80}")
    return structs(header["inputs"]), structs(header["outputs"])


def described(arrays: Sequence[Any]) -> list[list[Any]]:
    """[dtype name, shape] of each array, for JSON."""
    return [[np.dtype(array.dtype).name, list(array.shape)] for array in arrays]


def structs(entries: Any) -> list[jax.ShapeDtypeStruct]:
    """What `described` described.

    Raises:
        ValueError: anything else.
    """
    return [struct(entry) for entry in (entries if isinstance(entries, list) else [entries])]


def struct(entry: Any) -> jax.ShapeDtypeStruct:
    """The array of one [dtype name, shape].

    Raises:
        ValueError: anything else.
    """
    match entry:
        case [str(name), list(shape)] if all(type(n) is int and n >= 0 for n in shape) and math.prod(shape) < 2**62:
            try:
                dtype = np.dtype(name)
            except TypeError as error:
                raise ValueError(f"unknown dtype {name!r:.40}") from error
            if dtype.hasobject or dtype.name != name:  # np.dtype takes many spellings; one is written
                raise ValueError(f"unknown dtype {name!r:.40}")
            return jax.ShapeDtypeStruct(tuple(shape), dtype)
    raise ValueError(f"[dtype, shape] is wanted, got {entry!s:.80}")
