"""Rows: stacking, padding and cutting, against what `Executable` does with a whole batch."""

import jax
import ml_dtypes
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.runtime import copying
from jaxinfer.runtime.batcher import Rows, Shared
from jaxinfer.runtime.request import Batch, Group, Request
from jaxinfer.runtime.staging import Staging

DTYPES = ["float32", "int8", "bool", "complex64", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (40, 50), (70, 80, 90)])
def test_copies_are_equal_and_share_nothing(dtype, shape):
    draw = np.random.default_rng(0)
    whole = (draw.standard_normal((*shape, 2)) * 5).astype(dtype)
    for array in (whole[..., 0].copy(), whole[..., 0], whole[..., 0].T):
        want = array.astype(np.complex64)
        copies = copying.snapshot(array), copying.owned(array)
        into = np.zeros(array.shape, array.dtype)
        copying.write(into, array)
        for copy in (*copies, into):
            assert copy.dtype == array.dtype and copy.shape == array.shape and not np.shares_memory(copy, array)
            np.testing.assert_array_equal(copy.astype(np.complex64), want)
        assert copies[1].flags.writeable


def test_staging_gives_aligned_arrays_again():
    staging = Staging()
    first, second = (staging.take((3, 5), np.dtype("float32")) for _ in range(2))
    assert first.ctypes.data % 64 == second.ctypes.data % 64 == 0 and not np.shares_memory(first, second)
    staging.give([first])
    assert staging.take((3, 5), np.dtype("int32")) is not first
    assert staging.take((3, 5), np.dtype("float32")) is first


SPECS = [
    (("batch 3 time", "float32"), ("time batch", "int32"), ("batch", "float32")),
    (("time batch 2", "float32"), ("batch time", "int32"), ("batch 2 keys", "float32")),
    (("4 batch", "bfloat16"), ("keys time", "float32"), ("batch time keys", "float32")),
]


@pytest.mark.parametrize("specs", SPECS)
@pytest.mark.parametrize("masked", [(), ("time",), ("time", "keys")])
def test_stacked_rows_are_a_padded_batch(specs, masked):
    """Rows of one size, stacked and padded as a batch by `Padding.pad`, and rows of other sizes each by itself."""
    given = [ji.spec(*s) for s in specs]
    program = ji.trace(lambda p, *xs: [x.astype(float) for x in xs], (), *given)
    masked = [name for name in masked if name in program.axes]
    ladders = {name: [8 if name == "batch" else 6] for name in program.axes}
    served = ji.compile(program, buckets=ladders, masked=masked, ahead=False)
    rows, draw = Rows(served), np.random.default_rng(0)
    others = tuple((name, 6) for name in program.axes if name != "batch")
    fixed = {"keys": 5} if any("batch" not in s.names for s in given) else {}
    requests, whole = [], []
    for number in range(5):
        sizes = {"time": int(draw.integers(1, 7)) if not fixed else 4, "keys": int(draw.integers(1, 7))} | fixed
        arrays = [(draw.standard_normal(s.shape({**sizes, "batch": 1})) * 9).astype(s.dtype) for s in given]
        row = rows.check(
            tuple(a.squeeze(s.dims.index("batch")) for a, s in zip(arrays, given, strict=True) if "batch" in s.dims)
        )
        requests.append(Request(row, Group(others)))
        whole.append(served.padding.pad(arrays, {**dict(others), "batch": 1}))
        if number == 0:
            shared = [a for a, s in zip(arrays, given, strict=True) if "batch" not in s.names]
    stacked = rows.stack(Batch(requests, Group(others), 8, True), Staging())
    merged = rows.merge(stacked, rows.pad(Shared(shared), {**dict(others), "batch": 8}))
    for number, (spec, got) in enumerate(zip(given, merged, strict=True)):
        assert got.shape == spec.shape({**dict(others), "batch": 8}) and got.dtype == spec.dtype
        if "batch" not in spec.dims:
            np.testing.assert_array_equal(got, whole[0][number])
            continue
        axis = spec.dims.index("batch")
        want = np.concatenate([w[number] for w in whole] + [whole[-1][number]] * 3, axis)
        np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))


@pytest.mark.jax_defaults
def test_pytrees_of_rows_and_of_results():
    def forward(params, inputs, extra):
        image, (scale, pair) = inputs["image"], inputs["more"]
        return {"a": [image * scale, None], "b": (pair + extra, image.sum(axis=(1, 2)))}

    specs = {"image": ji.spec("batch 2 3"), "more": (ji.spec(""), ji.spec("3 batch"))}, ji.spec("batch")
    served = ji.compile(ji.trace(forward, (), *specs), buckets={"batch": [1, 4]})
    draw = np.random.default_rng(0)
    with ji.Engine(served) as engine:
        (name,) = engine._rows.shared
        engine.bind(**{name: 2.0})
        for _ in range(5):
            image, pair = draw.standard_normal((2, 3), np.float32), draw.standard_normal(3, np.float32)
            got = engine.submit({"image": image, "more": (None, pair)}, np.float32(3)).result(10)
            assert jax.tree.structure(got) == jax.tree.structure({"a": [0, None], "b": (0, 0)})
            np.testing.assert_allclose(got["a"][0], image * 2, rtol=1e-6)
            np.testing.assert_allclose(got["b"][0], pair + 3, rtol=1e-6)
            np.testing.assert_allclose(got["b"][1], image.sum(), rtol=1e-4)
            assert got["b"][1].shape == () and isinstance(got["b"][1], np.ndarray)
        with pytest.raises(ji.RequestError, match="got float32"):
            engine.submit({"image": image, "more": (np.float32(2), pair)}, np.float32(3))
