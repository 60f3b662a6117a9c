"""Fold: scales and shifts by weights, after a product or convolution with weights, move into those weights.

    ((conv(x, W) + b - mean) * rsqrt(var + eps) * gamma + beta)  ->  conv(x, W') + b'

W' and b' depend on weights only, so staging computes them once at load. The chain may be any spelling: additions,
subtractions, products and quotients by values that vary along the result's weight dims alone, in any order, through
transposes and reshapes that keep those dims apart. Whatever depends on the input (GroupNorm, LayerNorm) ends the chain.
Only within one dtype: a chain that casts in between rounds on purpose.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.axes.factors import reshape_groups
from jaxinfer.graph import Equation, Graph, Node
from jaxinfer.passes.report import Note, traffic
from jaxinfer.passes.report import flops as flops_of
from jaxinfer.passes.rewriting import Rewriter, nbytes, static_nodes

Dims = tuple[int | None, ...]  # for each dim of a value the weight's dim that it is, if any

_MOVES = ("reshape", "transpose", "squeeze", "expand_dims")
SMALL = 64 << 10  # bytes up to which a weight may be kept in two forms


@dataclass
class _Chain:
    """What follows a product: shifts and scales as (primitive, which side the product is on, value), and moves."""

    end: Node
    affine: list[tuple[str, int, "_Vector"]] = field(default_factory=list)
    moves: list[Equation] = field(default_factory=list)
    equations: list[Equation] = field(default_factory=list)


@dataclass(frozen=True)
class _Vector:
    """A static value that varies along weight dims alone: `node`, whose dims are the weight's `dims`."""

    node: Node
    dims: Dims


def fold(graph: Graph, params: int) -> tuple[Graph, list[Note]]:
    """Graph -> Graph."""
    rewriter, static = Rewriter(graph), static_nodes(graph, params)
    notes, taken = [], set()
    for equation in graph.equations:
        place = _weight(equation, static)
        if place is None or equation in taken:
            continue
        chain = _follow(rewriter, equation, place, static)
        scaled = any(name in ("mul", "div") for name, _, _ in chain.affine)
        if not chain.affine or not (scaled or len(chain.affine) > 1):
            continue
        if scaled and not owned(rewriter, equation.inputs[place.operand]):
            notes.append(Note(f"{equation.name} not folded: its weights are read elsewhere too", equation.source))
            continue
        taken.update(chain.equations)
        rewriter.replace(chain.end, _made(equation, place, chain))
        notes.append(_note(equation, chain))
    return rewriter.finish(), notes


def _note(equation: Equation, chain: _Chain) -> Note:
    steps = [e for e in chain.equations if e not in chain.moves]
    shifts = any(name in ("add", "sub") for name, _, _ in chain.affine)
    names = ", ".join(e.name for e in steps)
    kept = steps[-1:] if shifts else []
    what = f"{names} folded into the weights of {equation.name}{list(equation.outputs[0].shape)}"
    return Note(what, equation.source, flops_of(steps) - flops_of(kept), traffic(steps) - traffic(kept))


@dataclass(frozen=True)
class _Place:
    """Which operand of an equation is its weight, and the weight dim of each dim of the result."""

    operand: int
    dims: Dims


def _weight(equation: Equation, static: set[Node]) -> _Place | None:
    """The static operand of a product whose other operand is not; None for anything else."""
    if equation.name not in ("dot_general", "conv_general_dilated"):
        return None
    known = [n.constant or n in static for n in equation.inputs]
    if sum(known) != 1:
        return None
    number = known.index(True)
    out = equation.outputs[0]
    if equation.inputs[number].dtype != out.dtype or not jnp.issubdtype(out.dtype, jnp.floating):
        return None
    if equation.name == "dot_general":
        return _Place(number, _dot_dims(equation, number))
    numbers = equation.params["dimension_numbers"]
    if number != 1 or equation.params["batch_group_count"] != 1:
        return None
    features = numbers.out_spec[1]
    return _Place(1, tuple(numbers.rhs_spec[0] if d == features else None for d in range(len(out.shape))))


def _dot_dims(equation: Equation, number: int) -> Dims:
    contracted, batch = equation.params["dimension_numbers"]
    ranks = [len(n.shape) for n in equation.inputs]
    free = [[d for d in range(ranks[i]) if d not in contracted[i] and d not in batch[i]] for i in (0, 1)]
    dims: list[int | None] = list(batch[number])
    for side in (0, 1):
        dims += free[side] if side == number else [None] * len(free[side])
    return tuple(dims)


def _follow(rewriter: Rewriter, equation: Equation, place: _Place, static: set[Node]) -> _Chain:
    """The longest chain of shifts, scales and moves after a product, cut after its last shift or scale."""
    node, dims = equation.outputs[0], place.dims
    chain = _Chain(node)
    steps: list[Equation] = []
    while (reader := rewriter.only_reader(node)) is not None and len(reader.outputs) == 1:
        out = reader.outputs[0]
        if out.dtype != node.dtype:
            break
        if reader.name in ("add", "sub", "mul", "div", "neg") and out.shape == node.shape:
            side = reader.inputs.index(node)
            vector = _Vector(_ONE, ()) if reader.name == "neg" else _vector(reader.inputs[1 - side], node, dims, static)
            if vector is None or (reader.name == "div" and side == 1):
                break
            steps.append(reader)
            chain.affine.append((reader.name, side, vector))
            chain.end, chain.equations = out, list(steps)
        elif reader.name in _MOVES:
            dims = _moved(reader, dims)
            steps.append(reader)
        else:
            break
        node = out
    chain.moves = [s for s in chain.equations if s.name in _MOVES]
    return chain


_ONE = Node((), np.dtype(np.float32), value=np.float32(1))  # stands for the operand that neg doesn't have
_LOST = -1  # part of a weight dim, or several: nothing may vary along it


def _moved(equation: Equation, dims: Dims) -> Dims:
    source, out = equation.inputs[0], equation.outputs[0]
    if equation.name == "transpose":
        return tuple(dims[d] for d in equation.params["permutation"])
    moved: list[int | None] = [None] * len(out.shape)
    for mine, theirs in reshape_groups(source.shape, out.shape):
        alone = len(mine) == len(theirs) == 1
        for d in theirs:
            moved[d] = dims[mine[0]] if alone else _LOST if any(dims[m] is not None for m in mine) else None
    return tuple(moved)


def _vector(node: Node, beside: Node, dims: Dims, static: set[Node]) -> _Vector | None:
    """A static operand as a value over weight dims; None where it isn't static or varies along anything else."""
    if not (node.constant or node in static) or node.dtype != beside.dtype:
        return None
    if not node.shape:
        return _Vector(node, ())
    along: list[int | None] = [None if n == 1 else d for n, d in zip(node.shape, range(len(dims)), strict=True)]
    node, along = source_of(node, along)
    over = []
    for size, d in zip(node.shape, along, strict=True):
        weight_dim = None if d is None or size == 1 else dims[d]
        if size != 1 and (weight_dim is None or weight_dim == _LOST):
            return None
        over.append(weight_dim)
    return _Vector(node, tuple(over))


def source_of(node: Node, along: list[int | None]) -> tuple[Node, list[int | None]]:
    """Follows broadcasts and reshapes back to what they repeat. `along`: an index for each dim, kept for each dim."""
    while not node.constant and (made := node.equation) is not None and node.shape:
        source = made.inputs[0] if made.inputs else None
        if made.name == "broadcast_in_dim" and len(made.inputs) == 1:
            assert source is not None
            to = made.params["broadcast_dimensions"]
            along = [along[d] if n != 1 else None for n, d in zip(source.shape, to, strict=True)]
        elif made.name in ("reshape", "squeeze", "expand_dims"):
            assert source is not None
            groups = reshape_groups(source.shape, node.shape)
            if any(len(mine) != 1 or len(theirs) != 1 for mine, theirs in groups):
                break
            back: list[int | None] = [None] * len(source.shape)
            for mine, theirs in groups:
                back[mine[0]] = along[theirs[0]]
            along = back
        else:
            break
        node = source
    return node, along


def owned(rewriter: Rewriter, node: Node) -> bool:
    """Whether nothing else reads a weight, or what it is made of: only then its old form can be dropped."""
    waiting, seen = [node], {node}
    while waiting:
        top = waiting.pop()
        if top.constant or nbytes([top]) <= SMALL:
            continue
        if rewriter.only_reader(top) is None:
            return False
        fresh = [n for n in (top.equation.inputs if top.equation else ()) if n not in seen]
        seen.update(fresh)
        waiting += fresh
    return True


def _made(equation: Equation, place: _Place, chain: _Chain) -> Callable[[Rewriter], Node]:
    def make(new: Rewriter) -> Node:
        where = equation.source
        operands = [new(n) for n in equation.inputs]
        weight = operands[place.operand]
        scale: Node | None = None
        shift: Node | None = None

        def apply(name: str, *nodes: Node) -> Node:
            return new.emit(_BINARY[name], *nodes, source=where)

        for name, side, vector in chain.affine:
            if name == "neg" or (name == "sub" and side == 1):
                scale = new.emit(lax.neg, scale, source=where) if scale else _minus_one(new, weight, where)
                shift = new.emit(lax.neg, shift, source=where) if shift else None
            if name == "neg":
                continue
            value = new.emit(_spread, new(vector.node), source=where, dims=vector.dims, rank=len(weight.shape))
            if name in ("mul", "div"):
                scale = apply(name, scale or _one(weight), value) if scale or name == "div" else value
                shift = apply(name, shift, value) if shift else None
            elif shift is None:
                shift = new.emit(lax.neg, value, source=where) if name == "sub" and side == 0 else value
            else:
                shift = apply("sub" if side == 0 and name == "sub" else "add", shift, value)
        if scale is not None:
            operands[place.operand] = apply("mul", weight, scale)
        (node,) = new.copy(equation, operands)
        if shift is not None:
            node = new.emit(_shifted, node, shift, source=where, dims=place.dims)
        for move in chain.moves:
            (node,) = new.copy(move, [node])
        return node

    return make


def _one(weight: Node) -> Node:
    return Node((1,) * len(weight.shape), weight.dtype, value=np.ones((1,) * len(weight.shape), weight.dtype))


def _minus_one(new: Rewriter, weight: Node, where: str) -> Node:
    return new.emit(lax.neg, _one(weight), source=where)


def _spread(value: Any, dims: Dims, rank: int) -> Any:
    """A value over some weight dims with the weight's rank: size 1 where it doesn't vary."""
    shape = [1] * rank
    kept = [(d, n) for d, n in zip(dims, value.shape, strict=True) if d is not None]
    value = value.reshape([n for _, n in kept])
    value = jnp.transpose(value, np.argsort([d for d, _ in kept]).tolist())
    for d, n in kept:
        shape[d] = n
    return value.reshape(shape)


def _shifted(product: Any, shift: Any, dims: Dims) -> Any:
    """Adds a value over weight dims (size 1 where it doesn't vary) to a product whose dims are these weight dims."""
    kept = [d for d in dims if d is not None]
    others = [d for d in range(shift.ndim) if d not in kept]
    shift = jnp.transpose(shift, [*others, *kept]).reshape([shift.shape[d] for d in kept])
    shape = [1 if d is None else shift.shape[kept.index(d)] for d in dims]
    return product + shift.reshape(shape)


def _binary(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(lax, name)

    def apply(left: Any, right: Any) -> Any:
        shape = np.broadcast_shapes(left.shape, right.shape)
        return function(jnp.broadcast_to(left, shape), jnp.broadcast_to(right, shape))

    return apply


_BINARY = {name: _binary(name) for name in ("add", "sub", "mul", "div")}
