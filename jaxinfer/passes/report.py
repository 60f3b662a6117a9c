"""What a pass says that it did, and the counts of work that it says it with."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxinfer.graph import Equation
from jaxinfer.passes.rewriting import nbytes

# Moves nothing by itself: a view of its operand, or made where it is read.
VIEWS = frozenset({"broadcast_in_dim", "copy", "expand_dims", "iota", "reshape", "squeeze", "stop_gradient"})
MOVES = frozenset({"concatenate", "gather", "pad", "rev", "slice", "split", "stack", "transpose", "unstack"})


@dataclass(frozen=True)
class Note:
    """One thing that a pass did or would not do, and what a call is spared.

    `flops` counts multiplications, additions and function values alike. `bytes` counts operands and results as if every
    equation ran by itself; XLA fuses elementwise ones, so the true saving is smaller.
    """

    what: str
    where: str = ""  # source line
    flops: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Report:
    """The notes of one pass, and the sizes of the graph before and after."""

    name: str
    before: int
    after: int
    notes: tuple[Note, ...]

    def __str__(self) -> str:
        head = f"{self.name}: {self.before} equations -> {self.after}"
        flops, size = sum(n.flops for n in self.notes), sum(n.bytes for n in self.notes)
        return "\n".join([head + _saved(flops, size), *_lines(self.notes)])


def flops(equations: Iterable[Equation]) -> int:
    """Arithmetic of some equations; an inner loop (scan, while, cond) counts as none."""
    return sum(map(_flops, equations))


def traffic(equations: Iterable[Equation]) -> int:
    """Bytes that some equations read and write, each by itself."""
    total = 0
    for equation in equations:
        if equation.name not in VIEWS:
            total += nbytes(equation.inputs) + nbytes(equation.outputs)
        if equation.name == "attention":  # its reference goes over the scores as the forward did; a kernel need not
            total += 2 * _passes(equation) * _scores(equation) * equation.inputs[0].dtype.itemsize
    return total


def _scores(equation: Equation) -> int:
    """Numbers in the scores of an attention equation."""
    batch, query, groups, heads, _ = equation.inputs[0].shape
    return batch * query * groups * heads * equation.inputs[1].shape[1]


def _passes(equation: Equation) -> int:
    """How often an attention equation goes over its scores: its own steps, and max, sub, exp, sum, div."""
    return 5 + sum(len(equation.params[name]) for name in ("steps", "counted", "weights"))


def _flops(equation: Equation) -> int:
    result = math.prod(equation.outputs[0].shape) if equation.outputs else 0
    if equation.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2 * result * math.prod(equation.inputs[0].shape[d] for d in contracted)
    if equation.name == "conv_general_dilated":
        kernel, numbers = equation.inputs[1].shape, equation.params["dimension_numbers"]
        return 2 * result * math.prod(kernel[d] for d in numbers.rhs_spec[1:])
    if equation.name == "attention":
        (*_, dim), (*_, wide) = equation.inputs[0].shape, equation.inputs[2].shape
        return _scores(equation) * (2 * (dim + wide) + _passes(equation))
    if equation.name in VIEWS or equation.name in MOVES or equation.name in ("scan", "while", "cond"):
        return 0
    if equation.name.startswith(("reduce_", "cum", "arg")):
        return math.prod(equation.inputs[0].shape)
    return result


def _lines(notes: Sequence[Note]) -> list[str]:
    """Notes that say the same of several layers become one line."""
    groups: dict[tuple[str, str], list[Note]] = {}
    for note in notes:
        groups.setdefault((note.what, note.where), []).append(note)
    lines = []
    for (what, where), same in groups.items():
        times = f" ({len(same)} times)" if len(same) > 1 else ""
        saved = _saved(sum(n.flops for n in same), sum(n.bytes for n in same))
        lines.append(f"  {what}{times}{saved}" + (f"  # {where}" if where else ""))
    return lines


def _saved(flops: int, size: int) -> str:
    parts = [f"{_short(flops)}flop"] * bool(flops) + [f"{_short(size)}B"] * bool(size)
    return f"; a call is spared {' and '.join(parts)}" if parts else ""


def _short(number: int) -> str:
    size, unit = float(number), ""
    for unit in ("", "k", "M", "G", "T"):
        if abs(size) < 1000 or unit == "T":
            break
        size /= 1000
    return f"{size:.3g} {unit}"
