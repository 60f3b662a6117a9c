"""The waiting line: requests by group, each group in order of priority and arrival."""

import heapq
import itertools
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from jaxinfer.runtime.request import Request, State

T = TypeVar("T")


class Heap(Generic[T]):
    """A heap from which any item can be taken out: O(log n), lazily. Items are told apart by identity."""

    def __init__(self) -> None:
        self._entries: list[tuple[Any, int, T]] = []
        self._live: dict[T, int] = {}  # item -> number of its entry
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[T]:
        return iter(self._live)

    def __contains__(self, item: T) -> bool:
        return item in self._live

    def push(self, key: Any, item: T) -> None:
        """Adds an item; among equal keys the first one added comes first."""
        number = next(self._numbers)
        self._live[item] = number
        heapq.heappush(self._entries, (key, number, item))

    def discard(self, item: T) -> None:
        """Takes an item out, if it is there."""
        if self._live.pop(item, None) is not None and len(self._entries) > 2 * len(self._live) + 16:
            self._entries = [entry for entry in self._entries if self._live.get(entry[2]) == entry[1]]
            heapq.heapify(self._entries)

    def first(self) -> tuple[Any, T] | None:
        """(key, item) of the least key, or None."""
        while self._entries:
            key, number, item = self._entries[0]
            if self._live.get(item) == number:
                return key, item
            heapq.heappop(self._entries)
        return None

    def pop(self) -> T:
        """Takes out the item of the least key; IndexError if there is none."""
        found = self.first()
        if found is None:
            raise IndexError("pop from an empty heap")
        heapq.heappop(self._entries)
        del self._live[found[1]]
        return found[1]


class Line:
    """The waiting requests of one group. A priority is worth `ageing` seconds of waiting.

    A request of priority p stands where one of priority 0 would that came p * ageing seconds earlier. All age alike,
    so this place never changes, and nobody is overtaken by those who come more than that much later.
    """

    # Bare heaps, since every request passes through: entries of requests that left are skipped when they come up.

    def __init__(self, ageing: float):
        self._ageing = ageing
        self._order: list[tuple[float, int, Request]] = []
        self._due: list[tuple[float, int, Request]] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        return (entry[2] for entry in self._order if entry[2].state is State.QUEUED)

    def push(self, request: Request, due: float) -> None:
        """Adds a request, its state QUEUED, that should start by `due` even in a batch that isn't full."""
        heapq.heappush(self._order, (request.arrival - request.priority * self._ageing, request.number, request))
        heapq.heappush(self._due, (due, request.number, request))
        self._count += 1
        self._trim()

    def left(self) -> None:
        """Notes that a request's state isn't QUEUED any more."""
        self._count -= 1
        self._trim()

    def head(self) -> tuple[float, int]:
        """The place of the first in line: lines are compared by it."""
        return _first(self._order)[:2]

    def due(self) -> float:
        """When the first of them is due."""
        return _first(self._due)[0]

    def take(self, count: int, now: float) -> list[Request]:
        """The first `count` in line, fewer if some were cancelled."""
        taken = []
        while len(taken) < count and self._count:
            request = heapq.heappop(self._order)[2]
            if request.state is State.QUEUED:
                self._count -= 1
                if request.begin(now):
                    taken.append(request)
        return taken

    def _trim(self) -> None:
        for heap in (self._order, self._due):
            if len(heap) > 2 * self._count + 64:
                heap[:] = [entry for entry in heap if entry[2].state is State.QUEUED]
                heapq.heapify(heap)


def _first(heap: list[tuple[float, int, Request]]) -> tuple[float, int, Request]:
    """The first entry of a request that still waits."""
    while heap[0][2].state is not State.QUEUED:
        heapq.heappop(heap)
    return heap[0]
