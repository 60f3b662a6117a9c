"""Which values become state: the cheapest cut between what is remembered and what is made again each step.

Lexicographic: nothing but data movement and elementwise work is done again per cached row; then fewest bytes; ties to
least work. It is a minimum cut: a demanded value pays its bytes (stored), or its work and whatever its operands cost
(made again). So K is kept before the heads are repeated, and after rotation, which would be work for no bytes.
"""

import math
from collections import deque
from collections.abc import Hashable

from jaxinfer.errors import NotCausalError
from jaxinfer.graph import Equation, Node
from jaxinfer.passes.incremental.causality import Timing
from jaxinfer.passes.incremental.demand import Demands, demands_of, operand_views, repeatable, storable
from jaxinfer.passes.incremental.views import Demand, Kind, Place, kinds

_BYTES = 1 << 48  # weight of a byte against a unit of work: bytes decide, work breaks ties
_REPEAT = 1 << 96  # doing more than movement again, for a bounded number of rows: only if nothing else works
_NEVER = 1 << 120

Edges = dict[Hashable, dict[Hashable, int]]


def row_bytes(node: Node, timing: Timing) -> int:
    """Bytes of one row in time."""
    (time,) = timing.of(node)
    return math.prod(n for d, n in enumerate(node.shape) if d != time) * node.dtype.itemsize


def choose_state(timing: Timing) -> frozenset[Place]:
    """The values to remember, and of which kind of demand.

    Raises:
        NotCausalError: a value over pairs of rows is demanded that can be neither stored nor made again.
    """
    everything = demands_of(
        timing, False, store=lambda d: storable(d, timing), recompute=lambda d: repeatable(d, timing)
    )
    edges: Edges = {}
    for demand, asked_by in everything.memory.items():
        if not storable(demand, timing) and not repeatable(demand, timing):
            raise NotCausalError(_unkept(demand, asked_by, timing))
    for demand in everything.memory:
        _price(demand, everything, timing, edges)
    roots = [(n, everything.serving(n, v)) for n, v in everything.roots]
    chosen: set[Place] = set()
    for part in _parts(edges, roots):
        reached = _minimum_cut(edges, [(d, "in") for d in part])
        for demand, side in reached:  # type: ignore[misc]  # the sink is in no source's part
            if side == "in" and (demand, "out") not in reached:
                chosen.add((demand[0], kinds(demand[1])))
    return frozenset(chosen)


def _unkept(demand: Demand, asked_by: Equation | None, timing: Timing) -> str:
    """Why a value can be neither stored nor made again."""
    (node, views), reader = demand, asked_by or "an output"
    if len(timing.of(node)) != 1:
        return (
            f"{reader} reads all pairs of rows of a value of shape {list(node.shape)}: there is no state of bounded "
            "size per row for it"
        )
    later = max(v.hi for v in views if v.kind is Kind.ROWS) if Kind.ROWS in kinds(views) else 0
    if later > 0:
        return (
            f"{reader} reads {node.equation} up to {later} rows further on than the row it makes, as where rows were "
            "put in front and are cut off again; there a step has no value yet. Leave those rows out before it"
        )
    (dim,) = timing.of(node)
    return (
        f"{reader} reads rows so far of {node.equation or 'an input'}, which has {node.shape[dim]} rows for "
        f"{timing.capacity} of the input: only what has a row for each can be kept. Cut it to those first"
    )


def _price(demand: Demand, everything: Demands, timing: Timing, edges: Edges) -> None:
    """Adds a demand to the network: what storing it costs, and what making it again does."""
    node, views = demand
    rows = max(timing.capacity if v.kind is Kind.PREFIX else -v.lo for v in views)
    store = row_bytes(node, timing) * rows * _BYTES if storable(demand, timing) else _NEVER
    _connect(edges, (demand, "in"), (demand, "out"), store)
    if node.equation is None or not repeatable(demand, timing):
        _connect(edges, (demand, "out"), "sink", _NEVER)
        return
    work = math.prod(node.shape)
    _connect(edges, (demand, "out"), "sink", work if timing.factors[node.equation].movement else work * _REPEAT)
    for operand, asked in operand_views(node.equation, node, views, timing):
        if operand.constant:
            continue
        served = (operand, everything.serving(operand, asked))
        if served in everything.memory:
            _connect(edges, (demand, "out"), (served, "in"), _NEVER)


def _connect(edges: Edges, a: Hashable, b: Hashable, capacity: int) -> None:
    edges.setdefault(a, {})[b] = edges.get(a, {}).get(b, 0) + capacity
    edges.setdefault(b, {}).setdefault(a, 0)


def _parts(edges: Edges, roots: list[Demand]) -> list[list[Demand]]:
    """Roots whose networks hang together. Layers don't, so each is cut alone: one search of all would be quadratic."""
    group: dict[Hashable, int] = {}
    found: list[list[Demand]] = []
    for root in dict.fromkeys(roots):
        start = (root, "in")
        if start in group:
            found[group[start]].append(root)
            continue
        found.append([root])
        frontier: list[Hashable] = [start]
        while frontier:
            here = frontier.pop()
            if here not in group and here != "sink":
                group[here] = len(found) - 1
                frontier += edges[here]
    return found


def _minimum_cut(edges: Edges, sources: list[Hashable]) -> set[Hashable]:
    """Nodes on the sources' side of a minimum cut nearest to them (Edmonds-Karp); edges become residual."""
    while True:
        parent: dict[Hashable, Hashable | None] = dict.fromkeys(sources)
        queue: deque[Hashable] = deque(sources)
        while queue and "sink" not in parent:
            here = queue.popleft()
            for there, room in edges.get(here, {}).items():
                if room > 0 and there not in parent:
                    parent[there] = here
                    queue.append(there)
        if "sink" not in parent:
            return set(parent)
        path: list[tuple[Hashable, Hashable]] = []
        there: Hashable = "sink"
        while (before := parent[there]) is not None:
            path.append((before, there))
            there = before
        room = min(edges[a][b] for a, b in path)
        for a, b in path:
            edges[a][b] -= room
            edges[b][a] += room
