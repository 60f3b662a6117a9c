"""Fill analysis: where a value is known to be constant because of a mask.

A fact `Beyond(a, b, gap, fill)` of a value says: wherever index b exceeds index a by more than `gap`, it is `fill`.
A causal mask over [.., t, s] is Beyond(t, s, 0, False); a window of w adds Beyond(s, t, w - 1, False). Facts start at
comparisons of index expressions and at constant arrays, and flow forward through elementwise operations and movement.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.axes import Factors, factors_of
from jaxinfer.graph import Equation, Graph, Node

# A finite mask value counts as masking at a softmax from here down; scores are then assumed to stay far above it.
VERY_NEGATIVE = -1e4
_LARGEST_CONSTANT = 1 << 24  # elements of a captured mask that are worth a look


@dataclass(frozen=True)
class Beyond:
    """The value is `fill` wherever index[b] - index[a] > gap. `assumed`: only if scores are of ordinary size.

    `within`: (dim, first, end) where that is said only of indices of that dim in first .. end.
    """

    a: int
    b: int
    gap: int
    fill: float
    assumed: bool = False
    within: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Linear:
    """The value is sum(slopes[d] * index[d]) + offset; all slopes 0 for a uniform constant."""

    slopes: tuple[float, ...]
    offset: float

    @property
    def uniform(self) -> bool:
        return not any(self.slopes)


class Bands:
    """The linear forms and facts of every node, of the equations visited so far."""

    def __init__(self) -> None:
        self.linear: dict[Node, Linear] = {}
        self.facts: dict[Node, tuple[Beyond, ...]] = {}
        self._looked_at: set[Node] = set()

    @classmethod
    def of(cls, graph: Graph) -> "Bands":
        """Of a whole graph."""
        bands = cls()
        for equation in graph.equations:
            bands.visit(equation, factors_of(equation))
        return bands

    def visit(self, equation: Equation, factors: Factors) -> None:
        """Takes in the next equation of a graph."""
        for node in equation.inputs:
            if node.constant and node not in self._looked_at:
                self._looked_at.add(node)
                self._constant(node)
        if len(equation.outputs) == 1 and (not equation.inputs or any(map(self._known, equation.inputs))):
            self._flow(equation, factors)

    def masks(self, node: Node, dim: int, rows: tuple[int, int], neutral: Callable[[float], bool]) -> Beyond | None:
        """The tightest fact that hides `dim`, whose indices in `rows` are time, beyond another dim of the node."""
        found = [f for f in self.facts.get(node, ()) if f.b == dim and neutral(f.fill)]
        found = [f for f in found if f.within is None or f.within == (dim, *rows)]
        return min(found, key=lambda f: f.gap, default=None)

    def window(self, node: Node, dim: int, behind: int, neutral: Callable[[float], bool]) -> int | None:
        """How many rows before `behind`'s index `dim` is seen; None where a neutral fill hides nothing there."""
        facts = [f for f in self.facts.get(node, ()) if (f.a, f.b) == (dim, behind) and neutral(f.fill)]
        gaps = [f.gap for f in facts if f.within is None]
        return max(0, min(gaps)) if gaps else None

    def _known(self, node: Node) -> bool:
        return node in self.linear or node in self.facts

    def _constant(self, node: Node) -> None:
        value = np.asarray(node.value)
        if value.dtype.kind not in "biuf" and value.dtype.name != "bfloat16":
            return
        if value.size == 1:
            self.linear[node] = Linear((0.0,) * value.ndim, float(value.reshape(())))
            return
        wide = [d for d, n in enumerate(value.shape) if n > 1]
        if len(wide) == 2 and value.size <= _LARGEST_CONSTANT:
            matrix = value.reshape([value.shape[d] for d in wide])
            facts = (_corner(matrix, *wide), _corner(matrix.T, *reversed(wide)))
            self.facts[node] = tuple(f for f in facts if f is not None)

    def _flow(self, equation: Equation, factors: Factors) -> None:
        out = equation.outputs[0]
        form = _linear_form(equation, factors, [self.linear.get(n) for n in equation.inputs])
        if form is not None:
            self.linear[out] = form
            return
        facts = list(_compare(equation, factors, self.linear))
        if equation.name == "concatenate":
            facts += self._joined(equation, factors)
        elif factors.movement and equation.inputs:
            facts += self._elementwise(equation, factors)
        elif factors.reduction:
            facts += self._reduced(equation, factors)
        if facts:
            self.facts[out] = _tightest(facts)

    def _aligned(self, equation: Equation, factors: Factors, number: int) -> dict[tuple[int, int], Beyond]:
        """Facts of an operand, told in dims and indices of the result."""
        dims = factors.inputs[number]
        to: dict[int | None, int] = {f: d for d, f in enumerate(factors.outputs[0]) if f is not None}
        found = {}
        for fact in self.facts.get(equation.inputs[number], ()):
            a, b = to.get(dims[fact.a]), to.get(dims[fact.b])
            shifts = [_shift(equation, factors, number, d) for d in (fact.a, fact.b)]
            if a is not None and b is not None and None not in shifts:
                gap = fact.gap + (shifts[0] or 0) - (shifts[1] or 0)
                within = fact.within
                if within is not None:
                    d, first, end = within
                    moved, shift = to.get(dims[d]), _shift(equation, factors, number, d)
                    if moved is None or shift is None:
                        continue
                    within = (moved, max(0, first - shift), end - shift)
                found[a, b] = Beyond(a, b, gap, fact.fill, fact.assumed, within)
        return found

    def _joined(self, equation: Equation, factors: Factors) -> list[Beyond]:
        """Facts of the pieces of a concatenation, each said of its own stretch."""
        axis, found, start = equation.params["dimension"], [], 0
        for piece in equation.inputs:
            end = start + piece.shape[axis]
            for f in self.facts.get(piece, ()):
                if axis in (f.a, f.b) and f.within is None:
                    gap = f.gap + (start if f.b == axis else -start)
                    found.append(Beyond(f.a, f.b, gap, f.fill, f.assumed, (axis, start, end)))
            start = end
        return found

    def _elementwise(self, equation: Equation, factors: Factors) -> list[Beyond]:
        operands = [self._aligned(equation, factors, i) for i in range(len(equation.inputs))]
        constants = [
            self.linear[n].offset if n in self.linear and self.linear[n].uniform else None for n in equation.inputs
        ]
        found = []
        for pair in {p for facts in operands for p in facts}:
            facts = [o.get(pair) for o in operands]
            # Each fact alone first: an absorbing fill (0 in a product) needs nothing of the others and has its own gap.
            choices = [[f if i == j else None for j, f in enumerate(facts)] for i in range(len(facts)) if facts[i]]
            for chosen in [*choices, facts]:
                fills = [c if f is None else f.fill for f, c in zip(chosen, constants, strict=True)]
                result = _apply(equation, fills)
                present = [f for f in chosen if f is not None]
                if result is not None and present:
                    fill, assumed = result
                    gap = max(f.gap for f in present)
                    assumed = assumed or any(f.assumed for f in present)
                    limits = {f.within for f in present if f.within is not None}
                    if len(limits) <= 1:
                        found.append(Beyond(*pair, gap, fill, assumed, next(iter(limits), None)))
        return found

    def _reduced(self, equation: Equation, factors: Factors) -> list[Beyond]:
        found: list[Beyond] = []
        for number in range(len(equation.inputs)):
            kept = self._aligned(equation, factors, number).values()
            absorbing = factors.reduction in ("dot", "sum")
            found += [f for f in kept if (f.fill == 0 if absorbing else equation.name.startswith("reduce_"))]
        return found if factors.reduction != "prod" else []


def _tightest(facts: Sequence[Beyond]) -> tuple[Beyond, ...]:
    """One fact for each ordered pair of dims and kind of fill: the one with the smallest gap."""
    best: dict[tuple[Any, ...], Beyond] = {}
    for fact in sorted(facts, key=lambda f: (f.gap, f.assumed)):
        best.setdefault((fact.a, fact.b, fact.within), fact)
    return tuple(best.values())


def _corner(matrix: np.ndarray, a: int, b: int) -> Beyond | None:
    """The fact that the upper right corner of a constant matrix shows, if it holds more than the corner itself."""
    rows, columns = matrix.shape
    fill = matrix[0, -1]
    i, j = np.nonzero(matrix != fill)
    gap = int((j - i).max()) if len(i) else -rows
    return Beyond(a, b, gap, float(fill)) if gap < columns - 2 else None


def _linear_form(equation: Equation, factors: Factors, forms: Sequence[Linear | None]) -> Linear | None:
    name, out = equation.name, equation.outputs[0]
    if name == "iota":
        dimension = equation.params["dimension"]
        return Linear(tuple(float(d == dimension) for d in range(len(out.shape))), 0.0)
    if any(f is None for f in forms) or name not in ("add", "sub", "mul", "neg", "convert_element_type", *_MOVES):
        return None
    told = [_told(equation, factors, i, f) for i, f in enumerate(forms) if f is not None]
    if any(t is None for t in told):
        return None
    first = told[0]
    assert first is not None
    if name == "convert_element_type":
        whole = all(float(v).is_integer() for v in (*first.slopes, first.offset))
        return first if whole or out.dtype.kind == "f" else None
    if name == "neg":
        return Linear(tuple(-s for s in first.slopes), -first.offset)
    if len(told) == 1:
        return first
    second = told[1]
    assert second is not None
    if name == "mul":
        if not second.uniform:
            first, second = second, first
        scale = second.offset
        return Linear(tuple(s * scale for s in first.slopes), first.offset * scale) if second.uniform else None
    sign = 1 if name == "add" else -1
    slopes = tuple(x + sign * y for x, y in zip(first.slopes, second.slopes, strict=True))
    return Linear(slopes, first.offset + sign * second.offset)


def _shift(equation: Equation, factors: Factors, number: int, dim: int) -> int | None:
    """Index i of the result is the operand's i + shift along a dim; None where that isn't so everywhere."""
    low, high = factors.halo.get((number, dim), (0, 0))
    return low if low == high and (low == 0 or equation.name == "slice") else None


def _told(equation: Equation, factors: Factors, number: int, form: Linear) -> Linear | None:
    """An operand's linear form told in dims of the result; None where a dim it varies along is gone."""
    to = {f: d for d, f in enumerate(factors.outputs[0]) if f is not None}
    slopes, offset = [0.0] * len(factors.outputs[0]), form.offset
    for dim, (slope, factor) in enumerate(zip(form.slopes, factors.inputs[number], strict=True)):
        if slope:
            shift = _shift(equation, factors, number, dim)
            if factor is None or factor not in to or shift is None:
                return None
            slopes[to[factor]] = slope
            offset += slope * shift
    return Linear(tuple(slopes), offset)


def _compare(equation: Equation, factors: Factors, linear: dict[Node, Linear]) -> list[Beyond]:
    """Facts of a comparison of two index expressions: with D = index[b] - index[a], it is D <= m or D >= m."""
    if equation.name not in ("ge", "gt", "le", "lt", "eq") or not all(n in linear for n in equation.inputs):
        return []
    sides = [_told(equation, factors, i, linear[n]) for i, n in enumerate(equation.inputs)]
    if sides[0] is None or sides[1] is None:
        return []
    slopes = [x - y for x, y in zip(sides[0].slopes, sides[1].slopes, strict=True)]
    varying = [d for d, s in enumerate(slopes) if s]
    if len(varying) != 2 or slopes[varying[0]] != -slopes[varying[1]]:
        return []
    a, b = varying if slopes[varying[0]] > 0 else varying[::-1]  # left - right = scale * (i[a] - i[b]) + offset
    bound = (sides[0].offset - sides[1].offset) / slopes[a]
    low, high = math.floor(bound), math.ceil(bound)
    if equation.name == "eq":
        return [Beyond(a, b, low, 0.0), Beyond(b, a, -high, 0.0)]
    # ge: D <= bound; gt: D < bound; le: D >= bound; lt: D > bound.
    last = {"ge": low, "gt": high - 1, "le": high - 1, "lt": low}[equation.name]
    below = float(equation.name in ("ge", "gt"))  # what the comparison says for D <= last
    return [Beyond(a, b, last, 1.0 - below), Beyond(b, a, -last - 1, below)]


def _apply(equation: Equation, fills: Sequence[float | None]) -> tuple[float, bool] | None:
    """(result, assumed) of an elementwise operation on fills, None for an operand that is not known."""
    name = equation.name
    if name == "select_n":
        pick = fills[0]
        chosen = None if pick is None else fills[1 + int(pick)]
        if chosen is None and pick is None and None not in fills[1:] and len(set(fills[1:])) == 1:
            chosen = fills[1]
        return None if chosen is None else (chosen, False)
    known = [f for f in fills if f is not None]
    if len(known) < len(fills):
        return _absorb(name, fills, known, equation)
    function = _NUMERIC.get(name)
    if name in ("not", "and", "or", "xor") and equation.outputs[0].dtype.kind != "b":
        return None  # bit by bit
    if function is None and len(equation.inputs) == 1 and name in SAME:
        return known[0], False
    if function is None:
        return None
    with np.errstate(all="ignore"):
        result = float(function(*map(np.float64, known)))
    return None if math.isnan(result) else (result, False)


def _absorb(
    name: str, fills: Sequence[float | None], known: list[float], equation: Equation
) -> tuple[float, bool] | None:
    """Results that one known operand settles alone."""
    boolean = equation.outputs[0].dtype.kind == "b"
    if name == "mul" and 0 in known:
        return 0.0, False
    if name == "div" and fills[0] == 0:
        return 0.0, False
    if name == "and" and boolean and 0 in known:
        return 0.0, False
    if name == "or" and boolean and 1 in known:
        return 1.0, False
    if name in ("add", "sub") and fills[0] is not None and fills[0] <= VERY_NEGATIVE:
        return -math.inf, fills[0] != -math.inf
    if name == "add" and fills[1] is not None and fills[1] <= VERY_NEGATIVE:
        return -math.inf, fills[1] != -math.inf
    if name == "min" and min(known) <= VERY_NEGATIVE:
        return min(known), min(known) != -math.inf
    return None


_MOVES = ("broadcast_in_dim", "transpose", "squeeze", "expand_dims", "reshape", "slice", "copy", "stop_gradient")
SAME = frozenset((*_MOVES, "convert_element_type", "reduce_precision"))
_NUMERIC: dict[str, Callable[..., float]] = {
    "exp": np.exp,
    "exp2": np.exp2,
    "neg": np.negative,
    "abs": np.abs,
    "tanh": np.tanh,
    "square": np.square,
    "sign": np.sign,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "not": lambda x: 1 - x,
    "and": lambda x, y: float(bool(x) and bool(y)),
    "or": lambda x, y: float(bool(x) or bool(y)),
    "xor": lambda x, y: float(bool(x) != bool(y)),
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
