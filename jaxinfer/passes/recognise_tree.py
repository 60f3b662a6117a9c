"""The tree that an associative scan unrolls to: whether an application of the operator is the first one again, at
another number of rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxinfer.axes.factors import ELEMENTWISE
from jaxinfer.graph import Equation, Node
from jaxinfer.passes.recognise_cut import Cut, Unrecognised, params_at

SCOPE = "associative_scan"
Side = tuple[int, Node]  # 0 for the left operand or 1 for the right; the scanned operand
Shape = tuple[int, ...]


@dataclass(eq=False)
class Call:
    """One call, as far as the results that are read tell of it."""

    rows: int
    dims: dict[Node, int]  # scanned operand -> its dim of rows
    first: dict[Node, Node] = field(default_factory=dict)  # scanned operand -> what the first combination made of it
    ends: dict[Node, Side] = field(default_factory=dict)  # slices that the first combination reads
    cuts: dict[Node, Cut] = field(default_factory=dict)  # scanned operand -> the operator, for that result
    roots: dict[Node, Node] = field(default_factory=dict)  # scanned operand -> its result
    ambiguous: bool = False  # one array was scanned twice in one call


@dataclass(eq=False)
class Change:
    """What to change in a graph: new equations before old ones, and values that others stand for."""

    before: dict[Equation, list[Equation]]
    instead: dict[Node, Node]


def tree_equation(node: Node, name: str) -> Equation:
    """The equation of the tree that makes a value."""
    equation = node.equation
    if equation is None or equation.scope != SCOPE or equation.name != name:
        raise Unrecognised(f"no {name} of the tree")
    return equation


def sliced(equation: Equation, dim: int, start: int | None = None) -> Node:
    """What a slice along one dim alone takes rows of."""
    node, out = equation.inputs[0], equation.outputs[0]
    if any(a != b for d, (a, b) in enumerate(zip(node.shape, out.shape, strict=True)) if d != dim):
        raise Unrecognised("sliced along another dim")
    if start is not None and equation.params["start_indices"][dim] != start:
        raise Unrecognised("sliced elsewhere")
    return node


def resized(shape: Shape, dim: int, rows: int) -> Shape:
    """A shape with another number of rows."""
    return (*shape[:dim], rows, *shape[dim + 1 :])


def match(call: Call, source: Node, node: Node) -> dict[Side, Node]:
    """The operands of an application of the operator that makes `node` for one scanned operand.

    Raises:
        Unrecognised: something else makes it.
    """
    found = _Match(call, call.cuts[source], node.shape[call.dims[source]])
    found.compare(call.first[source], node)
    return found.bound


class _Match:
    """Compares an application of the operator, on `rows` rows, with the first one.

    On a single row library code leaves dims out (jnp.matmul squeezes a batch of 1), so there shapes are compared
    without their dims of size 1: those hold nothing, and what an equation does to the others is the same.
    """

    def __init__(self, call: Call, pattern: Cut, rows: int) -> None:
        self.call, self.pattern, self.rows = call, pattern, rows
        self.bound: dict[Side, Node] = {}
        self._done: set[tuple[Node, Node]] = set()

    def compare(self, first: Node, node: Node) -> None:
        todo = [(first, node)]
        while todo:
            first, node = todo.pop()
            while (before := self._before(first)) is not None:
                first = before
            if (first, node) in self._done:
                continue
            self._done.add((first, node))
            if first in self.pattern.ends:
                self._bind(first, node)
                continue
            while (before := self._before(node)) is not None:
                node = before
            if first in self.pattern.dims or not _same_value(first, node):
                todo += self._operands(first, node)

    def _bind(self, end: Node, node: Node) -> None:
        side = self.call.ends[end]
        expected = resized(end.shape, self.call.dims[side[1]], self.rows)
        while node.shape != expected:
            before = self._before(node)
            if before is None:
                raise Unrecognised("the operator is applied to something else")
            node = before
        if self.bound.setdefault(side, node) is not node:
            raise Unrecognised("the operator is applied in another way")

    def _operands(self, first: Node, node: Node) -> list[tuple[Node, Node]]:
        a, b = first.equation, node.equation
        if a is None or b is None or a.name != b.name or len(a.inputs) != len(b.inputs) or first.dtype != node.dtype:
            raise Unrecognised("another operator")
        params = a.params
        if first in self.pattern.dims:
            params = params_at(a, self.pattern.dims[first], self.rows)
        equal = self._shape(first) == node.shape and same(params, b.params)
        if not equal and self.rows == 1:
            signatures = [
                _without_units(e, p, [self._shape(n) for n in e.inputs], self._shape(e.outputs[0]))
                for e, p in ((a, params), (b, b.params))
            ]
            equal = signatures[0] is not None and same(*signatures)
        if not equal or a.outputs.index(first) != b.outputs.index(node):
            raise Unrecognised("another operator")
        return list(zip(a.inputs, b.inputs, strict=True))

    def _before(self, node: Node) -> Node | None:
        """Past an equation that changes nothing at this number of rows; JAX leaves some of them out there."""
        equation = node.equation
        if equation is None or node in self.pattern.ends:
            return None
        operand = equation.inputs[0] if equation.inputs else node
        old, new = self._shape(operand), self._shape(node)
        if equation.name == "broadcast_in_dim" and old == new:
            return operand
        unit = self.rows == 1 and equation.name in ("broadcast_in_dim", "squeeze", "expand_dims", "reshape")
        return operand if unit and _large(old) == _large(new) else None

    def _shape(self, node: Node) -> Shape:
        dim = self.pattern.dims.get(node)
        return node.shape if dim is None else resized(node.shape, dim, self.rows)


def _large(shape: Shape) -> Shape:
    return tuple(n for n in shape if n != 1)


def _kept(dims: Sequence[int], shape: Shape) -> tuple[int, ...]:
    """Dims that are larger than 1, renumbered as if the others weren't there."""
    return tuple(sum(n != 1 for n in shape[:d]) for d in dims if shape[d] != 1)


def _without_units(equation: Equation, params: dict[str, Any], inputs: list[Shape], out: Shape) -> Any:
    """What an equation does, said without dims of size 1; None where that isn't known."""
    if equation.name == "dot_general":
        sides = [
            tuple(_kept(dims, s) for dims, s in zip(pair, inputs, strict=True)) for pair in params["dimension_numbers"]
        ]
        return {**params, "dimension_numbers": tuple(sides)}, tuple(map(_large, inputs))
    if equation.name in ELEMENTWISE and all(len(s) in (0, len(out)) for s in inputs):
        along = tuple(tuple(_kept([d for d, n in enumerate(s) if n != 1], out)) for s in inputs)
        return params, along, _large(out)
    if equation.name.startswith("reduce_"):
        return {**params, "axes": _kept(params["axes"], inputs[0])}, _large(inputs[0])
    if equation.name == "transpose":
        return _kept(params["permutation"], inputs[0]), _large(inputs[0])
    return None


def _same_value(a: Node, b: Node) -> bool:
    return a is b or (a.constant and b.constant and a.dtype == b.dtype and same(a.value, b.value))


def same(a: Any, b: Any) -> bool:
    """Whether two parameters or constants are equal for certain."""
    if a is b:
        return True
    if isinstance(a, np.ndarray | jax.Array | np.generic) or isinstance(b, np.ndarray | jax.Array | np.generic):
        return np.shape(a) == np.shape(b) and np.array_equal(np.asarray(a), np.asarray(b), equal_nan=False)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and bool(a == b)
