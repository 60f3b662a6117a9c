"""Emits a plan: the program with a sharding constraint on every value, so that XLA has no say in the layout."""

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer import _jax
from jaxinfer.axes.factors import factors_of
from jaxinfer.graph import Equation, Graph, Node
from jaxinfer.sharding.clusters import STATIC, Bond
from jaxinfer.sharding.layouts import layout, placed
from jaxinfer.sharding.moves import layout_of, spec_of, steps
from jaxinfer.sharding.network import Network
from jaxinfer.sharding.solve import Solution
from jaxinfer.sharding.tables import Tables


@dataclass(eq=False)
class Chosen:
    """What a solution says of every value and every operand, as PartitionSpecs."""

    network: Network
    tables: Tables
    solution: Solution
    names: tuple[str, ...]  # of the mesh's axes
    _anchors: dict[Equation, int] = field(default_factory=dict)
    _whole: dict[tuple[Equation, Node], set[int]] = field(default_factory=dict)
    _riders: dict[Node, list[Bond]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = self.network.values
        self._anchors = {a.equation: self.network.anchor[n] for n, a in enumerate(values.anchors)}
        for whole in values.wholes:
            if not whole.reduced:
                self._whole.setdefault((whole.equation, whole.node), set()).add(whole.dim)
        for rider, bonds in values.riders.items():
            self._riders.setdefault(values.root(rider), []).extend(bonds)

    def of(self, node: Node) -> PartitionSpec | None:
        """The layout that a value is kept in; None where the plan has none for it."""
        values = self.network.values
        number = self.network.cluster.get(values.root(node))
        if number is not None:
            return self._spec(node, number, self.network.places(number, node))
        return self._riding(node)

    def _riding(self, node: Node) -> PartitionSpec | None:
        """A small parameter lies as the value that it is combined with."""
        values = self.network.values
        for bond in self._riders.get(values.root(node), ()):
            if (there := self.of(bond.result)) is None:
                continue
            theirs, axes = values.leaves(bond.source), dict[int, Any]()
            for d, e in bond.dims:
                if len(theirs[d]) == 1:
                    axes[theirs[d][0]] = there[e]
            return PartitionSpec(*(axes.get(dim[0]) if len(dim) == 1 else None for dim in values.leaves(node)))
        return None

    def operands(self, equation: Equation) -> list[list[PartitionSpec]]:
        """For each operand the layouts that it is brought to, one after the other."""
        number = self._anchors.get(equation)
        found: list[list[PartitionSpec]] = []
        for role, node in enumerate(equation.inputs):
            found.append([])
            if not node.shape or node.constant:
                continue
            bond = next((b for n in equation.outputs if (b := self.network.bound.get((node, n)))), None)
            if node in self.network.use and (number is not None or bond is not None):
                use = self.network.use[node]
                found[-1].append(self._spec(node, use, self.network.places(use, node)))
            if number is not None:
                found[-1].append(self._spec(node, number, self.network.variables[number].roles[role][1]))
            elif bond is not None:
                found[-1].append(self._spec(node, *bond))
            elif (dims := self._whole.get((equation, node))) and (there := _cleared(self.of(node), dims)) is not None:
                found[-1].append(there)
            elif equation.name.startswith("scatter") and self.network.values.kinds.get(node) == STATIC:
                # Kept whole beside sharded updates, XLA would gather those.
                found[-1].append(self._as_result(equation, role))
        return found

    def _as_result(self, equation: Equation, role: int) -> PartitionSpec:
        """An operand laid out as the result is made."""
        factors = factors_of(equation)
        made = self.results(equation)[0] or self.of(equation.outputs[0]) or ()
        axes = dict(zip(factors.outputs[0], made, strict=False))
        return PartitionSpec(*(None if f is None else axes.get(f) for f in factors.inputs[role]))

    def results(self, equation: Equation) -> list[PartitionSpec | None]:
        """For each result the layout that it is computed in, sums added up; None where that's the one it is kept in."""
        if (number := self._anchors.get(equation)) is not None:
            roles = self.network.variables[number].roles[len(equation.inputs) :]
            return [self._spec(node, number, places) for node, places in roles]
        if equation.name == "scan":  # rows are written one by one
            _, carried = _jax.scan_counts(equation.params)
            kept = [self.of(node) for node in equation.outputs[carried:]]
            return [*(None for _ in range(carried)), *(_cleared(spec, {0}) for spec in kept)]
        if any((equation, node) in self._whole for node in equation.inputs):
            return [_cleared(self.of(node), self._new(equation, n)) for n, node in enumerate(equation.outputs)]
        return [None for _ in equation.outputs]

    def _new(self, equation: Equation, result: int) -> set[int]:
        """Dims of a result that don't come from a dim of an operand that may be sharded: they are made whole."""
        factors, given = factors_of(equation), set[int | None]()
        for node, dims in zip(equation.inputs, factors.inputs, strict=True):
            if self.network.values.kinds.get(node, STATIC) != STATIC:
                whole = self._whole.get((equation, node), ())
                given.update(f for d, f in enumerate(dims) if d not in whole)
        return {d for d, f in enumerate(factors.outputs[result]) if f is None or f not in given}

    def _spec(self, node: Node, variable: int, places: Sequence[int]) -> PartitionSpec:
        c = self.tables.classes[variable]
        codes = placed(self.tables.codes[c][self.solution.chosen[c]], places)
        return spec_of(layout(codes.tolist(), [len(dim) for dim in self.network.values.leaves(node)]), self.names)


def _cleared(spec: PartitionSpec | None, dims: Container[int]) -> PartitionSpec | None:
    """The layout with some dims unsharded."""
    return spec if spec is None else PartitionSpec(*(None if d in dims else axes for d, axes in enumerate(spec)))


def run(graph: Graph, inputs: Sequence[Any], chosen: Chosen, mesh: Mesh) -> list[Any]:
    """Runs a graph inside a trace, every value that the plan speaks of constrained to its layout."""
    found: dict[Node, Any] = {}
    for node, value in zip(graph.inputs, inputs, strict=True):  # of loops too, which XLA would lay out by itself
        found[node] = value if (here := chosen.of(node)) is None else _put(value, here, mesh)
    moved: dict[tuple[Node, PartitionSpec], Any] = {}

    def read(node: Node) -> Any:
        return jnp.asarray(node.value, node.dtype) if node.constant else found[node]

    def brought(node: Node, targets: Sequence[PartitionSpec]) -> Any:
        value, here = read(node), chosen.of(node)
        for there in targets:
            if there != here and (node, there) not in moved:
                moved[node, there] = _moved(value, here, there, mesh)
            value, here = moved.get((node, there), value), there
        return value

    for equation in graph.equations:
        operands = [brought(n, targets) for n, targets in zip(equation.inputs, chosen.operands(equation), strict=True)]
        results = (_local if equation.name in _LOCAL else _results)(equation, operands, chosen, mesh)
        for node, value, made in zip(equation.outputs, results, chosen.results(equation), strict=True):
            there = chosen.of(node)
            if there is not None:
                found[node] = _moved(_put(value, made or there, mesh), made or there, there, mesh)
            elif node.shape and chosen.network.values.kinds.get(node) == STATIC:
                # XLA would otherwise shard tables of positions, and gather them again.
                found[node] = _put(value, PartitionSpec(), mesh)
            else:
                found[node] = value
    return [read(node) for node in graph.outputs]


def _put(value: Any, there: PartitionSpec, mesh: Mesh) -> Any:
    return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, there))


def _moved(value: Any, here: PartitionSpec | None, there: PartitionSpec, mesh: Mesh) -> Any:
    """A value brought from one layout to another step by step; at once where it has none yet."""
    if here is None:
        return _put(value, there, mesh)
    names = mesh.axis_names
    start, goal = (layout_of(spec, value.ndim, names) for spec in (here, there))
    for step in steps(start, goal, value.shape, mesh.axis_sizes):
        value = _put(value, spec_of(step.after, names), mesh)
    return value


# XLA gathers their operands though rows along the other dims have nothing to do with each other.
_LOCAL = frozenset({"fft", "top_k"})


def _local(equation: Equation, operands: Sequence[Any], chosen: Chosen, mesh: Mesh) -> Sequence[Any]:
    """An equation that each device runs on what it has."""
    brought = zip(equation.inputs, chosen.operands(equation), strict=True)
    given = tuple(targets[-1] if targets else chosen.of(node) for node, targets in brought)
    results = zip(equation.outputs, chosen.results(equation), strict=True)
    made = tuple(spec or chosen.of(node) for node, spec in results)
    if None in given or None in made:
        return _results(equation, operands, chosen, mesh)

    def here(*operands: Any) -> Any:
        return tuple(_results(equation, operands, chosen, mesh))

    return jax.shard_map(here, mesh=mesh, in_specs=given, out_specs=made)(*operands)


def _results(equation: Equation, operands: Sequence[Any], chosen: Chosen, mesh: Mesh) -> Sequence[Any]:
    bodies = chosen.network.values.bodies
    if equation.name == "scan":
        return _scan(equation, operands, bodies[equation, "jaxpr"][0], chosen, mesh)
    if equation.name == "cond":
        branches = [partial(_called, branch, chosen, mesh) for branch in bodies[equation, "branches"]]
        return jax.lax.switch(operands[0], branches, *operands[1:])
    if equation.name == "while":
        return _while(equation, operands, chosen, mesh)
    results = equation.primitive.bind(*operands, **equation.params)
    return results if equation.primitive.multiple_results else (results,)


def _called(graph: Graph, chosen: Chosen, mesh: Mesh, *operands: Any) -> list[Any]:
    return run(graph, operands, chosen, mesh)


def _scan(equation: Equation, operands: Sequence[Any], body: Graph, chosen: Chosen, mesh: Mesh) -> list[Any]:
    consts, carried = _jax.scan_counts(equation.params)
    fixed, start, over = operands[:consts], operands[consts : consts + carried], operands[consts + carried :]

    def step(carry: Any, xs: Any) -> tuple[Any, Any]:
        results = run(body, [*fixed, *carry, *xs], chosen, mesh)
        return results[:carried], results[carried:]

    params = equation.params
    options = {"length": params["length"], "reverse": params["reverse"], "unroll": params["unroll"]}
    carry, ys = jax.lax.scan(step, list(start), list(over), **options)
    return [*carry, *ys]


def _while(equation: Equation, operands: Sequence[Any], chosen: Chosen, mesh: Mesh) -> list[Any]:
    first, second = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    (body,) = chosen.network.values.bodies[equation, "body_jaxpr"]
    (condition,) = chosen.network.values.bodies[equation, "cond_jaxpr"]
    asked, fixed = operands[:first], operands[first : first + second]
    return jax.lax.while_loop(
        lambda carry: run(condition, [*asked, *carry], chosen, mesh)[0],
        lambda carry: run(body, [*fixed, *carry], chosen, mesh),
        list(operands[first + second :]),
    )
