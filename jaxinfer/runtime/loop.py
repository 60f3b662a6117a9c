"""The engine's loop: schedule, run, deliver.

The life of a request:
 1. submit     in its caller's thread: checked, put in line (`scheduler`), the loop woken if it has to look
 2. schedule   loop's thread: the scheduler makes a batch, the router chooses a replica (`core`)
 3. run        replica's first thread: rows are stacked, padded, moved to the device, begun (`worker`, `replica`)
 4. wait       replica's second thread: until the device is done; the loop may schedule the next one meanwhile
 5. deliver    the same thread: outputs are cut into rows, futures resolved
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxinfer.errors import EngineClosedError, ReplicaError
from jaxinfer.runtime.core import Core
from jaxinfer.runtime.fleet import Kind, Order
from jaxinfer.runtime.replica import Replica, Running
from jaxinfer.runtime.request import Request
from jaxinfer.runtime.stats import EngineStats, Meter
from jaxinfer.runtime.worker import Worker

_LONG = 3600.0  # seconds that the loop sleeps at most: a deadline may be further away than the system can wait
_LAST = 5.0  # seconds that threads have to end when nothing is left to do


class Loop:
    """Drives a Core with a thread of its own and two for each replica. The replicas have been started."""

    def __init__(self, core: Core, replicas: Sequence[Replica], clock: Callable[[], float] = time.monotonic):
        self.core, self.meter = core, Meter()
        self._replicas, self._clock = replicas, clock
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # the loop should look
        self._room = threading.Condition(self._lock)  # the queue may have room
        self._told = self._closed = False
        self._live: set[Request] = set()  # all whose futures aren't done
        self._workers = {(index, 0): Worker(replica, self._report) for index, replica in enumerate(replicas)}
        self._thread = threading.Thread(target=self._run, name="jaxinfer-loop", daemon=True)
        self._thread.start()

    def submit(self, request: Request, *, wait: bool = False) -> None:
        """Takes a request in; `wait`: until there is room.

        Raises:
            QueueFullError, ReplicaError, EngineClosedError
        """
        request.future.add_done_callback(lambda future: self._cancelled(request) if future.cancelled() else None)
        with self._lock:
            while wait and not self.core.scheduler.room and not self._closed and not self.core.fleet.gone:
                self._room.wait()
            if self._closed:
                raise EngineClosedError("this engine is closed and takes no requests; make a new one")
            # Waking the loop costs a switch of threads: it need not look while a batch grows that it will take anyway.
            if self.core.submit(request, self._clock()):
                self._tell()
            self.meter.submitted += 1
            self._live.add(request)

    def close(self, *, drain: bool, timeout: float | None = None) -> bool:
        """Takes no more requests, runs those that wait (or cancels them), ends the threads. False if `timeout` seconds
        weren't enough; what still waits is then cancelled. Called by a future's callback, in one of the engine's own
        threads, it can't wait for them: it returns at once."""
        until = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            self._closed = self.core.draining = True
            waiting = [] if drain else self.core.scheduler.clear()
            self._room.notify_all()
            self._tell()
        _cancel(waiting)
        me = threading.current_thread()
        if me is self._thread or any(worker.owns(me) for worker in list(self._workers.values())):
            return not self._live
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._lock:
                waiting = self.core.scheduler.clear()
            _cancel(waiting)
            return False
        # All requests are done. A thread that doesn't end now hangs in its replica, as those of older epochs may.
        members = self.core.fleet.members
        for worker in (w for (index, epoch), w in self._workers.items() if epoch == members[index].epoch):
            worker.join(_LAST if until is None else min(_LAST, max(until - time.monotonic(), 0.0)))
        for replica in self._replicas:
            replica.close()
        return True

    def stats(self, names: Sequence[str], age: float, compiles: int) -> EngineStats:
        """A snapshot."""
        with self._lock:
            return self.meter.summary(self.core, names, age, compiles)

    def _run(self) -> None:
        try:
            while True:
                with self._lock:
                    step = self.core.step(self._clock())
                    if self._closed and self.core.idle and not step.orders and not step.failed:
                        return
                    if not step.orders and not step.failed:
                        self._rest(step.wake)
                        continue
                    self._room.notify_all()
                    self.meter.started(step.orders)
                    self._live.difference_update(request for request, _ in step.failed)
                for order in step.orders:
                    self._worker(order).put(order)
                self.meter.missed(len(step.failed))
                for request, error in step.failed:
                    _resolve(request, error)
        except BaseException as error:  # a bug: whoever waits is told so
            self._crashed(error)
        finally:
            for worker in self._workers.values():
                worker.stop()

    def _rest(self, wake: float | None) -> None:
        if not self._told:
            self._changed.wait(None if wake is None else min(max(wake - self._clock(), 0.0), _LONG))
        self._told = False

    def _tell(self) -> None:
        self._told = True
        self._changed.notify()

    def _report(self, order: Order, running: Running | None, error: BaseException | None) -> None:
        """From a worker's thread: an order is done, or raised."""
        with self._lock:
            now = self._clock()
            requests = self.core.finished(order, now, error, running.prepare if running is not None else 0.0)
            self._live.difference_update(requests)
            self._tell()
        if not requests or running is None:
            return
        try:
            assert order.batch is not None
            results = dict(zip(order.batch.requests, running.results(), strict=True))
        except BaseException as broken:
            results = dict.fromkeys(requests, broken)
        # Backwards: whoever waits for all in their order is woken once, not once a row.
        self.meter.delivered(requests, results, now)
        for request in reversed(requests):
            _resolve(request, results[request])

    def _worker(self, order: Order) -> Worker:
        key = order.member, order.epoch
        if order.kind is Kind.RESTART:  # threads of its own: the old ones may hang
            for (index, epoch), worker in list(self._workers.items()):
                if index == order.member:
                    worker.stop()
                    del self._workers[index, epoch]
            self._workers[key] = Worker(self._replicas[order.member], self._report)
        return self._workers[key]

    def _cancelled(self, request: Request) -> None:
        with self._lock:
            self.core.scheduler.discard(request)
            self._live.discard(request)
            self.meter.cancelled += 1
            self._room.notify_all()

    def _crashed(self, error: BaseException) -> None:
        with self._lock:
            self._closed = True
            requests, self._live = list(self._live), set()
            for request in requests:
                self.core.scheduler.discard(request)
            self._room.notify_all()
        failed = ReplicaError(f"internal error: the engine's loop ended with {type(error).__name__}: {error}")
        failed.__cause__ = error
        for request in requests:
            if not request.future.done():
                _resolve(request, failed)


def _resolve(request: Request, result: Any) -> None:
    request.payload = None  # whoever keeps the future is not to keep the inputs
    request.resolve(result)


def _cancel(requests: Sequence[Request]) -> None:
    for request in requests:
        request.future.cancel()
