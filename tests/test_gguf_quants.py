"""Dequantisation against the `gguf` package, whose numpy code is independent of ours."""

import tracemalloc

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from jaxinfer.checkpoints import gguf_quants
from jaxinfer.checkpoints.gguf_quants import PLAIN, QUANTIZED, SUPPORTED, TYPES, dequantize

NUMBERS = {type_.name: number for number, type_ in TYPES.items()}
ROWS, COLUMNS = 24, 1024


def random_bytes(name: str, seed: int) -> np.ndarray:
    """Every bit random, but some scales infinite, NaN, the largest and the smallest there are."""
    type_ = TYPES[NUMBERS[name]]
    raw = np.random.default_rng(seed).integers(0, 256, ROWS * COLUMNS // type_.block * type_.nbytes, np.uint8)
    if name in QUANTIZED:
        extreme = np.array([np.inf, -np.inf, np.nan, 65504, -65504, 6e-8, -6e-8, 0], np.float16)
        raw.view(QUANTIZED[name][0])["d"][: len(extreme)] = extreme
    return raw


def widened(array: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return array.astype(np.float64)


def reference(raw: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        rows = gguf.quants.dequantize(raw.reshape(ROWS, -1), GGMLQuantizationType[name])
    return rows.astype(np.float32).reshape(ROWS, COLUMNS)


def test_sizes_are_those_of_the_reference():
    for number, type_ in TYPES.items():
        kind = GGMLQuantizationType(number)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == type_


def test_what_is_supported():
    wanted = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"}
    assert wanted <= set(SUPPORTED)
    assert set(SUPPORTED) <= set(NUMBERS)


@pytest.mark.parametrize("name", [*QUANTIZED, "F16", "BF16"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_reference_bit_by_bit(name: str, seed: int):
    raw = random_bytes(name, seed)
    ours = dequantize(raw, name, (ROWS, COLUMNS), np.float32)
    np.testing.assert_array_equal(ours, reference(raw, name))
    assert ours.dtype == np.float32
    assert np.isnan(ours).any() and np.isfinite(ours).any()  # the blocks were extreme
    assert np.isinf(ours).any() or name not in QUANTIZED


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("scale", [1e-7, 1.0, 6e4])
def test_equals_the_reference_where_all_is_finite(name: str, scale: float):
    raw = random_bytes(name, 7)
    blocks = raw.view(QUANTIZED[name][0])
    for field in set(blocks.dtype.names or ()) & {"d", "m", "dmin"}:
        blocks[field] = np.random.default_rng(8).uniform(-scale, scale, len(blocks)).astype(np.float16)
    ours = dequantize(raw, name, (ROWS, COLUMNS), np.float32)
    np.testing.assert_array_equal(ours, reference(raw, name))
    assert np.isfinite(ours).all() and ours.std() > 0


@pytest.mark.parametrize("name", [*QUANTIZED, "F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_dtypes_are_the_float32_values_cast(name: str, dtype: type):
    raw = random_bytes(name, 3)
    with np.errstate(all="ignore"):
        expected = dequantize(raw, name, (ROWS, COLUMNS), np.float32).astype(dtype)
    ours = dequantize(raw, name, (ROWS, COLUMNS), dtype)
    assert ours.dtype == dtype
    np.testing.assert_array_equal(widened(ours), widened(expected))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    for name in QUANTIZED:
        raw = random_bytes(name, 4)
        whole = dequantize(raw, name, (ROWS, COLUMNS), np.float32)
        monkeypatch.setattr(gguf_quants, "CHUNK", 768)  # 3 blocks of 256: the last chunk is shorter than the others
        np.testing.assert_array_equal(dequantize(raw, name, (ROWS, COLUMNS), np.float32), whole)
        monkeypatch.undo()


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_holds_no_second_copy(name: str, dtype: type):
    type_ = TYPES[NUMBERS[name]]
    elements = 1 << 22
    raw = np.zeros(elements // type_.block * type_.nbytes, np.uint8)
    tracemalloc.start()
    try:
        out = dequantize(raw, name, (elements,), dtype)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < out.nbytes + 12 * gguf_quants.CHUNK, f"{peak - out.nbytes} bytes beside the result"


def test_the_stored_dtype_is_a_view():
    for name, dtype in PLAIN.items():
        raw = np.zeros(ROWS * COLUMNS * dtype.itemsize, np.uint8)
        assert np.shares_memory(dequantize(raw, name, (ROWS, COLUMNS), dtype), raw)
        assert not np.shares_memory(dequantize(raw, name, (ROWS, COLUMNS), np.float16), raw) or name == "F16"


def test_integers_stay_integers_and_floats_are_not_truncated():
    raw = np.arange(-2, 6, dtype="<i8").view(np.uint8)
    np.testing.assert_array_equal(dequantize(raw, "I64", (8,), np.int32), np.arange(-2, 6))
    np.testing.assert_array_equal(dequantize(raw, "I64", (2, 4), np.float32), np.arange(-2, 6).reshape(2, 4))
    for name in ("F32", "BF16", "Q8_0"):
        with pytest.raises(TypeError, match="truncate"):
            dequantize(random_bytes("F32", 0), name, (ROWS, COLUMNS), np.int32)
    with pytest.raises(KeyError):
        dequantize(raw, "IQ4_XS", (256,), np.float32)
