"""Recognises decays between pairs of rows: exp(x[c+1] + .. + x[z]) for c <= z, 0 beyond.

The sums are differences of running sums, or (as in the listing of Dao and Gu 2024, which subtracts nothing) running
sums of what a mask leaves; beyond, they are masked by -inf before exp, or by 0 after it.
"""

from jaxinfer.graph import Node
from jaxinfer.passes.incremental.bands import Bands
from jaxinfer.passes.recognise_walk import Dims, Walk, back


def logarithm(decays: Walk, z: int, c: int, bands: Bands) -> Walk | None:
    """x, where decays are exp(x[c+1] + .. + x[z]) for c <= z and 0 beyond; its dims told as dims of the decays."""
    decays = back(decays)
    split = _masked(decays, z, c, 0, bands)
    if split is not None:
        inside, fill = split
        exponent = _operand(inside, "exp")
        if exponent is None or not _is(fill, 0.0, bands):
            return None
        return _sums(exponent, z, c, bands)
    exponent = _operand(decays, "exp")
    split = None if exponent is None else _masked(exponent, z, c, 0, bands)
    if split is None or not _is(split[1], float("-inf"), bands):
        return None
    return _sums(split[0], z, c, bands)


def _sums(total: Walk, z: int, c: int, bands: Bands) -> Walk | None:
    """x, where a value is x[c+1] + .. + x[z] for c <= z."""
    equation = total.node.equation
    if equation is None or total.scale != 1:
        return None
    if equation.name == "sub":
        sides = [back(Walk(_same_rank(n, total), total.dims)) for n in equation.inputs]
        both = [_running(side, at) for side, at in zip(sides, (z, c), strict=True)]
        if both[0] is None or both[1] is None or both[0].node is not both[1].node:
            return None
        others = [[d for d, n in zip(s.dims, s.node.shape, strict=True) if d not in (z, c) and n != 1] for s in sides]
        return both[0] if others[0] == others[1] else None
    if equation.name == "cumsum":
        split = _masked(back(Walk(equation.inputs[0], total.dims)), z, c, -1, bands)
        forward = total.dims[equation.params["axis"]] == z and not equation.params["reverse"]
        if split is None or not forward or not _is(split[1], 0.0, bands):
            return None
        x = sized(split[0])
        return x if z in x.dims and c not in x.dims and x.scale == 1 else None
    return None


def _running(walk: Walk, at: int) -> Walk | None:
    """x, where a value is its running sum along the dim told as `at`."""
    walk, equation = sized(walk), walk.node.equation
    if equation is None or equation.name != "cumsum" or equation.params["reverse"] or walk.scale != 1:
        return None
    return Walk(equation.inputs[0], walk.dims) if walk.dims[equation.params["axis"]] == at else None


def _masked(walk: Walk, z: int, c: int, gap: int, bands: Bands) -> tuple[Walk, Node] | None:
    """(what stands where c <= z + gap, what stands beyond) of a choice by a mask that says exactly that."""
    equation = walk.node.equation
    if equation is None or equation.name != "select_n" or len(equation.inputs) != 3 or walk.scale != 1:
        return None
    mask = equation.inputs[0]
    if mask.shape != walk.node.shape:
        return None
    for fact in bands.facts.get(mask, ()):
        rest = [f for f in bands.facts[mask] if (f.a, f.b, f.gap) == (fact.b, fact.a, -fact.gap - 1)]
        exact = fact.within is None and any(f.within is None and f.fill == 1 - fact.fill for f in rest)
        if exact and (walk.dims[fact.a], walk.dims[fact.b], fact.gap) == (z, c, gap) and fact.fill in (0, 1):
            beyond, inside = equation.inputs[1 + int(fact.fill)], equation.inputs[2 - int(fact.fill)]
            return back(Walk(inside, walk.dims)), beyond
    return None


def _operand(walk: Walk, name: str) -> Walk | None:
    equation = walk.node.equation
    if equation is None or equation.name != name or walk.scale != 1:
        return None
    return back(Walk(equation.inputs[0], walk.dims))


def _is(node: Node, value: float, bands: Bands) -> bool:
    """Whether a value is one number everywhere."""
    form = bands.linear.get(node)
    return form is not None and form.uniform and form.offset == value


def sized(walk: Walk) -> Walk:
    """Without the places of dims of size 1, which were broadcast."""
    dims: Dims = tuple(None if n == 1 else d for d, n in zip(walk.dims, walk.node.shape, strict=True))
    return Walk(walk.node, dims, walk.scale)


def _same_rank(node: Node, whole: Walk) -> Node:
    return node if len(node.shape) == len(whole.node.shape) else whole.node
