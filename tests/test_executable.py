"""ji.compile: buckets, padding, counts of compiles, and the cache on disk."""

import datetime
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer import cache

PARAMS = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((12, 5)), jnp.float32)}


def dense(params, x):
    return {"y": jax.nn.softmax(x @ params["w"]), "norm": jnp.sum(x**2, axis=-1)}


def rows(n, seed=1):
    return np.random.default_rng(seed).standard_normal((n, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def executable():
    return ji.compile(ji.trace(dense, PARAMS, ji.spec("batch 12")), buckets={"batch": [1, 4, 8]})


def test_every_size_and_no_compile_after_the_first(executable):
    inputs = [rows(n) for n in range(1, 9)]
    expected = [jax.tree.map(np.asarray, dense(PARAMS, x)) for x in inputs]
    before = executable.compile_count
    for x, want in zip(inputs, expected, strict=True):
        got = executable(x)
        assert isinstance(got["y"], jax.Array)
        np.testing.assert_allclose(got["y"], want["y"], atol=1e-6)
        np.testing.assert_allclose(got["norm"], want["norm"], rtol=1e-5)
    executable(jax.device_put(rows(4)))  # device arrays too
    assert executable.compile_count == before


def test_other_weights_without_compiling(executable):
    before = executable.compile_count
    doubled = executable.with_params({"w": np.asarray(PARAMS["w"]) * 2})
    want = rows(3) @ (np.asarray(PARAMS["w"]) * 2)
    np.testing.assert_array_equal(np.asarray(doubled(rows(3))["y"]).argmax(-1), want.argmax(-1))
    np.testing.assert_allclose(doubled(rows(3))["y"], np.exp(want) / np.exp(want).sum(-1, keepdims=True), rtol=1e-4)
    assert executable.compile_count == before
    with pytest.raises(ji.RequestError, match="shapes and dtypes"):
        executable.with_params({"w": np.ones((12, 6), np.float32)})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((rows(9),), "batch of 9 is over the largest bucket, 8"),
        ((rows(2)[:, :11],), "12 should be 12, got 11"),
        ((rows(2).astype(np.int32),), r"should be float32\[batch 12\], got int32\[2, 12\]"),
        ((rows(0),), "at least 1, got 0"),
        ((rows(2), rows(2)), "takes 1 inputs"),
    ],
)
def test_bad_inputs(executable, inputs, message):
    with pytest.raises(ji.RequestError, match=message):
        executable(*inputs)


def test_rows_that_mix_are_never_padded():
    program = ji.trace(lambda p, x: jax.nn.softmax(x @ p["w"], axis=0), PARAMS, ji.spec("batch 12"))
    mixing = ji.compile(program, buckets={"batch": [1, 4]})
    np.testing.assert_allclose(np.asarray(mixing(rows(4))).sum(0), 1, rtol=1e-5)  # an exact size is fine
    with pytest.raises(ji.BatchMixingError, match=r"batch of 3 is none of the buckets .* would change the results"):
        mixing(rows(3))


def test_a_mean_over_the_batch_is_found_though_zeros_are_neutral_to_a_sum():
    program = ji.trace(lambda p, x: x / x.shape[0], (), ji.spec("batch 12"))
    with pytest.raises(ji.BatchMixingError):
        ji.compile(program, buckets={"batch": [4]})(rows(3))


def test_dtype_casts_the_parameters():
    program = ji.trace(lambda p, x: x @ p["w"].astype(jnp.float32), PARAMS, ji.spec("batch 12"))
    half = ji.compile(program, buckets={"batch": [2]}, dtype="bfloat16")
    assert all(p.dtype == jnp.bfloat16 for p in half.params)
    np.testing.assert_allclose(half(rows(2)), rows(2) @ np.asarray(PARAMS["w"]), atol=0.1)


def test_hlo_is_there(executable):
    assert "HloModule" in executable.hlo_text({"batch": 4})


def test_buckets_must_name_the_named_dims():
    program = ji.trace(dense, PARAMS, ji.spec("batch 12"))
    for buckets in ({}, {"batch": [1], "time": [2]}, {"rows": [1]}):
        with pytest.raises(ji.TraceError, match="named dims"):
            ji.compile(program, buckets=buckets)
    merged = ji.trace(lambda p, x: x.reshape(-1), (), ji.spec("batch time"))
    with pytest.raises(ji.TraceError, match=r"merges named dims \(batch\*time\)"):
        ji.compile(merged, buckets={"batch": [1], "time": [1]})


def scaled(scale):
    """A program that no other test compiles."""
    return ji.trace(lambda p, x: dense(p, x * scale), PARAMS, ji.spec("batch 12"))


def test_the_second_time_comes_from_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    make = lambda: ji.compile(scaled(1.25), buckets={"batch": [2]})  # noqa: E731
    first, second = make(), make()
    assert (first.report.compiled, first.report.loaded) == (1, 0)
    assert (second.report.compiled, second.report.loaded) == (0, 1)
    np.testing.assert_array_equal(first(rows(2))["y"], second(rows(2))["y"])
    assert ji.compile(scaled(1.5), buckets={"batch": [2]}).report.loaded == 0


def test_why_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    make = lambda ahead: ji.compile(scaled(1.375), buckets={"batch": [1, 2, 4]}, ahead=ahead)  # noqa: E731
    lazy = make(ahead=False)
    assert lazy.why_compiled() == ()
    started = datetime.datetime.now().astimezone()
    for n in (2, 2, 1, 2):
        lazy(rows(n))
    first, second = lazy.why_compiled()
    assert (first.bucket, first.cause, first.origin) == ({"batch": 2}, {"batch": 2}, "XLA")
    assert (second.bucket, second.cause, second.origin) == ({"batch": 1}, {"batch": 1}, "XLA")
    assert started <= first.when <= second.when <= datetime.datetime.now().astimezone()
    assert first.seconds + second.seconds == pytest.approx(lazy.report.seconds)
    lazy(rows(3))  # the first call that is padded to 4: a check that this is safe comes before it
    assert [(made.bucket["batch"], made.cause) for made in lazy.why_compiled()[2:]] == [(4, {"batch": 3})]
    ahead = make(ahead=True)
    assert [made.cause for made in ahead.why_compiled()] == ["ahead, at compile"] * 3
    assert [made.origin for made in ahead.why_compiled()] == ["the cache on disk"] * 3
    lines = str(lazy.why_compiled()).splitlines()
    assert lines[0].split("  ")[0] == "program" and lines[3].startswith("batch 4  a call with batch 3  20")
    assert repr(lazy.why_compiled()) == str(lazy.why_compiled())
    page = lazy.why_compiled()._repr_html_()
    assert page.count("<tr>") == 4 and "<td>a call with batch 3</td>" in page
    assert lazy.with_params(PARAMS).why_compiled() == lazy.why_compiled()  # they share their programs


def test_threads_share_the_programs():
    executable = ji.compile(scaled(1.625), buckets={"batch": [2]}, ahead=False)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: np.asarray(executable(rows(2))["y"]), range(8)))
    assert len(executable.why_compiled()) == executable.report.compiled + executable.report.loaded == 1
    assert all(np.array_equal(result, results[0]) for result in results)


def test_outputs_in_tuples_and_none():
    program = ji.trace(lambda p, x: (x, [None, (x.sum(), x[:, 0])]), (), ji.spec("batch 3"))
    assert program.verify().output_axes == (("batch", 3), [None, ((), ("batch",))])
    out = ji.compile(program, buckets={"batch": [2]}, passes=[])(np.ones((2, 3), np.float32))
    assert jax.tree.structure(out) == jax.tree.structure((0, [None, (0, 0)]))
    np.testing.assert_array_equal(out[1][1][1], [1, 1])


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-7], lambda b: b[:60] + bytes([b[60] ^ 1]) + b[61:], lambda b: b"", lambda b: b"x" * 99]
)
def test_a_damaged_entry_is_compiled_again(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    scale = 2.0 + len(damage(bytes(100)))  # one program a case
    make = lambda: ji.compile(scaled(scale), buckets={"batch": [1]})  # noqa: E731
    make()
    (entry,) = (tmp_path / "executables").iterdir()
    good = entry.read_bytes()
    entry.write_bytes(damage(good))
    again = make()
    assert again.report.compiled == 1
    np.testing.assert_allclose(again(rows(1))["y"], dense(PARAMS, rows(1) * scale)["y"], atol=1e-6)
    assert make().report.loaded == 1  # written anew


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    monkeypatch.setattr(cache.Path, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    fresh = ji.compile(scaled(3.5), buckets={"batch": [1]})
    assert fresh(rows(1))["y"].shape == (1, 5)
    assert list((tmp_path / "executables").iterdir()) == []


def test_old_entries_go_first(tmp_path, monkeypatch):
    import os

    monkeypatch.setattr(cache, "_LIMIT", 250)
    for age, name in enumerate(["new", "old", "oldest"]):
        (tmp_path / name).write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    cache._prune(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]
