"""Moves: how a value gets from one layout to another, in steps that XLA compiles to one collective each, or to none.

The planner reckons with these steps and the emitted program takes them one by one: left to itself, XLA falls back to
gathering the whole value for some of the changes that two steps make cheaply.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from jax.sharding import PartitionSpec

Layout = tuple[tuple[int, ...], ...]  # for each dim the mesh axes that shard it, major to minor


class Step(NamedTuple):
    """One change of layout."""

    kind: str  # of collective; "" for a slice of what each device has
    axes: tuple[int, ...]  # of the mesh, that take part
    part: float  # of the whole value, on one device: an all-gather's result, what the others send
    after: Layout


@lru_cache(maxsize=1 << 17)
def steps(before: Layout, after: Layout, shape: tuple[int, ...], mesh: tuple[int, ...]) -> tuple[Step, ...]:
    """The steps between two layouts: slices first, then exchanges between dims, then gathers.

    Devices hold contiguous blocks, so a dim is cut finer, gathered or exchanged by its minor axes alone; where others
    have to go, blocks are permuted first.

    Args:
        shape: of the value.
        mesh: sizes of the mesh's axes.
    """
    walk = _Walk([list(d) for d in before], [list(d) for d in after], shape, mesh)
    while walk.dims != walk.goal:
        walk.next()
    return tuple(walk.found)


def layout_of(spec: PartitionSpec, rank: int, names: Sequence[str]) -> Layout:
    """A PartitionSpec as a Layout."""
    dims = [() if d is None else (d,) if isinstance(d, str) else d for d in spec]
    return (*(tuple(names.index(axis) for axis in d) for d in dims), *((),) * (rank - len(dims)))


def spec_of(layout: Layout, names: Sequence[str]) -> PartitionSpec:
    """A Layout as a PartitionSpec."""
    return PartitionSpec(*(tuple(names[m] for m in dim) or None for dim in layout))


class _Walk:
    """A layout on its way to another."""

    def __init__(self, dims: list[list[int]], goal: list[list[int]], shape: tuple[int, ...], mesh: tuple[int, ...]):
        self.dims, self.goal, self.shape, self.mesh = dims, goal, shape, mesh
        self.found: list[Step] = []
        self.wanted = {m: d for d, axes in enumerate(goal) for m in axes}

    def next(self) -> None:
        if self._slice(in_order=True):
            return
        groups = self._groups()
        ready = [(p, q) for p, q in groups if q is not None and not self._leaving(q)]
        gathers = sorted((p for p, q in groups if q is None), key=lambda p: all(q != p for _, q in groups))
        if ready:
            p, q = min(ready, key=lambda g: min(self.goal[g[1]].index(m) for m in groups[g]))
            self._exchange(p, q, groups[p, q])
        elif gathers:
            self._gather(gathers[0], groups[gathers[0], None])
        elif groups:  # dims that swap their axes
            p, q = next((p, q) for p, q in groups if q is not None)
            self._exchange(p, q, groups[p, q])
        elif not self._slice(in_order=False):
            self._permute(self.goal)

    def _held(self) -> int:
        return math.prod(self.mesh[m] for axes in self.dims for m in axes)

    def _add(self, kind: str, axes: Sequence[int], part: float) -> None:
        self.found.append(Step(kind, tuple(sorted(axes)), part, tuple(tuple(d) for d in self.dims)))

    def _leaving(self, dim: int) -> list[int]:
        return [m for m in self.dims[dim] if self.wanted.get(m) != dim]

    def _groups(self) -> dict[tuple[int, int | None], list[int]]:
        """(from dim, to dim or None) -> the axes that have to go there."""
        groups: dict[tuple[int, int | None], list[int]] = {}
        for p in range(len(self.dims)):
            for m in self._leaving(p):
                q = self.wanted.get(m)
                groups.setdefault((p, q), []).append(m)
        return groups

    def _slice(self, *, in_order: bool) -> bool:
        used = {m for axes in self.dims for m in axes}
        new: list[int] = []
        for mine, wanted in zip(self.dims, self.goal, strict=True):
            for m in wanted:
                fits = mine == wanted[: len(mine)] and m == wanted[len(mine)] if len(mine) < len(wanted) else False
                if m not in used and (fits or not in_order):
                    mine.append(m)
                    new.append(m)
        if new:
            self._add("", new, 0.0)
        return bool(new)

    def _exchange(self, p: int, q: int, axes: list[int]) -> None:
        if self.shape[q] % math.prod(self.mesh[m] for m in (*self.dims[q], *axes)):
            self._gather(p, axes)
            return
        self._to_tail(p, axes)
        part = 1 / self._held()
        tail = self.dims[p][-len(axes) :]
        del self.dims[p][-len(axes) :]
        self.dims[q].extend(tail)
        self._add("all-to-all", axes, part)

    def _gather(self, p: int, axes: list[int]) -> None:
        self._to_tail(p, axes)
        del self.dims[p][-len(axes) :]
        self._add("all-gather", axes, 1 / self._held())

    def _to_tail(self, p: int, axes: list[int]) -> None:
        if set(self.dims[p][-len(axes) :]) != set(axes):
            order = [*(m for m in self.dims[p] if m not in axes), *axes]
            self._permute([order if d == p else mine for d, mine in enumerate(self.dims)])

    def _permute(self, dims: list[list[int]]) -> None:
        moved = [m for mine, theirs in zip(self.dims, dims, strict=True) if mine != theirs for m in mine]
        self.dims = [list(d) for d in dims]
        self._add("collective-permute", moved, 1 / self._held())
