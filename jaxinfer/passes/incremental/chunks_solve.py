"""Forward substitution, by which delta rules make a chunk's rows of those before (Yang et al. 2024, arXiv:2406.06484).

Row l of the solution of A x = b, with A lower triangular, depends on rows up to l of A, of whose columns it reads those
up to l, and of b. It is made within a chunk only: row by row it would need every row of A again.
"""

from typing import TYPE_CHECKING

from jaxinfer.graph import Equation
from jaxinfer.passes.incremental.bands import Bands

if TYPE_CHECKING:
    from jaxinfer.passes.incremental.causality import Timing

_KNOWN = {"left_side", "lower", "transpose_a", "conjugate_a", "unit_diagonal"}


def substituted(equation: Equation, timing: "Timing", bands: Bands) -> bool:
    """Whether an equation is a forward substitution along time; then its facts are put down."""
    if equation.name != "triangular_solve" or not equation.params.keys() <= _KNOWN:
        return False
    params, (a, b), (out,) = equation.params, equation.inputs, equation.outputs
    row, column = len(out.shape) - 2, len(out.shape) - 1
    below = params["lower"] != params["transpose_a"]
    if not params["left_side"] or not below or not (timing.of(a) | timing.of(b)) & {row}:
        return False
    if any(d < row for d in timing.of(a) | timing.of(b)):
        return False
    leads = [timing.lead(a, d) for d in timing.of(a)] + [timing.lead(b, d) for d in timing.of(b) if d == row]
    dims = {row: max(leads)} | {d: timing.lead(b, d) for d in timing.of(b) if d == column}
    timing.dims[out] = frozenset(dims)
    timing.ahead[out] = max(dims.values())
    for d, lead in dims.items():
        if lead < timing.ahead[out]:
            timing.leads[out, d] = lead
    # What is 0 far enough above the diagonal of b is so in x.
    zeros = [f for f in bands.facts.get(b, ()) if (f.a, f.b, f.fill) == (row, column, 0) and f.within is None]
    if zeros:
        bands.facts[out] = tuple(zeros)
    return True
