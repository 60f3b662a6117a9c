"""Merge: products of one value with several weights become one product with those weights joined (QKV, gate and up).

    x @ Wq, x @ Wk, x @ Wv  ->  slices of x @ [Wq Wk Wv]

Staging joins the weights once at load and drops the parts. The arithmetic of each column is unchanged.

Off by default: on CPU (2 busy cores, JAX 0.10.2, float32) it gained nothing beyond the noise. Least of 25 runs in ms,
apart / merged, of 10 layers at d 576 (9 heads, 3 key heads) and 2 layers at d 2048, one token a row:

    d       weights    batch 1        batch 8         batch 32
    576     [in, out]  11.5 / 10.8    28.8 / 26.3     61.8 / 66.4
    576     [out, in]  18.2 / 18.7    56.8 / 61.1     58.4 / 59.4
    2048    [in, out]  22.9 / 30.7    231.6 / 181.8   413.9 / 441.3
    2048    [out, in]  38.4 / 36.0    115.5 / 116.4   268.5 / 274.5
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from jax import lax

from jaxinfer.graph import Equation, Graph, Node
from jaxinfer.passes.fold import owned
from jaxinfer.passes.report import Note
from jaxinfer.passes.rewriting import Rewriter, nbytes, static_nodes
from jaxinfer.passes.simplify import frozen


@dataclass(frozen=True)
class _Product:
    """A product with weights: which operand they are, the dim they are joined along, and where the result has it."""

    equation: Equation
    side: int
    dim: int
    out_dim: int

    @property
    def weight(self) -> Node:
        return self.equation.inputs[self.side]

    @property
    def size(self) -> int:
        return self.weight.shape[self.dim]


def merge(graph: Graph, params: int) -> tuple[Graph, list[Note]]:
    """Graph -> Graph."""
    rewriter, static = Rewriter(graph), static_nodes(graph, params)
    groups: dict[Hashable, list[_Product]] = {}
    for equation in graph.equations:
        product = _product(equation, static)
        if product is not None:
            groups.setdefault(_alike(product), []).append(product)
    notes = []
    for group in groups.values():
        mine = [p for p in group if owned(rewriter, p.weight)]
        if len(mine) > 1 and len({p.weight for p in mine}) == len(mine):
            _replace(rewriter, mine)
            notes.append(_note(mine))
    return rewriter.finish(), notes


def _note(group: list[_Product]) -> Note:
    first = group[0]
    sizes = " + ".join(str(p.size) for p in group)
    shared = first.equation.inputs[1 - first.side]
    spared = (len(group) - 1) * nbytes([shared])
    return Note(
        f"{len(group)} products of one {list(shared.shape)} made one, {sizes} wide", first.equation.source, 0, spared
    )


def _product(equation: Equation, static: set[Node]) -> _Product | None:
    if equation.name != "dot_general":
        return None
    known = [n.constant or n in static for n in equation.inputs]
    contracted, batch = equation.params["dimension_numbers"]
    if sum(known) != 1 or any(batch):
        return None
    side = known.index(True)
    ranks = [len(n.shape) for n in equation.inputs]
    free = [d for d in range(ranks[side]) if d not in contracted[side]]
    if not free:
        return None
    return _Product(equation, side, free[0], 0 if side == 0 else ranks[0] - len(contracted[0]))


def _alike(product: _Product) -> Hashable:
    """Equal for products that can be one: all but the size of the joined dim."""
    equation, weight = product.equation, product.weight
    shape = tuple(-1 if d == product.dim else n for d, n in enumerate(weight.shape))
    params = tuple((k, frozen(v)) for k, v in sorted(equation.params.items()))
    return equation.inputs[1 - product.side], product.side, shape, weight.dtype, equation.outputs[0].dtype, params


def _replace(rewriter: Rewriter, group: list[_Product]) -> None:
    joined: dict[Rewriter, Node] = {}
    first = group[0]

    def whole(new: Rewriter) -> Node:
        if new not in joined:
            where = first.equation.source
            operands = [new(n) for n in first.equation.inputs]
            parts = [new(p.weight) for p in group]
            operands[first.side] = new.emit(_join, *parts, source=where, dim=first.dim)
            like = first.equation.outputs[0]
            size = sum(p.size for p in group)
            shape = tuple(size if d == first.out_dim else n for d, n in enumerate(like.shape))
            like = Node(shape, like.dtype, like.weak)
            joined[new] = new.add(first.equation.primitive, first.equation.params, operands, like, where)
        return joined[new]

    start = 0
    for product in group:
        rewriter.replace(product.equation.outputs[0], _sliced(whole, product, start))
        start += product.size


def _sliced(whole: Callable[[Rewriter], Node], product: _Product, start: int) -> Callable[[Rewriter], Node]:
    def make(new: Rewriter) -> Node:
        where, stop = product.equation.source, start + product.size
        return new.emit(_slice, whole(new), source=where, start=start, stop=stop, dim=product.out_dim)

    return make


def _join(*weights: Any, dim: int) -> Any:
    return lax.concatenate(weights, dim)


def _slice(value: Any, start: int, stop: int, dim: int) -> Any:
    return lax.slice_in_dim(value, start, stop, axis=dim)
