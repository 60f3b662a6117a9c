"""The engine's record of its replicas: health, work in progress, measured speed. Pure, as the scheduler is."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from jaxinfer.runtime.replica import Shape
from jaxinfer.runtime.request import Batch, Group, Request
from jaxinfer.runtime.router import Snapshot

DEPTH = 2  # batches that a replica has at most: one runs, the next is prepared
FIRST_BACKOFF, TRIES = 0.5, 5  # seconds before the first restart, doubled each time; restarts until it is given up
_WEIGHT = 0.2  # of the newest measurement in the moving average
_UNKNOWN = 0.001  # seconds of a batch that no replica has run yet: one for all, so that none is favoured


class Health(Enum):
    """What a replica is up to."""

    SERVING = "serving"
    SUSPECT = "suspect"  # a batch raised: a row that has run before tells whether replica or batch is to blame
    QUARANTINED = "quarantined"  # failed; waits for its restart
    RESTARTING = "restarting"  # being started, then tried with that row
    GONE = "gone"  # failed too often


class Kind(Enum):
    """What a replica is told to do."""

    RUN = "run"
    PROBE = "probe"  # run a row that has run before
    RESTART = "restart"


@dataclass(frozen=True, eq=False)
class Order:
    """One thing for one replica to do. Reports on an order of an older epoch are void: the replica was given up since,
    and its requests are elsewhere."""

    member: int
    epoch: int
    kind: Kind
    given: float
    batch: Batch | None = None
    expected: float | None = None  # predicted seconds


@dataclass(eq=False)
class Member:
    """One replica."""

    index: int
    costs: dict[Shape, float] = field(default_factory=dict)  # seconds of a batch, moving averages
    health: Health = Health.SERVING
    epoch: int = 0
    failures: int = 0  # in a row
    retry_at: float = 0.0
    turn: float = 0.0
    prepare: float = 0.0  # seconds that preparing a batch takes, a moving average
    last_finish: float = 0.0
    orders: list[Order] = field(default_factory=list)  # given and not reported on; the oldest first
    held: list[tuple[Batch, BaseException]] = field(default_factory=list)  # raised, until blame is found
    batches: int = 0  # done
    rows: int = 0
    failed: int = 0  # times it was quarantined
    busy: float = 0.0  # seconds that it ran batches

    @property
    def open(self) -> bool:
        """Whether another batch may be given to it."""
        return self.health is Health.SERVING and len(self.orders) < DEPTH

    def started(self, order: Order) -> float:
        """When the oldest order began to run."""
        return max(order.given, self.last_finish)

    def free_in(self, now: float) -> float:
        """Predicted seconds until all it has is done; inf where unknown."""
        if not self.orders:
            return 0.0
        expected = [order.expected for order in self.orders]
        if None in expected:
            return float("inf")
        first, *rest = (seconds or 0.0 for seconds in expected)
        return max(self.started(self.orders[0]) + first - now, 0.0) + sum(rest)

    @property
    def lead(self) -> float:
        """How many seconds before it is free the next batch should be in the making."""
        return 0.0005 + 1.5 * self.prepare

    def give(self, kind: Kind, now: float, batch: Batch | None = None, expected: float | None = None) -> Order:
        """Notes an order."""
        order = Order(self.index, self.epoch, kind, now, batch, expected)
        self.orders.append(order)
        return order

    def measured(self, order: Order, now: float, prepare: float) -> None:
        """Notes what a batch took that came out well."""
        assert order.batch is not None
        seconds = now - self.started(order)
        shape = order.batch.shape
        self.costs[shape] = _average(self.costs.get(shape), seconds)
        self.prepare = _average(self.prepare or None, prepare)
        self.batches, self.rows = self.batches + 1, self.rows + len(order.batch.requests)
        self.busy += seconds
        self.failures = 0

    def abandon(self, now: float, backoff: float) -> list[Order]:
        """Quarantines it, for `backoff` seconds the first time, or gives it up. Returns what it had in hand."""
        self.epoch += 1
        self.failures += 1
        self.failed += 1
        self.health = Health.QUARANTINED if self.failures <= TRIES else Health.GONE
        self.retry_at = now + backoff * 2.0 ** (self.failures - 1)
        orders, self.orders = self.orders, []
        return orders


def _average(before: float | None, value: float) -> float:
    return value if before is None else before + _WEIGHT * (value - before)


class Fleet:
    """All replicas of an engine."""

    def __init__(self, costs: list[Mapping[Shape, float]]):
        self.members = [Member(index, dict(known)) for index, known in enumerate(costs)]
        self.backoff = FIRST_BACKOFF
        self.canary: tuple[Any, Group] | None = None  # the last payload that ran well: what suspects are tried with

    @property
    def gone(self) -> bool:
        """Whether no replica will ever serve again."""
        # Asked once a request, so the first one answers nearly always.
        return self.members[0].health is Health.GONE and all(m.health is Health.GONE for m in self.members)

    def cost(self, shape: Shape, member: Member | None = None) -> float | None:
        """Predicted seconds of a batch on a member, or on the average of those that know."""
        if member is not None and shape in member.costs:
            return member.costs[shape]
        known = [m.costs[shape] for m in self.members if shape in m.costs]
        return sum(known) / len(known) if known else None

    def snapshots(self, members: list[Member], batch: Batch, now: float) -> list[Snapshot]:
        """What the router sees."""
        seconds = [self.cost(batch.shape, member) for member in members]
        known = None not in seconds
        return [
            Snapshot(
                member.index,
                sum(len(order.batch.requests) for order in member.orders if order.batch is not None),
                member.free_in(now) if known and member.free_in(now) < float("inf") else _UNKNOWN * len(member.orders),
                (predicted or 0.0) if known else _UNKNOWN,
                member.turn,
            )
            for member, predicted in zip(members, seconds, strict=True)
        ]

    def rejoin(self, member: Member) -> None:
        """Back in service. It is not owed the turns that it missed."""
        others = [m.turn for m in self.members if m is not member and m.health is Health.SERVING]
        member.turn = max(member.turn, min(others, default=0.0))
        member.health = Health.SERVING

    def probe(self, member: Member, now: float, size: int) -> Order:
        """Tries a member with a row that is known to run."""
        assert self.canary is not None
        clone = Request(*self.canary)
        return member.give(Kind.PROBE, now, Batch((clone,), clone.group, size, True))

    @property
    def busy(self) -> bool:
        """Whether replicas have batches, or any are held."""
        return any(m.held or any(order.kind is Kind.RUN for order in m.orders) for m in self.members)

    def running(self) -> list[Request]:
        """Requests that replicas have, or that are held."""
        ordered = itertools.chain.from_iterable(m.orders for m in self.members)
        batches = [o.batch for o in ordered if o.kind is Kind.RUN and o.batch is not None]
        batches += [batch for m in self.members for batch, _ in m.held]
        return [request for batch in batches for request in batch.requests]
