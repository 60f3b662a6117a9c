"""Which values become state: the cheapest cut between what is remembered and what is made again each step.

Lexicographic: nothing but data movement and elementwise work is done again per cached row; then fewest bytes a row;
ties to least work. It is a minimum cut: a demanded value pays its bytes (stored), or its work and whatever its operands
cost (made again). So K is kept before the heads are repeated, and after rotation, which would be work for no bytes.
"""

import math
from collections import deque

from jaxinfer.errors import NotCausalError
from jaxinfer.graph import Graph, Node
from jaxinfer.passes.incremental.causality import Timing
from jaxinfer.passes.incremental.demand import Demand, demands_of, operand_views, storable

_BYTES = 1 << 48  # weight of a byte against a unit of work: bytes decide, work breaks ties
_NEVER = 1 << 120


def row_bytes(node: Node, timing: Timing) -> int:
    """Bytes of one row in time."""
    (time,) = timing.of(node)
    return math.prod(n for d, n in enumerate(node.shape) if d != time) * node.dtype.itemsize


def choose_state(graph: Graph, timing: Timing) -> frozenset[Demand]:
    """The memory demands to store.

    Raises:
        NotCausalError: a value over pairs of rows is demanded that can be neither stored nor made again.
    """
    everything = demands_of(
        graph,
        timing,
        last=False,
        store=lambda d: storable(d, timing),
        recompute=lambda d: _movable(d, timing),
    )
    edges: dict[object, dict[object, int]] = {}

    def connect(a: object, b: object, capacity: int) -> None:
        edges.setdefault(a, {})[b] = edges.get(a, {}).get(b, 0) + capacity
        edges.setdefault(b, {}).setdefault(a, 0)

    for demand, asked_by in everything.memory.items():
        node, views = demand
        bytes_, movable = storable(demand, timing), _movable(demand, timing)
        if not bytes_ and not movable:
            raise NotCausalError(
                f"{asked_by or 'an output'} reads all pairs of rows of a value of shape {list(node.shape)}: there is "
                "no state of bounded size per row for it"
            )
        connect((demand, "in"), (demand, "out"), row_bytes(node, timing) * _BYTES if bytes_ else _NEVER)
        if movable and node.equation is not None:
            connect((demand, "out"), "sink", math.prod(node.shape))
            for operand in operand_views(node.equation, node, views, timing):
                if operand in everything.memory:
                    connect((demand, "out"), (operand, "in"), _NEVER)
        else:
            connect((demand, "out"), "sink", _NEVER)
    for demand in everything.roots:
        connect("source", (demand, "in"), _NEVER)
    reached = _minimum_cut(edges)
    return frozenset(d for d in everything.memory if (d, "in") in reached and (d, "out") not in reached)


def _movable(demand: Demand, timing: Timing) -> bool:
    node = demand[0]
    return node.equation is not None and timing.factors[node.equation].movement


def _minimum_cut(edges: dict[object, dict[object, int]]) -> set[object]:
    """Nodes on the source's side of a minimum cut nearest to the source (Edmonds-Karp); edges become residual."""
    while True:
        parent: dict[object, object] = {"source": "source"}
        queue: deque[object] = deque(["source"])
        while queue and "sink" not in parent:
            here = queue.popleft()
            for there, room in edges.get(here, {}).items():
                if room > 0 and there not in parent:
                    parent[there] = here
                    queue.append(there)
        if "sink" not in parent:
            return set(parent)
        path: list[tuple[object, object]] = []
        there: object = "sink"
        while there != "source":
            path.append((parent[there], there))
            there = parent[there]
        room = min(edges[a][b] for a, b in path)
        for a, b in path:
            edges[a][b] -= room
            edges[b][a] += room
