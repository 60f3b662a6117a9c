"""Layouts: which atom each mesh axis shards. Every choice is a row of codes, one a mesh axis, -1 for replicated."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from jaxinfer.sharding.moves import Layout

Codes = np.ndarray  # int [options, mesh axes]: which of some choices each axis shards

REPLICATED, PARTIAL = -1, -2
MOST = 400  # options of one variable; with more, those that use the fewest different choices are kept


def options(sizes: Sequence[int], dims: Iterable[tuple[tuple[int, ...], ...]], mesh: Sequence[int]) -> Codes:
    """Every way to shard values over a mesh.

    Args:
        sizes: of each choice.
        dims: for each value, the choices of each dim, major to minor. What a dim is sharded by must be blocks of it:
            a choice counts only when those before it in the dim are sharded to the end.
        mesh: sizes of the mesh's axes.
    """
    patterns = {p for value in dims for p in value if len(p) > 1}
    found = []
    for codes in itertools.product(range(-1, len(sizes)), repeat=len(mesh)):
        shards = [1] * len(sizes)
        for code, n in zip(codes, mesh, strict=True):
            if code >= 0:
                shards[code] *= n
        if any(sizes[c] % n for c, n in enumerate(shards)):
            continue
        if all(_blocks(pattern, sizes, shards) for pattern in patterns):
            found.append(codes)
    if len(found) > MOST:
        found = sorted(found, key=lambda codes: len({c for c in codes if c >= 0}))[:MOST]
    return np.array(found, np.int64).reshape(len(found), len(mesh))


def _blocks(pattern: tuple[int, ...], sizes: Sequence[int], shards: Sequence[int]) -> bool:
    full = True
    for choice in pattern:
        if shards[choice] > 1 and not full:
            return False
        full = full and shards[choice] == sizes[choice]
    return True


def placed(codes: Codes, places: Sequence[int]) -> Codes:
    """Codes as places in one value: `places[choice]`, REPLICATED where the value doesn't have the choice."""
    return np.array([*places, REPLICATED], np.int64)[codes]


def shards(codes: Codes, mesh: Sequence[int]) -> np.ndarray:
    """Into how many pieces each option cuts: float [options]."""
    return np.prod(np.where(codes >= 0, np.array(mesh), 1), axis=1).astype(float)


def layout(codes: Sequence[int], parts: Sequence[int]) -> Layout:
    """For each dim the mesh axes that shard it, major to minor.

    Args:
        codes: for each mesh axis the place that it shards, or a negative number.
        parts: how many places each dim has.
    """
    cut, start = [], 0
    for n in parts:
        cut.append(tuple(m for place in range(start, start + n) for m, code in enumerate(codes) if code == place))
        start += n
    return tuple(cut)
