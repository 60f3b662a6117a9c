"""The engine's threads when replicas raise, hang or die: every request ends once, as it should, and nothing is left."""

import random
import threading
import time

import jax
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.runtime.core import Core
from jaxinfer.runtime.loop import Loop
from jaxinfer.runtime.request import Request
from jaxinfer.runtime.router import policy_of
from jaxinfer.runtime.scheduler import Scheduler
from jaxinfer.testing import FakeReplica


def engine_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("jaxinfer-") and "load" not in t.name]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    until = time.monotonic() + 5
    while left := engine_threads():
        assert time.monotonic() < until, left
        time.sleep(0.01)


def loop_of(*replicas, timeout=0.2, max_batch=4, **more):
    options = {"max_batch": max_batch, "max_delay": 0.001, "max_queue": 10_000} | more
    line = Scheduler([1, max_batch] if max_batch > 1 else [1], **options)
    for replica in replicas:
        replica.start()
    return Loop(Core(line, [{} for _ in replicas], policy_of("power_of_two"), step_timeout=timeout), replicas)


def submit(loop, payload, deadline=None):
    request = Request(payload, deadline=None if deadline is None else time.monotonic() + deadline)
    loop.submit(request)
    return request.future


def warm(loop):
    """Every replica has run something, so that the time of a batch is known."""
    for _ in range(20 * len(loop.core.fleet.members)):
        submit(loop, "warm").result(5)
        if all(member.batches for member in loop.core.fleet.members):
            return


def test_random_faults_under_load_from_threads():
    draw, lock, ends = random.Random(0), threading.Lock(), {}

    def fault(run):
        with lock:
            return draw.choices([None, "raise", "hang"], [97, 2, 1])[0] if run > 2 else None

    replicas = [FakeReplica(str(n), seconds=lambda s: 0.0005, bad=lambda p: p % 50 == 7, fault=fault) for n in range(3)]
    loop = loop_of(*replicas)

    def caller(start):
        for number in range(start, start + 200):
            future = submit(loop, number)
            future.add_done_callback(lambda future, number=number: ends.setdefault(number, []).append(future))
            time.sleep(0.0005)

    callers = [threading.Thread(target=caller, args=(200 * n,)) for n in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert loop.close(drain=True, timeout=30)
    for replica in replicas:
        replica.close()  # hanging threads go on
    assert sorted(ends) == list(range(800)) and all(len(futures) == 1 for futures in ends.values())
    lost = 0
    for number, (future,) in ends.items():
        error = future.exception(0)
        if number % 50 == 7:
            assert error is not None
        elif error is None:
            assert future.result() == number
        else:  # three replicas failed under it, or raised twice in a row while it ran alone
            assert isinstance(error, ji.ReplicaError | OSError)
            lost += 1
    assert lost <= 8 and sum(member.failed for member in loop.core.fleet.members) >= 1
    assert loop.core.idle and loop.core.fleet.running() == [] and len(loop.core.scheduler._deadlines) == 0


def test_a_hang_is_survived_and_the_hanging_threads_are_left_behind():
    hanging = FakeReplica("0", fault=lambda run: "hang" if run == 1 else None)
    loop = loop_of(hanging, max_batch=1)
    assert submit(loop, "first").result(5) == "first"
    loop.core.fleet.members[0].costs[(("batch", 1),)] = 0.001
    started = time.monotonic()
    assert submit(loop, "second").result(10) == "second"
    assert 0.2 < time.monotonic() - started < 3  # the watchdog, half a second of back-off, and the restart
    assert loop.close(drain=True, timeout=5)
    hanging.close()


def test_when_the_last_replica_is_gone_nothing_hangs():
    dead = FakeReplica("0", fault=lambda run: "raise" if run else None, revives=lambda restart: False)
    loop = loop_of(dead)
    assert submit(loop, 0).result(5) == 0
    loop.core.fleet.members[0].failures = 4  # two more and it is given up, after 8 s: now at once
    loop.core.fleet.backoff = 0.01
    futures = [submit(loop, n) for n in range(20)]
    started = time.monotonic()
    with pytest.raises(ji.DeadlineExceededError):
        submit(loop, "hurried", deadline=0.1).result(5)
    assert time.monotonic() - started < 2
    for future in futures:
        with pytest.raises(ji.ReplicaError, match="replicas have failed"):
            future.result(20)
    with pytest.raises(ji.ReplicaError, match="all 1 replicas of this engine have failed"):
        submit(loop, "late")
    assert loop.close(drain=True, timeout=5)


def test_a_loop_that_breaks_tells_everyone():
    replica = FakeReplica("0", seconds=lambda shape: 0.05)
    loop = loop_of(replica, max_batch=1)
    running, waiting = submit(loop, "running"), [submit(loop, n) for n in range(3)]
    loop.core._policy = None  # pyright: ignore[reportAttributeAccessIssue]  a bug
    submit(loop, "trigger")
    for future in waiting:
        error = future.exception(5)
        assert error is None or "internal error: the engine's loop ended with TypeError" in str(error)
    assert waiting[-1].exception(0) is not None and running.done()
    with pytest.raises(ji.EngineClosedError):
        submit(loop, "late")
    loop.close(drain=True, timeout=5)


SWITCH = {"mode": "fine", "release": threading.Event()}


def gate(value):
    if SWITCH["mode"] == "raise":
        raise OSError("the device is lost")
    if SWITCH["mode"] == "hang":
        SWITCH["release"].wait(20)
    return np.float32(value)


def gated(params, x, scale):
    return x * jax.pure_callback(gate, jax.ShapeDtypeStruct((), np.float32), scale)


@pytest.fixture
def served():
    SWITCH.update(mode="fine", release=threading.Event())
    program = ji.trace(gated, (), ji.spec("batch 3"), ji.spec(""))
    yield ji.compile(program, buckets={"batch": [1, 4]}, passes=[])
    SWITCH["release"].set()


@pytest.mark.jax_defaults
def test_a_real_replica_that_raises_comes_back(served):
    with ji.Engine(served, max_delay_ms=5) as engine:
        engine.bind(scale=2.0)
        assert engine.submit(np.ones(3, np.float32)).result(10).tolist() == [2, 2, 2]
        SWITCH["mode"] = "raise"
        futures = [engine.submit(np.full(3, n, np.float32)) for n in range(4)]
        until = time.monotonic() + 5
        while engine.stats().replicas[0].quarantined == 0 and time.monotonic() < until:
            time.sleep(0.005)
        assert engine.stats().replicas[0].health != "serving" and not any(f.done() for f in futures)
        SWITCH["mode"] = "fine"
        assert [f.result(10).tolist() for f in futures] == [[2.0 * n] * 3 for n in range(4)]
        stats = engine.stats()
        assert (stats.completed, stats.failed, stats.retried, stats.compiles) == (5, 0, 4, 0)


@pytest.mark.jax_defaults
def test_a_real_replica_that_hangs_is_left_for_another(served):
    with ji.Engine(served, replicas=2, max_delay_ms=1, step_timeout=0.3) as engine:
        engine.bind(scale=3.0)
        list(engine.map(np.ones((20, 3), np.float32)))
        release, SWITCH["mode"] = SWITCH["release"], "hang"
        future = engine.submit(np.ones(3, np.float32))
        time.sleep(0.1)
        SWITCH["mode"] = "fine"
        assert future.result(10).tolist() == [3, 3, 3]
        assert sorted(r.quarantined for r in engine.stats().replicas) == [0, 1]
        release.set()
        until = time.monotonic() + 10
        while [r.health for r in engine.stats().replicas] != ["serving"] * 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert [r.health for r in engine.stats().replicas] == ["serving"] * 2
        assert len(list(engine.map(np.ones((20, 3), np.float32)))) == 20
