"""Finds causal long convolutions made by FFT: y = irfft(rfft(x, n) * rfft(h, n))[:T], or by fft and ifft.

A product of transforms of length n is a circular convolution of what was transformed. With at least
rows of x + rows of h - 1 <= n nothing wraps around, so that its first rows are causal: y[t] = sum over s <= t of
x[s] h[t - s]. With less room an end of the input reaches the first rows, and the equations stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.axes.factors import Factors, rule
from jaxinfer.graph import Composite, Equation, Graph, Node
from jaxinfer.passes.recognise_tree import Change
from jaxinfer.passes.recognise_walk import Dims, Walk, back, past_scale, static, takes_all

Array = jax.Array

_BY_ROW = ("real", "neg", "convert_element_type", "copy", "copy_p", "reduce_precision")


def run(x: Array, h: Array, *, x_dims: Dims, h_dims: Dims, time: int, rank: int, dtype: Any) -> list[Array]:
    """The convolution of any number of rows, by FFT."""
    a, b = _placed(x, x_dims, rank), _placed(h, h_dims, rank)
    rows = a.shape[time]
    n = 1 << max(rows + b.shape[time] - 2, 0).bit_length()
    if np.issubdtype(dtype, np.complexfloating):
        y = jnp.fft.ifft(jnp.fft.fft(a, n, time) * jnp.fft.fft(b, n, time), n, time)
    else:
        y = jnp.fft.irfft(jnp.fft.rfft(a, n, time) * jnp.fft.rfft(b, n, time), n, time)
    return [lax.slice_in_dim(y, 0, rows, axis=time).astype(dtype)]


LONG_CONVOLUTION = Composite("long_convolution", run)


def _placed(value: Array, dims: Dims, rank: int) -> Array:
    """An operand with the result's dims, of size 1 where it has none."""
    value = lax.squeeze(value, tuple(d for d, to in enumerate(dims) if to is None))
    kept = [to for to in dims if to is not None]
    value = jnp.transpose(value, sorted(range(len(kept)), key=lambda d: kept[d]))
    return lax.expand_dims(value, tuple(d for d in range(rank) if d not in kept))


@rule("long_convolution", params="x_dims h_dims time rank dtype")
def _factors(equation: Equation) -> Factors:
    p, out = equation.params, equation.outputs[0]

    def side(node: Node, dims: Dims) -> tuple[int | None, ...]:
        pairs = zip(node.shape, dims, strict=True)
        return tuple(None if d is None or d == p["time"] or n != out.shape[d] else d for n, d in pairs)

    inputs = tuple(side(n, d) for n, d in zip(equation.inputs, (p["x_dims"], p["h_dims"]), strict=True))
    return Factors(inputs, (side(out, tuple(range(p["rank"]))),))


def find(graph: Graph) -> list[Change]:
    """For each convolution, equations in the place of its first rows."""
    readers = graph.consumers()
    found = []
    for equation in graph.equations:
        made = _convolution(equation) if _is_fft(equation, inverse=True) else None
        if made is None:
            continue
        equations, y, scale = made
        cutter = _Cutter(readers, y.shape[-1], equations)
        cutter.follow(equation.outputs[0], y, len(y.shape) - 1, scale)
        if cutter.ends:
            first = min((n.equation for n in cutter.ends if n.equation is not None), key=lambda e: e.number)
            found.append(Change({first: equations}, cutter.ends))
    return found


def _is_fft(equation: Equation, *, inverse: bool) -> bool:
    if equation.name != "fft" or len(equation.params["fft_lengths"]) != 1:
        return False
    return equation.params["fft_type"].name in (("IRFFT", "IFFT") if inverse else ("RFFT", "FFT"))


def _convolution(last: Equation) -> tuple[list[Equation], Node, complex] | None:
    """The equations that make all rows of the convolution that ends in an inverse transform, its result, and what
    multiplies that in the forward."""
    out = last.outputs[0]
    rank, n = len(out.shape), int(last.params["fft_lengths"][0])
    product = back(Walk(last.inputs[0], tuple(range(rank))))
    equation = product.node.equation
    if equation is None or equation.name != "mul" or n < 3:
        return None
    both = [_operand(Walk(node, product.dims), last, n) for node in equation.inputs if node.shape]
    sides = [s for s in both if s is not None]
    if len(sides) != 2:
        return None
    time = rank - 1
    sizes = [s.node.shape for s in sides]
    rows = [size[s.dims.index(time)] for s, size in zip(sides, sizes, strict=True)]
    covered = {d: m for s in sides for d, m in zip(s.dims, s.node.shape, strict=True) if m != 1}
    if sum(rows) - 1 > n or any(covered.get(d, 1) != m for d, m in enumerate(out.shape[:-1])):
        return None
    first = max((0, 1), key=lambda i: (rows[i], int(np.prod(sizes[i])), -i))
    x, h = sides[first], sides[1 - first]
    y = Node((*out.shape[:-1], rows[first]), out.dtype)
    params = {"x_dims": x.dims, "h_dims": h.dims, "time": time, "rank": rank, "dtype": out.dtype}
    equations = [_made(LONG_CONVOLUTION, params, (x.node, h.node), y, last.source)]
    return equations, y, product.scale * x.scale * h.scale


def _made(primitive: Any, params: dict[str, Any], inputs: tuple[Node, ...], out: Node, source: str) -> Equation:
    out.equation = Equation(primitive, params, inputs, (out,), source)
    return out.equation


def _operand(walk: Walk, last: Equation, n: int) -> Walk | None:
    """What one side of the product is the transform of, less the zeros that were put after it."""
    walk = back(walk)
    forward = walk.node.equation
    if forward is None or not _is_fft(forward, inverse=False) or forward.params["fft_lengths"] != (n,):
        return None
    time = len(last.outputs[0].shape) - 1
    if forward.params["fft_type"].name != last.params["fft_type"].name.replace("I", "", 1) or walk.dims[-1] != time:
        return None
    return _unpadded(back(Walk(forward.inputs[0], walk.dims, walk.scale)), time)


def _unpadded(walk: Walk, time: int) -> Walk | None:
    d, equation = walk.dims.index(time), walk.node.equation
    if equation is not None and equation.name == "pad":
        config = [tuple(map(int, c)) for c in equation.params["padding_config"]]
        low, high, inside = config.pop(d)
        if not any(map(any, config)) and low == inside == 0 and high > 0 and static(equation.inputs[1]) == 0:
            return Walk(equation.inputs[0], walk.dims, walk.scale)
    joined = equation is not None and equation.name == "concatenate" and equation.params["dimension"] == d
    if equation is not None and joined and all(_zeros(n) for n in equation.inputs[1:]):
        return Walk(equation.inputs[0], walk.dims, walk.scale)
    return walk


def _zeros(node: Node) -> bool:
    equation = node.equation
    if equation is not None and equation.name == "broadcast_in_dim":
        return _zeros(equation.inputs[0])
    return static(node) == 0


@dataclass
class _Cutter:
    """Follows the result of the inverse transform to where its first rows are cut out."""

    readers: dict[Node, list[Equation]]
    rows: int  # that were computed; the first rows of what stands in the graph
    equations: list[Equation]
    ends: dict[Node, Node] = field(default_factory=dict)  # each cut, and the value that stands for it

    def follow(self, node: Node, new: Node, dim: int, scale: complex) -> None:
        """
        Args:
            new: the same value, as far as its first rows along `dim` go, and but for a factor of `scale`.
        """
        for equation in self.readers.get(node, ()):
            out = equation.outputs[0]
            if equation.name == "slice":
                self._cut(equation, new, dim, scale)
            elif takes_all(equation):
                self.follow(out, new, dim, scale)
            elif equation.name == "transpose" or equation.name in _BY_ROW:
                order = equation.params["permutation"] if equation.name == "transpose" else range(len(out.shape))
                to = tuple(order).index(dim)
                shape = (*out.shape[:to], self.rows, *out.shape[to + 1 :])
                self.follow(out, self._applied(equation, new, shape), to, scale)
            elif equation.name in ("mul", "div") and (past := past_scale(Walk(out, (), scale), equation)) is not None:
                self.follow(out, new, dim, past.scale)

    def _cut(self, equation: Equation, new: Node, dim: int, scale: complex) -> None:
        node, out, p = equation.inputs[0], equation.outputs[0], equation.params
        whole = all(a == b for d, (a, b) in enumerate(zip(node.shape, out.shape, strict=True)) if d != dim)
        if not whole or any(p["start_indices"]) or any(s != 1 for s in p["strides"] or ()):
            return
        if out.shape[dim] > self.rows:
            self.follow(out, new, dim, scale)
        elif np.imag(scale) == 0:
            if out.shape[dim] < self.rows:
                new = self._applied(equation, new, out.shape)
            self.ends[out] = self._scaled(new, float(np.real(scale)), equation.source)

    def _scaled(self, node: Node, scale: float, source: str) -> Node:
        if abs(scale - 1) < 1e-6:  # 1/n and n, say; closer than the rounding of a transform
            return node
        factor, out = Node((), node.dtype, value=np.asarray(scale, node.dtype)), Node(node.shape, node.dtype)
        self.equations.append(_made(lax.mul_p, {}, (node, factor), out, source))
        return out

    def _applied(self, equation: Equation, new: Node, shape: Sequence[int]) -> Node:
        out = Node(tuple(shape), equation.outputs[0].dtype, equation.outputs[0].weak)
        self.equations.append(_made(equation.primitive, equation.params, (new,), out, equation.source))
        return out
