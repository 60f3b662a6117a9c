"""Which scanned rows each row of a tree's values holds: an interval, of which the operator joins two adjacent ones.

So a tree is a prefix scan exactly if row t of its result holds [0, t].
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.graph import Equation, Node
from jaxinfer.passes.recognise_cut import Unrecognised
from jaxinfer.passes.recognise_tree import SCOPE, Call, Side, match, sliced


@dataclass(eq=False)
class Rows:
    """The first and last scanned row that each row of a value holds; -1 and -1 for a zero of padding."""

    first: np.ndarray
    last: np.ndarray


class Symbolic:
    """Runs the tree on intervals.

    `known` holds what was computed before, by what it was computed of: layers of one length share it.
    """

    def __init__(self, call: Call, known: dict[Any, Rows]) -> None:
        self.call, self.known = call, known
        self._of: dict[Side | tuple[Node, Node], Rows] = {}

    def rows(self, node: Node, source: Node) -> Rows:
        """Which scanned rows each row of a value holds, the value being one of `source`'s."""
        if (node, source) not in self._of:
            self._of[node, source] = self._compute(node, source)
        return self._of[node, source]

    def _compute(self, node: Node, source: Node) -> Rows:
        dim, count = self.call.dims[source], self.call.rows
        if node is source:
            return self._shared(("all", count), lambda: (np.arange(count, dtype=np.int32),) * 2)
        if node.shape[dim] == 0:
            return self._shared(("none",), lambda: (np.zeros(0, np.int32),) * 2)
        if node.equation is not None and node.equation.scope == SCOPE:
            found = self._moved(node.equation, source, dim)
        else:
            found = self._combined(node, source)
        if found.first.shape != (node.shape[dim],):
            raise Unrecognised("another number of rows")
        return found

    def _shared(self, key: Any, make: Any) -> Rows:
        if key not in self.known:
            self.known[key] = Rows(*make())
        return self.known[key]

    def _combined(self, node: Node, source: Node) -> Rows:
        sides: list[list[Rows]] = [[], []]
        for (side, operand), value in match(self.call, source, node).items():
            sides[side].append(self.rows(value, operand))
        if not all(sides):
            raise Unrecognised("the operator reads one side only")
        left, right = sides[0][0], sides[1][0]
        if any(r is not side[0] for side in sides for r in side):
            raise Unrecognised("operands of unlike rows are combined")

        def join() -> tuple[np.ndarray, np.ndarray]:
            neighbours = left.last.shape == right.first.shape and np.array_equal(left.last + 1, right.first)
            if not neighbours or (left.first < 0).any() or (right.first < 0).any():
                raise Unrecognised("rows that aren't neighbours are combined")
            return left.first, right.last

        return self._shared(("join", left, right), join)

    def _moved(self, equation: Equation, source: Node, dim: int) -> Rows:
        """The tree's own equations: slices, paddings, concatenations, sums with zeros."""
        p, name = equation.params, equation.name
        found = [self.rows(n, source) for n in equation.inputs if n.shape]
        rows = found[0]
        if name == "slice":
            sliced(equation, dim)
            part = (int(p["start_indices"][dim]), int(p["limit_indices"][dim]), int((p["strides"] or {dim: 1})[dim]))
            return self._shared((rows, *part), lambda: (rows.first[slice(*part)], rows.last[slice(*part)]))
        if name == "pad":
            return self._padded(equation, rows, dim)
        if name == "concatenate" and p["dimension"] == dim:
            pieces = ([r.first for r in found], [r.last for r in found])
            return self._shared((name, *found), lambda: map(np.concatenate, pieces))
        if name in ("add", "or") and len(found) == 2 and len({n.shape for n in equation.inputs}) == 1:
            return self._shared(("add", *found), lambda: _added(*found))
        raise Unrecognised(f"{equation} is no part of the tree")

    def _padded(self, equation: Equation, rows: Rows, dim: int) -> Rows:
        config = [tuple(map(int, c)) for c in equation.params["padding_config"]]
        low, high, inside = config[dim]
        fill = equation.inputs[1]
        zero = fill.constant and not np.any(np.asarray(fill.value))
        if not zero or min(low, high) < 0 or any(any(c) for d, c in enumerate(config) if d != dim):
            raise Unrecognised("padded otherwise")

        def spread(values: np.ndarray) -> np.ndarray:
            into = np.full(equation.outputs[0].shape[dim], -1, np.int32)
            into[low + np.arange(len(values)) * (inside + 1)] = values
            return into

        return self._shared((rows, "pad", *config[dim]), lambda: (spread(rows.first), spread(rows.last)))


def _added(a: Rows, b: Rows) -> tuple[np.ndarray, np.ndarray]:
    empty = a.first < 0
    if not (empty ^ (b.first < 0)).all():
        raise Unrecognised("rows are added")
    return np.where(empty, b.first, a.first), np.where(empty, b.last, a.last)
