"""What `engine.stats()` tells."""

import math
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxinfer.runtime.core import Core
from jaxinfer.runtime.fleet import Kind, Order
from jaxinfer.runtime.request import Request

_KEPT = 4096  # requests that percentiles and rates are of


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds of the last 4,096 requests; NaN before there are any."""

    p50: float = math.nan
    p90: float = math.nan
    p99: float = math.nan

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Percentiles":
        return cls(*(1e3 * np.percentile(seconds, (50, 90, 99))).tolist()) if seconds else cls()

    def __str__(self) -> str:
        return f"p50 {self.p50:.2f} ms, p90 {self.p90:.2f} ms, p99 {self.p99:.2f} ms"


@dataclass(frozen=True)
class ReplicaStats:
    """One replica."""

    name: str
    health: str  # fleet.Health
    batches: int  # done
    rows: int
    outstanding: int  # batches that it has now
    busy: float  # share of the engine's life that it ran batches
    step_ms: Mapping[str, float]  # measured time of a batch, by bucket; moving averages
    quarantined: int  # times that it was taken out of service


@dataclass(frozen=True)
class EngineStats:
    """A snapshot. Counts are since the engine was made."""

    queued: int
    running: int
    submitted: int
    completed: int
    failed: int  # with an error, deadlines among them
    cancelled: int
    retried: int  # put in line again, since a batch raised or a replica failed
    batches: int
    occupancy: float  # rows a batch, as a share of max_batch
    padding: float  # share of what was computed that was padding, in rows and other named dims
    rows_per_s: float  # over the last 4,096 requests
    latency: Percentiles  # from submit until the device was done
    queueing: Percentiles  # from submit until a replica got it
    compiles: int  # by XLA in this process since the engine was ready
    replicas: tuple[ReplicaStats, ...] = field(default=())

    def __str__(self) -> str:
        lines = [
            f"{self.completed} completed, {self.failed} failed, {self.cancelled} cancelled, {self.retried} retried; "
            f"{self.queued} queued, {self.running} running; {self.rows_per_s:.1f} rows/s",
            f"latency {self.latency}; queueing {self.queueing}",
            f"{self.batches} batches, {self.occupancy:.0%} full, {self.padding:.0%} padding; {self.compiles} compiles",
        ]
        for r in self.replicas:
            steps = ", ".join(f"{shape} {ms:.2f} ms" for shape, ms in r.step_ms.items())
            lines.append(f"{r.name}: {r.health}, {r.batches} batches, {r.rows} rows, {r.busy:.0%} busy; {steps}")
        return "\n".join(lines)


class Meter:
    """Counts what happens. Its methods may be called by any thread."""

    def __init__(self) -> None:
        self.submitted = self.completed = self.failed = self.cancelled = 0
        self._batches = self._rows = 0
        self._real = self._computed = 0  # elements of the named dims
        self._latency: deque[float] = deque(maxlen=_KEPT)
        self._queueing: deque[float] = deque(maxlen=_KEPT)
        self._times: deque[float] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()

    def started(self, orders: Sequence[Order]) -> None:
        """Batches went to replicas."""
        with self._lock:
            for order in orders:
                if order.kind is not Kind.RUN or order.batch is None:
                    continue
                self._batches += 1
                self._rows += len(order.batch.requests)
                self._real += sum(request.volume for request in order.batch.requests)
                self._computed += math.prod(size for _, size in order.batch.shape)
                self._queueing.extend(order.given - request.arrival for request in order.batch.requests)

    def delivered(self, requests: Sequence[Request], results: Mapping[Request, Any], now: float) -> None:
        """Requests got their results."""
        with self._lock:
            for request in requests:
                if isinstance(results[request], BaseException):
                    self.failed += 1
                    continue
                self.completed += 1
                self._latency.append(now - request.arrival)
                self._times.append(now)

    def missed(self, count: int) -> None:
        """Requests failed without a result."""
        with self._lock:
            self.failed += count

    def summary(self, core: Core, names: Sequence[str], age: float, compiles: int) -> EngineStats:
        """Everything, with what the core knows. The caller holds the core's lock."""
        with self._lock:
            span = self._times[-1] - self._times[0] if len(self._times) > 1 else 0.0
            return EngineStats(
                queued=len(core.scheduler),
                running=len(core.fleet.running()),
                submitted=self.submitted,
                completed=self.completed,
                failed=self.failed,
                cancelled=self.cancelled,
                retried=core.retried,
                batches=self._batches,
                occupancy=self._rows / max(self._batches * core.scheduler.max_batch, 1),
                padding=1 - self._real / max(self._computed, 1) if self._computed else 0.0,
                rows_per_s=(len(self._times) - 1) / span if span else math.nan,
                latency=Percentiles.of(self._latency),
                queueing=Percentiles.of(self._queueing),
                compiles=compiles,
                replicas=tuple(
                    ReplicaStats(
                        name,
                        member.health.value,
                        member.batches,
                        member.rows,
                        len(member.orders),
                        member.busy / max(age, 1e-9),
                        {_label(shape): 1e3 * seconds for shape, seconds in sorted(member.costs.items())},
                        member.failed,
                    )
                    for name, member in zip(names, core.fleet.members, strict=True)
                ),
            )


def _label(shape: Sequence[tuple[str, int]]) -> str:
    return " ".join(f"{name} {size}" for name, size in shape)
