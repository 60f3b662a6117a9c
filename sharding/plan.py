"""Plan: where every value of a program lies on a mesh, what that should cost, and what the compiled program does."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfer.errors import PlanError

_VERSION = 1


@dataclass(frozen=True)
class Cost:
    """Of one call, as the cost model sees it. Predicted: from the plan alone. Compiled: from what XLA made of it."""

    seconds: float
    argument_bytes: float  # on a device: parameters and inputs
    collectives: Mapping[str, float]  # kind -> how many
    collective_bytes: float  # on a device, of all collectives


@dataclass(frozen=True)
class Candidate:
    """A layout that was considered."""

    name: str
    mesh: Mapping[str, int]
    predicted: Cost
    compiled: Cost | None


@dataclass(eq=False)
class Plan:
    """Made by `ji.plan`. The specs are PartitionSpecs over the axes of `mesh`."""

    program: str
    hardware: str
    sizes: Mapping[str, int]  # of the named dims that it was made for
    mesh: Mapping[str, int]  # axis -> size
    param_specs: Any  # the tree of the parameters
    input_specs: Any  # a tree for each input
    output_specs: Any
    predicted: Cost
    compiled: Cost | None
    candidates: tuple[Candidate, ...]
    replicas: int = 1
    notes: tuple[str, ...] = ()
    _run: Callable[..., Any] | None = field(default=None, repr=False)
    _devices: Any = field(default=None, repr=False)

    @property
    def function(self) -> Callable[..., Any]:
        """The program laid out by this plan, jitted: (params, *inputs) -> outputs, at `sizes`, on the plan's devices.

        Raises:
            PlanError: the plan was loaded from text, or made for devices that aren't here.
        """
        if self._run is None:
            raise PlanError("this plan can't run here: make it with ji.plan on the devices that are to run it")
        return self._run

    def shard(self, params: Any) -> Any:
        """Parameters put on the devices as the plan lays them out."""
        if self._devices is None:
            raise PlanError("this plan is for devices that aren't here")
        place = lambda spec: NamedSharding(self._devices, spec)  # noqa: E731
        return jax.device_put(params, jax.tree.map(place, self.param_specs, is_leaf=_is_spec))

    def explain(self) -> str:
        """The plan in words: its layout, its costs, and what else was considered."""
        axes = " x ".join(f"{name}={n}" for name, n in self.mesh.items())
        given = ", ".join(f"{name}={n}" for name, n in self.sizes.items())
        lines = [f"{self.program} on {math.prod(self.mesh.values())} x {self.hardware}, mesh {axes}, for {given}", ""]
        for title, tree in (("parameters", self.param_specs), ("inputs", self.input_specs)):
            lines += [f"{title}:", *_grouped(tree)]
        lines += ["", f"predicted: {_words(self.predicted)}"]
        if self.compiled is not None:
            lines.append(f"compiled:  {_words(self.compiled)}")
        else:
            lines.append("compiled:  nothing; these are predictions alone")
        lines += [f"note: {n}" for n in self.notes]
        if len(self.candidates) > 1:
            lines += ["", "considered:"]
            for c in self.candidates:
                cost = c.compiled or c.predicted
                mesh = " x ".join(map(str, c.mesh.values()))
                lines.append(f"  {c.name:<12} {mesh:<8} {_words(cost)}")
        return "\n".join(lines)

    __str__ = explain

    def to_json(self) -> str:
        """The plan as text, for `Plan.from_json`."""
        trees = {name: _flat(getattr(self, name)) for name in ("param_specs", "input_specs", "output_specs")}
        kept = ("program", "hardware", "replicas")
        return json.dumps(
            {
                "version": _VERSION,
                **{name: getattr(self, name) for name in kept},
                "sizes": dict(self.sizes),
                "mesh": dict(self.mesh),
                **trees,
                "predicted": asdict(self.predicted),
                "compiled": None if self.compiled is None else asdict(self.compiled),
                "candidates": [asdict(c) for c in self.candidates],
                "notes": list(self.notes),
            },
            indent=1,
        )

    @staticmethod
    def from_json(text: str) -> "Plan":
        """The plan that `to_json` wrote; its specs are flat: {path: PartitionSpec}.

        Raises:
            PlanError: the text isn't a plan of this version.
        """
        try:
            found = json.loads(text)
            if found.pop("version") != _VERSION:
                raise PlanError(f"a plan of version {_VERSION} is needed")
            for name in ("param_specs", "input_specs", "output_specs"):
                found[name] = {path: _spec(dims) for path, dims in found[name].items()}
            found["predicted"] = Cost(**found["predicted"])
            found["compiled"] = None if found["compiled"] is None else Cost(**found["compiled"])
            found["candidates"] = tuple(_candidate(c) for c in found["candidates"])
            found["notes"] = tuple(found["notes"])
            return Plan(**found)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PlanError(f"this text isn't a plan that jaxinfer wrote: {type(error).__name__}: {error}") from error

    def diff(self, other: "Plan") -> str:
        """The parameters and inputs that lie differently under another plan, a line each."""
        lines = []
        for name in ("param_specs", "input_specs"):
            mine, theirs = _flat(getattr(self, name)), _flat(getattr(other, name))
            for path in dict.fromkeys([*mine, *theirs]):
                if mine.get(path) != theirs.get(path):
                    lines.append(f"{path}: {_spec_text(mine.get(path))} -> {_spec_text(theirs.get(path))}")
        if dict(self.mesh) != dict(other.mesh):
            lines.insert(0, f"mesh: {dict(self.mesh)} -> {dict(other.mesh)}")
        return "\n".join(lines) or "no difference"


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def _flat(tree: Any) -> dict[str, list[Any]]:
    if isinstance(tree, dict) and all(isinstance(k, str) and _is_spec(v) for k, v in tree.items()):
        return {path: _dims(spec) for path, spec in tree.items()}
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_spec)
    return {jax.tree_util.keystr(path, simple=True, separator="."): _dims(spec) for path, spec in found}


def _dims(spec: PartitionSpec) -> list[Any]:
    return [list(d) if isinstance(d, tuple) else d for d in spec]


def _spec(dims: list[Any]) -> PartitionSpec:
    return PartitionSpec(*(tuple(d) if isinstance(d, list) else d for d in dims))


def _candidate(found: Mapping[str, Any]) -> Candidate:
    compiled = None if found["compiled"] is None else Cost(**found["compiled"])
    return Candidate(found["name"], found["mesh"], Cost(**found["predicted"]), compiled)


def _spec_text(dims: list[Any] | None) -> str:
    if dims is None:
        return "absent"
    cut = ["*".join(d) if isinstance(d, list) else d or "-" for d in dims]
    return f"[{', '.join(cut)}]"


def _grouped(tree: Any) -> list[str]:
    """A line for each layout, with the values that have it: layers that differ only in their number are one."""
    import re

    found: dict[tuple[str, str], list[str]] = {}
    for path, dims in _flat(tree).items():
        alike = re.sub(r"\d+", "*", path)
        found.setdefault((alike, _spec_text(dims)), []).append(path)
    width = max((len(name) for name, _ in found), default=0)
    return [f"  {name or '(the input)':<{width}}  {spec}  x{len(paths)}" for (name, spec), paths in found.items()]


def _words(cost: Cost) -> str:
    moved = ", ".join(f"{n:g} {kind}" for kind, n in cost.collectives.items()) or "no collectives"
    held = f"{cost.argument_bytes / 1e6:,.1f} MB of arguments a device"
    return f"{cost.seconds * 1e6:,.1f} us, {moved} ({cost.collective_bytes / 1e6:,.3f} MB), {held}"
