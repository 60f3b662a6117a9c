"""A softmax over one dim, as jax.nn writes it or by hand, found by its quotient."""

from dataclasses import dataclass

import numpy as np

from jaxinfer.graph import Equation, Node
from jaxinfer.passes import atoms
from jaxinfer.passes.atoms import Atom, Dims
from jaxinfer.passes.rewriting import Rewriter, splat

VIEWS = ("transpose", "reshape", "squeeze", "expand_dims")


@dataclass(frozen=True)
class Softmax:
    """The softmax of `scores` over the atoms `keys`; all in the atoms of the scores' dims."""

    scores: Node
    score_dims: Dims
    weights: Node
    weight_dims: Dims
    keys: list[Atom]
    counted: tuple[Equation, ...] = ()  # the mask on what the sum counts


def find_softmax(rewriter: Rewriter, division: Equation) -> Softmax | None:
    """exp(s - max s) / sum of it, where nothing else reads what lies between."""
    above, below = division.inputs
    exp = above.equation
    shifted = exp.inputs[0].equation if exp is not None and exp.name == "exp" else None
    if exp is None or shifted is None or shifted.name != "sub":
        return None
    top, total = _reduction(shifted.inputs[1], "reduce_max"), _reduction(below, "reduce_sum")
    if top is None or total is None:
        return None
    scores, views = _root(shifted.inputs[0])
    peak, to_peak = _root(top[0].inputs[0])
    counted, to_sum = _root(total[0].inputs[0])
    mask = counted.equation
    if counted is not above and mask is not None and mask.name == "select_n" and mask.inputs[2] is above:
        counted = above if splat(mask.inputs[1]) == 0 and mask.inputs[0].dtype == np.bool_ else counted
    else:
        mask = None
    if peak is not scores or counted is not above or len(scores.shape) != len(above.shape):
        return None
    dims = atoms.fresh(scores.shape)
    inside = _along(views, dims)
    if inside is None:
        return None
    highest, summed = _spread_over(dims, to_peak, top), _spread_over(inside, to_sum, total)
    if highest is None or summed is None:
        return None
    keys = atoms.flat([highest[0]])
    repeated = [[] if set(d) & set(keys) else d for d in atoms.settled(inside)]
    same = atoms.settled(highest[1]) == atoms.settled(summed[1]) == repeated
    if not same or atoms.flat([summed[0]]) != keys:
        return None
    pattern = {division, exp, shifted, *views, *to_peak, *to_sum, *top, *total, *([mask] if mask else [])}
    made = {n for e in pattern - {division} for n in e.outputs} | {scores}
    if not all(rewriter.only_read_by(n, pattern) for n in made):
        return None
    counts = (mask,) if mask is not None else ()
    return Softmax(scores, dims, division.outputs[0], inside, keys, counts)


def _root(node: Node) -> tuple[Node, tuple[Equation, ...]]:
    """What a value is a view of, and the views from there."""
    views: list[Equation] = []
    while not node.constant and node.equation is not None and node.equation.name in VIEWS:
        views.insert(0, node.equation)
        node = node.equation.inputs[0]
    return node, tuple(views)


def _reduction(node: Node, name: str) -> tuple[Equation, ...] | None:
    """A reduction over one dim and the views and broadcasts from there to a value."""
    found: list[Equation] = []
    while not node.constant and (made := node.equation) is not None:
        found.insert(0, made)
        if made.name == name:
            return tuple(found) if len(made.params["axes"]) == 1 else None
        if made.name not in (*VIEWS, "broadcast_in_dim") or len(made.inputs) != 1:
            return None
        node = made.inputs[0]
    return None


def _along(views: tuple[Equation, ...], dims: Dims) -> Dims | None:
    for view in views:
        found = atoms.moved(view, dims)
        if found is None:
            return None
        dims = found
    return dims


def _spread_over(
    dims: Dims, views: tuple[Equation, ...], reduction: tuple[Equation, ...]
) -> tuple[list[Atom], Dims] | None:
    """(atoms reduced, dims of the result once it is repeated), for a reduction of views of a value of these dims."""
    before = _along(views, dims)
    if before is None:
        return None
    first, *rest = reduction
    dim = int(first.params["axes"][0])
    now: Dims = [d for i, d in enumerate(before) if i != dim]
    for step in rest:
        source, out = step.inputs[0], step.outputs[0]
        if step.name == "broadcast_in_dim":
            to = {int(d): i for i, d in enumerate(step.params["broadcast_dimensions"])}
            now = [now[to[d]] if d in to and source.shape[to[d]] != 1 else [] for d in range(len(out.shape))]
        else:
            moved = atoms.moved(step, now)
            if moved is None:
                return None
            now = moved
    return atoms.flat([before[dim]]), now
