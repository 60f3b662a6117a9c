"""What a user says of the layout: parameters pinned, named dims that stay whole, layouts by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxinfer import specs
from jaxinfer.errors import PlanError
from jaxinfer.graph import Graph, Node
from jaxinfer.program import Program
from jaxinfer.sharding.clusters import DATA
from jaxinfer.sharding.layouts import Codes
from jaxinfer.sharding.network import Network
from jaxinfer.sharding.tables import Allowed

LAYOUTS = ("data", "fsdp")


@dataclass(eq=False)
class Control:
    """Which options of a variable are allowed."""

    network: Network
    layout: str | None
    params: frozenset[int]  # variables of clusters that hold parameters
    pinned: dict[int, tuple[str, Node, PartitionSpec]] = field(default_factory=dict)
    whole: dict[int, frozenset[int]] = field(default_factory=dict)  # variable -> choices that are never sharded
    batch: dict[int, frozenset[int]] = field(default_factory=dict)  # variable -> choices that are the batch

    def separate(self, colours: Sequence[int]) -> list[int]:
        """Colours in which what is pinned is alone in its class."""
        fresh = max(colours, default=0) + 1
        return [fresh + v if v in self.pinned else c for v, c in enumerate(colours)]

    def allowed(self, names: Sequence[str]) -> Allowed:
        """The rule for a mesh with axes of these names."""

        def rule(variable: int, codes: Codes) -> np.ndarray:
            kept = np.ones(len(codes), bool)
            for choice in self.whole.get(variable, ()):
                kept &= ~np.any(codes == choice, axis=1)
            if variable in self.pinned:
                kept &= self._as_pinned(variable, codes, names)
            if variable in self.params and self.layout == "data":
                kept &= np.all(codes < 0, axis=1)
            if variable in self.params and self.layout == "fsdp":
                cut = np.sum(codes >= 0, axis=1)
                kept &= cut == np.max(np.where(kept, cut, -1))
            if self.layout in LAYOUTS and variable in self.batch:
                mine = np.isin(codes, list(self.batch[variable]))
                good = kept & np.all(mine, axis=1)
                kept = good if good.any() else kept & np.all(mine | (codes < 0), axis=1)
            return kept

        return rule

    def _as_pinned(self, variable: int, codes: Codes, names: Sequence[str]) -> np.ndarray:
        path, node, spec = self.pinned[variable]
        places = self.network.places(variable, node)
        leaves = self.network.values.leaves(node)
        starts = np.cumsum([0, *(len(dim) for dim in leaves)])
        dim_of = {p: d for d in range(len(leaves)) for p in range(starts[d], starts[d + 1])}
        wanted = {name: d for d, axes in enumerate(spec) for name in _axes(axes)}
        if unknown := set(wanted) - set(names):
            raise PlanError(f"pin of {path} names the mesh axes {sorted(unknown)}; this mesh has {list(names)}")
        kept = np.ones(len(codes), bool)
        for m, name in enumerate(names):
            dims = np.array([*(dim_of.get(p, -1) for p in places), -1])[codes[:, m]]
            kept &= dims == wanted.get(name, -1)
        if not kept.any():
            raise PlanError(f"{path}{list(node.shape)} can't be laid out as {spec}: a dim doesn't divide by its axes")
        return kept


def control_of(
    program: Program, graph: Graph, network: Network, pin: Mapping[str, Any], forbid: Sequence[str], layout: str | None
) -> Control:
    """What the arguments of `ji.plan` allow."""
    if layout is not None and layout not in LAYOUTS:
        raise PlanError(f"known layouts are {', '.join(LAYOUTS)}, got {layout!r}")
    if unknown := set(forbid) - set(program.axes):
        raise PlanError(f"forbid names {sorted(unknown)}; the named dims of {program.name} are {sorted(program.axes)}")
    values = network.values
    leaves = jax.tree_util.tree_leaves_with_path(program.abstract_params)
    nodes = {
        jax.tree_util.keystr(path, simple=True, separator="."): node
        for (path, _), node in zip(leaves, graph.inputs, strict=False)
    }
    variable = lambda node: network.cluster.get(values.root(node))  # noqa: E731
    params = frozenset(v for n in nodes.values() if (v := variable(n)) is not None and _only_params(network, v))
    control = Control(network, layout, params)
    for path, spec in pin.items():
        if path not in nodes:
            close = [p for p in nodes if path in p][:4]
            raise PlanError(f"pin names {path!r}, which is no parameter of {program.name}; near it: {close}")
        if (v := variable(nodes[path])) is None:
            raise PlanError(f"{path} isn't used in a product: it lies as the values that it is combined with")
        if not isinstance(spec, PartitionSpec) or len(spec) > len(nodes[path].shape):
            raise PlanError(
                f"the pin of {path} is a PartitionSpec of at most {len(nodes[path].shape)} dims, got {spec}"
            )
        control.pinned[v] = path, nodes[path], spec
    _named(program, graph, network, forbid, control)
    return control


def _named(program: Program, graph: Graph, network: Network, forbid: Sequence[str], control: Control) -> None:
    """Finds the atoms of named dims, which clusters share only as far as elementwise work reaches; and the batch's."""
    values = network.values
    inputs: list[Any] = specs.leaves(program.inputs)
    given = graph.inputs[len(graph.inputs) - len(inputs) :]
    atoms: dict[str, set[int]] = {}
    for leaf, node in zip(inputs, given, strict=True):
        for dim, mine in zip(leaf.dims, values.leaves(node), strict=True):
            if isinstance(dim, str):
                atoms.setdefault(dim, set()).update(mine)
    _follow(network, atoms)
    for v, variable in enumerate(network.variables):
        if variable.kind == "cluster":
            for name, into in (*((n, control.whole) for n in forbid), ("batch", control.batch)):
                found = frozenset(i for i, a in enumerate(variable.atoms) if a in atoms.get(name, ()))
                if found and v not in control.params:
                    into[v] = into.get(v, frozenset()) | found


def _follow(network: Network, atoms: dict[str, set[int]]) -> None:
    """Named atoms through anchors: a factor of an operand that is named names it in the results."""
    values = network.values
    for number in range(len(values.anchors)):
        roles = network.variables[network.anchor[number]].roles
        inputs = len(values.anchors[number].equation.inputs)
        for node, places in roles[:inputs]:
            if values.kinds.get(node) != DATA:
                continue
            mine = [a for dim in values.leaves(node) for a in dim]
            for choice, place in enumerate(places):
                if place < 0:
                    continue
                for found in atoms.values():
                    if mine[place] in found:
                        for out, there in roles[inputs:]:
                            flat = [a for dim in values.leaves(out) for a in dim]
                            if there[choice] >= 0:
                                found.add(flat[there[choice]])


def _only_params(network: Network, variable: int) -> bool:
    return all(network.values.kinds.get(n) != DATA for n in network.variables[variable].members)


def _axes(axes: Any) -> tuple[str, ...]:
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)
