"""What a compiled program does, read from its optimised HLO: collectives, arithmetic, memory traffic, memory held.

XLA's own `cost_analysis()` counts the body of a scan once; here bodies of loops count as often as they run.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from jaxinfer.sharding.hardware import Hardware, collective_line
from jaxinfer.sharding.hardware_table import dtype_class
from jaxinfer.sharding.hlo_groups import Groups, factors_of, groups_of
from jaxinfer.sharding.hlo_loops import trip_count
from jaxinfer.sharding.hlo_text import Computation, Instruction, Module, parse
from jaxinfer.sharding.hlo_work import flops_of, traffic_of

__all__ = ["Collective", "Measured", "Memory", "Operation", "collectives", "flops_and_bytes", "measure", "memory"]

_KINDS = {
    "all-reduce": "all-reduce",
    "all-gather": "all-gather",
    "reduce-scatter": "reduce-scatter",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "collective-permute",
    "collective-broadcast": "collective-permute",
}


@dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
        kind: all-reduce | all-gather | reduce-scatter | all-to-all | collective-permute.
        bytes: on one device, each time: all-gather: the full result's; the others: the operand's. One instruction that
            XLA combined from several is one Collective with their sum.
        dtype: as HLO spells it; of several, that of the most bytes. XLA:CPU promotes bf16 all-reduces to f32.
        group_size: devices of a group; 1 where nothing is sent.
        groups: device ids, as places in the mesh's flat order.
        weight: how often it runs: 5 in a scan of 5.
        source: the op_name of XLA's metadata, "jit(f)/while/body/dot_general".
        where: "file.py:12 (function)" of the user's line, or "".
        combined: how many results it has: what XLA's combiner put together.
    """

    kind: str
    bytes: float
    dtype: str
    group_size: int
    groups: Groups
    weight: float = 1.0
    source: str = ""
    where: str = ""
    combined: int = 1

    @property
    def factors(self) -> tuple[tuple[int, int], ...]:
        """(size, stride) pairs of its first group's ids, for `collective_time`."""
        return factors_of(self.groups[0]) if self.groups and self.group_size > 1 else ()

    def time(self, hardware: Hardware) -> float:
        """Seconds of all its runs."""
        latency, rate = collective_line(self.kind, self.factors, hardware)
        return self.weight * (latency + self.bytes * rate)


@dataclass(frozen=True)
class Operation:
    """Instructions alike: flops in products of `dtype` ("" for none) and bytes of memory, each `weight` times."""

    flops: float
    bytes: float
    dtype: str
    weight: float = 1.0


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, as the backend's memory_analysis() tells; None where it can't.

    `alias` is what outputs share with arguments (donation). `peak` is the backend's figure for everything held at once
    or, where it gives none, argument + output + temp - alias.
    """

    argument: int | None = None
    output: int | None = None
    temp: int | None = None
    alias: int | None = None
    code: int | None = None
    peak: int | None = None


@dataclass(frozen=True)
class Measured:
    """What one device does in one run.

    Attributes:
        unknown_loops: loops whose number of runs the text doesn't tell; they count once.
    """

    collectives: tuple[Collective, ...]
    operations: tuple[Operation, ...]
    memory: Memory = field(default_factory=Memory)
    unknown_loops: int = 0

    @property
    def flops(self) -> float:
        return sum(o.flops * o.weight for o in self.operations)

    @property
    def bytes(self) -> float:
        return sum(o.bytes * o.weight for o in self.operations)

    @property
    def collective_bytes(self) -> float:
        return sum(c.bytes * c.weight for c in self.collectives)

    def counts(self) -> dict[str, float]:
        """Collectives of each kind that a run executes; those over one device, which send nothing, left out."""
        found: dict[str, float] = {}
        for collective in self.collectives:
            if collective.group_size > 1:
                found[collective.kind] = found.get(collective.kind, 0.0) + collective.weight
        return found

    def time(self, hardware: Hardware, by_operation: bool = False) -> float:
        """Seconds that the cost model gives: max(flops / peak, bytes / bandwidth) + launch + collectives.

        Args:
            by_operation: take the maximum for each instruction instead of for the whole program, which is slower where
                some are bound by arithmetic and others by memory.
        """
        arithmetic = [o.weight * o.flops / hardware.peak(o.dtype) for o in self.operations]
        traffic = [o.weight * o.bytes / hardware.hbm_bandwidth for o in self.operations]
        compute = sum(map(max, arithmetic, traffic)) if by_operation else max(sum(arithmetic), sum(traffic))
        return compute + hardware.launch + sum(collective.time(hardware) for collective in self.collectives)


def measure(compiled: Any) -> Measured:
    """Reads a `jax.stages.Compiled`, or the text that its as_text() gave (memory is unknown then).

    Raises:
        PlanError: the backend gives no HLO text.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    walk = _Walk(parse(text or ""))
    found = walk.program()
    held = Memory() if isinstance(compiled, str) else memory(compiled)
    operations = tuple(Operation(*key, weight) for key, weight in found.operations.items())
    return Measured(tuple(found.collectives), operations, held, len(walk.unknown))


def collectives(text: str) -> list[Collective]:
    """The collectives of a module's text, in its order, each asynchronous pair once.

    Loops multiply weights; of a conditional's branches the one with the most collective bytes counts.
    """
    return list(measure(text).collectives)


def flops_and_bytes(text: str) -> tuple[float, float]:
    """(flops of products and convolutions, bytes of memory traffic) of one run on one device."""
    measured = measure(text)
    return measured.flops, measured.bytes


def memory(compiled: Any) -> Memory:
    """What a compiled program holds on a device; fields are None where the backend can't tell."""
    try:
        stats = compiled.memory_analysis()
    except (NotImplementedError, AttributeError, RuntimeError):  # JaxRuntimeError is a RuntimeError
        stats = None
    if stats is None:
        return Memory()
    names = ("argument", "output", "temp", "alias", "generated_code")
    argument, output, temp, alias, code = (getattr(stats, f"{name}_size_in_bytes", None) for name in names)
    peak = getattr(stats, "peak_memory_in_bytes", 0)
    if not peak and None not in (argument, output, temp, alias):
        peak = argument + output + temp - alias  # pyright: ignore[reportOptionalOperand]
    return Memory(argument, output, temp, alias, code, peak or None)


@dataclass
class _Found:
    """Of a computation, run once. Keys of operations: (flops, bytes, dtype)."""

    collectives: list[Collective] = field(default_factory=list)
    operations: dict[tuple[float, float, str], float] = field(default_factory=dict)

    def add(self, other: "_Found", times: float = 1.0) -> None:
        self.collectives += [replace(c, weight=c.weight * times) for c in other.collectives]
        for key, weight in other.operations.items():
            self.operations[key] = self.operations.get(key, 0.0) + weight * times

    def size(self) -> tuple[float, float, float]:
        sent = sum(c.bytes * c.weight for c in self.collectives)
        flops = sum(flops * weight for (flops, _, _), weight in self.operations.items())
        return sent, flops, sum(moved * weight for (_, moved, _), weight in self.operations.items())


class _Walk:
    """From the entry through every computation that runs."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.done: dict[str, _Found] = {}
        self.unknown: set[str] = set()  # names of while instructions

    def program(self) -> _Found:
        return self._computation(self.module.entry)

    def _computation(self, computation: Computation) -> _Found:
        if (known := self.done.get(computation.name)) is not None:
            return known
        found = self.done[computation.name] = _Found()
        for instruction in computation.instructions:
            self._instruction(instruction, computation, found)
        return found

    def _instruction(self, instruction: Instruction, computation: Computation, found: _Found) -> None:
        opcode = instruction.opcode
        kind = _KINDS.get(opcode.removesuffix("-start"))
        if kind is not None:
            found.collectives.append(self._collective(instruction, computation, kind))
        elif opcode == "while":
            times = trip_count(instruction, computation, self.module)
            if times is None:
                self.unknown.add(instruction.name)
            for body in self._called(instruction, "body"):
                found.add(self._computation(body), 1.0 if times is None else times)
        elif opcode == "conditional":
            keys = ("branch_computations", "true_computation", "false_computation")
            branches = [self._computation(c) for c in self._called(instruction, *keys)]
            found.add(max(branches, key=_Found.size, default=_Found()))
        elif opcode == "fusion":
            self._fusion(instruction, computation, found)
        elif opcode in ("call", "call-start", "async-start"):
            for called in self._called(instruction, "to_apply", "calls", "called_computation"):
                found.add(self._computation(called))
        elif opcode.removesuffix("-done").removesuffix("-update") not in _KINDS:
            flops, dtype = flops_of(instruction, computation)
            self._work(flops, instruction, computation, dtype, found)

    def _fusion(self, instruction: Instruction, computation: Computation, found: _Found) -> None:
        flops, dtypes, inside = 0.0, {}, []
        for fused in self._fused(instruction):
            for part in fused.instructions:
                more, dtype = flops_of(part, fused)
                flops += more
                dtypes[dtype] = dtypes.get(dtype, 0.0) + more
                if kind := _KINDS.get(part.opcode.removesuffix("-start")):
                    inside.append((part, fused, kind))
        for part, fused, kind in inside:
            if _continued(part, fused):
                continue
            scattered = kind == "all-reduce" and _sliced(part, fused)
            collective = self._collective(part, fused, "reduce-scatter" if scattered else kind)
            source, where = self.module.where(instruction)
            found.collectives.append(
                collective if collective.source else replace(collective, source=source, where=where)
            )
        # A fusion that is a collective moves what that says; one that computes beside a collective has both.
        if not inside or flops:
            self._work(flops, instruction, computation, max(dtypes, key=dtypes.__getitem__, default=""), found)

    def _fused(self, instruction: Instruction) -> Iterable[Computation]:
        for computation in self._called(instruction, "calls"):
            yield computation
            for part in computation.instructions:
                if part.opcode == "fusion":
                    yield from self._fused(part)

    def _work(
        self, flops: float, instruction: Instruction, computation: Computation, dtype: str, found: _Found
    ) -> None:
        moved = traffic_of(instruction, computation, self.module)
        if flops or moved:
            key = (flops, moved, dtype_class(dtype) if flops else "")
            found.operations[key] = found.operations.get(key, 0.0) + 1.0

    def _called(self, instruction: Instruction, *keys: str) -> Iterable[Computation]:
        names = [name for key in keys for name in instruction.called(key)]
        return [self.module.computations[name] for name in names if name in self.module.computations]

    def _collective(self, instruction: Instruction, computation: Computation, kind: str) -> Collective:
        groups = groups_of(instruction, self.module, kind)
        group_size = max((len(group) for group in groups), default=1)
        # Results of -start forms are tuples of operands, results and contexts; operands are the same in all forms.
        leaves = [leaf for operand in computation.sizes(instruction) for leaf in operand if leaf.bytes]
        if kind == "collective-permute":
            leaves = leaves[:1] if len(leaves) > 1 and instruction.opcode.endswith("-start") else leaves
        scale = group_size if kind == "all-gather" else 1
        largest = max(leaves, key=lambda leaf: leaf.bytes, default=None)
        source, where = self.module.where(instruction)
        # An all-to-all without a split dimension takes its pieces as operands.
        pieces = kind == "all-to-all" and instruction.attribute("dimensions") is None
        combined = 1 if pieces else len(leaves)
        size = scale * sum(leaf.bytes for leaf in leaves)
        dtype = largest.dtype if largest else ""
        return Collective(kind, size, dtype, group_size, groups, 1.0, source, where, combined)


def _continued(instruction: Instruction, fused: Computation) -> bool:
    """Whether a fused collective only goes on or ends: TPUs spread one over several fusions, of which the first holds
    AsyncCollectiveStart and all name a chain."""
    if "chain_id=" not in instruction.attributes:
        return False
    return not any("AsyncCollectiveStart" in i.attributes for i in fused.instructions if i.opcode == "custom-call")


def _sliced(reduction: Instruction, fused: Computation) -> bool:
    """Whether a fused all-reduce is followed by each device's slice: how TPUs write a reduce-scatter."""
    root = fused.root
    while root is not None and root.opcode in ("bitcast", "copy") and root.operands:
        root = fused.by_name.get(root.operands[0])
    return root is not None and root.opcode == "dynamic-slice" and root.operands[0] == reduction.name
