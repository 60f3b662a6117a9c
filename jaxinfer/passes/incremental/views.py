"""Views: which rows of a value a step works on, dim by dim."""

import enum
from typing import NamedTuple

from jaxinfer.graph import Node


class Kind(enum.IntEnum):  # of ints: views are hashed by the hundred thousand
    """What is wanted of one dim."""

    WHOLE = 0  # as it is in the forward
    PREFIX = 1  # rows 0 .. L: everything so far
    LAST = 2  # row pos + n - 1: the chunk's last real one
    ROWS = 3  # the chunk's: pos + lo .. pos + k + hi


class View(NamedTuple):
    """A kind. For ROWS, how far the rows reach beyond the chunk's own on either side; for PREFIX, how many rows that
    aren't time stand before and after it (a column for an attention sink, joined to the scores)."""

    kind: Kind
    lo: int = 0
    hi: int = 0

    def shifted(self, lo: int, hi: int) -> "View":
        """What an equation that reads its operand's rows i + lo .. i + hi asks for to make these rows."""
        return View(self.kind, self.lo + int(lo), self.hi + int(hi)) if self.kind is Kind.ROWS else self


WHOLE, ROWS, LAST, PREFIX = (View(kind) for kind in (Kind.WHOLE, Kind.ROWS, Kind.LAST, Kind.PREFIX))

Views = tuple[View, ...]
Kinds = tuple[Kind, ...]
Demand = tuple[Node, Views]
Place = tuple[Node, Kinds]  # what is remembered, however many rows of it


def whole(node: Node) -> Views:
    """The view of a value as it is."""
    return (WHOLE,) * len(node.shape)


def kinds(views: Views) -> Kinds:
    """What of each dim, without how many rows."""
    return tuple([v[0] for v in views])


def fresh(views: Views) -> Views:
    """The chunk's own rows, wherever rows of some kind are wanted: what a step adds to what it remembers."""
    return tuple(v if v.kind is Kind.WHOLE else ROWS for v in views)


def hull(views: list[Views]) -> Views:
    """The smallest view that holds all of these, which are of the same kinds."""
    if len(views) == 1:
        return views[0]
    return tuple(View(d[0].kind, min(v.lo for v in d), max(v.hi for v in d)) for d in zip(*views, strict=True))


def holds(outer: Views, inner: Views) -> bool:
    """Whether every row of `inner` is one of `outer`."""
    return outer == inner or all(
        a.kind is b.kind and a.lo <= b.lo and a.hi >= b.hi for a, b in zip(outer, inner, strict=True)
    )
