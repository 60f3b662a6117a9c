"""Derives a random program's step and holds it against the forward, and the claim of causality against changes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from fuzz_time import FEATURES, Shape, build, weights

import jaxinfer as ji

T, K, SLOTS, VOCAB = 12, 4, 2, 11
Steps = Sequence[tuple[str, int]]


def check(steps: Steps, *, last: bool = False) -> str:
    """ "" if the program is derived, and rightly; else why it is refused. A wrong step is an AssertionError.

    Args:
        last: also compare the last row alone, which compiles another program, and in a state with room for fewer rows.
    """
    shape, function, params = Shape.of(steps), build(steps), {"embed": weights(1, (VOCAB, FEATURES))}
    program = ji.trace(function, params, ji.spec(shape.axes, shape.dtype))
    try:
        step = ji.incremental(program, length=T)
    except ji.NotCausalError as error:
        return str(error)
    random = np.random.default_rng(0)
    rows = [drawn(shape, T, random) for _ in range(3)]
    forward = runner(function)
    full = [[rows_first(shape, o) for o in forward(params, placed(shape, r))] for r in rows]
    looks_back(shape, forward, params, rows, full)
    decodes(shape, step, params, rows, full, last, room=T - 3 if last else T)
    return ""


def runner(function: Callable[..., Any]) -> Callable[..., Any]:
    """Unoptimised: compiling takes most of the time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def drawn(shape: Shape, count: int, random: np.random.Generator) -> np.ndarray:
    """Rows of one sequence: [count, 4] or [count]"""
    if shape.dtype == "int32":
        return random.integers(0, VOCAB, count).astype(np.int32)
    return random.standard_normal((count, FEATURES)).astype(np.float32)


def placed(shape: Shape, rows: np.ndarray, leading: int = 0) -> np.ndarray:
    """Rows as the program takes them, with a batch of one where it has one, behind `leading` dims."""
    names = shape.axes.split()
    return np.expand_dims(rows, leading + names.index("batch")) if "batch" in names else rows


def rows_first(shape: Shape, output: Any, leading: int = 0) -> np.ndarray:
    """An output without its batch: [time, -1]"""
    names, output = shape.axes.split(), np.asarray(output)
    output = output.squeeze(leading + names.index("batch")) if "batch" in names else output
    return output.reshape(*output.shape[: leading + 1], -1)


def looks_back(shape: Shape, forward: Any, params: Any, rows: list[np.ndarray], full: list[list[np.ndarray]]) -> None:
    """Whatever comes after a row, its outputs stay."""
    for t in (0, 1, T // 2, T - 2):
        for other in (1, 2):
            changed = np.concatenate([rows[0][: t + 1], rows[other][t + 1 :]])
            for number, (a, b) in enumerate(zip(full[0], forward(params, placed(shape, changed)), strict=True)):
                b = rows_first(shape, b)[: t + 1]
                same(b, a[: t + 1], a, f"derived, but output {number} up to row {t} depends on later ones")


def decodes(
    shape: Shape, step: ji.Step, params: Any, rows: list[np.ndarray], full: list[Any], last: bool, room: int = T
) -> None:
    """Chunks of random real lengths, padded with other content; a slot whose sequence has ended starts another."""
    leaves = jax.tree.leaves(params)
    run = runner(lambda given, at, n, state: step(leaves, [given], at, state, n))
    only = runner(lambda given, at, n, state: step(leaves, [given], at, state, n, last=True)) if last else None
    random = np.random.default_rng(1)
    state, done = step.init(SLOTS, room), np.zeros(SLOTS, np.int32)
    serves, waiting = list(range(SLOTS)), list(range(SLOTS, len(rows)))
    while waiting or (done < room).any():
        for i in range(SLOTS):
            if done[i] == room and waiting:
                serves[i], done[i] = waiting.pop(), 0
        counts = np.minimum(random.integers(0, K + 1, SLOTS), room - done).astype(np.int32)
        chunk = np.stack([drawn(shape, K, random) for _ in range(SLOTS)])
        for i, s in enumerate(serves):
            chunk[i, : counts[i]] = rows[s][done[i] : done[i] + counts[i]]
        given = placed(shape, chunk, 1)
        outputs, after = run(given, done, counts, state)
        lasts = only(given, done, counts, state)[0] if only else outputs
        for number, (out, one) in enumerate(zip(outputs, lasts, strict=True)):
            got, end = rows_first(shape, out, 1), rows_first(shape, one, 1)
            for i, s in enumerate(serves):
                at, want = f"output {number}, rows {done[i]} + {counts[i]}", full[s][number]
                same(got[i, : counts[i]], want[done[i] : done[i] + counts[i]], want, at)
                if only and counts[i]:
                    same(end[i, 0], want[done[i] + counts[i] - 1], want, f"the last row of {at}")
        for a, b in zip(state, after, strict=True):
            for i in np.flatnonzero((counts == 0) & (done > 0)):
                assert np.array_equal(np.asarray(a)[i], np.asarray(b)[i], equal_nan=True), "no rows change the state"
        state, done = after, done + counts


def same(got: np.ndarray, want: np.ndarray, of: np.ndarray, what: str) -> None:
    """Within 1e-4 of the largest output."""
    bound = 1e-4 * max(float(np.abs(of).max()), 1e-3)
    off = np.abs(got.astype(np.float64) - want.astype(np.float64))
    assert got.shape == want.shape and (off <= bound).all(), f"{what}: off by {off.max() if off.size else got.shape}"
