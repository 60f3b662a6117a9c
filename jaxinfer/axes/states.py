"""What the batch proof knows of a value: where its rows lie, that it has none, or why they are mixed."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from jaxinfer.graph import Equation, Node


@dataclass(frozen=True)
class Free:
    """Depends on no row. `uniform`: the dims that grow with the number of rows, along which it is constant."""

    uniform: frozenset[int] = frozenset()
    known: bool | None = None  # the value of a condition that is the same everywhere


@dataclass(frozen=True)
class Rows:
    """Element e depends on one row alone, in a way that is the same for every row and any number of them.

    `dim` has outer * rows * inner elements, and index i of it belongs to row (i // inner) % rows: [batch, time] merged
    is (1, time), [time, batch] merged is (time, 1). HERE (dim -1) is a value that belongs as a whole to one row.
    """

    dim: int
    outer: int = 1
    inner: int = 1


@dataclass(frozen=True, eq=False)
class Mixed:
    """Depends on several rows, on a row's place, or on how many rows there are. `order`: how early that was found."""

    equation: Equation | None
    text: str
    order: int


@dataclass(frozen=True)
class Index:
    """Counts rows: the value is its own index along `dim`, as arange(batch) is. To index by it keeps each row in place;
    anything else that is done with it makes a row depend on its place (`otherwise`).

    parts: None where the whole value counts, else the elements of the last dim that do; the others are the row's own.
    """

    dim: int
    otherwise: Mixed = field(compare=False)
    parts: frozenset[int] | None = None


State = Free | Rows | Mixed | Index
FREE = Free()
HERE = Rows(-1)


def merged(states: Iterable[State]) -> Mixed | None:
    """The earliest reason why any of the values is mixed."""
    found = [s if isinstance(s, Mixed) else s.otherwise for s in states if isinstance(s, Mixed | Index)]
    return min(found, key=lambda m: m.order, default=None)


def shifted(state: State, by: int) -> State:
    """The state of a value that gains (by = 1) or loses (by = -1) a leading dim which isn't the rows'."""
    if isinstance(state, Rows) and state != HERE:
        return Rows(state.dim + by, state.outer, state.inner)
    if isinstance(state, Free):
        return Free(frozenset(d + by for d in state.uniform if d + by >= 0))
    return state.otherwise if isinstance(state, Index) else state


def reshaped(before: tuple[int, ...], after: tuple[int, ...], place: Rows, rows: int) -> Rows | None:
    """Where rows lie after a reshape; None where they straddle two dims."""
    inner = place.inner
    for n in before[place.dim + 1 :]:
        inner *= n
    if inner == 0 or 0 in after:
        return None
    size = 1  # elements behind dim d
    for d in reversed(range(len(after))):
        if size * after[d] >= inner * rows and after[d] > 1:
            if inner % size or after[d] % (inner // size * rows):
                return None
            return Rows(d, after[d] // (inner // size * rows), inner // size)
        size *= after[d]
    return None


@dataclass(eq=False)
class Sizes:
    """What changes between two traces at different numbers of rows."""

    rows: int
    other_rows: int = 0
    dims: dict[Node, frozenset[int]] = field(default_factory=dict)  # dims that grow with the rows
    odd: dict[Any, str] = field(default_factory=dict)  # constants and equations that differ in more than shape
    moved: set[Equation] = field(default_factory=set)  # whose start or count of groups grows with the rows
    compared: bool = False

    def scaled(self, one: int, other: int) -> bool:
        """Whether two sizes are the same multiple of their numbers of rows."""
        return one % self.rows == 0 and one // self.rows * self.other_rows == other

    def grown(self, node: Node) -> frozenset[int]:
        """Dims of a value that grow with the number of rows; without a comparison, those that the number divides."""
        if self.compared:
            return self.dims.get(node, frozenset())
        return frozenset(d for d, n in enumerate(node.shape) if n and n % self.rows == 0)
