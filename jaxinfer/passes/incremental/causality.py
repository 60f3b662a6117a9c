"""Which dims of which values are time, and the proof that no output looks ahead.

The invariant, kept by every equation: an element depends on the rows of the input at or before the largest of its time
indices. Elementwise work and contractions over other dims keep it as they are; a reduction over time keeps it only if a
mask hides, for each time index that remains, everything after it (see bands).
"""

import math
from dataclasses import dataclass, field

from jaxinfer.axes import Factors, factors_of
from jaxinfer.errors import NotCausalError
from jaxinfer.graph import Equation, Graph, Node
from jaxinfer.passes.incremental.bands import VERY_NEGATIVE, Bands


@dataclass(eq=False)
class Timing:
    """The time dims of every value that depends on the rows of the time inputs; others aren't in `dims`."""

    dims: dict[Node, frozenset[int]]
    factors: dict[Equation, Factors]
    summed: dict[Equation, frozenset[int]]  # reduced factors that are time
    assumptions: list[str] = field(default_factory=list)

    def of(self, node: Node) -> frozenset[int]:
        """The time dims of a value; empty for one that no row of the input reaches."""
        return self.dims.get(node, frozenset())


def prove(graph: Graph, sources: dict[Node, int], capacity: int, *, assume_causal: bool = False) -> Timing:
    """Finds the time dims and proves causality.

    Args:
        sources: for each input that is made of rows in time, its time dim.
        capacity: the size of the time dim in this trace.
        assume_causal: take a reduction over time without a proof as causal; a mask that leaks is still refused.

    Raises:
        NotCausalError: naming the equation that looks ahead or that no rule understands, with its source line.
    """
    bands = Bands(graph)
    timing = Timing({node: frozenset({dim}) for node, dim in sources.items()}, {}, {})
    for equation in graph.equations:
        factors = timing.factors[equation] = factors_of(equation)
        times = _time_factors(equation, factors, timing)
        if times is None:
            continue
        timing.summed[equation] = times & factors.reduced
        for factor in sorted(timing.summed[equation]):
            times |= _kept_behind(equation, factors, factor, bands, timing, assume_causal)
        for node, dims in zip(equation.outputs, factors.outputs, strict=True):
            timing.dims[node] = frozenset(d for d, f in enumerate(dims) if f in times)
            for d in timing.dims[node]:
                if node.shape[d] != capacity:
                    raise NotCausalError(
                        f"{equation} makes a time axis of {node.shape[d]} rows out of {capacity}: shifted or shortened "
                        "time can't be derived yet; return and use the whole axis"
                    )
    for number, node in enumerate(graph.outputs):
        if len(timing.of(node)) != 1:
            raise NotCausalError(
                f"output {number} of shape {list(node.shape)} has {len(timing.of(node))} time axes; it must have one, "
                "a row for each row of the input (a pooled or summed output looks at later rows)"
            )
    return timing


def _time_factors(equation: Equation, factors: Factors, timing: Timing) -> frozenset[int] | None:
    """Factors of an equation that are time; None where no operand depends on the rows."""
    if not any(node in timing.dims for node in equation.inputs):
        return None
    times = set()
    for node, dims in zip(equation.inputs, factors.inputs, strict=True):
        for d in timing.of(node):
            factor = dims[d]
            if factor is None:
                raise NotCausalError(
                    f"{equation} needs the time axis (dim {d} of {list(node.shape)}) as a whole, and no rule says how "
                    "it treats later rows. Rewrite it with operations that work row by row, or mask explicitly"
                )
            times.add(factor)
    return frozenset(times)


def _kept_behind(
    equation: Equation, factors: Factors, factor: int, bands: Bands, timing: Timing, assume_causal: bool
) -> frozenset[int]:
    """Proves that a reduction over time ignores rows after another time index; returns that index's factor."""
    neutral = {
        "dot": lambda fill: fill == 0,
        "sum": lambda fill: fill == 0,
        "max": lambda fill: fill <= VERY_NEGATIVE,
        "min": lambda fill: fill >= -VERY_NEGATIVE,
        "and": lambda fill: fill == 1,
        "or": lambda fill: fill == 0,
        "prod": lambda fill: fill == 1,
    }[factors.reduction or "sum"]
    kept = {f for dims in factors.outputs for f in dims}
    leak = None
    for node, dims in zip(equation.inputs, factors.inputs, strict=True):
        if factor not in dims:
            continue
        fact = bands.masks(node, dims.index(factor), neutral)
        if fact is None or dims[fact.a] not in kept:
            continue
        if fact.gap <= 0:
            if fact.assumed or (factors.reduction == "max" and not math.isinf(fact.fill)):
                note = f"scores stay above the mask value where {equation} reads them"
                if note not in timing.assumptions:
                    timing.assumptions.append(note)
            behind = dims[fact.a]
            assert behind is not None
            return frozenset({behind})
        leak = fact.gap
    if leak is not None:
        raise NotCausalError(
            f"{equation} reads up to {leak} rows ahead: its mask hides only what is more than {leak} rows later. "
            "A causal mask keeps s <= t"
        )
    if assume_causal and kept & {f for dims in factors.inputs for f in dims if f is not None}:
        timing.assumptions.append(f"{equation} ignores later rows (assume_causal=True)")
        return frozenset()
    raise NotCausalError(
        f"{equation} combines all rows of the time axis, and no mask was found that hides later ones (a mask must be "
        f"exactly 0 in a sum, or -inf or at most {VERY_NEGATIVE:g} before a softmax). If the model is causal all the "
        "same, pass assume_causal=True"
    )
