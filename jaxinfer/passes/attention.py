"""Attention: softmax(QK^T)V, in any of its spellings, becomes one equation, so that a kernel can take its place.

The equation, its operands and params: see attention_equation. Found from the softmax: backward through scales, masks,
biases and moves to the product of queries and keys, forward to the product with the values.

Not recognised, and left as they are: a softmax that something else reads too, one over another dim than the keys, a
product with anything but masks and casts between softmax and values (dropout left on), scores that no product makes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.graph import Equation, Graph, Node
from jaxinfer.passes import atoms
from jaxinfer.passes.atoms import Atom, Dims
from jaxinfer.passes.attention_roles import Match, assign
from jaxinfer.passes.fold import source_of
from jaxinfer.passes.report import Note
from jaxinfer.passes.rewriting import Rewriter, splat
from jaxinfer.passes.softmax import VIEWS, Softmax, find_softmax

_DEEP = 32  # steps between the product and the softmax, more than any forward has


def attention(graph: Graph, params: int) -> tuple[Graph, list[Note]]:
    """Graph -> Graph."""
    del params
    rewriter, notes = Rewriter(graph), []
    for equation in graph.equations:
        softmax = find_softmax(rewriter, equation) if equation.name == "div" else None
        if softmax is None:
            continue
        found = _mixed(rewriter, softmax)
        match = None
        if found is not None:
            for chain in _chains(rewriter, softmax.scores):
                match = match or _match(softmax, chain, found)
        if match is None:
            notes.append(Note("a softmax that is not one of attention's, left as it is", equation.source))
            continue
        rewriter.replace(match.result, match.make)
        notes.append(Note(match.what, equation.source))
    return rewriter.finish(), notes


@dataclass(frozen=True)
class _Mixed:
    """What follows the softmax: moves and casts, then the product with the values."""

    moves: tuple[Equation, ...]
    product: Equation
    side: int  # which operand the weights are


def _mixed(rewriter: Rewriter, softmax: Softmax) -> _Mixed | None:
    node, moves = softmax.weights, []
    while (reader := rewriter.only_reader(node)) is not None:
        if reader.name == "dot_general":
            return _Mixed(tuple(moves), reader, reader.inputs.index(node))
        zeroed = reader.name == "select_n" and len(reader.inputs) == 3 and splat(reader.inputs[1]) == 0
        if reader.name not in (*VIEWS, "convert_element_type") and not (zeroed and reader.inputs[2] is node):
            return None
        moves.append(reader)
        node = reader.outputs[0]
    return None


Chain = tuple[tuple[Equation, int], ...]  # from the product on; each with the operand that the scores are


def _chains(rewriter: Rewriter, scores: Node) -> list[Chain]:
    """The ways from a product of two values to the softmax's scores; usually one, more where products are added."""
    done: list[Chain] = []
    waiting: list[tuple[Node, Chain]] = [(scores, ())]
    while waiting and len(done) < 4:
        node, chain = waiting.pop()
        made = node.equation
        if made is None or len(chain) > _DEEP or (chain and rewriter.only_reader(node) is None):
            continue
        if made.name == "dot_general":
            done.append(((made, 0), *chain))
        elif made.name in (*VIEWS, "convert_element_type", "tanh"):
            waiting.append((made.inputs[0], ((made, 0), *chain)))
        elif made.name in ("add", "mul", "sub", "div", "select_n"):
            sides = range(1, 3) if made.name == "select_n" else range(1 if made.name in ("sub", "div") else 2)
            for side in reversed(sides):
                if len(made.inputs) <= 3 and made.inputs[side].shape == made.outputs[0].shape:
                    waiting.append((made.inputs[side], ((made, side), *chain)))
    return done


@dataclass
class _Steps:
    """What a chain does to the scores."""

    dims: Dims
    steps: list[tuple[Any, ...]]
    others: list[tuple[Node, Dims]]


def _match(softmax: Softmax, chain: Chain, mixed: _Mixed) -> Match | None:
    (first, _), *rest = chain
    left, right = atoms.fresh(first.inputs[0].shape), atoms.fresh(first.inputs[1].shape)
    contracted, batch = first.params["dimension_numbers"]
    for a, b in [*zip(*contracted, strict=True), *zip(*batch, strict=True)]:
        right[b] = left[a]
    dims, features, _ = atoms.dot_dims(first, left, right)
    found = _Steps(dims, [], [])
    if not _follow(found, rest):
        return None
    steps, found.steps = found.steps, []
    keys = _renamed(softmax, found)
    if keys is None or not _follow(found, [(e, 2) for e in softmax.counted]):
        return None
    counted, found.steps = found.steps, []
    if not _follow(found, [(e, 2 if e.name == "select_n" else 0) for e in mixed.moves]):
        return None
    values = mixed.product.inputs[1 - mixed.side]
    value_dims = _value_dims(mixed, found.dims, values)
    second = (found.dims, value_dims) if mixed.side == 0 else (value_dims, found.dims)
    result, mixed_over, paired = atoms.dot_dims(mixed.product, *second)
    keys = atoms.flat([keys])
    if not paired or not keys or set(mixed_over) != set(keys):
        return None
    sides = [(first.inputs[0], left), (first.inputs[1], right)]
    if set(keys) <= set(atoms.flat(left)):
        sides.reverse()
    roles = assign(sides[0], sides[1], (values, value_dims), keys, set(features))
    params = {
        "steps": tuple(steps),
        "counted": tuple(counted),
        "weights": tuple(found.steps),
        "first": _product_params(first),
        "second": _product_params(mixed.product),
    }
    return None if roles is None else roles.match(mixed.product, found.others, params, result)


def _renamed(softmax: Softmax, found: "_Steps") -> list[Atom] | None:
    """Goes through the softmax: from the dims of its scores to those of its weights. The atoms that it is over."""
    mine = atoms.settled(found.dims)
    name: dict[Atom, list[Atom]] = {}
    for theirs, ours in zip(softmax.score_dims, mine, strict=True):
        if theirs:
            whole = Atom(theirs[0].size, ours) if len(ours) != 1 else ours[0]
            _split_alike(theirs[0], whole, name)
    if any(a not in name for d in softmax.weight_dims for a in atoms.flat([d])):
        return None
    found.dims = [[b for a in atoms.flat([d]) for b in name[a]] for d in softmax.weight_dims]
    return [b for a in atoms.flat([softmax.keys]) for b in name[a]]


def _split_alike(theirs: Atom, ours: Atom, name: dict[Atom, list[Atom]]) -> None:
    if not theirs.parts:
        name[theirs] = [ours]
        return
    shape = tuple(p.size for p in theirs.parts)
    parts = atoms.regrouped([[ours]], (ours.size,), shape)
    for part, same in zip(theirs.parts, parts or [], strict=False):
        if len(same) == 1:
            _split_alike(part, same[0], name)


def _value_dims(mixed: _Mixed, dims: Dims, values: Node) -> Dims:
    found = atoms.fresh(values.shape)
    contracted, batch = mixed.product.params["dimension_numbers"]
    for pair in [*zip(*contracted, strict=True), *zip(*batch, strict=True)]:
        found[pair[1 - mixed.side]] = dims[pair[mixed.side]]
    return found


def _follow(found: _Steps, chain: Sequence[tuple[Equation, int]]) -> bool:
    """Adds what these equations do; False for one that isn't understood."""
    for equation, side in chain:
        name = equation.name
        if name in VIEWS:
            dims = atoms.moved(equation, found.dims)
            if dims is None:
                return False
            found.dims = dims
        elif name == "tanh":
            found.steps.append(("tanh",))
        elif name == "convert_element_type":
            found.steps.append(("cast", equation.outputs[0].dtype))
        elif name == "select_n":
            fill = splat(equation.inputs[3 - side])
            predicate = equation.inputs[0]
            if fill is None or predicate.dtype != np.bool_ or predicate.shape != equation.outputs[0].shape:
                return False
            found.steps.append(("mask", _other(found, predicate), float(fill), side == 2))
        else:
            found.steps.append(_arithmetic(found, name, equation.inputs[1 - side]))
    return True


def _arithmetic(found: _Steps, name: str, operand: Node) -> tuple[Any, ...]:
    number = splat(operand)
    if number is not None and name in ("mul", "div"):
        return ("scale" if name == "mul" else "divide", float(number))
    if name in ("sub", "div"):
        return ("less" if name == "sub" else "over", _other(found, operand))
    return ("bias" if name == "add" else "factor", _other(found, operand))


def _other(found: _Steps, node: Node) -> int:
    """Keeps an operand of the scores, taken before it is broadcast; its number."""
    source, along = source_of(node, list(range(len(node.shape))))
    dims = [[] if d is None or n == 1 else found.dims[d] for n, d in zip(source.shape, along, strict=True)]
    found.others.append((source, dims))
    return len(found.others) - 1


def _product_params(equation: Equation) -> tuple[tuple[str, Any], ...]:
    return tuple((k, equation.params[k]) for k in ("precision", "preferred_element_type"))
