"""Proves a random program and, where it is proved, holds the claim against random runs."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fuzz_rows import FEATURES, build

from jaxinfer.axes.proof import Verdict, prove
from jaxinfer.axes.states import Free, Rows
from jaxinfer.graph import Graph, evaluate, flatten

ROWS, OTHER = 11, 13


@cache
def inputs(rows: int, seed: int) -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, *FEATURES)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(random.integers(0, 99, rows), jnp.int32)


def traced(steps: Sequence[tuple[str, int]], rows: int) -> Graph:
    return flatten(jax.make_jaxpr(build(steps))(*inputs(rows, 0)))


def check(steps: Sequence[tuple[str, int]], *, sizes: bool = True) -> str:
    """ "" if the program is proved, and is so; else why it is refused. A claim that isn't so is an AssertionError.

    Args:
        sizes: also compare with a run on more rows, which compiles a second program.
    """
    graph, other = traced(steps, ROWS), traced(steps, OTHER)
    verdict = prove("batch", ROWS, graph, [0, 0], other, OTHER)
    if verdict.mixed is not None:
        return f"{verdict.mixed.equation and verdict.mixed.equation.name}: {verdict.mixed.text}"
    hold(verdict, graph, other if sizes else None)
    return ""


def hold(verdict: Verdict, graph: Graph, other: Graph | None) -> None:
    """One row changed, all rows in another order, and two rows more: each row's result stays its own."""
    given, run = inputs(ROWS, 0), runner(graph)
    before = rows_of(verdict, ROWS, run(*given))
    row = 4
    changed = [a.at[row].set(b[row]) for a, b in zip(given, inputs(ROWS, 1), strict=True)]
    others = np.delete(np.arange(ROWS), row)
    same(before, rows_of(verdict, ROWS, run(*changed)), others, others)
    order = np.random.default_rng(2).permutation(ROWS)
    same(before, rows_of(verdict, ROWS, run(*(a[order] for a in given))), order, np.arange(ROWS), rounded=True)
    if other is not None:
        more = [jnp.concatenate([a, b[:2]]) for a, b in zip(given, inputs(ROWS, 1), strict=True)]
        after = rows_of(verdict, OTHER, runner(other)(*more))
        same(before, after, np.arange(ROWS), np.arange(ROWS), rounded=True)


def runner(graph: Graph) -> Callable[..., Any]:
    """Unoptimised: compiling one small program takes less time than compiling each of its equations."""
    return jax.jit(lambda *given: evaluate(graph, given), compiler_options={"xla_backend_optimization_level": 0})


def rows_of(verdict: Verdict, rows: int, outputs: Sequence[jax.Array]) -> list[np.ndarray]:
    """The outputs as [rows, ...], by where the verdict says that rows are."""
    found = []
    for state, value in zip(verdict.outputs, map(np.asarray, outputs), strict=True):
        if isinstance(state, Rows):
            shape = (*value.shape[: state.dim], state.outer, rows, state.inner, *value.shape[state.dim + 1 :])
            found.append(np.moveaxis(value.reshape(shape), state.dim + 1, 0))
        else:
            assert isinstance(state, Free)
            one = value.take([0] * rows, next(iter(state.uniform))) if state.uniform else value
            assert not state.uniform or np.array_equal(one, value, equal_nan=True)
            found.append(
                np.broadcast_to(value, (rows, *value.shape)) if not state.uniform else np.stack([value[0]] * rows)
            )
    return found


def same(
    before: list[np.ndarray], after: list[np.ndarray], left: np.ndarray, right: np.ndarray, *, rounded: bool = False
) -> None:
    """Rows `left` of one run equal rows `right` of another.

    Args:
        rounded: rows stand elsewhere, so that they may round differently and a step function may then jump in one row.
    """
    for number, (a, b) in enumerate(zip(before, after, strict=True)):
        one, two = (np.asarray(x[i], np.float64).reshape(len(i), -1) for x, i in ((a, left), (b, right)))
        differ = [not np.allclose(x, y, rtol=2e-4, atol=2e-5, equal_nan=True) for x, y in zip(one, two, strict=True)]
        assert sum(differ) <= rounded, f"output {number} is proved, but {sum(differ)} rows differ"
