"""Compares a forward traced at two numbers of rows: what must not change is that it is one computation.

A row's result may depend neither on how many rows there are (x / x.shape[0]) nor on a branch taken by that number. So
the two graphs must have the same equations on the same values, with the same parameters except those that spell a
shape; the dims that differ are the ones that hold rows.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxinfer.axes.states import Sizes
from jaxinfer.graph import Equation, Graph, Node, flatten

# Parameters that only repeat the shapes of the results.
_SHAPES = frozenset(
    ("shape", "new_sizes", "limit_indices", "slice_sizes", "sizes", "computation", "fft_lengths", "reps")
)
_MOVING = frozenset(("start_indices", "feature_group_count"))


class Bodies:
    """The inner graphs of scan, while, cond and custom_linear_solve equations, each flattened once."""

    def __init__(self) -> None:
        self._found: dict[Equation, dict[str, list[Graph]]] = {}

    def of(self, equation: Equation) -> dict[str, list[Graph]]:
        """By parameter name, the graphs it holds."""
        if equation not in self._found:
            held = {name: list(map(flatten, _jaxprs(value))) for name, value in equation.params.items()}
            self._found[equation] = {name: graphs for name, graphs in held.items() if graphs}
        return self._found[equation]


def _jaxprs(value: Any) -> Iterator[ClosedJaxpr]:
    if isinstance(value, ClosedJaxpr):
        yield value
    elif isinstance(value, Jaxpr) and not value.constvars:
        yield ClosedJaxpr(value, ())
    elif isinstance(value, tuple):
        for part in value:
            yield from _jaxprs(part)


def compare(one: Graph, other: Graph, rows: int, other_rows: int, bodies: Bodies) -> tuple[Sizes, Equation | None]:
    """The sizes found in `one`, and its first equation at which the two graphs part ways (None where they don't).

    Args:
        rows, other_rows: how many there are in `one` and in `other`.
    """
    found = Sizes(rows, other_rows, compared=True)
    parting = _graphs(one, other, found, bodies)
    return found, parting


def _graphs(one: Graph, other: Graph, found: Sizes, bodies: Bodies) -> Equation | None:
    same: dict[Node, Node] = {}

    def match(a: Node, b: Node) -> bool:
        if a.constant or b.constant:
            return a.constant and b.constant and _constants(a, b, found)
        return same.get(a) is b

    def define(a: Node, b: Node) -> bool:
        same[a] = b
        return _shapes(a, b, found)

    if len(one.inputs) != len(other.inputs) or not all(map(define, one.inputs, other.inputs)):
        return one.equations[0] if one.equations else None
    for a, b in zip(one.equations, other.equations, strict=False):
        if a.name != b.name or len(a.inputs) != len(b.inputs) or not all(map(match, a.inputs, b.inputs)):
            return a
        if not all(map(define, a.outputs, b.outputs)):
            return a
        parting = _params(a, b, found, bodies)
        if parting is not None:
            return parting
    longer = max(one, other, key=lambda g: len(g.equations)).equations
    if len(one.equations) != len(other.equations):
        return longer[min(len(one.equations), len(other.equations))]
    return None if all(map(match, one.outputs, other.outputs)) or not longer else longer[-1]


def _shapes(a: Node, b: Node, found: Sizes) -> bool:
    if a.shape == b.shape:
        return a.dtype == b.dtype
    if len(a.shape) != len(b.shape) or a.dtype != b.dtype:
        return False
    grown = frozenset(d for d, (n, m) in enumerate(zip(a.shape, b.shape, strict=True)) if n != m)
    found.dims[a] = grown
    return all(found.scaled(a.shape[d], b.shape[d]) for d in grown)


def _constants(a: Node, b: Node, found: Sizes) -> bool:
    """Constants of equal values. One that grows with the rows is judged where it is used, one that differs is odd."""
    if not _shapes(a, b, found):
        return False
    if a.value is b.value or a in found.odd:
        return True
    grown = found.dims.get(a, frozenset())
    first = tuple(slice(1) if d in grown else slice(None) for d in range(len(a.shape)))
    x, y = (np.asarray(n.value)[first] for n in (a, b))
    if x.shape != y.shape or not np.array_equal(x, y, equal_nan=x.dtype.kind in "fc"):
        found.odd[a] = f"the constant {_short(a.value)} here is {_short(b.value)} at another number of rows"
    return True


def _short(value: Any) -> str:
    return f"{np.asarray(value)}" if np.ndim(value) == 0 else f"of shape {list(np.shape(value))}"


def _params(a: Equation, b: Equation, found: Sizes, bodies: Bodies) -> Equation | None:
    if _equal(a.params, b.params):
        return None
    inner, others = bodies.of(a), bodies.of(b)
    for name, value in a.params.items():
        if name in inner:
            graphs = others.get(name, [])
            if len(graphs) != len(inner[name]):
                return a
            for x, y in zip(inner[name], graphs, strict=True):
                parting = _graphs(x, y, found, bodies)
                if parting is not None:
                    return parting
        elif name in _MOVING and _moves(value, b.params[name], found):
            found.moved.add(a)
        elif name not in _SHAPES and not _equal(value, b.params.get(name)):
            found.odd[a] = f"its {name} is {value} here and {b.params.get(name)} at another number of rows"
    return None


def _moves(a: Any, b: Any, found: Sizes) -> bool:
    """Whether a parameter differs only by growing with the rows: slices that start whole blocks of rows further."""
    one, other = (x if isinstance(x, tuple) else (x,) for x in (a, b))
    return a != b and all(n == m or found.scaled(n, m) for n, m in zip(one, other, strict=True))


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a is b or a == b)
    except ValueError:  # arrays
        return np.array_equal(a, b)
