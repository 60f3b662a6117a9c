"""Engine: serves an Executable to many callers at once. See `loop` for the life of a request."""

import asyncio
import atexit
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from jaxinfer import _jax
from jaxinfer.errors import RequestError
from jaxinfer.executable import Executable
from jaxinfer.runtime.batcher import Rows, Shared
from jaxinfer.runtime.checks import check_executable, check_rows, check_workers, flag, number, places, shapes, whole
from jaxinfer.runtime.core import Core
from jaxinfer.runtime.device_replica import DeviceReplica
from jaxinfer.runtime.fleet import DEPTH
from jaxinfer.runtime.loop import Loop
from jaxinfer.runtime.mapping import ordered
from jaxinfer.runtime.request import Group, Request
from jaxinfer.runtime.router import policy_of
from jaxinfer.runtime.scheduler import Scheduler
from jaxinfer.runtime.stats import EngineStats

MAX_PRIORITY = 100


class Engine:
    """Serves an Executable: requests of one row each, batched as they come, on one or more devices.

        with ji.Engine(executable) as engine:
            future = engine.submit(image)           # one row, without the batch dim
            results = list(engine.map(images))      # many, in order

    Requests share a batch only where the forward provably keeps rows apart. One that is refused, cancelled, too late or
    makes the executable raise does so alone. NaN and infinity are results like any others, delivered to the row that
    made them and to no other, unless `check_finite` says that they are errors. Nothing is compiled once it is made.

    Args:
        executable: from `ji.compile`, with a named dim "batch" whose rows don't mix.
        replicas: copies, over `devices` in turn; those on one device share its weights.
        workers: "thread": replicas are threads of this process.
        devices: where to run; the executable's own device first and then others of its kind, if not given.
        max_delay_ms: how long a request waits for company while a replica is free.
        max_batch: most rows in a batch; the largest bucket if not given. With 1 every request runs by itself, and the
            forward's rows may mix.
        max_queue: most requests that wait; `submit` refuses more.
        router: which replica takes a batch: "power_of_two", "least_outstanding" or "round_robin" (`runtime.router`).
        warmup: make every bucket ready and time it before the first request is taken. False compiles what is met.
        deterministic: all batches are padded to one size, so that a row's bits don't depend on its company; this is
            checked at the start, and `stats().padding` tells what it costs.
        check_finite: a row with NaN or infinity in its outputs fails with NonFiniteError.
        step_timeout: seconds that a batch may run before its replica is taken to hang and its rows run elsewhere.

    Raises:
        RequestError: an option out of range, or something else than an Executable.
        BatchMixingError: rows of the batch influence each other; names the equation.
        TraceError: no named dim "batch".
    """

    def __init__(
        self,
        executable: Executable,
        *,
        replicas: int = 1,
        workers: str = "thread",
        devices: Sequence[Any] | None = None,
        max_delay_ms: float = 2.0,
        max_batch: int | None = None,
        max_queue: int = 1024,
        router: str = "power_of_two",
        warmup: bool = True,
        deterministic: bool = False,
        check_finite: bool = False,
        step_timeout: float = 60.0,
    ):
        check_executable(executable)
        check_workers(workers)
        policy = policy_of(router)
        ladder = executable.buckets["batch"]
        most = ladder[-1] if max_batch is None else whole("max_batch", max_batch, 1, ladder[-1])
        check_rows(executable, most)
        sizes = [size for size in ladder if size < most] + [min(size for size in ladder if size >= most)]
        sizes = sizes[-1:] if deterministic else sizes
        number("max_delay_ms", max_delay_ms, 0.0)
        number("step_timeout", step_timeout, 1e-3)
        whole("max_queue", max_queue, 1)
        given = places(executable, whole("replicas", replicas, 1), devices)
        flags: dict[str, Any] = {"warmup": warmup, "positions": deterministic, "check_finite": check_finite}
        for name, value in flags.items():
            flag("deterministic" if name == "positions" else name, value)

        self._executable, self._rows = executable, Rows(executable)
        self._bucket_of = lru_cache(1 << 14)(self._bucket)
        self._shared: Shared | None = None if self._rows.shared else Shared()
        every = shapes(executable, sizes)
        self._replicas = [DeviceReplica(executable, device, self._rows, every, **flags) for device in given]
        costs = _started(self._replicas)
        self._compiles, self._made = _jax.compiles(), time.monotonic()
        self._window = 2 * DEPTH * most * replicas  # rows that map() is ahead: what the replicas have, and as many more
        scheduler = Scheduler(sizes, max_batch=most, max_delay=max_delay_ms / 1e3, max_queue=max_queue)
        core = Core(scheduler, costs, policy, step_timeout=step_timeout)
        self._loop = Loop(core, self._replicas)
        atexit.register(self.close, drain=False, timeout=5.0)

    def submit(self, *row: Any, priority: int = 0, deadline: float | None = None) -> "Future[Any]":
        """Takes one request.

        Args:
            row: one pytree of arrays an input, as the specs say, without the batch dim and without inputs that have
                none (`bind` them). They are copied.
            priority: from -100 to 100; a step up is worth a second of waiting, so that nobody waits for ever.
            deadline: seconds from now until the request fails, waiting or running.

        Returns: a Future of the forward's outputs for this row: numpy arrays, the caller's own. It can be cancelled
            while the request waits.

        Raises:
            RequestError: inputs that don't fit the specs, or sizes over the largest bucket.
            BatchMixingError: a size that is no bucket, along a dim that can't be padded.
            QueueFullError: `max_queue` requests wait.
            ReplicaError: every replica has failed for good.
            EngineClosedError: the engine was closed.
        """
        return self._submit(row, priority, deadline, wait=False)

    async def asubmit(self, *row: Any, priority: int = 0, deadline: float | None = None) -> Any:
        """`submit`, awaited. Cancelling the await cancels the request, if it still waits."""
        return await asyncio.wrap_future(self.submit(*row, priority=priority, deadline=deadline))

    def map(
        self, rows: Iterable[Any], *, priority: int = 0, deadline: float | None = None, progress: bool = False
    ) -> Iterator[Any]:
        """The results of many rows, in their order.

        Lazy: rows are taken as results are, a few batches ahead, and wait for room in the queue.

        Args:
            rows: an iterable of rows: of arrays (or pytrees) where the forward has one input with a batch dim, else of
                tuples of them. An array [n, ...] is one.
            priority, deadline: of each row, as in `submit`.
            progress: draw a bar on stderr.

        Raises:
            What the first row that fails raised; later rows are cancelled.
        """

        def one(row: Any) -> "Future[Any]":
            given = (row,) if self._rows.inputs == 1 else tuple(row)
            return self._submit(given, priority, deadline, wait=True)

        return ordered(one, rows, self._window, progress)

    def bind(self, **shared: Any) -> "Engine":
        """Sets inputs without a batch dim, by name: their key in the specs, or else the forward's parameter. Requests
        submitted from now on see these values; those before them keep the old ones. Returns the engine.

        Raises:
            RequestError: an unknown name, another shape or dtype, or one that is still without a value.
        """
        self._shared = self._rows.bound(self._shared, shared)
        self._bucket_of.cache_clear()  # it holds what was bound before
        return self

    def stats(self) -> EngineStats:
        """A snapshot of counts, latencies and replicas; prints as a few lines."""
        names = [replica.name for replica in self._replicas]
        return self._loop.stats(names, time.monotonic() - self._made, _jax.compiles() - self._compiles)

    def close(self, *, drain: bool = True, timeout: float | None = None) -> bool:
        """Takes no more requests, and returns when those that wait have run; `drain=False` cancels them. A second call
        does nothing. Returns False if `timeout` seconds were not enough: the rest is then cancelled."""
        atexit.unregister(self.close)
        return self._loop.close(drain=drain, timeout=timeout)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self.close(drain=kind is None)

    def _submit(self, given: tuple[Any, ...], priority: int, deadline: float | None, *, wait: bool) -> "Future[Any]":
        whole("priority", priority, -MAX_PRIORITY, MAX_PRIORITY)
        if deadline is not None:
            deadline = time.monotonic() + number("deadline", deadline, 0.0)
        shared = self._shared
        if shared is None:
            raise RequestError(
                f"bind({', '.join(f'{n}=...' for n in self._rows.shared)}) comes before the first request"
            )
        row = self._rows.check(given)
        group, volume = self._bucket_of(row.sizes, shared)
        request = Request(row, group, priority, deadline, volume)
        self._loop.submit(request, wait=wait)
        return request.future

    def _bucket(self, sizes: tuple[tuple[str, int], ...], shared: Shared) -> tuple[Group, int]:
        """What a row of these sizes can share a batch with, and how much of a bucket it fills."""
        known = dict(shared.sizes)
        for name, size in sizes:
            if known.setdefault(name, size) != size:
                raise RequestError(f"{name} is {size} in this request and {known[name]} in what was bound")
        bucket = self._executable.bucket_of({**known, "batch": self._executable.buckets["batch"][0]})
        group = Group(tuple((name, bucket[name]) for name in self._executable.program.axes if name != "batch"))
        return Group(group.bucket, shared if shared.arrays else None), math.prod(known.values())


def _started(replicas: Sequence[DeviceReplica]) -> list[Any]:
    """What each measured; the first one alone, since the others take over what it compiled."""
    first = replicas[0].start()
    with ThreadPoolExecutor(len(replicas), thread_name_prefix="jaxinfer-start") as pool:
        return [first, *pool.map(DeviceReplica.start, replicas[1:])]
