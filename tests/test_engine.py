"""ji.Engine on real executables: every request's result is what the forward says of its row alone."""

import asyncio
import itertools
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import forwards
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji

PARAMS = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((12, 5)), jnp.float32)}


def dense(params, x):
    return {"y": jnp.tanh(x @ params["w"]), "norm": jnp.sum(x**2, axis=-1)}


def crawl(params, x):
    """Some 0.07 s a row: a chain of small steps that nothing shortens."""
    return jax.lax.scan(lambda c, _: (jnp.sin(c) + x, None), x, length=1_000_000)[0]


def rows(n, seed=1):
    return np.random.default_rng(seed).standard_normal((n, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def executable():
    return ji.compile(ji.trace(dense, PARAMS, ji.spec("batch 12")), buckets={"batch": [1, 4, 8]})


@pytest.fixture(scope="module")
def slow():
    return ji.compile(ji.trace(crawl, (), ji.spec("batch 12")), buckets={"batch": [1]})


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    until = time.monotonic() + 5
    while left := [t.name for t in threading.enumerate() if t.name.startswith("jaxinfer-") and "load" not in t.name]:
        assert time.monotonic() < until, left
        time.sleep(0.01)


def alone(program, row):
    """The forward itself, under jax.jit, on a batch of this row alone."""
    if not hasattr(program, "jitted"):
        program.jitted = jax.jit(program.function)
    return jax.tree.map(lambda y: np.asarray(y)[0], program.jitted(program.params, *(x[None] for x in row)))


def assert_close(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert isinstance(a, np.ndarray) and a.dtype == b.dtype and a.shape == np.shape(b)
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * max(np.abs(b).max(), 1))


CASES = {
    "resnet": {"batch": [6]},
    "mlp_mixer": {"batch": [1, 4]},
    "gnn": {"batch": [4], "edges": [3, 5]},
    "vit": {"batch": [1, 8]},
    "unet": {"batch": [4]},
    "swin": {"batch": [1, 6]},
    "encoder_decoder": {"batch": [1, 4], "time": [4], "source": [3, 6]},
}
FAST = ("mlp_mixer", "gnn")


@pytest.mark.jax_defaults
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.heavy) for n in CASES])
def test_the_zoo_under_load_from_four_threads(name):
    program = forwards.trace(name)
    served = ji.compile(program, buckets=CASES[name])
    draw, count = np.random.default_rng(0), 24
    others = [
        dict(zip(CASES[name], (1, *sizes), strict=True)) for sizes in itertools.product(*list(CASES[name].values())[1:])
    ]
    requests = [[x[0] for x in forwards.draw(name, others[i % len(others)], draw)] for i in range(count)]
    with ji.Engine(served, max_delay_ms=1) as engine, ThreadPoolExecutor(4) as callers:
        results = list(callers.map(lambda row: engine.submit(*row).result(60), requests))
        stats = engine.stats()
    for row, result in zip(requests, results, strict=True):
        assert_close(result, alone(program, row))
    assert (stats.completed, stats.failed, stats.compiles) == (count, 0, 0)


def test_requests_share_batches_and_keep_their_bucket(executable):
    want = jax.tree.map(np.asarray, dense(PARAMS, rows(19)))
    with ji.Engine(executable, max_delay_ms=200) as engine:
        started = time.monotonic()
        futures = [engine.submit(row) for row in rows(19)]
        for number, future in enumerate(futures):
            assert_close(future.result(10), {name: values[number] for name, values in want.items()})
        stats = engine.stats()
    assert 0.1 < time.monotonic() - started < 2  # the last three waited for company
    assert 3 <= stats.batches <= 5 and stats.compiles == 0 and stats.completed == 19
    assert stats.occupancy == pytest.approx(19 / 8 / stats.batches)


def pooled(params, tokens, mask):
    """float32[batch 8], and each token's own float32[batch time 8]"""
    hidden = jnp.tanh(params["embed"][tokens])
    real = (mask > 0).astype(jnp.float32)
    return jnp.einsum("bt,btd->bd", real, hidden) / (1 + real.sum(-1, keepdims=True)), hidden


def test_lengths_are_grouped_by_bucket_and_masked_padding_changes_nothing():
    draw = np.random.default_rng(0)
    params = {"embed": draw.standard_normal((50, 8)).astype(np.float32)}
    program = ji.trace(pooled, params, *[ji.spec("batch time", "int32")] * 2)
    served = ji.compile(program, buckets={"batch": [1, 4], "time": [4, 8]}, masked=("time",))
    requests = [(draw.integers(0, 50, n).astype(np.int32), np.ones(n, np.int32)) for n in draw.integers(1, 9, 30)]
    with ji.Engine(served, max_delay_ms=20) as engine:
        results = [f.result(30) for f in [engine.submit(*row) for row in requests]]
        stats = engine.stats()
        with pytest.raises(ji.RequestError, match="time of 9 is over the largest bucket, 8"):
            engine.submit(np.zeros(9, np.int32), np.ones(9, np.int32))
    for (tokens, _), (vector, hidden) in zip(requests, results, strict=True):
        want = np.tanh(params["embed"][tokens])
        np.testing.assert_allclose(hidden, want, atol=1e-5)  # its own length, not the bucket's
        np.testing.assert_allclose(vector, want.sum(0) / (1 + len(want)), atol=1e-5)
    assert stats.compiles == 0 and stats.batches < 20
    assert set(stats.replicas[0].step_ms) == {f"batch {b} time {t}" for b in (1, 4) for t in (4, 8)}
    real = sum(len(tokens) for tokens, _ in requests)
    assert 1 - real / (8 * 4 * stats.batches) >= stats.padding >= 1 - real / (30 * 4)


@pytest.mark.heavy
def test_minilm_gives_every_text_its_vector():
    encoder = ji.load("all-minilm-l6-v2")
    text = "the river turns a wheel in winter and carries the mill's stones past two old bridges"
    texts = [text[i % 7 : i % 7 + 5 + 4 * (i % 19)] for i in range(60)]
    buckets = {"batch": [1, 8], "length": [16, 32]}
    served = ji.compile(encoder.program, buckets=buckets, masked=("length",))
    tokens = [np.array(ids, np.int32) for ids in encoder.tokenizer.encode_batch(texts)]
    with ji.Engine(served, replicas=2) as engine:
        vectors = np.stack(list(engine.map((ids, np.ones_like(ids)) for ids in tokens)))
        stats = engine.stats()
    np.testing.assert_allclose(vectors, encoder.embed(texts), rtol=0, atol=2e-6)
    assert stats.compiles == 0 and stats.completed == 60


def test_a_size_that_cannot_be_padded_is_refused_at_submit():
    program = ji.trace(lambda p, x: jax.nn.softmax(x, axis=1), (), ji.spec("batch time"))
    served = ji.compile(program, buckets={"batch": [1, 4], "time": [4, 8]})
    with ji.Engine(served) as engine:
        np.testing.assert_allclose(engine.submit(np.zeros(8, np.float32)).result(10), np.full(8, 1 / 8), rtol=1e-6)
        with pytest.raises(ji.BatchMixingError, match=r"time of 3 is none of the buckets"):
            engine.submit(np.zeros(3, np.float32))


@pytest.mark.jax_defaults
def test_rows_that_mix_are_refused_unless_each_runs_by_itself():
    program = ji.trace(lambda p, x: x - x.mean(axis=0), (), ji.spec("batch 12"))
    served = ji.compile(program, buckets={"batch": [1, 4]})
    with pytest.raises(ji.BatchMixingError, match=r"can't share batches(.|\n)*With max_batch=1"):
        ji.Engine(served)
    with ji.Engine(served, max_batch=1) as engine:
        for result in engine.map(rows(5)):
            np.testing.assert_array_equal(result, np.zeros(12))
    with pytest.raises(ji.BatchMixingError, match="needs a bucket of 1"):
        ji.Engine(ji.compile(program, buckets={"batch": [4]}), max_batch=1)


@pytest.mark.jax_defaults
def test_a_forward_that_mixes_rows_at_one_size_only_is_refused():
    def moody(params, x):
        return x - x.mean(axis=0) if x.shape[0] == 2 else x

    program = ji.trace(moody, (), ji.spec("batch 12"))
    for warmup in (True, False):
        served = ji.compile(program, buckets={"batch": [1, 2, 8]}, ahead=warmup)
        if warmup:
            with pytest.raises(ji.BatchMixingError, match="can't share a batch of 2"):
                ji.Engine(served)
            continue
        with ji.Engine(served, warmup=False, max_delay_ms=50) as engine:
            futures = [engine.submit(row) for row in rows(2)]
            for future, row in zip(futures, rows(2), strict=True):
                np.testing.assert_array_equal(future.result(10), row)  # each by itself


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((np.zeros(11, np.float32),), r"12 should be 12, got 11"),
        ((np.zeros((1, 12), np.float32),), r"float32\[12\], without a batch dim; got float32\[1, 12\]"),
        ((np.zeros(12, np.int32),), r"without a batch dim; got int32\[12\]"),
        ((np.zeros(12, np.float32),) * 2, r"is float32\[12\], got float32\[12\], float32\[12\]"),
        (({"x": np.zeros(12)},), "got"),
        ((["a"] * 12,), "got"),
        ((), "got nothing"),
    ],
)
def test_what_does_not_fit_is_refused_at_submit(executable, row, message):
    with ji.Engine(executable) as engine:
        with pytest.raises(ji.RequestError, match=message):
            engine.submit(*row)
        for fine in (rows(1)[0], rows(1)[0].astype(np.float64), rows(1)[0].tolist(), jnp.asarray(rows(1)[0])):
            assert engine.submit(fine).result(10)["y"].shape == (5,)
        assert engine.stats().submitted == 4


def test_integers_that_would_wrap_are_refused():
    served = ji.compile(ji.trace(lambda p, x: x + 1, (), ji.spec("batch 2", "int32")), buckets={"batch": [1]})
    with ji.Engine(served) as engine:
        assert engine.submit(np.array([1, 2**31 - 2])).result(10).tolist() == [2, 2**31 - 1]
        with pytest.raises(ji.RequestError, match="integers from 1 to 4294967297 don't fit int32"):
            engine.submit(np.array([1, 2**32 + 1]))


def test_nan_stays_with_the_row_that_made_it(executable):
    given = rows(8)
    given[3, 0] = np.nan
    given[5, 1] = np.inf
    with ji.Engine(executable, max_delay_ms=50) as engine:
        results = [f.result(10) for f in [engine.submit(row) for row in given]]
    assert [bool(np.isfinite(r["norm"])) for r in results] == [i not in (3, 5) for i in range(8)]
    with ji.Engine(executable, max_delay_ms=50, check_finite=True) as engine:
        futures = [engine.submit(row) for row in given]
        for number, future in enumerate(futures):
            if number in (3, 5):
                with pytest.raises(ji.NonFiniteError, match=r"[15] of the [15] numbers of output [01] are NaN or inf"):
                    future.result(10)
            else:
                assert future.result(10)["y"].tobytes() == results[number]["y"].tobytes()
        assert engine.stats().failed == 2 and engine.stats().retried == 0


def test_callers_own_what_they_give_and_get(executable):
    with ji.Engine(executable, max_delay_ms=100) as engine:
        row = rows(1)[0]
        first = engine.submit(row)
        row[:] = 0
        second = engine.submit(row)
        assert first.result(10)["norm"] == pytest.approx((rows(1)[0] ** 2).sum()) and second.result(10)["norm"] == 0
        y = first.result()["y"]
        assert y.base is None and y.flags.writeable  # holds no neighbour's memory
        y[:] = 9
        np.testing.assert_array_equal(second.result()["y"], np.zeros(5))


def test_outputs_that_are_the_inputs_survive_the_next_batches():
    served = ji.compile(ji.trace(lambda p, x: (x, x + 1), (), ji.spec("batch 64 64")), buckets={"batch": [4]})
    images = np.random.default_rng(0).standard_normal((40, 64, 64)).astype(np.float32)
    with ji.Engine(served) as engine:
        for image, (same, more) in zip(images, engine.map(images), strict=True):
            np.testing.assert_array_equal(same, image)
            np.testing.assert_array_equal(more, image + 1)


def scaled(params, x, scale, shift):
    return x * scale + shift["by"]


@pytest.mark.jax_defaults
def test_bind_gives_the_inputs_without_a_batch_dim():
    specs = ji.spec("batch 3"), ji.spec(""), {"by": ji.spec("3")}
    served = ji.compile(ji.trace(scaled, (), *specs), buckets={"batch": [1, 4]})
    with ji.Engine(served, max_delay_ms=100) as engine:
        with pytest.raises(ji.RequestError, match=r"bind\(scale=..., by=...\) comes before the first request"):
            engine.submit(np.ones(3, np.float32))
        with pytest.raises(ji.RequestError, match=r"by .* has no value yet"):
            engine.bind(scale=2.0)
        with pytest.raises(ji.RequestError, match=r"has the shared inputs \['by', 'scale'\]"):
            engine.bind(size=2.0)
        with pytest.raises(ji.RequestError, match=r"bind\(by=...\): float32\[3\] is wanted, got 3 of 2"):
            engine.bind(scale=2.0, by=np.zeros(2, np.float32))
        engine.bind(scale=2.0, by=np.arange(3, dtype=np.float32))
        before = engine.submit(np.ones(3, np.float32))
        after = engine.bind(scale=10.0).submit(np.ones(3, np.float32))
        assert before.result(10).tolist() == [2, 3, 4] and after.result(10).tolist() == [10, 11, 12]
        assert engine.stats().compiles == 0
    plain = ji.compile(ji.trace(dense, PARAMS, ji.spec("batch 12")), buckets={"batch": [1]})
    with ji.Engine(plain) as engine, pytest.raises(ji.RequestError, match="has no inputs without a batch dim"):
        engine.bind(scale=1.0)


@pytest.mark.jax_defaults
def test_a_bound_table_with_a_dim_of_its_own_is_padded_once():
    def attend(params, query, keys, mask):
        scores = jnp.where(mask > 0, query @ keys.T, -jnp.inf)
        return jax.nn.softmax(scores, axis=-1) @ keys

    specs = ji.spec("batch 4"), ji.spec("items 4"), ji.spec("items")
    served = ji.compile(ji.trace(attend, (), *specs), buckets={"batch": [1, 4], "items": [8]}, masked=("items",))
    draw = np.random.default_rng(0)
    keys, queries = draw.standard_normal((5, 4)).astype(np.float32), draw.standard_normal((6, 4)).astype(np.float32)
    with ji.Engine(served) as engine:
        engine.bind(keys=keys, mask=np.ones(5, np.float32))
        want = np.asarray(attend((), queries, keys, np.ones(5, np.float32)))
        np.testing.assert_allclose(np.stack(list(engine.map(queries))), want, rtol=1e-5)


def test_map_keeps_order_takes_rows_as_results_are_taken_and_draws_a_bar(executable, capsys):
    taken = []

    def source():
        for number, row in enumerate(rows(400)):
            taken.append(number)
            yield row

    with ji.Engine(executable, max_queue=10) as engine:
        results = engine.map(source())
        assert taken == []
        first = next(results)
        assert len(taken) <= 40  # four batches of eight, whatever the length of the source
        want = np.asarray(dense(PARAMS, rows(400))["norm"])
        norms = [first["norm"], *(r["norm"] for r in results)]
        np.testing.assert_allclose(np.stack(norms), want, rtol=1e-5)
        assert capsys.readouterr().err == ""
        assert len(list(engine.map(rows(20), progress=True))) == 20
        assert "20/20" in capsys.readouterr().err


def test_map_stops_at_a_bad_row_and_cancels_the_rest(slow):
    with ji.Engine(slow, max_batch=1) as engine:
        results = engine.map([*rows(2), rows(1)[0][:3], *rows(9)])
        with pytest.raises(ji.RequestError, match="12 should be 12, got 3"):
            list(results)
        dropped = engine.map(rows(30))
        next(dropped)
        dropped.close()
        assert engine.stats().cancelled >= 1
        assert engine.stats().submitted < 10


def test_a_full_queue_refuses_and_map_waits_for_room(slow):
    with ji.Engine(slow, max_batch=1, max_queue=2) as engine:
        accepted = []
        with pytest.raises(ji.QueueFullError, match="max_queue is 2"):
            for row in rows(20):
                accepted.append(engine.submit(row))
        assert 2 <= len(accepted) <= 5
        assert len(list(engine.map(rows(4)))) == 4
        assert all(f.done() for f in accepted)


def test_cancelling_a_future_that_waits(slow):
    with ji.Engine(slow, max_batch=1) as engine:
        futures = [engine.submit(row) for row in rows(6)]
        assert futures[5].cancel() and futures[4].cancel()
        time.sleep(0.02)
        assert not futures[0].cancel()  # runs
        assert engine.stats().queued <= 2 and engine.stats().cancelled == 2
        with pytest.raises(CancelledError):
            futures[5].result(0)
        assert all(f.result(20).shape == (12,) for f in futures[:4])
        assert engine.stats().completed == 4


def test_deadlines_hold_for_requests_that_wait_and_that_run(slow):
    with ji.Engine(slow, max_batch=1) as engine:
        running, waiting = engine.submit(rows(1)[0], deadline=0.02), engine.submit(rows(1)[0], deadline=0.03)
        others = [engine.submit(row) for row in rows(3)]
        started = time.monotonic()
        for future in (running, waiting):
            with pytest.raises(ji.DeadlineExceededError, match=r"s passed: it was (running|still waiting) after"):
                future.result(10)
        assert time.monotonic() - started < 0.2  # not by waiting for the device
        assert all(f.result(20).shape == (12,) for f in others)
        assert engine.submit(rows(1)[0], deadline=1e15).result(20).shape == (12,)
        for bad in (-1.0, float("nan"), "soon"):
            with pytest.raises(ji.RequestError, match="deadline should be a number"):
                engine.submit(rows(1)[0], deadline=bad)


def test_priority_goes_first(slow):
    order = []
    with ji.Engine(slow, max_batch=1) as engine:
        futures = [engine.submit(rows(1)[0]) for _ in range(3)]
        for name, priority in (("low", -5), ("none", 0), ("high", 5)):
            futures.append(engine.submit(rows(1)[0], priority=priority))
            futures[-1].add_done_callback(lambda _, name=name: order.append(name))
        for future in futures:
            future.result(20)
        with pytest.raises(ji.RequestError, match="priority should be an integer from -100 to 100, got 101"):
            engine.submit(rows(1)[0], priority=101)
    assert order == ["high", "none", "low"]


def test_asubmit_and_cancelling_what_is_awaited(slow):
    async def main(engine):
        tasks = [asyncio.create_task(engine.asubmit(row)) for row in rows(6)]
        await asyncio.sleep(0.01)
        tasks[5].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(done[5], asyncio.CancelledError)
        with pytest.raises(ji.RequestError):
            await engine.asubmit(np.zeros(3, np.float32))
        return done[:5]

    with ji.Engine(slow, max_batch=1) as engine:
        results = asyncio.run(main(engine))
        assert engine.stats().cancelled == 1
    want = jax.jit(crawl)((), rows(6))
    for result, expected in zip(results, np.asarray(want), strict=False):
        np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-3)


def test_deterministic_bits_do_not_depend_on_company(executable):
    with ji.Engine(executable, deterministic=True, max_batch=8, max_delay_ms=20) as engine:
        alone_ = [engine.submit(row).result(10)["y"] for row in rows(8)]
        together = [f.result(10)["y"] for f in [engine.submit(row) for row in rows(8)[::-1]]][::-1]
        stats = engine.stats()
    assert [a.tobytes() for a in alone_] == [b.tobytes() for b in together]
    assert set(stats.replicas[0].step_ms) == {"batch 8"}
    assert stats.padding == pytest.approx(1 - 16 / (8 * stats.batches))


def test_replicas_run_on_devices_of_their_own_without_compiling_again(executable):
    before = executable.compile_count
    with ji.Engine(executable, replicas=3, router="round_robin", max_delay_ms=0) as engine:
        assert executable.compile_count == before  # machine code was taken over
        results = list(engine.map(rows(200)))
        stats = engine.stats()
    np.testing.assert_allclose([r["norm"] for r in results], (rows(200) ** 2).sum(-1), rtol=1e-5)
    assert [r.name for r in stats.replicas] == ["cpu:0", "cpu:1", "cpu:2"]
    assert (
        stats.compiles == 0 and all(r.rows > 10 for r in stats.replicas) and sum(r.rows for r in stats.replicas) == 200
    )


def test_an_executable_on_another_device(executable):
    device = jax.local_devices()[2]
    moved = executable.on(device)
    before = moved.compile_count
    out = moved(rows(3))
    assert out["y"].devices() == {device} and {d for p in moved.params for d in p.devices()} == {device}
    np.testing.assert_allclose(out["y"], executable(rows(3))["y"], rtol=1e-6)
    assert moved.compile_count == before and moved.report.compiled == 0 and moved.report.loaded == 1
    assert {made.origin for made in moved.why_compiled()} == {"another device"}
    again = moved.on(jax.local_devices()[1])
    np.testing.assert_array_equal(again(rows(3))["y"], out["y"])


def test_devices_are_taken_in_turn_and_share_weights(executable):
    one, two = jax.local_devices()[3:5]
    with ji.Engine(executable, replicas=3, devices=[one, two]) as engine:
        assert [r.name for r in engine.stats().replicas] == ["cpu:3", "cpu:4", "cpu:3"]
        assert len(list(engine.map(rows(50)))) == 50


def test_a_bundle_is_served_without_the_code_that_made_it(executable, tmp_path):
    executable.save(tmp_path / "bundle")
    loaded = ji.Executable.load(tmp_path / "bundle")
    with ji.Engine(loaded, replicas=2) as engine:
        norms = [r["norm"] for r in engine.map(rows(30))]
        assert engine.stats().compiles == 0
    np.testing.assert_allclose(norms, (rows(30) ** 2).sum(-1), rtol=1e-5)


def test_without_warm_up_a_bucket_is_compiled_when_it_is_met():
    program = ji.trace(lambda p, x: dense(p, x * 1.75), PARAMS, ji.spec("batch 12"))
    served = ji.compile(program, buckets={"batch": [1, 4]}, ahead=False)
    with ji.Engine(served, warmup=False) as engine:
        assert served.why_compiled() == ()
        engine.submit(rows(1)[0]).result(30)
        assert {made.bucket["batch"] for made in served.why_compiled()} == {1}


def test_close_drains_or_cancels_and_takes_nothing_more(slow):
    drained = ji.Engine(slow, max_batch=1)
    futures = [drained.submit(row) for row in rows(3)]
    assert drained.close() is True and all(f.done() and f.result().shape == (12,) for f in futures)
    with pytest.raises(ji.EngineClosedError, match="is closed"):
        drained.submit(rows(1)[0])
    assert drained.close() is True
    hurried = ji.Engine(slow, max_batch=1)
    futures = [hurried.submit(row) for row in rows(9)]
    while not futures[0].running():
        time.sleep(0.001)
    assert hurried.close(drain=False) is True
    assert {f.cancelled() for f in futures} == {True, False} and all(f.done() for f in futures)
    with pytest.raises(ZeroDivisionError), ji.Engine(slow, max_batch=1) as engine:
        futures = [engine.submit(row) for row in rows(9)]
        1 / 0  # noqa: B018
    assert futures[8].cancelled()


def test_close_from_a_callback_and_within_a_timeout(slow):
    engine, closed = ji.Engine(slow, max_batch=1), threading.Event()
    futures = [engine.submit(row) for row in rows(4)]
    futures[0].add_done_callback(lambda _: (engine.close(), closed.set()))
    assert closed.wait(10) and not futures[3].done()  # it can't wait for the thread that it is in
    assert all(f.result(20).shape == (12,) for f in futures)
    assert engine.close() is True
    late = ji.Engine(slow, max_batch=1)
    futures = [late.submit(row) for row in rows(9)]
    assert late.close(timeout=0.05) is False
    assert any(f.cancelled() for f in futures)
    assert late.close(timeout=20) is True and all(f.done() for f in futures)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": 0}, "replicas should be an integer of at least 1, got 0"),
        ({"replicas": 2.0}, "replicas should be an integer"),
        ({"workers": "process"}, "workers='process' is not available"),
        ({"workers": "fork"}, "workers should be 'thread', got 'fork'"),
        ({"devices": []}, "devices is empty"),
        ({"max_delay_ms": -1}, "max_delay_ms should be a number of at least 0, got -1"),
        ({"max_delay_ms": float("inf")}, "max_delay_ms should be"),
        ({"max_batch": 9}, "max_batch should be an integer from 1 to 8, got 9"),
        ({"max_batch": True}, "max_batch should be"),
        ({"max_queue": 0}, "max_queue should be"),
        ({"router": "random"}, "router should be one of"),
        ({"router": "session"}, "caches nothing between requests"),
        ({"step_timeout": 0}, "step_timeout should be"),
        ({"deterministic": 1}, "deterministic should be True or False, got 1"),
    ],
)
def test_options_out_of_range(executable, options, message):
    with pytest.raises(ji.RequestError, match=message):
        ji.Engine(executable, **options)


def test_unknown_options_and_models_are_refused(executable):
    with pytest.raises(TypeError, match="slots"):
        ji.Engine(executable, slots=4)  # pyright: ignore[reportCallIssue]
    for model in (dense, {"a": executable}, ji.trace(dense, PARAMS, ji.spec("batch 12"))):
        with pytest.raises(ji.RequestError, match=r"Engine serves an Executable, made by ji\.compile"):
            ji.Engine(model)  # pyright: ignore[reportArgumentType]
    program = ji.trace(lambda p, x: x, (), ji.spec("rows 12"))
    with pytest.raises(ji.TraceError, match="no dim named 'batch'"):
        ji.Engine(ji.compile(program, buckets={"rows": [1]}))


def test_stats_print(executable):
    with ji.Engine(executable) as engine:
        assert "0 completed" in str(engine.stats())
        list(engine.map(rows(40)))
        text = str(engine.stats())
    assert "40 completed, 0 failed" in text and "cpu:0: serving" in text and "batch 8" in text


def test_host_work_overlaps_device_work(slow):
    """While one batch runs the next is prepared and in the device's queue, so that it begins at once."""
    with ji.Engine(slow, max_batch=1) as engine:
        futures = [engine.submit(row) for row in rows(5)]
        while engine.stats().replicas[0].outstanding < 2:
            time.sleep(0.001)
        assert not futures[0].done()
        assert futures[4].result(20).shape == (12,)
