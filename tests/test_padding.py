"""Padding up to a bucket: where it is proved, where the caller vouches for a mask, and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.padding import cross_check

pytestmark = pytest.mark.jax_defaults

W = jnp.asarray(np.random.default_rng(0).standard_normal((12, 5)), jnp.float32)


def attend(w, x, mask):
    """Attention over the length, as far as the mask lets it."""
    scores = jnp.where(mask[:, None, :] != 0, jnp.einsum("btd,bsd->bts", x, x), -1e30)
    mixed = jax.nn.softmax(scores, -1) @ x @ w
    return jnp.sum(jnp.where(mask[:, :, None] != 0, mixed, 0.0), 1) / jnp.maximum(mask.sum(1), 1)[:, None]


def rows(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


SPECS = ji.spec("batch length 12"), ji.spec("batch length", "int32")


def test_length_is_padded_only_on_the_callers_word():
    program = ji.trace(attend, W, *SPECS)
    assert program.independent_axes == {"batch"}
    x, mask = rows(3, 5, 12), np.ones((3, 5), np.int32)
    buckets = {"batch": [4], "length": [2, 8]}
    with pytest.raises(ji.BatchMixingError) as refused:
        ji.compile(program, buckets=buckets, ahead=False)(x, mask)
    assert "length of 5 is none of the buckets [2, 8]" in str(refused.value)
    assert 'masked=("length",)' in str(refused.value)
    assert "test_padding.py:" in str(refused.value)
    want, first = attend(W, x, mask), attend(W, x[:1], mask[:1])
    executable = ji.compile(program, buckets=buckets, masked=["length"])
    before = executable.compile_count
    np.testing.assert_allclose(executable(x, mask), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(executable(x[:1], mask[:1]), first, rtol=1e-4, atol=1e-5)
    assert executable.compile_count == before


def test_a_mask_that_does_not_hide_the_padding_is_found():
    def leaky(w, x, mask):
        return attend(w, x, mask) + x.mean(1) @ w

    program = ji.trace(leaky, W, *SPECS)
    executable = ji.compile(program, buckets={"batch": [2], "length": [4]}, masked=["length"])
    exact = rows(2, 4, 12), np.ones((2, 4), np.int32)
    np.testing.assert_allclose(executable(*exact), leaky(W, *exact), rtol=1e-4, atol=1e-5)
    with pytest.raises(ji.BatchMixingError, match="the model's mask doesn't hide the padding"):
        executable(rows(2, 3, 12), np.ones((2, 3), np.int32))


def test_masked_names_must_be_there():
    with pytest.raises(ji.TraceError, match=r"masked names \['time'\]"):
        ji.compile(ji.trace(attend, W, *SPECS), buckets={"batch": [1], "length": [4]}, masked=["time"])


def test_nothing_is_tried_where_nothing_is_padded(monkeypatch):
    monkeypatch.setattr("jaxinfer.padding.cross_check", lambda *a: pytest.fail("not needed"))
    program = ji.trace(lambda w, x: x @ w, W, ji.spec("batch 12"))
    executable = ji.compile(program, buckets={"batch": [1, 2, 3]})
    assert executable(rows(3, 12)).shape == (3, 5)
    assert program.trace_count == 1 + 3  # analysis and buckets: no proof was asked for


def test_a_forward_that_takes_another_way_at_a_bucket_is_refused_there():
    """Traced at the sizes of the analysis, it is independent of the batch."""
    program = ji.trace(lambda w, x: x @ w if x.shape[0] > 8 else (x - x.mean(0)) @ w, W, ji.spec("batch 12"))
    assert program.independent_axes == {"batch"}
    executable = ji.compile(program, buckets={"batch": [8, 16]})
    with pytest.raises(ji.BatchMixingError, match="another way for another number of rows"):
        executable(rows(5, 12))
    np.testing.assert_allclose(executable(rows(12, 12)), rows(12, 12) @ np.asarray(W), rtol=1e-3, atol=1e-4)


def test_padding_repeats_a_row_so_that_loops_end():
    """On zeros this loop would never end."""

    def grow(w, x):
        return jax.vmap(lambda r: jax.lax.while_loop(lambda v: jnp.abs(v).sum() < 100, lambda v: v * 1.5, r))(x)

    program = ji.trace(grow, (), ji.spec("batch 12"))
    executable = ji.compile(program, buckets={"batch": [4]})
    np.testing.assert_allclose(executable(rows(3, 12)), grow((), rows(3, 12)), rtol=1e-5)


def test_shared_inputs_and_several_outputs():
    def forward(w, x, scale):
        return {"y": x @ w * scale, "norm": (x**2).sum(-1), "scale": scale + 1}

    program = ji.trace(forward, W, ji.spec("batch 12"), ji.spec(""))
    got = ji.compile(program, buckets={"batch": [8]})(rows(5, 12), np.float32(2))
    want = forward(W, rows(5, 12), np.float32(2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_a_run_that_contradicts_the_proof_is_an_internal_error():
    program = ji.trace(lambda w, x: x @ w, W, ji.spec("batch 12"))
    cross_check(program, "batch", {"batch": 4}, lambda arrays, bucket: [arrays[0] @ np.asarray(W)])
    for wrong in (
        lambda arrays, bucket: [(arrays[0] - arrays[0].mean(0)) @ np.asarray(W)],
        lambda arrays, bucket: [arrays[0] @ np.asarray(W) + 0 * arrays[0].sum()],  # seen by NaN alone
    ):
        with pytest.raises(ji.JaxInferError, match=r"internal error.*is proved to keep"):
            cross_check(program, "batch", {"batch": 4}, wrong)


def test_the_outcome_is_kept_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    program = ji.trace(lambda w, x: x @ w * 1.25, W, ji.spec("batch 12"))
    ji.compile(program, buckets={"batch": [4]})
    again = ji.trace(lambda w, x: x @ w * 1.25, W, ji.spec("batch 12"))
    monkeypatch.setattr("jaxinfer.padding.cross_check", lambda *a: pytest.fail("known already"))
    executable = ji.compile(again, buckets={"batch": [4]})
    assert executable(rows(3, 12)).shape == (3, 5)
    assert again.trace_count == 1
