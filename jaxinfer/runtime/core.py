"""What the engine does next, decided without threads and without JAX: `step` is schedule and route, `finished` is what
to deliver and whose fault a failure was. `loop.Loop` drives it with threads, `testing.Simulation` in virtual time."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from jaxinfer.errors import DeadlineExceededError, ReplicaError
from jaxinfer.runtime.fleet import Fleet, Health, Kind, Member, Order
from jaxinfer.runtime.replica import Shape
from jaxinfer.runtime.request import Batch, Request, State
from jaxinfer.runtime.router import Policy
from jaxinfer.runtime.scheduler import Scheduler

ATTEMPTS = 3  # replicas that may fail under a request before it fails itself
RAISES = 2  # times that a row may raise in a batch of its own: the first may have been a passing fault
_ROUNDING = 1e-7  # seconds: a wake-up at the very moment is not too early
_LOG = logging.getLogger("jaxinfer")


@dataclass
class Step:
    """What is to be done now, and when to look again at the latest."""

    orders: list[Order] = field(default_factory=list)
    failed: list[tuple[Request, BaseException]] = field(default_factory=list)
    wake: float | None = None


class Core:
    """Scheduler, fleet and router together.

    Whose fault is an exception? The replica is tried with a row that has run before. If that fails too, the replica is
    quarantined and the batch runs elsewhere; if not, the batch's rows run one by one, and a row that raises alone,
    twice, fails with its exception. A replica that takes longer than `step_timeout` is quarantined, and its rows run
    one by one elsewhere. A request that `ATTEMPTS` replicas failed under fails with ReplicaError.

    Args:
        costs: for each replica the seconds of a batch of each shape, as far as they are known.
        step_timeout: seconds that a batch may run; ten times that for a shape that never ran, and for a restart.
    """

    def __init__(
        self, scheduler: Scheduler, costs: list[Mapping[Shape, float]], policy: Policy, *, step_timeout: float
    ):
        self.scheduler, self.fleet = scheduler, Fleet(costs)
        scheduler.cost = lambda group, size: self.fleet.cost(group.shape(size))
        self.draining = False
        self.retried = 0  # requests that ran more than once
        self._policy, self._timeout, self._random = policy, step_timeout, Random(0)
        self._failed: list[tuple[Request, BaseException]] = []
        self._orders: list[Order] = []

    @property
    def idle(self) -> bool:
        """Whether no request waits, runs or is to be told of its end."""
        return not (len(self.scheduler) or self.fleet.busy or self._failed)

    def submit(self, request: Request, now: float) -> bool:
        """Takes a request in. Returns whether `step` should be called: it may have something to do, or earlier.

        Raises:
            QueueFullError: no room.
            ReplicaError: nothing is left to run it.
        """
        if self.fleet.gone:
            raise ReplicaError(f"all {len(self.fleet.members)} replicas of this engine have failed; make a new one")
        return self.scheduler.add(request, now)

    def step(self, now: float) -> Step:
        """Expires, watches, restarts, schedules: all that time alone brings about, and every batch that can start."""
        for request in self.scheduler.expired(now):
            self._failed.append((request, _too_late(request, now)))
        self._watch(now)
        while (order := self._next(now)) is not None:
            self._orders.append(order)
        if self.fleet.gone:
            error = ReplicaError(f"all {len(self.fleet.members)} replicas have failed; restarting them did not help")
            self._failed += [(request, error) for request in self.scheduler.clear()]
        step = Step(self._orders, self._failed, self._wake(now))
        self._orders, self._failed = [], []
        return step

    def finished(
        self, order: Order, now: float, error: BaseException | None = None, prepare: float = 0.0
    ) -> list[Request]:
        """A replica reports. Returns those requests of its batch that are to be given their results now."""
        member = self.fleet.members[order.member]
        if order.epoch != member.epoch:
            return []
        member.orders.remove(order)
        delivered: list[Request] = []
        if order.kind is not Kind.RUN:
            self._tried(member, order.kind, error, now)
        elif error is None:
            assert order.batch is not None
            member.measured(order, now, prepare)
            delivered = [r for r in order.batch.requests if r.state is State.RUNNING]
            for request in delivered:
                self.scheduler.done(request)
                self.fleet.canary = request.payload, request.group
        else:
            assert order.batch is not None
            self._raised(member, order.batch, error, now)
        member.last_finish = now
        return delivered

    def _next(self, now: float) -> Order | None:
        open_ = [member for member in self.fleet.members if member.open]
        if not open_:
            return None
        # A batch that isn't full goes only to a replica that is free, or about to be: until then it may still grow.
        free = [member for member in open_ if member.free_in(now) <= member.lead + _ROUNDING]
        batch = self.scheduler.schedule(now, partial=bool(free), flush=self.draining)
        if batch is None:
            return None
        candidates = self.fleet.snapshots(open_ if batch.full else free, batch, now)
        chosen = self._policy(candidates, self._random)
        member = self.fleet.members[chosen.index]
        member.turn += chosen.seconds
        return member.give(Kind.RUN, now, batch, self.fleet.cost(batch.shape, member))

    def _watch(self, now: float) -> None:
        for member in self.fleet.members:
            if member.orders and now >= self._limit(member):
                error = ReplicaError(f"replica {member.index} did not finish a batch within {self._timeout:g} s")
                self._quarantine(member, error, now, hung=True)
            if member.health is Health.QUARANTINED and now >= member.retry_at:
                member.health = Health.RESTARTING
                self._orders.append(member.give(Kind.RESTART, now))

    def _limit(self, member: Member) -> float:
        """When the oldest order of a member has taken too long."""
        oldest = member.orders[0]
        known = oldest.expected is not None or oldest.kind is Kind.PROBE
        return member.started(oldest) + (self._timeout if known else 10 * self._timeout)

    def _raised(self, member: Member, batch: Batch, error: BaseException, now: float) -> None:
        member.held.append((batch, error))
        if self.fleet.canary is None:
            self._absolved(member)
        elif member.health is Health.SERVING:
            member.health = Health.SUSPECT
            self._orders.append(self.fleet.probe(member, now, self.scheduler.smallest))

    def _tried(self, member: Member, kind: Kind, error: BaseException | None, now: float) -> None:
        """The outcome of a restart or of a probe."""
        if error is not None:
            self._quarantine(member, error, now, hung=False)
        elif kind is Kind.RESTART and self.fleet.canary is not None:
            self._orders.append(self.fleet.probe(member, now, self.scheduler.smallest))
        else:
            self._absolved(member)
            self.fleet.rejoin(member)

    def _absolved(self, member: Member) -> None:
        """The batches that raised on a sound replica: their rows run alone; one that did, twice, is to blame itself."""
        for batch, error in member.held:
            for request in batch.requests:
                if request.state is not State.RUNNING:
                    continue
                request.raised += len(batch.requests) == 1
                if request.raised < RAISES:
                    self.retried += 1
                    self.scheduler.back(request, alone=True)
                else:
                    self._fail(request, error)
        member.held.clear()

    def _quarantine(self, member: Member, error: BaseException, now: float, *, hung: bool) -> None:
        """Its batches go elsewhere; those of its rows that may have brought it down are counted."""
        text = "replica %d is taken out of service: %s: %s"
        _LOG.warning(text, member.index, type(error).__name__, error)
        orders = member.abandon(now, self.fleet.backoff)
        suspects = [batch for batch, _ in member.held]
        in_hand = [order.batch for order in orders if order.kind is Kind.RUN and order.batch is not None]
        if hung and orders[0].batch in in_hand:
            suspects.append(in_hand.pop(0))
        member.held.clear()
        for batch in [*suspects, *in_hand]:
            for request in batch.requests:
                if request.state is State.RUNNING:
                    self.retried += 1
                    request.attempts += batch in suspects
                    if request.attempts < ATTEMPTS:
                        self.scheduler.back(request, alone=hung and batch in suspects)
                    else:
                        self._fail(request, _unlucky(request, error))

    def _fail(self, request: Request, error: BaseException) -> None:
        self.scheduler.done(request)
        self._failed.append((request, error))

    def _wake(self, now: float) -> float | None:
        """When time alone will next change something."""
        times = [self.scheduler.next_deadline()]
        for member in self.fleet.members:
            if member.orders:
                times.append(self._limit(member))
            elif member.health is Health.QUARANTINED:
                times.append(member.retry_at)
        if len(self.scheduler):
            # Not before it is due, nor before a replica is about to be free.
            waits = [member.free_in(now) - member.lead for member in self.fleet.members if member.open]
            due = self.scheduler.next_due()
            if waits and min(waits) < float("inf") and due is not None:
                times.append(max(due, now + max(min(waits), 0.0)))
        return min((time for time in times if time is not None), default=None)


def _too_late(request: Request, now: float) -> DeadlineExceededError:
    assert request.deadline is not None
    allowed, waited = request.deadline - request.arrival, now - request.arrival
    where = "it was still waiting" if request.started is None else "it was running"
    return DeadlineExceededError(
        f"the deadline of {allowed:g} s passed: {where} after {waited:.3f} s. Allow more time or add replicas"
    )


def _unlucky(request: Request, error: BaseException) -> ReplicaError:
    failed = ReplicaError(f"{request.attempts} replicas failed while they ran this request; the last: {error}")
    failed.__cause__ = error
    return failed
