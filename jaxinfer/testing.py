"""Fakes that we ship: a clock that only moves when told, a replica that computes nothing, and the engine's core driven
by both in virtual time, so that hours of traffic, failures and hangs among it, pass in a second."""

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxinfer.runtime.core import Core
from jaxinfer.runtime.fleet import Kind, Order
from jaxinfer.runtime.replica import Shape
from jaxinfer.runtime.request import Batch, Group, Request


class FakeClock:
    """Seconds that pass only by `advance`.

    >>> clock = FakeClock()
    >>> clock.advance(1.5)
    >>> clock()
    1.5
    """

    def __init__(self, now: float = 0.0):
        self._now = now

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Moves on; never back."""
        if seconds < 0:
            raise ValueError(f"time doesn't go back: {seconds}")
        self._now += seconds


class FakeReplica:
    """A replica (`runtime.replica.Replica`) that only takes its time.

    Args:
        answer: the result of a request's payload; the payload itself by default.
        seconds: how long a batch of a shape takes.
        bad: payloads that make the batch they are in raise ValueError.
        fault: asked before each run with its number, from 0: None, "raise" (the replica fails: OSError) or "hang"
            (the run never ends, until `close`).
        revives: asked at each restart with its number, from 0: whether it succeeds.

    Its `seen` lists the payloads of each batch it ran.
    """

    def __init__(
        self,
        name: str = "fake",
        *,
        answer: Callable[[Any], Any] = lambda payload: payload,
        seconds: Callable[[Shape], float] = lambda shape: 0.0,
        bad: Callable[[Any], bool] = lambda payload: False,
        fault: Callable[[int], str | None] = lambda run: None,
        revives: Callable[[int], bool] = lambda restart: True,
    ):
        self.name = name
        self.seconds, self.fault = seconds, fault
        self.seen: list[list[Any]] = []
        self._answer, self._bad, self._revives = answer, bad, revives
        self._starts, self._runs = itertools.count(-1), itertools.count()
        self._closed = threading.Event()

    def start(self) -> Mapping[Shape, float]:
        """Always succeeds the first time."""
        restart = next(self._starts)
        if restart >= 0 and not self._revives(restart):
            raise OSError(f"{self.name} does not come back")
        self._closed = threading.Event()
        return {}

    def run(self, batch: Batch) -> "FakeBatch":
        """Begins a batch; its outcome is decided now."""
        payloads = [request.payload for request in batch.requests]
        self.seen.append(payloads)
        fault = self.fault(next(self._runs))
        error: Exception | None = None
        if fault == "raise":
            error = OSError(f"{self.name} failed")
        elif any(map(self._bad, payloads)):
            error = ValueError(f"bad payload in a batch of {len(payloads)}")
        closed = self._closed if fault == "hang" else None
        return FakeBatch([self._answer(p) for p in payloads], self.seconds(batch.shape), error, closed)

    def close(self) -> None:
        """Lets those who wait for a hanging run go on."""
        self._closed.set()


class FakeBatch:
    """A batch of a FakeReplica (`runtime.replica.Running`)."""

    def __init__(self, answers: list[Any], seconds: float, error: Exception | None, hangs: threading.Event | None):
        self.seconds, self.error, self.hangs, self._answers = seconds, error, hangs, answers
        self.prepare = 0.0

    def wait(self) -> None:
        """Takes its time, in real seconds."""
        if self.hangs is not None:
            self.hangs.wait()
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error

    def results(self) -> list[Any]:
        """An answer for each request."""
        return self._answers


class Simulation:
    """The engine's core with fake replicas, in virtual time. A replica runs its orders one after another."""

    def __init__(self, core: Core, replicas: Sequence[FakeReplica], clock: FakeClock):
        self.core, self.replicas, self.clock = core, replicas, clock
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Order, FakeBatch | None, Exception | None]] = []
        self._wake: float | None = None
        self._free: dict[tuple[int, int], float] = {}  # (replica, epoch) -> when it has done all its orders
        for replica in replicas:
            replica.start()

    def submit(self, payload: Any, *, after: float | None = None, group: Group | None = None, **more: Any) -> Request:
        """Takes a request in; `after`: its deadline, in seconds from now."""
        deadline = None if after is None else self.clock() + after
        request = Request(payload, group or Group(), deadline=deadline, **more)
        self.core.submit(request, self.clock())
        self.settle()
        return request

    def cancel(self, request: Request) -> bool:
        """Cancels a request that waits."""
        done = request.future.cancel()
        if done:
            self.core.scheduler.discard(request)
        return done

    def advance(self, seconds: float) -> None:
        """Lets time pass, and all happen that falls into it."""
        end = self.clock() + seconds
        while (moment := self.next()) is not None and moment <= end:
            self.clock.advance(max(moment - self.clock(), 0.0))
            self.settle()
        self.clock.advance(end - self.clock())
        self.settle()

    def drain(self, limit: float = 1e6) -> None:
        """Lets time pass until nothing is left to do, as `Engine.close` does.

        Raises:
            AssertionError: something is left, and would be for ever, or after `limit` seconds.
        """
        self.core.draining = True
        end = self.clock() + limit
        self.settle()
        while not self.core.idle:
            moment = self.next()
            assert moment is not None and moment <= end, "the core waits for nothing that will come"
            self.clock.advance(max(moment - self.clock(), 0.0))
            self.settle()

    def next(self) -> float | None:
        """When something happens next."""
        times = [self._wake, self._events[0][0] if self._events else None]
        return min((moment for moment in times if moment is not None), default=None)

    def settle(self) -> None:
        """Lets all happen that is due now."""
        while True:
            while self._events and self._events[0][0] <= self.clock():
                self._finish(*heapq.heappop(self._events)[2:])
            step = self.core.step(self.clock())
            for request, error in step.failed:
                request.resolve(error)
            for order in step.orders:
                self._begin(order)
            self._wake = step.wake
            if not step.orders and not step.failed and not (self._events and self._events[0][0] <= self.clock()):
                return

    def _begin(self, order: Order) -> None:
        replica, seconds = self.replicas[order.member], 0.0
        batch: FakeBatch | None = None
        error: Exception | None = None
        try:
            if order.kind is Kind.RESTART:
                replica.close()
                replica.start()
            else:
                assert order.batch is not None
                batch = replica.run(order.batch)
                seconds, error = batch.seconds, batch.error
        except OSError as failed:
            error = failed
        key = order.member, order.epoch
        self._free[key] = max(self._free.get(key, 0.0), self.clock()) + seconds
        if batch is not None and batch.hangs is not None:
            self._free[key] = float("inf")
        if self._free[key] < float("inf"):
            heapq.heappush(self._events, (self._free[key], next(self._numbers), order, batch, error))

    def _finish(self, order: Order, batch: FakeBatch | None, error: Exception | None) -> None:
        requests = self.core.finished(order, self.clock(), error)
        if batch is not None and order.batch is not None:
            answers = dict(zip(order.batch.requests, batch.results(), strict=True))
            for request in requests:
                request.resolve(answers[request])
