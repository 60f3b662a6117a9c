"""Moves a weight from the memory side of a product to the other side, where that makes what is remembered narrower.

scores = q (c W)^T = (q W^T) c^T, and mixed = p (c W) = (p c) W: with c remembered instead of c W, multi-head latent
attention keeps its latent (DeepSeek-V2, arXiv:2405.04434, section 2.1.2) rather than every head's keys and values. A
key joined of several pieces is split into a sum of products first, so that each piece is judged by itself.

Only the step is rewritten, and only where c's row is at most half as wide: the product over c has as many
multiplications a head as c is wide, so equal widths (plain multi-head attention) would lose.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxinfer.graph import Equation, Graph, Node, in_place_of

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Expanded:
    """A value that is c @ W, moved about: its dims are dims of c that W leaves alone, and dims of W."""

    c: Node
    weight: Node
    contracted: tuple[int, ...]  # dims of c
    reduced: tuple[int, ...]  # dims of the weight that meet them
    labels: tuple[int | None, ...]  # for each dim of the value: the dim of c that it is; None for one of the weight
    moves: tuple[Callable[[jax.Array], jax.Array], ...]  # take the weight, contracted dims first, to the value's order


def absorb(graph: Graph, rows: Sequence[Node]) -> Graph:
    """The graph with every product rewritten that gains; `rows` are the inputs made of rows in time."""
    reached = _reached(graph, rows)
    equations: list[Equation] = []
    for equation in graph.equations:
        new = _rewritten(equation, reached) if equation.name == "dot_general" else None
        equations += new or [equation]
    return Graph(graph.inputs, graph.outputs, equations)


def _reached(graph: Graph, rows: Sequence[Node]) -> set[Node]:
    reached = set(rows)
    for equation in graph.equations:
        if any(n in reached for n in equation.inputs):
            reached.update(equation.outputs)
    return reached


def _rewritten(equation: Equation, reached: set[Node]) -> list[Equation] | None:
    """Equations in place of a product; None to leave it."""
    if not all(n in reached for n in equation.inputs):
        return None
    for side in (1, 0):
        memory = equation.inputs[side]
        pieces = _pieces(memory, equation.params["dimension_numbers"][0][side])
        expanded = [_narrower(piece, reached) for piece in pieces]
        if any(expanded):
            return _spliced(equation, side, pieces, expanded)
    return None


def _pieces(memory: Node, summed: Sequence[int]) -> tuple[Node, ...]:
    """The pieces that a value is joined of along its contracted dim; itself if it isn't."""
    made = memory.equation
    if made is not None and made.name == "concatenate" and tuple(summed) == (made.params["dimension"],):
        return made.inputs
    return (memory,)


def _narrower(value: Node, reached: set[Node]) -> Expanded | None:
    """How a value is c @ W, if c's row is at most half as wide as the value's."""
    chain: list[tuple[Equation, int]] = []
    here = value
    while here.equation is not None and here.equation.name in _MOVES:
        chain.append((here.equation, here.equation.outputs.index(here)))
        here = here.equation.inputs[0]
    product = here.equation
    if product is None or product.name != "dot_general" or product.params["dimension_numbers"][1] != ((), ()):
        return None
    left, right = product.inputs
    if (left in reached) == (right in reached):
        return None
    side = 0 if left in reached else 1
    c, weight = product.inputs[side], product.inputs[1 - side]
    contracted, reduced = (product.params["dimension_numbers"][0][s] for s in (side, 1 - side))
    kept = [d for d in range(len(c.shape)) if d not in contracted]
    own: list[int | None] = [None] * (len(weight.shape) - len(reduced))
    labels = [*kept, *own] if side == 0 else [*own, *kept]
    if c.dtype != value.dtype or 2 * math.prod(c.shape[d] for d in contracted) > _width(value, here, labels):
        return None
    moves: list[Callable[[jax.Array], jax.Array]] = []
    for equation, number in reversed(chain):
        moved = _MOVES[equation.name](equation, number, labels, len(contracted))
        if moved is None:
            return None
        labels, move = moved
        moves.append(move)
    return Expanded(c, weight, tuple(contracted), tuple(reduced), tuple(labels), tuple(moves))


def _width(value: Node, product: Node, labels: Sequence[int | None]) -> int:
    """Numbers in a row of the value: its size over that of the dims of c, which no move changes."""
    return math.prod(value.shape) // math.prod(n for n, d in zip(product.shape, labels, strict=True) if d is not None)


# Each move: (equation, which result, labels before, how many dims lead the weight) -> (labels after, the same move of
# the weight alone), or None where it isn't one of the weight's dims alone.
Moved = tuple[list[int | None], Callable[[jax.Array], jax.Array]] | None


def _transpose(equation: Equation, number: int, labels: list[int | None], lead: int) -> Moved:
    order = equation.params["permutation"]
    mine = [d for d, label in enumerate(labels) if label is None]
    moved = [lead + mine.index(d) for d in order if labels[d] is None]
    return [labels[d] for d in order], lambda w: jnp.transpose(w, (*range(lead), *moved))


def _reshape(equation: Equation, number: int, labels: list[int | None], lead: int) -> Moved:
    before, after = equation.inputs[0].shape, equation.outputs[0].shape
    front = 0
    while front < min(len(before), len(after)) and before[front] == after[front]:
        front += 1
    back = 0
    while back < min(len(before), len(after)) - front and before[-1 - back] == after[-1 - back]:
        back += 1
    if any(label is not None for label in labels[front : len(before) - back]):
        return None
    middle: list[int | None] = [None] * (len(after) - front - back)
    new = [*labels[:front], *middle, *labels[len(before) - back :]]
    shape = [n for n, label in zip(after, new, strict=True) if label is None]
    return new, lambda w: w.reshape((*w.shape[:lead], *shape))


def _cut(
    labels: list[int | None], lead: int, starts: Sequence[int], limits: Sequence[int], shape: Sequence[int]
) -> Moved:
    mine = [slice(None)] * lead
    for label, start, limit, n in zip(labels, starts, limits, shape, strict=True):
        if label is None:
            mine.append(slice(start, limit))
        elif (start, limit) != (0, n):
            return None
    return labels, lambda w: w[tuple(mine)]


def _slice(equation: Equation, number: int, labels: list[int | None], lead: int) -> Moved:
    if equation.params["strides"] is not None and set(equation.params["strides"]) != {1}:
        return None
    given = equation.params["start_indices"], equation.params["limit_indices"]
    return _cut(labels, lead, *given, equation.inputs[0].shape)


def _split(equation: Equation, number: int, labels: list[int | None], lead: int) -> Moved:
    shape, axis, sizes = equation.inputs[0].shape, equation.params["axis"], equation.params["sizes"]
    starts, limits = [0] * len(shape), list(shape)
    starts[axis] = sum(sizes[:number])
    limits[axis] = starts[axis] + sizes[number]
    return _cut(labels, lead, starts, limits, shape)


_MOVES = {"transpose": _transpose, "reshape": _reshape, "slice": _slice, "split": _split}


def _spliced(
    equation: Equation, side: int, pieces: Sequence[Node], expanded: Sequence[Expanded | None]
) -> list[Equation]:
    """The product as a sum over pieces, each by its c and weight where it is expanded of them."""
    operands = [equation.inputs[1 - side]]
    for piece, how in zip(pieces, expanded, strict=True):
        operands += [piece] if how is None else [how.c, how.weight]

    def product(other: jax.Array, *given: jax.Array) -> list[jax.Array]:
        rest, start = list(given), 0
        total: jax.Array | None = None
        for piece, how in zip(pieces, expanded, strict=True):
            part = other
            if len(pieces) > 1:
                ((summed,),) = (equation.params["dimension_numbers"][0][1 - side],)
                size = piece.shape[equation.params["dimension_numbers"][0][side][0]]
                part = jax.lax.slice_in_dim(other, start, start + size, axis=summed)
                start += size
            term = _term(equation, side, part, how, rest)
            total = term if total is None else total + term
        assert total is not None
        return [total.astype(equation.outputs[0].dtype)]

    return in_place_of(equation.outputs, product, operands, equation.source)


def _term(equation: Equation, side: int, other: jax.Array, how: Expanded | None, rest: list[jax.Array]) -> jax.Array:
    """One piece's product, with `rest` beginning with its operands, which are taken from it."""
    first = rest.pop(0)
    names = iter(_LETTERS)
    mine = [next(names) for _ in range(first.ndim if how is None else len(how.labels))]
    theirs, out = _named(equation, side, mine, other.ndim, names)
    exact = {key: equation.params[key] for key in ("precision", "preferred_element_type")}  # as the product itself was
    if how is None:
        return jnp.einsum(f"{theirs},{''.join(mine)}->{out}", other, first, **exact)
    c, weight = first, rest.pop(0)
    inner = [next(names) for _ in how.contracted]
    c_names = dict(zip(how.contracted, inner, strict=True))
    c_names |= {label: name for name, label in zip(mine, how.labels, strict=True) if label is not None}
    weight = jnp.transpose(weight, (*how.reduced, *(d for d in range(weight.ndim) if d not in how.reduced)))
    for move in how.moves:
        weight = move(weight)
    by_c = "".join(c_names[d] for d in range(c.ndim)), c
    by_weight = "".join([*inner, *(n for n, label in zip(mine, how.labels, strict=True) if label is None)]), weight
    over_weight = any(how.labels[d] is None for d in equation.params["dimension_numbers"][0][side])
    near, far = (by_weight, by_c) if over_weight else (by_c, by_weight)
    between = "".join(dict.fromkeys(n for n in theirs + near[0] if n in out + far[0]))
    partial = jnp.einsum(f"{theirs},{near[0]}->{between}", other, near[1], precision=exact["precision"])
    return jnp.einsum(f"{between},{far[0]}->{out}", partial, far[1], **exact)


def _named(equation: Equation, side: int, mine: list[str], rank: int, names: Iterator[str]) -> tuple[str, str]:
    """Letters of the other operand's dims and of the product's, given those of the operand on `side`."""
    sums, batches = equation.params["dimension_numbers"]
    theirs = [next(names) for _ in range(rank)]
    for a, b in [*zip(sums[side], sums[1 - side], strict=True), *zip(batches[side], batches[1 - side], strict=True)]:
        theirs[b] = mine[a]
    my_free = [n for d, n in enumerate(mine) if d not in (*sums[side], *batches[side])]
    their_free = [n for d, n in enumerate(theirs) if d not in (*sums[1 - side], *batches[1 - side])]
    free = my_free + their_free if side == 0 else their_free + my_free
    return "".join(theirs), "".join([*(mine[d] for d in batches[side]), *free])
