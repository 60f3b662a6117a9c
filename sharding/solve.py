"""The cheapest options under a limit on memory: what has few neighbours is eliminated exactly, the rest is a MILP."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.errors import PlanError
from jaxinfer.sharding.tables import Tables, memory, total

LARGEST = 4_000_000  # entries of a table that elimination may build
GAP = 1e-6  # relative; HiGHS stops there


@dataclass(frozen=True)
class Solution:
    """One option a class."""

    chosen: tuple[int, ...]
    seconds: float
    memory: float  # bytes a device


def solve(tables: Tables, limit: float = math.inf) -> Solution:
    """The options of the least time within `limit` bytes a device.

    Without a binding limit, variables are eliminated one by one (min-plus), which is exact; what has too many
    neighbours for that, or a limit that binds, is solved as a mixed-integer program by HiGHS.

    Raises:
        PlanError: no options fit; says how many bytes the smallest need.
    """
    free = _eliminated(tables)
    if free.memory <= limit:
        return free
    least = math.fsum(float(m.min()) for m in tables.memory)
    if least > limit:
        raise PlanError(f"nothing fits: the smallest layout takes {least:.4g} bytes a device, the limit is {limit:.4g}")
    return _milp(tables, set(range(len(tables.times))), limit)


def _answer(tables: Tables, chosen: list[int]) -> Solution:
    return Solution(tuple(chosen), total(tables, chosen), memory(tables, chosen))


def _eliminated(tables: Tables) -> Solution:
    """Solves without a limit: removes the variable with the smallest table around it until none is left."""
    unary = [t.copy() for t in tables.times]
    pairs = {frozenset(k): (k, m) for k, m in tables.pairs.items()}
    factors: list[tuple[tuple[int, ...], np.ndarray]] = [(k, m) for k, m in pairs.values()]
    alive, undo = set(range(len(unary))), []
    while alive:
        around = {v: {w for scope, _ in factors if v in scope for w in scope} | {v} for v in alive}
        entries = {v: math.prod(len(unary[w]) for w in scope) for v, scope in around.items()}
        v = min(alive, key=lambda u: (entries[u], u))
        if entries[v] > LARGEST:
            break
        scope = tuple(sorted(around[v] - {v}))
        table = _sum([((v,), unary[v]), *((s, m) for s, m in factors if v in s)], (v, *scope), unary)
        undo.append((v, scope, np.argmin(table, axis=0)))
        factors = [f for f in factors if v not in f[0]]
        least = np.min(table, axis=0)
        alive.discard(v)
        if len(scope) == 1:
            unary[scope[0]] = unary[scope[0]] + least
        elif scope:
            factors.append((scope, least))
    chosen = [0] * len(unary)
    if alive:
        rest = _milp(tables, alive, math.inf, unary, factors)
        for v in alive:
            chosen[v] = rest.chosen[v]
    for v, scope, best in reversed(undo):
        chosen[v] = int(best[tuple(chosen[w] for w in scope)])
    return _answer(tables, chosen)


def _sum(terms: list[tuple[tuple[int, ...], np.ndarray]], scope: tuple[int, ...], unary: list[np.ndarray]) -> Any:
    table = np.zeros([len(unary[v]) for v in scope])
    for mine, m in terms:
        order = sorted(range(len(mine)), key=lambda i: scope.index(mine[i]))
        shape = [len(unary[v]) if v in mine else 1 for v in scope]
        table = table + np.transpose(m, order).reshape(shape)
    return table


def _milp(
    tables: Tables,
    variables: set[int],
    limit: float,
    unary: list[np.ndarray] | None = None,
    factors: list[tuple[tuple[int, ...], np.ndarray]] | None = None,
) -> Solution:
    """One-hot options, and for each table a transport between the options of those it ties together."""
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    times = tables.times if unary is None else unary
    terms: list[tuple[tuple[int, ...], np.ndarray]] = list(tables.pairs.items()) if factors is None else factors
    scale = 1.0 / max(1e-12, max((float(np.max(t)) for t in times), default=1.0))
    program = _Program()
    first = {v: program.columns(times[v] * scale, binary=True) for v in sorted(variables)}
    for v in first:
        program.row({first[v] + i: 1.0 for i in range(len(times[v]))}, 1.0)
    for scope, table in terms:
        start = program.columns(table.ravel() * scale, binary=False)
        numbers = start + np.arange(table.size).reshape(table.shape)
        for axis, v in enumerate(scope):
            for i in range(table.shape[axis]):
                row = dict.fromkeys(np.take(numbers, i, axis=axis).ravel().tolist(), 1.0)
                program.row({**row, first[v] + i: -1.0}, 0.0)
    right: Any = np.array(program.right)
    constraints = [LinearConstraint(program.matrix(sparse), right, right)]
    if math.isfinite(limit):
        weights = np.zeros(len(program.cost))
        most = max(1.0, *(float(m.max()) for m in tables.memory))  # near 1, as the solver's tolerances want it
        for v in first:
            weights[first[v] : first[v] + len(times[v])] = tables.memory[v] / most
        constraints.append(LinearConstraint(weights[None, :], -np.inf, limit / most))
    result = milp(
        np.array(program.cost),
        constraints=constraints,
        integrality=np.array(program.binary),
        bounds=Bounds(0.0, 1.0),
        options={"mip_rel_gap": GAP},
    )
    if result.x is None:
        raise PlanError(f"no layout fits {limit:.4g} bytes a device: {result.message}")
    chosen = [0] * len(times)
    for v in first:
        chosen[v] = int(np.argmax(result.x[first[v] : first[v] + len(times[v])]))
    return _answer(tables, chosen)


class _Program:
    """Columns and equality rows of a mixed-integer program, as they are added."""

    def __init__(self) -> None:
        self.cost: list[float] = []
        self.binary: list[int] = []
        self.right: list[float] = []
        self._entries: tuple[list[int], list[int], list[float]] = ([], [], [])

    def columns(self, cost: np.ndarray, *, binary: bool) -> int:
        """Adds variables in [0, 1]; the number of the first."""
        start = len(self.cost)
        self.cost.extend(cost.tolist())
        self.binary.extend([int(binary)] * len(cost))
        return start

    def row(self, entries: dict[int, float], right: float) -> None:
        """Adds the constraint that the weighted sum of some columns is `right`."""
        rows, columns, values = self._entries
        rows.extend([len(self.right)] * len(entries))
        columns.extend(entries)
        values.extend(entries.values())
        self.right.append(right)

    def matrix(self, sparse: Any) -> Any:
        """The constraints' coefficients."""
        rows, columns, values = self._entries
        return sparse.csr_array((values, (rows, columns)), shape=(len(self.right), len(self.cost)))
