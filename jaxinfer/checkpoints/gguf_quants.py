"""GGML's tensor types: their sizes, and dequantisation in numpy straight into the wanted dtype.

Each quantised type is declared once, as the structured dtype of its block (ggml's `block_*` structs), beside the
function that expands n blocks to float32 `[n, block]`. Expressions keep ggml's order of operations, so that results
are bit-equal to its reference.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxinfer.checkpoints.base import aligned_empty, converted

__all__ = ["SUPPORTED", "TYPES", "GGMLType", "dequantize"]

# float32 elements expanded at a time: 512 KB, which stays in a core's L2 cache (an eighth was 2x slower)
CHUNK = 1 << 17


class GGMLType(NamedTuple):
    """A tensor type: `block` consecutive elements of a row take `nbytes` bytes."""

    name: str
    block: int
    nbytes: int


# Sizes are known for more types than can be read, so that a file which holds one can be opened and described.
TYPES: dict[int, GGMLType] = {
    0: GGMLType("F32", 1, 4),
    1: GGMLType("F16", 1, 2),
    2: GGMLType("Q4_0", 32, 18),
    3: GGMLType("Q4_1", 32, 20),
    6: GGMLType("Q5_0", 32, 22),
    7: GGMLType("Q5_1", 32, 24),
    8: GGMLType("Q8_0", 32, 34),
    9: GGMLType("Q8_1", 32, 40),
    10: GGMLType("Q2_K", 256, 84),
    11: GGMLType("Q3_K", 256, 110),
    12: GGMLType("Q4_K", 256, 144),
    13: GGMLType("Q5_K", 256, 176),
    14: GGMLType("Q6_K", 256, 210),
    15: GGMLType("Q8_K", 256, 292),
    16: GGMLType("IQ2_XXS", 256, 66),
    17: GGMLType("IQ2_XS", 256, 74),
    18: GGMLType("IQ3_XXS", 256, 98),
    19: GGMLType("IQ1_S", 256, 50),
    20: GGMLType("IQ4_NL", 32, 18),
    21: GGMLType("IQ3_S", 256, 110),
    22: GGMLType("IQ2_S", 256, 82),
    23: GGMLType("IQ4_XS", 256, 136),
    24: GGMLType("I8", 1, 1),
    25: GGMLType("I16", 1, 2),
    26: GGMLType("I32", 1, 4),
    27: GGMLType("I64", 1, 8),
    28: GGMLType("F64", 1, 8),
    29: GGMLType("IQ1_M", 256, 56),
    30: GGMLType("BF16", 1, 2),
    34: GGMLType("TQ1_0", 256, 54),
    35: GGMLType("TQ2_0", 256, 66),
    39: GGMLType("MXFP4", 32, 17),
}

PLAIN: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}

Q4_0 = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])
Q5_0 = np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
Q5_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
Q8_0 = np.dtype([("d", "<f2"), ("qs", "i1", 32)])
Q4_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)])
Q5_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)])
Q6_K = np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")])


def _column(values: np.ndarray) -> np.ndarray:
    """float16 [n] -> float32 [n, 1]"""
    return values.astype(np.float32)[:, None]


def _nibbles(packed: np.ndarray, width: int) -> np.ndarray:
    """uint8 [n, k * width] -> uint8 [n, k, 2, width]: of each `width` bytes, the low nibbles, then the high ones."""
    # Eight at a time as 64-bit words and one word column after another, since numpy's inner loop would else be 16 long.
    words = np.ascontiguousarray(packed).view("<u8").reshape(len(packed), -1, width // 8)
    out = np.empty((len(packed), words.shape[1], 2, width // 8), "<u8")
    mask = np.uint64(0x0F0F0F0F0F0F0F0F)
    for i in range(words.shape[1]):
        for j in range(width // 8):
            np.bitwise_and(words[:, i, j], mask, out=out[:, i, 0, j])
            np.bitwise_and(words[:, i, j] >> np.uint64(4), mask, out=out[:, i, 1, j])
    return out.view(np.uint8)


def _fifth_bits(qh: np.ndarray) -> np.ndarray:
    """uint8 [n, 4], a bit an element -> uint8 [n, 32] of 0 or 16"""
    return np.unpackbits(np.ascontiguousarray(qh), axis=1, bitorder="little") << np.uint8(4)


def _six_bit_scales(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 12] -> scales and minima, uint8 [n, 8] each, of the eight groups of a K-block.

    Bytes 0-3 and 4-7 hold the low six bits of scales and minima 0-3, and in their top two bits the top of 4-7, whose
    low four bits share bytes 8-11.
    """
    first, second, shared = scales[:, 0:4], scales[:, 4:8], scales[:, 8:12]
    scale = np.concatenate([first & 63, (shared & 15) | ((first >> 6) << 4)], axis=1)
    minimum = np.concatenate([second & 63, (shared >> 4) | ((second >> 6) << 4)], axis=1)
    return scale, minimum


# Of each expansion, copying the integers into `out` first and scaling in place was fastest: no float32 temporaries.


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    out[...] = _nibbles(blocks["qs"], 16).reshape(-1, 32).view(np.int8) - np.int8(8)
    out *= _column(blocks["d"])


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    out[...] = _nibbles(blocks["qs"], 16).reshape(-1, 32)
    out *= _column(blocks["d"])
    out += _column(blocks["m"])


def _q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    q = _nibbles(blocks["qs"], 16).reshape(-1, 32) | _fifth_bits(blocks["qh"])
    out[...] = q.view(np.int8) - np.int8(16)
    out *= _column(blocks["d"])


def _q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
    out[...] = _nibbles(blocks["qs"], 16).reshape(-1, 32) | _fifth_bits(blocks["qh"])
    out *= _column(blocks["d"])
    out += _column(blocks["m"])


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    out[...] = blocks["qs"]
    out *= _column(blocks["d"])


def _scale_k(blocks: np.ndarray, q: np.ndarray, out: np.ndarray) -> None:
    """Q4_K and Q5_K alike: (d * scale) * q - (dmin * minimum) in eight groups of 32. q: uint8 [n, 8, 32]"""
    scale, minimum = _six_bit_scales(blocks["scales"])
    groups = out.reshape(-1, 8, 32)
    groups[...] = q
    groups *= (_column(blocks["d"]) * scale.astype(np.float32))[:, :, None]
    groups -= (_column(blocks["dmin"]) * minimum.astype(np.float32))[:, :, None]


def _q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    _scale_k(blocks, _nibbles(blocks["qs"], 32).reshape(-1, 8, 32), out)


def _q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    q = _nibbles(blocks["qs"], 32).reshape(-1, 8, 32)
    bit = np.arange(8, dtype=np.uint8)[None, :, None]  # group g's fifth bits are bit g of the 32 bytes
    q |= ((blocks["qh"][:, None, :] >> bit) & np.uint8(1)) << np.uint8(4)
    _scale_k(blocks, q, out)


def _q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    q = _nibbles(blocks["ql"], 64).reshape(-1, 2, 4, 32)
    shift = np.arange(0, 8, 2, dtype=np.uint8)[None, None, :, None]
    q |= ((blocks["qh"].reshape(-1, 2, 1, 32) >> shift) & np.uint8(3)) << np.uint8(4)
    groups = out.reshape(-1, 16, 16)
    groups[...] = q.view(np.int8).reshape(-1, 16, 16) - np.int8(32)
    groups *= (_column(blocks["d"]) * blocks["scales"].astype(np.float32))[:, :, None]


QUANTIZED: dict[str, tuple[np.dtype, Callable[[np.ndarray, np.ndarray], None]]] = {
    "Q4_0": (Q4_0, _q4_0),
    "Q4_1": (Q4_1, _q4_1),
    "Q5_0": (Q5_0, _q5_0),
    "Q5_1": (Q5_1, _q5_1),
    "Q8_0": (Q8_0, _q8_0),
    "Q4_K": (Q4_K, _q4_k),
    "Q5_K": (Q5_K, _q5_k),
    "Q6_K": (Q6_K, _q6_k),
}

SUPPORTED = (*PLAIN, *QUANTIZED)


def dequantize(raw: np.ndarray, type_name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Bytes of a tensor as stored -> its values as an array of `shape` in `dtype`.

    A read-only view of `raw` where the stored dtype is `dtype`; else a fresh array, beside which at most a few
    `CHUNK`s of float32 are held. What a narrower dtype can't hold becomes infinite, as in any cast.

    Args:
        raw: uint8 [nbytes], of exactly the size that `type_name` and `shape` ask for.
        type_name: one of `SUPPORTED`.

    Raises:
        KeyError: a type that is not in `SUPPORTED`.
        TypeError: floating values asked for as integers.
    """
    dtype = np.dtype(dtype)
    if not _is_float(dtype) and not type_name.startswith("I"):
        raise TypeError(f"{type_name} holds floating values, which {dtype} would truncate")
    if type_name in PLAIN:
        stored = raw.view(PLAIN[type_name]).reshape(shape)
        return stored if stored.dtype == dtype else converted(stored, dtype)
    struct, expand = QUANTIZED[type_name]
    blocks = raw.view(struct)
    out = aligned_empty(shape, dtype)
    rows = out.reshape(len(blocks), -1)
    step = CHUNK // rows.shape[1]
    buffer = None if dtype == np.float32 else np.empty((step, rows.shape[1]), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(blocks), step):
            part = rows[start : start + step]
            if buffer is None:
                expand(blocks[start : start + step], part)
            else:
                expand(blocks[start : start + step], buffer[: len(part)])
                part[...] = buffer[: len(part)]
    return out


def _is_float(dtype: np.dtype) -> bool:
    return np.issubdtype(dtype, np.floating) or dtype == ml_dtypes.bfloat16
