"""Products with the decays between all pairs of chunks, as the recurrence that they are.

exp(x[c+1] + .. + x[z]) for c <= z, and 0 for c > z, times s[c] and summed over c, is h[z] = exp(x[z]) h[z-1] + s[z]
(Dao and Gu 2024, arXiv:2405.21060, section 3: a 1-semiseparable matrix). As a product every chunk's s would have to be
kept; as a recurrence one h is. Also a running sum less its own last term, which is the sum of the terms before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxinfer.axes import factors_of
from jaxinfer.graph import Equation, Graph, Node, in_place_of
from jaxinfer.passes.incremental.bands import Bands
from jaxinfer.passes.incremental.chunks_decays import logarithm, sized
from jaxinfer.passes.incremental.chunks_find import Labels
from jaxinfer.passes.recognise_walk import Dims, Walk, back

Array = jax.Array
Readers = Mapping[Node, Sequence[Equation]]


def recurrences(equations: Sequence[Equation], labels: dict[Node, Labels]) -> list[Equation]:
    """The equations with such products and sums along the axis of chunks made as recurrences."""
    graph = Graph((), (), list(equations))
    bands, readers = Bands.of(graph), graph.consumers()
    found: list[Equation] = []
    instead: dict[Equation, list[Equation]] = {}
    for equation in equations:
        if equation not in instead:
            product = _found(equation, labels, bands)
            if product is not None:
                instead |= _before(product, readers) or {equation: _recurrence(product)}
        found += instead.get(equation) or _sum_before(equation, labels) or [equation]
    return [e for e in found if e not in instead]


def _along_chunks(node: Node, dim: int, labels: dict[Node, Labels]) -> bool:
    return node in labels and labels[node][dim] in "N?"


def _sum_before(equation: Equation, labels: dict[Node, Labels]) -> list[Equation] | None:
    if equation.name != "sub":
        return None
    total, term = equation.inputs
    made = total.equation
    if made is None or made.name != "cumsum" or made.inputs[0] is not term or made.params["reverse"]:
        return None
    axis = made.params["axis"]
    if not _along_chunks(total, axis, labels):
        return None

    def before(total: Array) -> list[Array]:
        front = [(int(d == axis), 0, 0) for d in range(total.ndim)]
        rows = jax.lax.pad(total, jnp.zeros((), total.dtype), front)
        return [jax.lax.slice_in_dim(rows, 0, total.shape[axis], axis=axis)]

    return in_place_of(equation.outputs, before, (total,), equation.source)


@dataclass(frozen=True)
class _Product:
    """A product of decays and states, h[z] = sum over c <= z of exp(x[c+1] + .. + x[z]) s[c].

    The dims of x and s are told as dims of its recurrence, which runs along the first.
    """

    equation: Equation
    x: Walk
    s: Walk
    after: tuple[int, ...]  # the recurrence's dims in the order of the product's result

    @property
    def out(self) -> Node:
        return self.equation.outputs[0]

    @property
    def rest(self) -> tuple[int, ...]:
        """Shape of h without z."""
        return tuple(self.out.shape[self.after.index(d)] for d in range(1, len(self.after)))


def _found(equation: Equation, labels: dict[Node, Labels], bands: Bands) -> _Product | None:
    for decays, states, out in _sides(equation):
        summed = [d for d in states.dims if d is not None and d not in out]
        rows = [d for d in decays.dims if d is not None and d in out and d not in states.dims]
        if len(summed) != 1 or len(rows) != 1 or summed[0] not in decays.dims or decays.scale * states.scale != 1:
            continue
        (z,), (c,) = rows, summed
        if not _along_chunks(decays.node, decays.dims.index(z), labels):
            continue
        x = logarithm(decays, z, c, bands)
        if x is None:
            continue
        order = (z, *(d for d in out if d != z))
        places = {d: order.index(d) for d in out}
        x = Walk(x.node, tuple(places.get(d) if d is not None else None for d in x.dims))
        s = Walk(states.node, tuple(0 if d == c else None if d is None else places[d] for d in states.dims))
        if 0 in x.dims and all(d is not None or n == 1 for d, n in zip(x.dims, x.node.shape, strict=True)):
            return _Product(equation, x, s, tuple(places[d] for d in out))
    return None


def _sides(equation: Equation) -> list[tuple[Walk, Walk, tuple[int, ...]]]:
    """(one operand of a product, the other, the dims of the result), all dims told alike; both ways round.

    A product is a dot_general, or a sum over one dim of an elementwise product.
    """
    factors, made = factors_of(equation), equation.inputs[0].equation if equation.inputs else None
    if equation.name == "dot_general":
        sides = [sized(Walk(n, dims)) for n, dims in zip(equation.inputs, factors.inputs, strict=True)]
    elif equation.name == "reduce_sum" and made is not None and made.name == "mul":
        dims = factors.inputs[0]
        sides = [sized(back(Walk(n, dims))) for n in made.inputs if len(n.shape) == len(dims)]
    else:
        return []
    out = tuple(d for d in factors.outputs[0] if d is not None)
    return [(*sides, out), (*sides[::-1], out)] if len(sides) == 2 else []  # type: ignore[list-item]


def _recurrence(found: _Product) -> list[Equation]:
    """h itself."""

    def run(x: Array, s: Array) -> list[Array]:
        s = _rows(s, found)
        _, rows = _run(x, found.x.dims, jnp.zeros_like(s[0]), s)
        return [jnp.transpose(rows, found.after)]

    return in_place_of((found.out,), run, (found.x.node, found.s.node), found.equation.source)


def _before(found: _Product, readers: Readers) -> dict[Equation, list[Equation]] | None:
    """h[z - 1] where that is all that is read: x and s have a row in front, the state that the first chunk begins with,
    and the last row of h is cut off again. {equation: what stands in its place}, for all that go; None where not so.

    So h is remembered once. Shifted, it would be a second time, as the row before.
    """
    first = found.s.dims.index(0)
    x, s = _front(found.x.node, found.x.dims.index(0)), _front(found.s.node, first)
    ends = _without_last(found.out, found.after.index(0), found.s.node.shape[first] - 1, readers)
    if x is None or s is None or ends is None:
        return None

    def run(x: Array, begin: Array, s: Array) -> list[Array]:
        begin = jnp.broadcast_to(begin, (*s.shape[:first], 1, *s.shape[first + 1 :]))
        before, _ = _run(x, found.x.dims, _rows(begin, found)[0], _rows(s, found))
        results = []
        for path in ends.values():
            rows = jnp.transpose(before, found.after)
            for equation in path[:-1]:
                rows = jnp.transpose(rows, equation.params["permutation"])
            results.append(rows)
        return results

    new = in_place_of(tuple(ends), run, (x[1], *s), found.equation.source)
    return {e: [] for path in ends.values() for e in path} | {found.equation: new}


def _rows(s: Array, found: _Product) -> Array:
    """s in the recurrence's order of dims and of the result's dtype."""
    s = _spread(s, found.s.dims, len(found.after))
    return jnp.broadcast_to(s, (s.shape[0], *found.rest)).astype(found.out.dtype)


def _run(x: Array, places: Dims, begin: Array, s: Array) -> tuple[Array, Array]:
    """(h before each row, h after it)"""
    factors = jnp.exp(_spread(x, places, s.ndim)).astype(s.dtype)
    factors = jnp.broadcast_to(factors, (s.shape[0], *factors.shape[1:]))

    def step(h: Array, row: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        after = row[0] * h + row[1]
        return after, (h, after)

    return jax.lax.scan(step, begin, (factors, s))[1]


def _front(node: Node, dim: int) -> tuple[Node, Node] | None:
    """(the first row, or what it is all of; the others) of a value made by putting one row in front of others."""
    equation = node.equation
    if equation is None:
        return None
    if equation.name == "concatenate" and equation.params["dimension"] == dim and len(equation.inputs) == 2:
        front, rest = equation.inputs
        return (front, rest) if front.shape[dim] == 1 else None
    if equation.name == "pad" and list(equation.params["padding_config"]) == [
        (int(d == dim), 0, 0) for d in range(len(node.shape))
    ]:
        return equation.inputs[1], equation.inputs[0]
    return None


def _without_last(node: Node, dim: int, rows: int, readers: Readers) -> dict[Node, list[Equation]] | None:
    """Where all but the last row of a value is cut out, with the way there; None where it is read otherwise, too."""
    found: dict[Node, list[Equation]] = {}
    for equation in readers.get(node, ()):
        out = equation.outputs[0]
        if equation.name == "transpose":
            ends = _without_last(out, equation.params["permutation"].index(dim), rows, readers)
            if ends is None:
                return None
            found |= {end: [equation, *path] for end, path in ends.items()}
        elif equation.name == "slice" and out.shape == (*node.shape[:dim], rows, *node.shape[dim + 1 :]):
            if any(equation.params["start_indices"]):
                return None
            found[out] = [equation]
        else:
            return None
    return found or None


def _spread(x: Array, places: Sequence[int | None], rank: int) -> Array:
    """A value with its dims at these places of a rank, of size 1 elsewhere."""
    kept = [d for d, to in enumerate(places) if to is not None]
    x = jax.lax.squeeze(x, tuple(d for d, to in enumerate(places) if to is None))
    to = [p for p in places if p is not None]
    x = jnp.transpose(x, sorted(range(len(kept)), key=to.__getitem__))
    return jax.lax.expand_dims(x, tuple(d for d in range(rank) if d not in to))
