"""Which requests run next, and together. Pure: state and time in, a batch out; no JAX, no threads, no clock."""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence

from jaxinfer.errors import QueueFullError
from jaxinfer.runtime.queue import Heap, Line
from jaxinfer.runtime.request import Batch, Group, Request, State

AGEING = 1.0  # seconds of waiting that one step of priority is worth


class Scheduler:
    """Dynamic batching of rows.

    - Only requests of one group share a batch: equal buckets of their other dims, equal bound inputs.
    - A group is ready when it fills the largest batch, or when one of its requests is due: `max_delay` after it came,
      or early enough to meet its deadline.
    - Of the ready groups that goes first whose first request stands first (priority and arrival, see `queue.Line`).
    - A batch takes as many rows as cost least a row: 9 waiting rows and buckets of 8 and 32 run as 8 and 1 where a
      padded 32 would cost more.

    Args:
        sizes: buckets of the batch dim, ascending.
        max_batch: most rows in a batch; at most the largest bucket.
        max_delay: seconds that a request waits for company.
        max_queue: most requests that wait.
        cost: predicted seconds of a batch of a group padded to a size; None where not known yet. An attribute too:
            the core sets it, which measures.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        max_batch: int,
        max_delay: float,
        max_queue: int,
        cost: Callable[[Group, int], float | None] = lambda group, size: None,
        ageing: float = AGEING,
    ):
        self.max_batch, self.max_queue = max_batch, max_queue
        self._sizes = [size for size in sizes if size < max_batch] + [min(s for s in sizes if s >= max_batch)]
        self.cost, self._max_delay, self._ageing = cost, max_delay, ageing
        self._lines: dict[Group, Line] = {}
        self._alone: deque[Request] = deque()
        self._deadlines: Heap[Request] = Heap()  # of all that aren't done, waiting or running
        self._waiting = self._number = 0

    def __len__(self) -> int:
        """Requests that wait."""
        return self._waiting

    @property
    def smallest(self) -> int:
        """The smallest bucket of the batch dim."""
        return self._sizes[0]

    @property
    def room(self) -> int:
        """How many more requests may be added."""
        return max(self.max_queue - self._waiting, 0)

    def add(self, request: Request, now: float) -> bool:
        """Puts a new request in line. Returns whether `schedule` may now do what it would not have done before, or
        earlier: most requests just join those that wait.

        Raises:
            QueueFullError: as many wait as may.
        """
        if not self.room:
            raise QueueFullError(
                f"{self._waiting} requests wait and max_queue is {self.max_queue}: try again when some are done, use "
                "map(), which waits for room, or give the engine a larger max_queue"
            )
        self._number += 1
        request.number, request.arrival = self._number, now
        first = False
        if request.deadline is not None:
            self._deadlines.push(request.deadline, request)
            first = self.next_deadline() == request.deadline
        line, due = self._insert(request)
        return first or len(line) == self.max_batch or line.due() == due

    def back(self, request: Request, *, alone: bool = False) -> None:
        """Puts a request that was running in line again, at its old place; `alone`: in a batch of its own, at once."""
        request.alone = request.alone or alone
        if request.alone:
            request.state = State.QUEUED
            self._waiting += 1
            self._alone.append(request)
        else:
            self._insert(request)

    def discard(self, request: Request) -> None:
        """Takes a request out that was cancelled or has failed."""
        self._remove(request)
        self.done(request)

    def done(self, request: Request) -> None:
        """Notes that a request's result, or error, is on its way to its caller."""
        request.state = State.DONE
        if request.deadline is not None:
            self._deadlines.discard(request)

    def schedule(self, now: float, *, partial: bool = True, flush: bool = False) -> Batch | None:
        """The next batch, or None where it is better to wait.

        Args:
            partial: a replica is free, so that a batch that isn't full may go as well.
            flush: no more will come: nobody waits for company.
        """
        while self._alone:
            request = self._alone.popleft()
            self._waiting -= 1
            if request.begin(now):
                return Batch((request,), request.group, self._sizes[0], True)
        while ready := [
            (line.head(), group)
            for group, line in self._lines.items()
            if len(line) >= self.max_batch or (partial and (flush or line.due() <= now))
        ]:
            _, group = min(ready, key=lambda found: found[0])
            line = self._lines[group]
            before, rows = len(line), self._rows(group, len(line))
            requests = line.take(rows, now)
            self._waiting -= before - len(line)
            if not len(line):
                del self._lines[group]
            if requests:
                size = self._sizes[bisect_left(self._sizes, len(requests))]
                return Batch(requests, group, size, before >= self.max_batch)
        return None

    def expired(self, now: float) -> list[Request]:
        """Requests, waiting or running, whose deadlines have passed; they are taken out."""
        found = []
        while (first := self._deadlines.first()) is not None and first[0] <= now:
            if first[1].state is not State.DONE:  # one that is was cancelled in this moment
                found.append(first[1])
            self.discard(first[1])
        return found

    def clear(self) -> list[Request]:
        """Takes out all that wait."""
        found = [*self._alone, *(request for line in self._lines.values() for request in line)]
        for request in found:
            self.discard(request)
        return found

    def next_due(self) -> float | None:
        """When the next waiting request is due."""
        if self._alone:
            return self._alone[0].arrival
        return min((line.due() for line in self._lines.values()), default=None)

    def next_deadline(self) -> float | None:
        """When the next deadline passes."""
        first = self._deadlines.first()
        return None if first is None else first[0]

    def _insert(self, request: Request) -> tuple[Line, float]:
        """(the line that it now stands in, when it is due)"""
        request.state = State.QUEUED
        self._waiting += 1
        due = request.arrival + self._max_delay
        if request.deadline is not None:
            due = min(due, request.deadline - 1.5 * (self.cost(request.group, self._sizes[-1]) or 0.0))
        line = self._lines.get(request.group)
        if line is None:
            line = self._lines[request.group] = Line(self._ageing)
        line.push(request, due)
        return line, due

    def _remove(self, request: Request) -> None:
        if request.state is not State.QUEUED:
            return
        request.state = State.DONE
        self._waiting -= 1
        if request.alone:
            self._alone.remove(request)
            return
        line = self._lines[request.group]
        line.left()
        if not len(line):
            del self._lines[request.group]

    def _rows(self, group: Group, waiting: int) -> int:
        """How many rows to take: up to the next bucket, padded, or a whole smaller one where that costs less a row."""
        rows = min(waiting, self.max_batch)
        place = bisect_left(self._sizes, rows)
        if place == 0 or self._sizes[place] == rows:
            return rows
        smaller = self._sizes[place - 1]
        whole, padded = self.cost(group, smaller), self.cost(group, self._sizes[place])
        if whole is None or padded is None or whole / smaller >= padded / rows:
            return rows
        return smaller
