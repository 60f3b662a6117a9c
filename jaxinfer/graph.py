"""Graph: a jaxpr flattened for analysis: calls inlined, dead equations removed, every value a node of its own."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive

from jaxinfer import _jax


@dataclass(eq=False, slots=True)  # of these two there are tens of thousands
class Node:
    """One value: an input, a constant (then `value` holds it) or the result of `equation`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    weak: bool = False
    value: Any = None
    equation: "Equation | None" = field(default=None, repr=False)

    @property
    def constant(self) -> bool:
        """Whether this is a literal or a captured array."""
        return self.value is not None


@dataclass(frozen=True, eq=False)
class Composite:
    """An idiom of several equations taken as one. Stands where a primitive does: `bind` runs `lower`, in any trace."""

    name: str
    lower: Callable[..., Any]  # (*operands, **params) -> results, or the only one
    multiple_results: bool = True

    def bind(self, *operands: Any, **params: Any) -> Any:
        return self.lower(*operands, **params)


@dataclass(eq=False, repr=False, slots=True)
class Equation:
    """One primitive applied to nodes. `source` is where the user's outermost call stands."""

    primitive: Primitive | Composite
    params: dict[str, Any]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    source: str
    number: int = -1
    scope: str = ""  # the function of JAX whose own code made this, where that matters: "associative_scan"

    @property
    def name(self) -> str:
        return self.primitive.name

    def __repr__(self) -> str:  # not the dataclass's: it would spell out all that leads here
        return str(self)

    def __str__(self) -> str:
        shapes = ", ".join(f"{n.dtype}{list(n.shape)}" for n in self.inputs)
        return f"{self.name}({shapes})" + (f" at {self.source}" if self.source else "")


@dataclass(eq=False)
class Graph:
    """Inputs in the jaxpr's order, equations in an order in which each value is made before it is used."""

    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    equations: list[Equation] = field(default_factory=list)

    def consumers(self) -> dict[Node, list[Equation]]:
        """The equations that read each node."""
        found: dict[Node, list[Equation]] = {}
        for equation in self.equations:
            for node in equation.inputs:
                found.setdefault(node, []).append(equation)
        return found


@contextmanager
def uncollected() -> Iterator[None]:
    """Pauses garbage collection: analyses and rewrites make no cycles that matter, and among JAX's objects a full
    collection takes 0.1 s, several of them a pass over 7,000 equations."""
    paused = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if paused:
            gc.enable()


@uncollected()
def flatten(closed: ClosedJaxpr) -> Graph:
    """The Graph of a jaxpr. Equations that nothing needs are left out."""
    inputs = tuple(_node(v.aval) for v in closed.jaxpr.invars)
    consts = [_node(v.aval, c) for v, c in zip(closed.jaxpr.constvars, closed.consts, strict=True)]
    equations: list[Equation] = []
    outputs = _inline(closed.jaxpr, consts, inputs, "", equations)
    graph = Graph(inputs, outputs, needed(outputs, equations))
    for number, equation in enumerate(graph.equations):
        equation.number = number
    return graph


def evaluate(graph: Graph, inputs: Sequence[Any]) -> list[Any]:
    """Runs a graph on its inputs, inside a trace or not; the outputs in order."""
    values: dict[Node, Any] = dict(zip(graph.inputs, inputs, strict=True))

    def read(node: Node) -> Any:
        return jnp.asarray(node.value, node.dtype) if node.constant else values[node]

    for equation in graph.equations:
        results = equation.primitive.bind(*map(read, equation.inputs), **equation.params)
        results = results if equation.primitive.multiple_results else (results,)
        values.update(zip(equation.outputs, results, strict=True))
    return [read(node) for node in graph.outputs]


def needed(outputs: Iterable[Node], equations: Sequence[Equation]) -> list[Equation]:
    """Those of the equations that the outputs depend on, in order."""
    wanted, kept = set(outputs), []
    for equation in reversed(equations):
        if not wanted.isdisjoint(equation.outputs):
            wanted.update(equation.inputs)
            kept.append(equation)
    kept.reverse()
    return kept


def copies(equations: Iterable[Equation], made: dict[Node, Node], source: str = "") -> list[Equation]:
    """The equations on other operands of the same shapes: `made` says which, and is told the new results.

    `source`: where equations stand that have no line of their own.
    """
    found = []
    for old in equations:
        inputs = tuple(n if n.constant else made[n] for n in old.inputs)
        outputs = tuple(Node(n.shape, n.dtype, n.weak) for n in old.outputs)
        new = Equation(old.primitive, old.params, inputs, outputs, old.source or source, scope=old.scope)
        for before, node in zip(old.outputs, outputs, strict=True):
            node.equation = new
            made[before] = node
        found.append(new)
    return found


def in_place_of(
    results: Sequence[Node], function: Callable[..., Any], operands: Sequence[Node], source: str
) -> list[Equation]:
    """The equations of function(*arrays) -> arrays, traced on the operands' shapes; its results are the given nodes."""
    inner = flatten(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(n.shape, n.dtype) for n in operands)))
    stands = dict(zip(inner.inputs, operands, strict=True))
    equations = inner.equations
    for new, old in zip(inner.outputs, results, strict=True):
        if new in stands or new.equation is None:  # two results that are one value, or an operand
            equations.append(Equation(jax.lax.copy_p, {}, (new,), (old,), source))
        else:
            stands[new] = old
    for equation in equations:
        equation.inputs = tuple(stands.get(n, n) for n in equation.inputs)
        equation.outputs = tuple(stands.get(n, n) for n in equation.outputs)
        equation.source = source
        for node in equation.outputs:
            node.equation = equation
    return equations


def _node(aval: Any, value: Any = None) -> Node:
    dtype = aval.dtype
    # Keys of jax.random have a dtype that NumPy doesn't know.
    if not isinstance(dtype, np.dtype) and not jnp.issubdtype(dtype, jax.dtypes.extended):
        dtype = np.dtype(dtype)
    return Node(tuple(aval.shape), dtype, bool(getattr(aval, "weak_type", False)), value)


def _inline(
    jaxpr: Jaxpr, consts: Sequence[Node], arguments: Sequence[Node], source: str, into: list[Equation]
) -> tuple[Node, ...]:
    env: dict[Any, Node] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Node:
        return _node(atom.aval, atom.val) if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        # An inner jaxpr is cached with its first caller's traceback, so the outermost call's line is the true one.
        where = source or _jax.source_line(eqn)
        operands = tuple(map(read, eqn.invars))
        inner = _jax.called(eqn)
        if inner is not None:
            body, values = inner
            held = [_node(v.aval, c) for v, c in zip(body.constvars, values, strict=True)]
            results = _inline(body, held, operands, where, into)
        else:
            results, params = tuple(_node(v.aval) for v in eqn.outvars), dict(eqn.params)
            if eqn.primitive is jax.lax.reshape_p and params.get("dimensions") is not None:
                operands, params["dimensions"] = (_transposed(operands[0], params["dimensions"], where, into),), None
            equation = Equation(eqn.primitive, params, operands, results, where, scope=_jax.scope(eqn))
            for node in results:
                node.equation = equation
            into.append(equation)
        env.update(zip(eqn.outvars, results, strict=True))
    return tuple(map(read, jaxpr.outvars))


def _transposed(node: Node, order: Sequence[int], source: str, into: list[Equation]) -> Node:
    """What a reshape with `dimensions` (vmap of a convolution makes one) does first, as the equation that it is."""
    out = Node(tuple(node.shape[d] for d in order), node.dtype, node.weak)
    out.equation = Equation(jax.lax.transpose_p, {"permutation": tuple(order)}, (node,), (out,), source)
    into.append(out.equation)
    return out
