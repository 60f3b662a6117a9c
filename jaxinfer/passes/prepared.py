"""A Program made ready to compile: rewritten, and staged so that every bucket shares one list of weights.

What is staged is decided once, on the trace at `Program.analysis_sizes`: its named dims are primes found nowhere else,
so a value with such a dim, and all that is made of it, is known to differ between buckets and stays in the call. A
bucket's own trace then takes exactly those values, found by how they are made (see `Staged.keys`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax

from jaxinfer import specs
from jaxinfer.aot import CompileReport, Pending, Ready
from jaxinfer.errors import TraceError
from jaxinfer.graph import Equation, Graph, Node, evaluate, flatten
from jaxinfer.passes import Report, Staged, chosen, optimise
from jaxinfer.passes.keys import digest_of
from jaxinfer.passes.report import flops, traffic
from jaxinfer.passes.stage import stage
from jaxinfer.program import Program


class UnsharedWeightsError(TraceError):
    """A bucket's trace reads weights that the analysis trace doesn't."""


class Prepared:
    """The rewritten, staged Program. `passes` names the rewrites to run (see `passes.chosen`); with none of them
    nothing is staged either, and the compiled program is the forward as it was traced."""

    def __init__(self, program: Program, passes: Iterable[str] | None = None):
        self.passes = chosen(passes)
        # Without the weights' values: what isn't read any more is not to be held here.
        self.program = program.with_params(program.abstract_params)
        self._cones: dict[str, Any] = {}

    @cached_property
    def fingerprint(self) -> str:
        """Names the compiled computation: the program's own fingerprint, and the passes."""
        return f"{self.program.fingerprint} {' '.join(self.passes)}"

    @cached_property
    def _analysed(self) -> tuple[Graph, list[Report]]:
        return optimise(flatten(self.program.jaxpr), self._count, self.passes)

    @cached_property
    def _count(self) -> int:
        return len(jax.tree.leaves(self.program.abstract_params))

    @cached_property
    def staged(self) -> Staged:
        """The split of the analysis trace, which decides for all buckets."""

        def varies(node: Node) -> bool:
            return any(isinstance(self.program.axis_name(n), str) for n in node.shape)

        graph = self._analysed[0]
        if self.passes:
            return stage(graph, self._count, varies=varies)
        return Staged(Graph(graph.inputs[: self._count], ()), graph, tuple(range(self._count)), ())

    @property
    def abstract_weights(self) -> list[jax.ShapeDtypeStruct]:
        """What every bucket's program takes before its inputs: the kept params, then the staged values."""
        nodes = self.staged.main.inputs[: len(self.staged.kept) + len(self.staged.keys)]
        return [jax.ShapeDtypeStruct(n.shape, n.dtype) for n in nodes]

    @property
    def outputs(self) -> Sequence[Node]:
        """The flat outputs; each has a dtype."""
        return self._analysed[0].outputs

    def main(self, sizes: Mapping[str, int]) -> Graph:
        """(*weights, *inputs) -> outputs at these sizes of the named dims.

        Raises:
            UnsharedWeightsError: the forward takes other weights at these sizes than at the analysis sizes.
        """
        graph, _ = optimise(flatten(self.program.at(sizes).jaxpr), self._count, self.passes)
        found = stage(graph, self._count, only=frozenset(self.staged.keys))
        given = dict(zip(found.keys, found.main.inputs[len(found.kept) :], strict=False))
        kept = dict(zip(found.kept, found.main.inputs, strict=False))
        if missing := [i for i in found.kept if i not in self.staged.kept]:
            names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(self.program.params)]
            raise UnsharedWeightsError(
                f"{self.program.name} at {dict(sizes)} reads weights ({', '.join(names[i] for i in missing[:3])}) that "
                f"it doesn't read at {self.program.analysis_sizes}: it branches on its shapes. Compile it with "
                "passes=[], which keeps every weight"
            )
        weights = [kept.get(i) or _unread(graph.inputs[i]) for i in self.staged.kept]
        staged = zip(self.staged.keys, self.staged.prelude.outputs, strict=True)
        weights += [given.get(key) or _unread(node) for key, node in staged]
        inputs = found.main.inputs[len(found.kept) + len(found.keys) :]
        return Graph((*weights, *inputs), found.main.outputs, found.main.equations)

    def ready(self, sizes: Mapping[str, int], device: Any, report: CompileReport) -> Pending:
        """The compiled (*weights, *inputs) -> outputs at these sizes: see `main`."""
        structs = [*self.abstract_weights, *jax.tree.leaves(specs.structs(self.program.inputs, sizes))]
        return Pending(
            lambda *arrays: tuple(evaluate(self.main(sizes), arrays)),
            structs,
            len(jax.tree.leaves(self.program.output_axes)),
            program=self.fingerprint,
            bucket=sizes,
            device=device,
            report=report,
        )

    def weights(self, params: Any, device: Any, report: CompileReport) -> list[jax.Array]:
        """The weights that every bucket's program takes: those params that are still read, and the prelude's values.

        One value is made at a time and what it is made of is let go, so that the device never holds a second copy of
        the weights. Values made alike (the same fold in 50 layers) share one compiled program.
        """
        leaves = jax.tree.leaves(params)
        kept = [jax.device_put(leaves[i], device) for i in self.kept]
        made = []
        for _, program, operands in self.preludes(device, report):
            made += jax.device_put(program.result()(*(jax.device_put(leaves[i], device) for i in operands)), device)
        return [*kept, *made]

    @property
    def kept(self) -> Sequence[int]:
        """Places of the params that are weights as they are."""
        return self.staged.kept

    def preludes(self, device: Any, report: CompileReport) -> Iterator[tuple[str, Ready, list[int]]]:
        """For each value of the prelude: a name of what makes it, the program, and which params it takes."""
        place = {node: i for i, node in enumerate(self.staged.prelude.inputs)}
        for output in self.staged.prelude.outputs:
            cone = _cone(output)
            key = digest_of(cone).hex()
            if key not in self._cones:
                structs = [jax.ShapeDtypeStruct(n.shape, n.dtype) for n in cone.inputs]
                self._cones[key] = Pending(
                    lambda *arrays, cone=cone: tuple(evaluate(cone, arrays)),
                    structs,
                    1,
                    program=key,
                    bucket={"what": "prelude"},
                    device=device,
                    report=report,
                )
            yield key, self._cones[key], [place[n] for n in cone.inputs]

    def without_values(self, program: Program) -> Program:
        """The program with shapes in place of those params that nothing reads any more, so that they can be freed."""
        leaves, tree = jax.tree.flatten(program.params)
        shapes, kept = jax.tree.leaves(program.abstract_params), set(self.staged.kept)
        held = [leaf if i in kept else shape for i, (leaf, shape) in enumerate(zip(leaves, shapes, strict=True))]
        return program.with_params(jax.tree.unflatten(tree, held))

    def explain(self) -> str:
        """What each pass did, and what a call is spared in all."""
        _, reports = self._analysed
        original, main = flatten(self.program.jaxpr), self.staged.main
        before, after = flops(original.equations), flops(main.equations)
        moved, left = traffic(original.equations), traffic(main.equations)
        # What the passes before didn't take away themselves is what the forward did to its weights in each call.
        told = [n for r in reports for n in r.notes]
        rest = (before - after - sum(n.flops for n in told), moved - left - sum(n.bytes for n in told))
        notes = [replace(n, flops=rest[0], bytes=rest[1]) if i == 0 else n for i, n in enumerate(self.staged.notes)]
        reports = [*reports, Report("stage", len(self._analysed[0].equations), len(main.equations), tuple(notes))]
        sizes = ", ".join(f"{k} {v}" for k, v in self.program.analysis_sizes.items())
        total = f"a call{f' at {sizes}' if sizes else ''}: {before:,} flops -> {after:,}; {moved:,} bytes -> {left:,}"
        return "\n".join([f"{self.program.name}: {total}", *map(str, reports)])


def _unread(like: Node) -> Node:
    return Node(like.shape, like.dtype, like.weak)


def _cone(output: Node) -> Graph:
    """What makes one value, from the weights that it takes; inputs in the order of their first use."""
    found: set[Equation] = set()
    waiting = [output]
    while waiting:
        equation = waiting.pop().equation
        if equation is not None and equation not in found:
            found.add(equation)
            waiting += equation.inputs
    equations = sorted(found, key=lambda e: e.number)
    inputs = dict.fromkeys(n for e in equations for n in e.inputs if n.equation is None and not n.constant)
    return Graph(tuple(inputs), (output,), equations)
