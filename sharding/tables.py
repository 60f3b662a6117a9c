"""Tables: what every option of every choice costs on one mesh, in seconds and bytes; equal choices counted together."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from jaxinfer.graph import Equation, Node
from jaxinfer.sharding.clusters import Values, Whole
from jaxinfer.sharding.costs import Costs, How, flops
from jaxinfer.sharding.hardware import compute_time
from jaxinfer.sharding.layouts import REPLICATED, Codes, options, placed, shards
from jaxinfer.sharding.network import Network, Pair, Variable

Allowed = Callable[[int, Codes], np.ndarray]


@dataclass(eq=False)
class Tables:
    """A problem of choices: minimise the sum of times and pairs under a limit on the sum of bytes."""

    codes: list[Codes]  # of each class of variables
    times: list[np.ndarray]  # seconds of each option, of all members together
    memory: list[np.ndarray]  # bytes on a device of each option, of all members together
    pairs: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    classes: list[int] = field(default_factory=list)  # of each variable


def tables_of(
    network: Network, colours: Sequence[int], costs: Costs, held: Collection[Node], allowed: Allowed | None = None
) -> Tables:
    """The tables of a network whose variables of one colour choose alike.

    Args:
        held: values that stay in memory: parameters and state.
        allowed: (variable, codes) -> which of the options may be taken; all if not given.
    """
    order = {c: n for n, c in enumerate(dict.fromkeys(colours))}
    classes = [order[c] for c in colours]
    members = Counter(classes)
    first: dict[int, int] = {}
    for number, c in enumerate(classes):
        first.setdefault(c, number)
    inside = _freed(network)
    tables = Tables([], [], [], classes=classes)
    for c, number in first.items():
        variable = network.variables[number]
        codes = options(variable.sizes, variable.patterns, costs.mesh)
        codes = codes if allowed is None else codes[allowed(number, codes)]
        time = _time(network, variable, inside.get(number, Counter()), codes, costs)
        tables.codes.append(codes)
        memory = members[c] * _memory(network.values, variable, codes, costs, held)
        tables.times.append(members[c] * time + _TIDY * memory / costs.hardware.hbm_bandwidth)
        tables.memory.append(memory)
    counted: Counter[tuple[int, int, Pair]] = Counter()
    for p in network.pairs:
        alike = replace(p, a=first[classes[p.a]], b=first[classes[p.b]])
        counted[classes[p.a], classes[p.b], alike] += 1
    for (a, b, p), count in counted.items():
        before, after = placed(tables.codes[a], p.before), placed(tables.codes[b], p.after)
        table = count * p.weight * costs.reshard(before, after, p.size, p.shape, p.parts)
        if a == b:
            tables.times[a] = tables.times[a] + np.diag(table)
        elif (b, a) in tables.pairs:
            tables.pairs[b, a] = tables.pairs[b, a] + table.T
        else:
            tables.pairs[a, b] = tables.pairs.get((a, b), 0.0) + table
    return tables


class _Freed(NamedTuple):
    """A value that an equation needs with some places unsharded; one that several need so is gathered once."""

    places: tuple[int, ...]  # of the cluster's choices in the value
    gone: tuple[int, ...]
    size: float  # of the value, or of the result if it is reduced
    shape: tuple[int, ...]
    parts: tuple[int, ...]
    how: How
    weight: float


def _freed(network: Network) -> dict[int, Counter[_Freed]]:
    """For each variable what its equations need unsharded, and how often."""
    values = network.values
    dims: dict[tuple[Node, Equation], dict[int, Whole]] = defaultdict(dict)
    for whole in values.wholes:
        dims[whole.node, whole.equation][whole.dim] = whole
    found: dict[int, Counter[_Freed]] = defaultdict(Counter)
    gathered: set[tuple[Node, tuple[int, ...]]] = set()
    for (node, equation), wholes in dims.items():
        number = network.cluster.get(values.root(node))
        whole = next(iter(wholes.values()))
        key = node, tuple(sorted(wholes))
        if number is None or (not whole.reduced and key in gathered):
            continue
        gathered.add(key)
        parts = tuple(map(len, values.leaves(node)))
        starts = [sum(parts[:d]) for d in range(len(parts))]
        gone = tuple(p for d in sorted(wholes) for p in range(starts[d], starts[d] + parts[d]))
        size = values.bytes(equation.outputs[0] if whole.reduced else node)
        places = network.places(number, node)
        found[number][_Freed(places, gone, size, node.shape, parts, _how(whole), whole.weight)] += 1
    return found


def _how(whole: Whole) -> How:
    if not whole.reduced:
        return "gathered"
    return "picked" if whole.equation.name in ("argmax", "argmin") else "reduced"


def _time(network: Network, variable: Variable, freed: Counter[_Freed], codes: Codes, costs: Costs) -> np.ndarray:
    if variable.anchor is not None:
        return _anchor_time(network.values, variable, codes, costs)
    if variable.kind == "use":
        return np.zeros(len(codes))
    return _cluster_time(network.values, variable, freed, codes, costs)


def _anchor_time(values: Values, variable: Variable, codes: Codes, costs: Costs) -> np.ndarray:
    equation, weight = variable.anchor or (None, 0.0)
    assert equation is not None
    moved = np.zeros(len(codes))
    read = {0: 1, 1: 2}.get(len(equation.outputs), 1) if equation.name == "gather" else None
    for role, (node, places) in enumerate(variable.roles):
        size = values.bytes(node) if role != 0 or read is None else values.bytes(equation.outputs[0])
        moved = moved + size / shards(placed(codes, places), costs.mesh)
    work = flops(equation) / shards(codes, costs.mesh)
    return weight * (compute_time(work, moved, equation.inputs[0].dtype, costs.hardware) - costs.hardware.launch)


def _cluster_time(values: Values, variable: Variable, freed: Counter[_Freed], codes: Codes, costs: Costs) -> np.ndarray:
    """Memory traffic of the elementwise work between anchors, and what needs a dim whole."""
    total = np.zeros(len(codes))
    counted: Counter[tuple[tuple[int, ...], float]] = Counter()
    for node in variable.members:
        if node.equation is not None and node.equation.name not in _FREE:
            counted[_places(values, variable, node), values.bytes(node)] += 1
    for (places, size), times in counted.items():
        traffic = size / shards(placed(codes, places), costs.mesh) / costs.hardware.hbm_bandwidth
        total += times * _UNFUSED * traffic
    for need, times in freed.items():
        mine = placed(codes, need.places)
        spent = costs.freeing(mine, need.gone, need.size, need.shape, need.parts, need.how)
        total += times * need.weight * spent
    return total


_FREE = frozenset({"broadcast_in_dim", "reshape", "transpose", "squeeze", "expand_dims", "iota", "copy", "slice"})
_TIDY = 1e-3  # of the time to read them: what bytes held cost, so that of equal plans the smaller is taken
_UNFUSED = 0.5  # of elementwise results reach memory, as XLA fuses them


def _places(values: Values, variable: Variable, node: Node) -> tuple[int, ...]:
    mine = [a for dim in values.leaves(node) for a in dim]
    return tuple(mine.index(a) if a in mine else REPLICATED for a in variable.atoms)


def _memory(values: Values, variable: Variable, codes: Codes, costs: Costs, held: Collection[Node]) -> np.ndarray:
    total = np.zeros(len(codes))
    if variable.kind == "cluster":
        for node in variable.members:
            if node in held:
                places = _places(values, variable, node)
                total += values.bytes(node) / shards(placed(codes, places), costs.mesh)
    return total


def traffic(network: Network, tables: Tables, chosen: Sequence[int], costs: Costs) -> tuple[dict[str, float], float]:
    """(how many collectives of each kind, bytes of all on a device) that a choice of options makes."""
    kinds: defaultdict[str, float] = defaultdict(float)
    moved = 0.0
    for p in network.pairs:
        a, b = tables.classes[p.a], tables.classes[p.b]
        before = placed(tables.codes[a][chosen[a]], p.before).tolist()
        after = placed(tables.codes[b][chosen[b]], p.after).tolist()
        for kind, _, part in costs.collectives(before, after, p.shape, p.parts):
            kinds[kind] += p.weight
            moved += p.weight * part * p.size
    for number, freed in _freed(network).items():
        c = tables.classes[number]
        for need, times in freed.items():
            mine = placed(tables.codes[c][chosen[c]], need.places).tolist()
            for kind, _, part in costs.freed(mine, need.gone, need.shape, need.parts, need.how):
                kinds[kind] += times * need.weight
                moved += times * need.weight * part * need.size
    return dict(kinds), moved


def total(tables: Tables, chosen: Sequence[int]) -> float:
    """Seconds of one choice of options, one a class."""
    seconds = math.fsum(float(t[x]) for t, x in zip(tables.times, chosen, strict=True))
    return seconds + math.fsum(float(m[chosen[a], chosen[b]]) for (a, b), m in tables.pairs.items())


def memory(tables: Tables, chosen: Sequence[int]) -> float:
    """Bytes on a device of one choice of options."""
    return math.fsum(float(m[x]) for m, x in zip(tables.memory, chosen, strict=True))
