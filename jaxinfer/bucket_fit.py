"""Bucket ladders that fit the traffic: `fit_ladder` for one named dim, `fit_buckets` for several. What they minimise:

    cost of a ladder = sum over calls of cost(bucket that the call is padded to) + compile_seconds * programs

The cost of a call is the caller's: by default its bucket, which is work that grows linearly. In
`lambda b: b + b * b / 512` attention is as heavy as the rest at 512 rows. With compile_seconds the unit is seconds, so
measure some sizes and give `lambda b: np.interp(b, sizes, seconds)`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxinfer.errors import RequestError

Sizes = Sequence[int] | np.ndarray | Mapping[int, float]  # one a call, or a histogram: size -> calls
_CHUNK = 1 << 22  # numbers of the table of segments held at once: 32 MB


class Ladder(tuple[int, ...]):
    """Ascending bucket sizes, and what they cost on the traffic that they were chosen from."""

    cost: float  # of all calls and compiles
    padding: float  # share of the calls' cost that is spent on padding, from 0 to 1

    def __new__(cls, sizes: Sequence[int], cost: float, padding: float) -> "Ladder":
        made = super().__new__(cls, sizes)
        made.cost, made.padding = cost, padding
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self), self.cost, self.padding

    def __str__(self) -> str:
        return f"{list(self)}: {len(self)} programs, {self.padding:.1%} of the work is padding"


def fit_ladder(
    sizes: Sizes,
    programs: int = 8,
    *,
    cost: Callable[[np.ndarray], np.ndarray] | None = None,
    compile_seconds: float = 0.0,
    largest: int | None = None,
    multiple: int = 1,
) -> Ladder:
    """The cheapest ladder of at most `programs` buckets for these sizes; exact, by dynamic programming.

    Takes O(n^2 * programs) steps for n distinct sizes: 0.3 s for 2,300 and 8 programs, 2 s for 8,600.

    Args:
        sizes: of the calls, one each or as a histogram {size: calls}; `sizes_in` reads a recorded trace.
        cost: float[n] cost of a call in each of the buckets int[n]; the bucket itself by default.
        compile_seconds: what one more program costs; fewer than `programs` are chosen where more don't pay.
        largest: the largest size that must be served, where the traffic doesn't reach it.
        multiple: buckets are multiples of this, e.g. 8 or 128 as the hardware tiles; `largest` is kept as it is.

    Raises:
        RequestError: no sizes, sizes below 1, or options that contradict each other.
    """
    found, calls = _histogram(sizes)
    buckets, table = _candidates(found, programs, largest, multiple)
    per_call = _costs(cost or _linear, buckets[None, :])
    counts = np.zeros(len(buckets))
    np.add.at(counts, table, calls)
    chosen, total = _cheapest(per_call, counts[None, :], programs, compile_seconds)
    spent = total - compile_seconds * len(chosen)
    needed = float(_costs(cost or _linear, found[None, :])[0] @ calls)
    return Ladder([int(buckets[i]) for i in chosen], total, 1 - needed / spent if spent > 0 else 0.0)


def fit_buckets(
    calls: Mapping[str, Sequence[int] | np.ndarray],
    programs: int = 8,
    *,
    cost: Callable[..., np.ndarray] | None = None,
    compile_seconds: float = 0.0,
    largest: Mapping[str, int] | None = None,
    multiple: Mapping[str, int] | None = None,
) -> dict[str, Sequence[int]]:
    """Buckets for `ji.compile` with at most `programs` programs, chosen for recorded calls.

    A program is compiled for every combination of buckets. One named dim is solved exactly. For several, each way to
    share `programs` among the dims is tried; its ladders are fitted one by one, and then again, each exactly for the
    ladders that the others have, until none gets better: no single ladder can be changed for the better, while another
    combination of ladders might still be cheaper.

    Args:
        calls: for each named dim the size in every call; the dims' lists are of one length.
        cost: cost(**sizes) of a call in a bucket, on arrays that broadcast; the product of the sizes by default.
        compile_seconds, largest, multiple: as in `fit_ladder`, the last two for each dim that needs one.

    Raises:
        RequestError: as in `fit_ladder`, or lists of different lengths.
    """
    names = list(calls)
    columns = {name: np.asarray(calls[name]) for name in names}
    if not names or len({column.shape for column in columns.values()}) != 1:
        raise RequestError(
            f"one size a call and named dim is wanted, got { ({n: c.shape for n, c in columns.items()}) }"
        )
    if len(names) == 1:
        (name,) = names
        options = {"largest": (largest or {}).get(name), "multiple": (multiple or {}).get(name, 1)}
        one = (lambda b: cost(**{name: b})) if cost is not None else None
        return {name: fit_ladder(columns[name], programs, cost=one, compile_seconds=compile_seconds, **options)}
    dims = {n: _histogram(columns[n])[0] for n in names}
    options = {n: _candidates(dims[n], programs, (largest or {}).get(n), (multiple or {}).get(n, 1)) for n in names}
    of_call = {n: options[n][1][np.searchsorted(dims[n], columns[n])] for n in names}  # the candidate of each call
    search = _Search({n: options[n][0] for n in names}, of_call, cost or _product, programs, compile_seconds)
    return search.best()


class _Search:
    """Coordinate descent over the ladders of several dims."""

    def __init__(
        self,
        candidates: Mapping[str, np.ndarray],
        calls: Mapping[str, np.ndarray],
        cost: Callable[..., np.ndarray],
        programs: int,
        compile_seconds: float,
    ):
        self.candidates, self.cost, self.programs, self.compile_seconds = candidates, cost, programs, compile_seconds
        self.names = list(candidates)
        rows = np.stack([calls[name] for name in self.names], axis=1)
        self.calls, self.counts = np.unique(rows, axis=0, return_counts=True)

    def best(self) -> dict[str, Sequence[int]]:
        """The cheapest of all ways to share the programs."""
        found: tuple[float, dict[str, Sequence[int]]] | None = None
        for shares in _shares(len(self.names), self.programs):
            result = self._descend(dict(zip(self.names, shares, strict=True)))
            if found is None or result[0] < found[0]:
                found = result
        assert found is not None
        return {name: [int(self.candidates[name][i]) for i in chosen] for name, chosen in found[1].items()}

    def _descend(self, shares: Mapping[str, int]) -> tuple[float, dict[str, Sequence[int]]]:
        # To begin with the other dims are as if never padded.
        ladders: dict[str, Sequence[int]] = {name: range(len(c)) for name, c in self.candidates.items()}
        total = np.inf
        while True:
            before, last = total, dict(ladders)
            for place, name in enumerate(self.names):
                ladders[name], total = self._refit(place, shares, ladders)
            if total >= before * (1 - 1e-12):
                return before, last

    def _refit(
        self, place: int, shares: Mapping[str, int], ladders: Mapping[str, Sequence[int]]
    ) -> tuple[Sequence[int], float]:
        """The cheapest ladder of one dim while the others stay."""
        padded = self.calls.copy()
        for other, name in enumerate(self.names):
            if other != place:
                ladder = np.asarray(ladders[name])
                padded[:, other] = ladder[np.searchsorted(ladder, self.calls[:, other])]
        rest = np.delete(padded, place, axis=1)
        groups, group = np.unique(rest, axis=0, return_inverse=True)
        own = self.candidates[self.names[place]]
        counts = np.zeros((len(groups), len(own)))
        np.add.at(counts, (group.reshape(-1), self.calls[:, place]), self.counts)
        others = [name for name in self.names if name != self.names[place]]
        sizes = {name: self.candidates[name][groups[:, i]][:, None] for i, name in enumerate(others)}
        per_call = np.broadcast_to(self.cost(**sizes, **{self.names[place]: own[None, :]}), counts.shape)
        # One more bucket here is a program more for every combination of the others'.
        each = self.compile_seconds * float(np.prod([min(len(ladders[name]), shares[name]) for name in others]))
        return _cheapest(np.asarray(per_call, np.float64), counts, shares[self.names[place]], each)


def _shares(dims: int, programs: int) -> list[tuple[int, ...]]:
    """Every way to give each dim a number of buckets, so that no dim could have one more."""
    if dims == 1:
        return [(programs,)]
    found = [(first, *rest) for first in range(1, programs + 1) for rest in _shares(dims - 1, programs // first)]
    return [s for s in found if all(np.prod(s) // s[i] * (s[i] + 1) > programs for i in range(dims))]


def _cheapest(
    per_call: np.ndarray, counts: np.ndarray, programs: int, compile_seconds: float
) -> tuple[list[int], float]:
    """Which of n candidates to take, the last one always: dynamic programming over the place of the last one taken.

    Args:
        per_call: float[g, n], what a call of group g costs in candidate n.
        counts: float[g, n], the calls of each group whose own candidate is n.
    """
    n = counts.shape[1]
    programs = min(programs, n)
    before = np.concatenate([np.zeros((len(counts), 1)), np.cumsum(counts, axis=1)], axis=1)  # calls below candidate i
    # best[k, j]: the least cost of all calls below candidate j, with k candidates taken, the last one being j - 1.
    best = np.full((programs + 1, n + 1), np.inf)
    best[0, 0] = 0
    came = np.zeros((programs + 1, n + 1), np.int64)
    step = max(1, _CHUNK // (n + 1))
    for start in range(1, n + 1, step):
        stop = min(start + step, n + 1)
        costs = per_call[:, start - 1 : stop - 1]
        # segment[j, i]: candidates i .. j - 1 padded up to candidate j - 1.
        segment = (costs * before[:, start:stop]).sum(axis=0)[:, None] - costs.T @ before[:, :stop]
        segment[np.arange(stop)[None, :] >= np.arange(start, stop)[:, None]] = np.inf
        for k in range(1, programs + 1):
            options = segment + best[k - 1, :stop]
            came[k, start:stop] = options.argmin(axis=1)
            best[k, start:stop] = options.min(axis=1)
    totals = best[1:, n] + compile_seconds * np.arange(1, programs + 1)
    k = int(totals.argmin()) + 1
    chosen, at, total = [], n, float(totals[k - 1])
    while at:
        chosen.append(at - 1)
        at, k = int(came[k, at]), k - 1
    return chosen[::-1], total


def _histogram(sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Ascending distinct sizes, and how many calls have each."""
    if isinstance(sizes, Mapping):
        values, calls = np.array(list(sizes)), np.array(list(sizes.values()), np.float64)
    else:
        values, calls = np.unique(np.asarray(sizes), return_counts=True)
    if not values.size or values.dtype.kind not in "iu" or values.min() < 1 or calls.min() < 0:
        raise RequestError("to fit buckets, give the size of at least one call; sizes are integers of at least 1")
    order = np.argsort(values)
    return values[order].astype(np.int64), calls[order].astype(np.float64)


def _candidates(sizes: np.ndarray, programs: int, largest: int | None, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """The sizes that a bucket may have, and for each of `sizes` the place of the one it is in if all are taken.

    A cheapest ladder needs no other: lowering a bucket to the largest size in it costs no call more, as long as larger
    buckets don't cost less.
    """
    if programs < 1 or multiple < 1:
        raise RequestError(f"programs and multiple must be at least 1, got {programs} and {multiple}")
    top = largest if largest is not None else int(-(-sizes[-1] // multiple) * multiple)
    if top < sizes[-1]:
        raise RequestError(f"largest is {largest}, and the traffic has a call of {sizes[-1]}; leave it out or raise it")
    rounded = np.minimum(-(-sizes // multiple) * multiple, top)
    candidates = np.unique(np.append(rounded, top))
    return candidates, np.searchsorted(candidates, rounded)


def _linear(bucket: np.ndarray) -> np.ndarray:
    return bucket.astype(np.float64)


def _product(**sizes: np.ndarray) -> np.ndarray:
    total = np.ones((), np.float64)
    for size in sizes.values():
        total = total * size
    return total


def _costs(cost: Callable[[np.ndarray], np.ndarray], buckets: np.ndarray) -> np.ndarray:
    found = np.asarray(cost(buckets), np.float64)
    if found.shape != buckets.shape or not np.isfinite(found).all() or (found < 0).any():
        raise RequestError("cost must return a finite number of at least 0 for each of the buckets that it is given")
    return found
