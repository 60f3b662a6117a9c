"""Which replica takes the next batch: pure functions over snapshots of those that have room.

A policy is handed the candidates and a source of randomness and returns one of them. Every figure that it may weigh is
measured: a replica that takes twice as long for this batch has twice the `seconds`, and so gets half of the work.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from jaxinfer.errors import RequestError


@dataclass(frozen=True)
class Snapshot:
    """A replica that has room for a batch."""

    index: int
    rows: int  # given to it and not done yet
    backlog: float  # predicted seconds until those are done
    seconds: float  # predicted for the batch in question; the same for all while nothing was measured
    turn: float  # predicted seconds of all the work it was given so far


Policy = Callable[[Sequence[Snapshot], Random], Snapshot]


def round_robin(candidates: Sequence[Snapshot], random: Random) -> Snapshot:
    """Each in turn, weighted by speed: whoever was given the least seconds of work so far. On equal replicas and equal
    batches that is one after another. (Stride scheduling: Waldspurger and Weihl, 1995.)"""
    del random
    return min(candidates, key=lambda replica: (replica.turn, replica.index))


def least_outstanding(candidates: Sequence[Snapshot], random: Random) -> Snapshot:
    """Where the batch is predicted to be done first."""
    del random
    return min(candidates, key=lambda replica: (replica.backlog + replica.seconds, replica.rows, replica.turn))


def power_of_two(candidates: Sequence[Snapshot], random: Random) -> Snapshot:
    """Two drawn at random, fast ones more often; the better of them. Nearly as good as asking all of many replicas, and
    no herd forms where snapshots are stale. (Mitzenmacher, 2001.)"""
    if len(candidates) <= 2:
        return least_outstanding(candidates, random)
    weights = [1 / max(replica.seconds, 1e-9) for replica in candidates]
    (first,) = random.choices(range(len(candidates)), weights)
    weights[first] = 0.0
    (second,) = random.choices(range(len(candidates)), weights)
    return least_outstanding((candidates[first], candidates[second]), random)


POLICIES: dict[str, Policy] = {
    "round_robin": round_robin,
    "least_outstanding": least_outstanding,
    "power_of_two": power_of_two,
}


def policy_of(name: str) -> Policy:
    """The policy of this name.

    Raises:
        RequestError: an unknown name, or a policy for caches of language models.
    """
    if name in ("prefix_affinity", "session"):
        raise RequestError(
            f"router {name!r} chooses by what a replica has cached of a conversation; an Executable caches nothing "
            f"between requests. Use one of {sorted(POLICIES)}"
        )
    if name not in POLICIES:
        raise RequestError(f"router should be one of {sorted(POLICIES)}, got {name!r}")
    return POLICIES[name]
