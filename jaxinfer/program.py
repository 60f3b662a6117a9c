"""Program: the one IR. A closed jaxpr over (params, *inputs), with named axes and where each equation came from."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from jaxinfer import _jax, specs
from jaxinfer.errors import TraceError


@dataclass(frozen=True)
class Traced:
    """One trace of a forward, at concrete sizes."""

    jaxpr: ClosedJaxpr  # over the flattened (params, *inputs)
    in_tree: Any
    out_tree: Any
    sizes: Mapping[str, int]


@dataclass(eq=False)
class Program:
    """A forward pass that jaxinfer has traced, made by `ji.trace`.

    JAX shapes are concrete, so there is a trace for each combination of sizes of the named dims: `at` makes it when
    first asked and never again. `jaxpr` is the trace used for analysis and printing, at primes found nowhere else.
    """

    name: str
    function: Callable[..., Any]  # (params, *inputs) -> any pytree
    params: Any  # pytree of arrays or ShapeDtypeStructs
    inputs: tuple[Any, ...]  # a pytree of Specs for each positional input
    identity: str | None = None  # set where the forward is known without tracing (our own models): see fingerprint
    _traces: dict[tuple[tuple[str, int], ...], Traced] = field(default_factory=dict, repr=False)

    @property
    def axes(self) -> tuple[str, ...]:
        """The named dims of the inputs."""
        return specs.names(self.inputs)

    @property
    def trace_count(self) -> int:
        """How many traces were made so far."""
        return len(self._traces)

    def at(self, sizes: Mapping[str, int]) -> Traced:
        """The trace at these sizes of the named dims, made once.

        Raises:
            TraceError: a named dim without a size, a name that isn't there, or a forward that can't be traced.
        """
        if set(sizes) != set(self.axes):
            raise TraceError(f"{self.name} has the named dims {sorted(self.axes)}, got sizes for {sorted(sizes)}")
        key = tuple(sorted(sizes.items()))
        if key not in self._traces:
            self._traces[key] = self._trace(dict(sizes))
        return self._traces[key]

    def _trace(self, sizes: dict[str, int]) -> Traced:
        arguments = (self.abstract_params, *specs.structs(self.inputs, sizes))
        try:
            jaxpr, shape = jax.make_jaxpr(self.function, return_shape=True)(*arguments)
        except TraceError:
            raise
        except Exception as error:  # whatever the user's forward raises, said with what it was called with
            given = ", ".join(map(str, specs.leaves(self.inputs)))
            raise TraceError(
                f"{self.name} can't be traced with inputs {given} at {sizes}: {type(error).__name__}: {error}"
            ) from error
        return Traced(jaxpr, jax.tree.structure(arguments), jax.tree.structure(shape), sizes)

    @cached_property
    def abstract_params(self) -> Any:
        """The parameters' shapes and dtypes."""
        return specs.shapes_of(self.params)

    def with_params(self, params: Any) -> "Program":
        """The same program on other parameters of the same shapes and dtypes; nothing is traced again."""
        return replace(self, params=params, _traces=self._traces)

    @cached_property
    def analysis_sizes(self) -> dict[str, int]:
        """A distinct prime for each named dim, dividing no other dim, so that equal sizes mean one axis."""
        taken = [d for p in jax.tree.leaves(self.abstract_params) for d in p.shape]
        taken += [d for leaf in specs.leaves(self.inputs) for d in leaf.dims if isinstance(d, int)]
        return dict(zip(self.axes, specs.fresh_primes(len(self.axes), taken), strict=True))

    @property
    def jaxpr(self) -> ClosedJaxpr:
        """The trace at `analysis_sizes`."""
        return self.at(self.analysis_sizes).jaxpr

    @cached_property
    def output_axes(self) -> Any:
        """For each output its specs.Dims: the name of each dim ("batch", "batch*time" where merged) or its size."""
        traced = self.at(self.analysis_sizes)
        named = [specs.Dims(self.axis_name(d) for d in aval.shape) for aval in traced.jaxpr.out_avals]
        return jax.tree.unflatten(traced.out_tree, named)

    def axis_name(self, size: int) -> str | int:
        """What a dim of the analysis trace is called: its named dims joined by *, a factor before them, or its size."""
        names, rest = [], size
        for name, prime in self.analysis_sizes.items():
            while rest > 1 and rest % prime == 0:
                names.append(name)
                rest //= prime
        if not names:
            return size
        return "*".join(([str(rest)] if rest > 1 else []) + names)

    @cached_property
    def _verdicts(self) -> dict[str, Any]:
        return {}

    def verdict(self, axis: str) -> Any:
        """What is proved of the rows along a named dim: an axes.proof.Verdict, found once.

        Raises:
            TraceError: no input has such a dim.
        """
        from jaxinfer.axes import report

        if axis not in self._verdicts:
            self._verdicts[axis] = report.verdict_of(self, axis)
        return self._verdicts[axis]

    @property
    def independent_axes(self) -> frozenset[str]:
        """The named dims whose rows provably don't mix: row i of every output depends on row i of the inputs alone, in
        the same way for every row and any number of rows. Inputs without the dim are shared by the rows."""
        return frozenset(axis for axis in self.axes if self.verdict(axis).independent)

    def why(self, axis: str) -> str:
        """In a few lines, the proof that rows along a named dim don't mix, or the equation that mixes them."""
        from jaxinfer.axes import report

        return report.explain(self, self.verdict(axis))

    @cached_property
    def fingerprint(self) -> str:
        """Names the computation (not the weights' values): equal fingerprints compile to equal programs."""
        digest = hashlib.sha256()
        if self.identity is not None:
            digest.update(self.identity.encode())
        else:
            jaxpr = self.jaxpr
            digest.update(str(jaxpr).encode())
            for const in jaxpr.consts:
                digest.update(np.asarray(const).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.abstract_params):
            digest.update(f"{path}{leaf.shape}{leaf.dtype}".encode())
        digest.update(" ".join(map(str, specs.leaves(self.inputs))).encode())
        return digest.hexdigest()

    @property
    def parameter_count(self) -> int:
        """Numbers in the parameters."""
        return sum(math.prod(p.shape) for p in jax.tree.leaves(self.abstract_params))

    def verify(self) -> "Program":
        """Checks the IR and returns it: every value defined once and before its use, and no dim of the outputs that
        changes with a named dim in a way that isn't a product of named dims.

        Raises:
            TraceError: naming the equation or output that breaks the rule.
        """
        _jax.check_single_assignment(self.jaxpr)
        other = dict(zip(self.axes, specs.fresh_primes(2 * len(self.axes), ())[len(self.axes) :], strict=True))
        outputs = jax.tree.leaves(self.output_axes)
        for number, (dims, aval) in enumerate(zip(outputs, self.at(other).jaxpr.out_avals, strict=True)):
            expected = tuple(math.prod(other.get(p, 0) or int(p) for p in str(d).split("*")) for d in dims)
            if expected != aval.shape:
                raise TraceError(
                    f"output {number} of {self.name} is {dims}, but at {other} its shape is {aval.shape}: a dim that "
                    "depends on a named dim otherwise than as itself or a product can't be bucketed"
                )
        return self

    def explain(self, passes: Iterable[str] | None = None) -> str:
        """What each pass does to this program, with the source lines, and what a call is spared.

        Args:
            passes: as in `ji.compile`: names of the rewrites to run, those that are on by default if not given.
        """
        from jaxinfer.passes.prepared import Prepared  # the passes rest on Program

        return Prepared(self, passes).explain()

    def show(self, width: int = 110) -> str:
        """The equations, one a line, with axis names in place of sizes."""
        return _jax.pretty(self.jaxpr, self.axis_name, width)

    def __str__(self) -> str:
        outputs = jax.tree.leaves(self.output_axes)
        inputs = ", ".join(map(str, specs.leaves(self.inputs)))
        head = f"{self.name}: ({inputs}) -> {', '.join(str(list(o)).replace(chr(39), '') for o in outputs)}"
        return f"{head}; {self.parameter_count:,} parameters, {len(self.jaxpr.jaxpr.eqns)} equations\n{self.show()}"
