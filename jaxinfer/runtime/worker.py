"""The two threads of a replica: one prepares and begins batches, the other waits for them."""

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from jaxinfer.runtime.fleet import Kind, Order
from jaxinfer.runtime.replica import Replica, Running

# (order, what it began unless it raised, what it raised)
Report = Callable[[Order, Running | None, BaseException | None], None]


class Worker:
    """Does a replica's orders one after another: while one batch runs, the next is stacked, moved to the device and
    queued there. Reports come from its threads. A worker that hangs is abandoned: its threads are daemons."""

    def __init__(self, replica: Replica, report: Report):
        self._replica, self._report = replica, report
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        self._begun: SimpleQueue[tuple[Order, Running] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=target, name=f"jaxinfer-{what}-{replica.name}", daemon=True)
            for target, what in ((self._prepare, "prepare"), (self._deliver, "deliver"))
        ]
        for thread in self._threads:
            thread.start()

    def put(self, order: Order) -> None:
        """Hands it an order."""
        self._orders.put(order)

    def stop(self) -> None:
        """Its threads end after the orders that it has."""
        self._orders.put(None)

    def join(self, timeout: float | None) -> bool:
        """Waits for its threads, but never for the one that asks; False if they are still at work."""
        until = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(None if until is None else max(until - time.monotonic(), 0.0))
        return not any(thread.is_alive() and thread is not threading.current_thread() for thread in self._threads)

    def owns(self, thread: threading.Thread) -> bool:
        """Whether this is one of its threads."""
        return thread in self._threads

    def _prepare(self) -> None:
        while (order := self._orders.get()) is not None:
            try:
                if order.kind is Kind.RESTART:
                    self._replica.close()
                    self._replica.start()
                    self._report(order, None, None)
                    continue
                assert order.batch is not None
                running = self._replica.run(order.batch)
            except BaseException as error:  # whatever it is, it is its requests' to know
                self._report(order, None, error)
            else:
                self._begun.put((order, running))
        self._begun.put(None)

    def _deliver(self) -> None:
        while (begun := self._begun.get()) is not None:
            order, running = begun
            try:
                running.wait()
            except BaseException as error:
                self._report(order, None, error)
            else:
                self._report(order, running, None)
            del begun, running  # what they hold is not to be kept until the next batch comes
