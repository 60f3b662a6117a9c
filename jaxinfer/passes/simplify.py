"""Simplify: equal equations become one, arithmetic of literals is done, and what changes nothing goes.

Only what gives the same bits: sums and products are not reordered, and only correctly rounded functions are computed
here. What is dead is already gone (see `graph.flatten` and `rewriting.live`).
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinfer.graph import Equation, Graph, Node
from jaxinfer.passes.report import Note, traffic
from jaxinfer.passes.report import flops as flops_of
from jaxinfer.passes.rewriting import Rewriter, splat

_EXACT: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "sqrt": np.sqrt,
    "neg": np.negative,
    "max": np.maximum,
    "min": np.minimum,
    "convert_element_type": lambda x: x,
}


def simplify(graph: Graph, params: int) -> tuple[Graph, list[Note]]:
    """Graph -> Graph."""
    del params
    rewriter = Rewriter(graph)
    seen: dict[Hashable, Equation] = {}
    same: dict[Node, Node] = {}  # node -> the one that stands for it
    gone = []
    for equation in graph.equations:
        operands = tuple(same.get(n, n) for n in equation.inputs)
        instead = _without(equation, operands)
        if instead is not None and instead.shape != equation.outputs[0].shape:
            gone.append(equation)
            rewriter.replace(equation.outputs[0], _stretched(instead, equation))
            continue
        if instead is None:
            first = seen.setdefault(_key(equation, operands), equation)
            if first is equation:
                continue
            replacements = first.outputs
        else:
            replacements = (instead,)
        gone.append(equation)
        for old, new in zip(equation.outputs, replacements, strict=True):
            same[old] = new
            rewriter.replace(old, lambda new_graph, new=new: new_graph(new))
    if not gone:
        return graph, []
    return rewriter.finish(), [Note("equal equations made one, no-ops removed", "", flops_of(gone), traffic(gone))]


def _stretched(node: Node, equation: Equation) -> Callable[[Rewriter], Node]:
    shape, source = equation.outputs[0].shape, equation.source
    return lambda new: new.emit(_stretch, new(node), source=source, shape=shape)


def _stretch(x: Any, shape: tuple[int, ...]) -> Any:
    return jnp.broadcast_to(x, shape)


def _key(equation: Equation, operands: tuple[Node, ...]) -> Hashable:
    params = tuple((name, frozen(value)) for name, value in sorted(equation.params.items()))
    return equation.primitive, params, tuple(map(_operand, operands))


def _operand(node: Node) -> Hashable:
    if not node.constant:
        return node
    if np.size(node.value) > 64:
        return id(node.value), node.dtype
    return np.asarray(node.value).tobytes(), node.shape, node.dtype, node.weak


def frozen(value: Any) -> Hashable:
    """A hashable stand-in for an equation's parameter; equal ones mean equal parameters."""
    if isinstance(value, np.ndarray):
        return value.tobytes(), value.shape, value.dtype
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(frozen, value))
    if isinstance(value, dict):
        return tuple((k, frozen(v)) for k, v in value.items())
    try:
        hash(value)
    except TypeError:
        return f"<unhashable at 0x{id(value):x}>"
    return type(value), value


def _without(equation: Equation, operands: tuple[Node, ...]) -> Node | None:
    """What the single result of an equation is without running it, or None."""
    if len(equation.outputs) != 1 or not operands:
        return None
    out, first, name = equation.outputs[0], operands[0], equation.name
    if name in _EXACT and all(n.constant and not n.shape for n in operands) and _float(out.dtype):
        with np.errstate(all="ignore"):
            value = _EXACT[name](*(np.asarray(n.value, n.dtype) for n in operands))
        return Node((), out.dtype, out.weak, np.asarray(value).astype(out.dtype))
    alike = (first.shape, first.dtype) == (out.shape, out.dtype)
    if name in ("stop_gradient", "copy", "copy_p", "name") and alike:
        return first
    if name in ("broadcast_in_dim", "reshape", "convert_element_type") and alike and len(operands) == 1:
        return first
    if name in ("max", "mul", "and", "or", "div") and len(operands) == 2:
        return _neutral(name, out, *operands)
    if name == "select_n" and len(operands) == 3 and first.dtype == np.bool_ and (which := splat(first)) is not None:
        chosen = operands[1 + int(which)]
        return chosen if chosen.shape == out.shape else None
    return None


def _neutral(name: str, out: Node, left: Node, right: Node) -> Node | None:
    """max(-inf, x), x * 1, x / 1, True and x, False or x: x, perhaps of fewer rows than the result."""
    for number, (value, other) in enumerate(((splat(left), right), (splat(right), left))):
        if value is None or other.dtype != out.dtype or len(other.shape) != len(out.shape):
            continue
        if (
            (name == "max" and _float(out.dtype) and np.isneginf(value))
            or (name == "mul" and value == 1)
            or (name == "div" and number == 1 and value == 1)
            or (name == "and" and out.dtype == np.bool_ and bool(value))
            or (name == "or" and out.dtype == np.bool_ and not value)
        ):
            return other
    return None


def _float(dtype: np.dtype) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))
