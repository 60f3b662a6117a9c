"""Network: the planner's choices and what each pair of them costs.

Values -> variables (a cluster's layout, an anchor's strategy, the layout that a shared operand is brought to) and pairs
(a value moves from one to the other) -> equal layers folded into one with a count -> costs of what is left
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from jaxinfer.axes.factors import factors_of
from jaxinfer.graph import Equation, Node
from jaxinfer.sharding.clusters import DATA, STATIC, Bond, Occurrence, Values, params_of
from jaxinfer.sharding.layouts import PARTIAL, REPLICATED

ROUNDS = 6  # of colouring: layers that agree so far around are one class
Pattern = tuple[tuple[int, ...], ...]  # for each dim of a value, which choices it has, major to minor


@dataclass(eq=False)
class Variable:
    """One choice of the plan: for each mesh axis one of `sizes`, or none."""

    kind: str  # "cluster", "anchor" or "use"
    sizes: tuple[int, ...]  # of the choices
    patterns: frozenset[Pattern]  # of the values that it lays out
    signature: Hashable
    anchor: Occurrence | None = None
    members: list[Node] = field(default_factory=list)  # of a cluster; the one value of a use
    atoms: tuple[int, ...] = ()  # of a cluster or use: the choices as atoms
    roles: list[tuple[Node, tuple[int, ...]]] = field(default_factory=list)  # anchor: each choice's place in a value


@dataclass(frozen=True)
class Pair:
    """A value of `size` bytes that one variable hands to another; maps from the choices of each to its places."""

    a: int
    b: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    size: float
    weight: float
    shape: tuple[int, ...]
    parts: tuple[int, ...]  # places of each dim


@dataclass(eq=False)
class Network:
    """What there is to choose. Variables stand for a class of `count` equal ones."""

    values: Values
    variables: list[Variable] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    cluster: dict[Node, int] = field(default_factory=dict)  # root of a cluster -> variable
    anchor: dict[int, int] = field(default_factory=dict)  # number of an anchor in values.anchors -> variable
    use: dict[Node, int] = field(default_factory=dict)
    bound: dict[tuple[Node, Node], tuple[int, tuple[int, ...]]] = field(default_factory=dict)  # of (value, result):
    # the variable whose layout the value is brought to, and the place in the value of each of its choices

    def places(self, variable: int, node: Node) -> tuple[int, ...]:
        """For each choice of a cluster or use, its place among the atoms of a value."""
        mine = [a for dim in self.values.leaves(node) for a in dim]
        return tuple(mine.index(a) if a in mine else REPLICATED for a in self.variables[variable].atoms)

    def pair(self, a: int, b: int, before: tuple[int, ...], after: tuple[int, ...], node: Node, weight: float) -> None:
        """Says that one variable hands a value to another."""
        parts = tuple(map(len, self.values.leaves(node)))
        self.pairs.append(Pair(a, b, before, after, self.values.bytes(node), weight, node.shape, parts))


def network_of(values: Values, outside: Sequence[Node]) -> Network:
    """The network of some values.

    Args:
        outside: inputs and outputs, which have a layout though no anchor may touch them.
    """
    network = Network(values)
    touched = [n for a in values.anchors for n in (*a.equation.inputs, *a.equation.outputs)]
    for node in (*touched, *outside):
        values.of(node)
    members: dict[Node, dict[Node, None]] = defaultdict(dict)
    for node in values.dims:
        if values.kinds.get(node, STATIC) != STATIC:
            members[values.root(node)][node] = None
    wanted = {values.root(n) for n in outside if values.kinds.get(n, STATIC) == DATA}
    for occurrence in values.anchors:
        sides = (*occurrence.equation.inputs, *occurrence.equation.outputs)
        wanted.update(values.root(n) for n in sides if values.kinds.get(n, STATIC) != STATIC)
    wanted.update(values.root(n) for bond in values.bonds for n in (bond.source, bond.result))
    for root, nodes in members.items():
        if root in wanted:
            network.cluster[root] = len(network.variables)
            network.variables.append(_cluster(values, list(nodes)))
    bonds = [*values.bonds, *(b for riders in values.riders.values() for b in riders)]
    readers = Counter(bond.source for bond in bonds)
    readers.update(
        n for a in values.anchors for n in dict.fromkeys(a.equation.inputs) if values.kinds.get(n, STATIC) == DATA
    )
    for number, occurrence in enumerate(values.anchors):
        network.anchor[number] = len(network.variables)
        network.variables.append(_anchor(values, occurrence))
        _connect(network, number, occurrence, readers)
    _bind(network, bonds, readers)
    return network


def _pattern(values: Values, node: Node, choices: Sequence[int]) -> Pattern:
    return tuple(tuple(choices.index(a) for a in dim if a in choices) for dim in values.leaves(node))


def _cluster(values: Values, nodes: list[Node]) -> Variable:
    atoms: dict[int, None] = {}
    twice: set[int] = set()
    for node in nodes:
        leaves = [a for dim in values.leaves(node) for a in dim]
        atoms.update(dict.fromkeys(leaves))
        twice.update(a for a, n in Counter(leaves).items() if n > 1)
    choices = [a for a in atoms if a not in twice]
    patterns = {n: _pattern(values, n, choices) for n in nodes}
    shapes = Counter((n.shape, str(n.dtype), values.kinds.get(n), patterns[n]) for n in nodes)
    sizes = tuple(values.atoms.sizes[a] for a in choices)
    signature = ("cluster", sizes, tuple(sorted(map(str, shapes.items()))))
    return Variable("cluster", sizes, frozenset(patterns.values()), signature, members=nodes, atoms=tuple(choices))


def _anchor(values: Values, occurrence: Occurrence) -> Variable:
    """The strategies of an anchor: each of its factors, part by part, and for a look-up the rows of its table."""
    equation, factors = occurrence.equation, factors_of(occurrence.equation)
    nodes = [*equation.inputs, *equation.outputs]
    places: dict[tuple[int, int], list[int]] = {}
    sizes: dict[tuple[int, int], int] = {}
    # Devices would need each other's borders.
    windows = {factors.inputs[role][d] for role, d in factors.halo}
    for role, (node, dims) in enumerate(zip(nodes, (*factors.inputs, *factors.outputs), strict=True)):
        start = 0
        for d, (f, leaves) in enumerate(zip(dims, values.leaves(node), strict=True)):
            if f is None and role == 0 and _looked_up(equation, d):
                f = -1
            for k, atom in enumerate(leaves):
                if f is not None and f not in windows:
                    places.setdefault((f, k), [REPLICATED] * len(nodes))[role] = start + k
                    sizes[f, k] = values.atoms.sizes[atom]
            start += len(leaves)
    for key, where in places.items():  # summed up: partial in the results
        if all(where[role] == REPLICATED for role in range(len(equation.inputs), len(nodes))):
            places[key] = [*where[: len(equation.inputs)], *[PARTIAL] * len(equation.outputs)]
    keys = sorted(places)
    roles = [(node, tuple(places[key][role] for key in keys)) for role, node in enumerate(nodes)]
    patterns = frozenset(_by_place(values, node, where) for node, where in roles)
    shapes = tuple((n.shape, str(n.dtype), values.kinds.get(n, STATIC)) for n in nodes)
    signature = (equation.name, str(sorted(params_of(equation).items())), shapes, occurrence.weight, tuple(roles[0][1]))
    return Variable("anchor", tuple(sizes[k] for k in keys), patterns, signature, anchor=occurrence, roles=roles)


def _by_place(values: Values, node: Node, where: Sequence[int]) -> Pattern:
    choice = {place: c for c, place in enumerate(where) if place >= 0}
    return tuple(tuple(choice[p] for p in places if p in choice) for places in _ranges(values, node))


def _ranges(values: Values, node: Node) -> list[range]:
    found, start = [], 0
    for leaves in values.leaves(node):
        found.append(range(start, start + len(leaves)))
        start += len(leaves)
    return found


def _looked_up(equation: Equation, dim: int) -> bool:
    """Whether a gather takes single rows of its operand along this dim alone: devices may then hold some rows each."""
    params = equation.params
    if equation.name != "gather":
        return False
    return params["dimension_numbers"].start_index_map == (dim,) and params["slice_sizes"][dim] == 1


def _connect(network: Network, number: int, occurrence: Occurrence, readers: Counter[Node]) -> None:
    """Pairs an anchor with the clusters of its operands and results; what several read moves once."""
    values, me = network.values, network.anchor[number]
    inputs = len(occurrence.equation.inputs)
    for role, (node, places) in enumerate(network.variables[me].roles):
        if node.constant or values.kinds.get(node, STATIC) == STATIC:
            continue
        cluster = network.cluster[values.root(node)]
        if role >= inputs:
            after = network.places(cluster, node)
            network.pair(me, cluster, places, after, node, occurrence.weight)
            continue
        if readers[node] > 1:
            cluster = _use(network, node, cluster, occurrence.weight)
        network.pair(cluster, me, network.places(cluster, node), places, node, occurrence.weight)


def _use(network: Network, node: Node, cluster: int, weight: float) -> int:
    if node not in network.use:
        values = network.values
        atoms = tuple(dict.fromkeys(a for dim in values.leaves(node) for a in dim))
        sizes = tuple(values.atoms.sizes[a] for a in atoms)
        pattern = _pattern(values, node, atoms)
        network.use[node] = len(network.variables)
        signature = ("use", node.shape, str(node.dtype), pattern, weight)
        variable = Variable("use", sizes, frozenset({pattern}), signature, members=[node], atoms=atoms)
        network.variables.append(variable)
        mine = network.places(network.use[node], node)
        before = network.places(cluster, node)
        network.pair(cluster, network.use[node], before, mine, node, weight)
    return network.use[node]


def _bind(network: Network, bonds: Sequence[Bond], readers: Counter[Node]) -> None:
    """Pairs a cluster with another that it is broadcast into, and one of parameters with what it is combined with."""
    values = network.values
    for bond in bonds:
        a, b = values.root(bond.source), values.root(bond.result)
        if a not in network.cluster or b not in network.cluster:
            continue
        first, second = network.cluster[a], network.cluster[b]
        theirs = values.leaves(bond.result)
        ranges = _ranges(values, bond.source)
        after = [REPLICATED] * len(network.variables[second].atoms)
        for d, e in bond.dims:
            for place, atom in zip(ranges[d], theirs[e], strict=False):
                if atom in network.variables[second].atoms:
                    after[network.variables[second].atoms.index(atom)] = place
        if readers[bond.source] > 1:
            first = _use(network, bond.source, first, bond.weight)
        before = network.places(first, bond.source)
        network.bound[bond.source, bond.result] = second, tuple(after)
        network.pair(first, second, before, tuple(after), bond.source, bond.weight)


def colours(network: Network) -> list[int]:
    """A class for each variable: equal ones look the same so far around as ROUNDS steps reach."""
    known: dict[Hashable, int] = {}
    found = [known.setdefault(v.signature, len(known)) for v in network.variables]
    for _ in range(ROUNDS):
        around: list[list[Hashable]] = [[] for _ in found]
        for p in network.pairs:
            shape = (p.before, p.after, p.size, p.weight, p.shape, p.parts)
            around[p.a].append((0, found[p.b], shape))
            around[p.b].append((1, found[p.a], shape))
        fresh: dict[Hashable, int] = {}
        finer = [
            fresh.setdefault((c, frozenset(Counter(seen).items())), len(fresh))
            for c, seen in zip(found, around, strict=True)
        ]
        if len(fresh) == len(set(found)):
            break
        found = finer
    return found
