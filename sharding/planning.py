"""`plan`: a Program and devices to the layout that is cheapest, found by search and held against what XLA compiles.

values -> network -> tables of each mesh -> solution -> emitted program -> compiled, read, compared
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxinfer.errors import PlanError
from jaxinfer.graph import Graph, Node, flatten
from jaxinfer.program import Program
from jaxinfer.sharding import hlo
from jaxinfer.sharding.clusters import values_of
from jaxinfer.sharding.control import Control, control_of
from jaxinfer.sharding.costs import Costs
from jaxinfer.sharding.emit import Chosen, run
from jaxinfer.sharding.hardware import Hardware, hardware_of
from jaxinfer.sharding.network import Network, colours, network_of
from jaxinfer.sharding.plan import Candidate, Cost, Plan
from jaxinfer.sharding.solve import solve
from jaxinfer.sharding.tables import tables_of, traffic

_NAMES = "xyzw"
_WORTH = 0.98  # a mesh of more axes has to be predicted so much cheaper to be preferred without compiling


@dataclass(eq=False)
class _Problem:
    """What is the same for every mesh."""

    program: Program
    sizes: dict[str, int]
    graph: Graph
    network: Network
    colours: list[int]
    control: Control


def plan(
    program: Program,
    devices: Any = None,
    *,
    sizes: Mapping[str, int],
    hardware: Any = None,
    memory: float | None = None,
    pin: Mapping[str, Any] | None = None,
    forbid: Sequence[str] = (),
    layout: str | None = None,
    verify: bool = True,
) -> Plan:
    """Lays a program out over devices: which axis of every parameter and value each mesh axis shards.

    Args:
        devices: None for all that are here, a number of them, a list, a Mesh (its shape is kept), or a name such as
            "tpu-v5e-8" for devices that needn't be here (then nothing is compiled).
        sizes: of the program's named dims: what the plan is made for.
        hardware: whose costs to reckon with, as a name; the devices' own if not given.
        memory: bytes of parameters and inputs that a device may hold; 90 % of the hardware's if not given.
        pin: path of a parameter ("layers.0.wq", as `Plan.explain` shows it) -> PartitionSpec over the mesh axes "x",
            "y", ... that it must have.
        forbid: named dims that are never sharded.
        layout: "data" shards no parameter, "fsdp" shards the batch and every parameter that it can; the search if not
            given.
        verify: compile the best plan of each mesh shape and choose by what XLA made of them.

    Raises:
        PlanError: an unknown name, a pin that can't be had, or no layout that fits the memory.
    """
    if set(sizes) != set(program.axes):
        raise PlanError(f"{program.name} has the named dims {sorted(program.axes)}, got sizes for {sorted(sizes)}")
    found, kind, shapes = _devices(devices)
    costs_of = hardware_of(hardware)[0] if isinstance(hardware, str) else hardware or kind
    limit = 0.9 * costs_of.hbm if memory is None else float(memory)
    problem = _problem(program, dict(sizes), pin or {}, forbid, layout)
    tried = [_solved(problem, Costs(costs_of, shape), limit) for shape in shapes]
    compiling = verify and found is not None
    if not compiling:
        tried = [_simplest(tried)]
    measured = [_emitted(problem, solved, found if compiling else None) for solved in tried]
    best = min(range(len(measured)), key=lambda n: (measured[n].compiled or measured[n].predicted).seconds)
    chosen = measured[best]
    chosen.candidates = tuple(c for m in measured for c in m.candidates)
    if found is None:
        chosen.notes = (f"nothing was compiled: {costs_of.name} is not here",)
    return chosen


def _devices(devices: Any) -> tuple[list[Any] | None, Hardware, list[tuple[int, ...]]]:
    """(devices that are here or None, their hardware, shapes of mesh to try)"""
    if isinstance(devices, str):
        kind, count = hardware_of(devices)
        return None, kind, _shapes(count)
    if isinstance(devices, Mesh):
        return list(devices.devices.flat), hardware_of(devices)[0], [tuple(devices.devices.shape)]
    here = jax.devices()
    if isinstance(devices, int):
        if not 0 < devices <= len(here):
            raise PlanError(f"{devices} devices were asked for; {len(here)} are here")
        devices = here[:devices]
    found = list(here if devices is None else devices)
    return found, hardware_of(found)[0], _shapes(len(found))


def _shapes(count: int) -> list[tuple[int, ...]]:
    """One axis, and the most even two."""
    small = max((d for d in range(2, math.isqrt(count) + 1) if count % d == 0), default=0)
    return [(count,), (count // small, small)] if small else [(count,)]


def _problem(
    program: Program, sizes: dict[str, int], pin: Mapping[str, Any], forbid: Sequence[str], layout: str | None
) -> _Problem:
    graph = flatten(program.at(sizes).jaxpr)
    held = len(jax.tree.leaves(program.abstract_params))
    values = values_of([graph], [held])
    network = network_of(values, [*graph.inputs, *graph.outputs])
    control = control_of(program, graph, network, pin, forbid, layout)
    return _Problem(program, sizes, graph, network, control.separate(colours(network)), control)


@dataclass(eq=False)
class _Solved:
    chosen: Chosen
    costs: Costs


def _solved(problem: _Problem, costs: Costs, limit: float) -> _Solved:
    names = tuple(_NAMES[: len(costs.mesh)])
    held = set(problem.graph.inputs)
    allow = problem.control.allowed(names)
    tables = tables_of(problem.network, problem.colours, costs, held, allow)
    return _Solved(Chosen(problem.network, tables, solve(tables, limit), names), costs)


def _simplest(tried: list[_Solved]) -> _Solved:
    best = tried[0]
    for other in tried[1:]:
        if other.chosen.solution.seconds < _WORTH * best.chosen.solution.seconds:
            best = other
    return best


def _emitted(problem: _Problem, solved: _Solved, devices: list[Any] | None) -> Plan:
    graph, chosen, program = problem.graph, solved.chosen, problem.program
    spec = lambda node: chosen.of(node) or PartitionSpec()  # noqa: E731
    traced = program.at(problem.sizes)
    in_specs = jax.tree.unflatten(traced.in_tree, [spec(n) for n in graph.inputs])
    out_specs = jax.tree.unflatten(traced.out_tree, [spec(n) for n in graph.outputs])
    shape = dict(zip(chosen.names, solved.costs.mesh, strict=True))
    kinds, moved = traffic(problem.network, chosen.tables, chosen.solution.chosen, solved.costs)
    held = math.fsum(_local(n, spec(n), shape) for n in graph.inputs)
    predicted = Cost(chosen.solution.seconds, held, kinds, moved)
    compiled, function, mesh = None, None, None
    if devices is not None:
        mesh = Mesh(
            np.array(devices).reshape(solved.costs.mesh), chosen.names, axis_types=(AxisType.Auto,) * len(shape)
        )
        function = _function(problem, chosen, mesh, in_specs, out_specs)
        compiled = _compiled(function, program, problem, solved.costs.hardware)
    name = problem.control.layout or "search"
    candidate = Candidate(name, shape, predicted, compiled)
    params, *inputs = in_specs
    return Plan(
        program.name,
        solved.costs.hardware.name,
        problem.sizes,
        shape,
        params,
        tuple(inputs),
        out_specs,
        predicted,
        compiled,
        (candidate,),
        _run=function,
        _devices=mesh,
    )


def _local(node: Node, spec: PartitionSpec, mesh: Mapping[str, int]) -> float:
    axes = [a for dim in spec if dim is not None for a in (dim if isinstance(dim, tuple) else (dim,))]
    return math.prod(node.shape) * node.dtype.itemsize / math.prod(mesh[a] for a in axes)


def _function(problem: _Problem, chosen: Chosen, mesh: Mesh, in_specs: Any, out_specs: Any) -> Any:
    traced = problem.program.at(problem.sizes)
    place = lambda spec: NamedSharding(mesh, spec)  # noqa: E731
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731

    def laid_out(*arguments: Any) -> Any:
        return jax.tree.unflatten(traced.out_tree, run(problem.graph, jax.tree.leaves(arguments), chosen, mesh))

    laid_out.__name__ = problem.program.name
    return jax.jit(
        laid_out,
        in_shardings=jax.tree.map(place, in_specs, is_leaf=is_spec),
        out_shardings=jax.tree.map(place, out_specs, is_leaf=is_spec),
    )


def _compiled(function: Any, program: Program, problem: _Problem, hardware: Hardware) -> Cost:
    from jaxinfer import specs

    arguments = (program.abstract_params, *specs.structs(program.inputs, problem.sizes))
    compiled = function.lower(*arguments).compile()
    measured = hlo.measure(compiled)
    held = measured.memory.argument
    return Cost(
        measured.time(hardware),
        float(held or 0),
        {kind: n for kind, n in measured.counts().items() if n},
        measured.collective_bytes,
    )
