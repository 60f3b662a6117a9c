"""A request on its way through the engine, and the batch that it shares with others."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class State(Enum):
    """Where a request is."""

    QUEUED = "queued"  # waits in the scheduler; can still be cancelled
    RUNNING = "running"  # in a batch that a replica has, or held until it is known whose fault an exception was
    DONE = "done"  # has its result or error, or was cancelled


@dataclass(frozen=True)
class Group:
    """What requests must have in common to share a batch."""

    bucket: tuple[tuple[str, int], ...] = ()  # of their named dims other than the batch
    shared: Any = None  # the inputs without a batch dim, as they were bound when the request came

    def shape(self, rows: int) -> tuple[tuple[str, int], ...]:
        """The bucket of a whole batch: what is compiled, and what its cost is kept under."""
        return (("batch", rows), *self.bucket)


@dataclass(eq=False, slots=True)
class Request:
    """One row. Times are seconds on the engine's clock."""

    payload: Any  # what a replica runs; the scheduler never looks into it
    group: Group = field(default_factory=Group)
    priority: int = 0
    deadline: float | None = None
    volume: int = 1  # product of its sizes along named dims: how much of a bucket it fills
    future: "Future[Any]" = field(default_factory=Future)
    state: State = State.QUEUED
    number: int = 0  # by order of arrival; set by the scheduler, as the two times are
    arrival: float = 0.0
    started: float | None = None  # when it first left the queue
    attempts: int = 0  # replicas that failed while they had it
    raised: int = 0  # times that it raised in a batch of its own, on a sound replica
    alone: bool = False  # runs in a batch of its own, since a batch that it was in failed

    def begin(self, now: float) -> bool:
        """Leaves the queue for a batch; False if its caller cancelled it meanwhile."""
        if self.started is None:
            if not self.future.set_running_or_notify_cancel():
                self.state = State.DONE
                return False
            self.started = now
        self.state = State.RUNNING
        return True

    def resolve(self, result: Any) -> None:
        """Gives the future its result, or its error if the result is an exception."""
        if isinstance(result, BaseException):
            if self.started is None and not self.future.set_running_or_notify_cancel():
                return  # cancelled in the same moment
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


@dataclass(frozen=True, eq=False)
class Batch:
    """Requests of one group that run together."""

    requests: Sequence[Request]
    group: Group
    size: int  # the bucket that its rows are padded up to
    full: bool  # nothing is gained by waiting for more

    @property
    def shape(self) -> tuple[tuple[str, int], ...]:
        """The bucket of each named dim."""
        return self.group.shape(self.size)
