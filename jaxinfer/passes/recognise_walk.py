"""The way back from a value past equations that only move its dims or multiply it by a constant."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.graph import Equation, Node

Dims = tuple[int | None, ...]  # for each dim of a value, the dim of the result that it is; None: of size 1, in no other

_WITHOUT_EFFECT = ("copy", "copy_p", "optimization_barrier")


@dataclass
class Walk:
    """A value met on the way back from the result, with the constant that multiplies it on the way there."""

    node: Node
    dims: Dims
    scale: complex = 1.0


def back(walk: Walk) -> Walk:
    """Past equations that only move dims, or multiply by a constant."""
    while (before := _step_back(walk)) is not None:
        walk = before
    return walk


def _step_back(walk: Walk) -> Walk | None:
    equation = walk.node.equation
    if equation is None:
        return None
    operand, out = equation.inputs[0], equation.outputs[0]
    if equation.name in ("mul", "div"):
        return past_scale(walk, equation)
    if equation.name == "transpose":
        order = equation.params["permutation"]
        return Walk(operand, tuple(walk.dims[order.index(d)] for d in range(len(order))), walk.scale)
    if equation.name == "broadcast_in_dim" and len(equation.inputs) == 1:
        to = equation.params["broadcast_dimensions"]
        return Walk(operand, tuple(walk.dims[int(d)] for d in to), walk.scale)
    if equation.name in ("reshape", "squeeze", "expand_dims"):
        kept = [(n, d) for n, d in zip(out.shape, walk.dims, strict=True) if n != 1]
        if [n for n, _ in kept] != [n for n in operand.shape if n != 1]:
            return None
        dims = iter([d for _, d in kept])
        return Walk(operand, tuple(None if n == 1 else next(dims) for n in operand.shape), walk.scale)
    same = operand.shape == out.shape
    widened = equation.name == "convert_element_type" and np.result_type(operand.dtype, np.complex64) == out.dtype
    unpadded = equation.name == "pad" and not any(any(c) for c in equation.params["padding_config"])
    if same and (unpadded or takes_all(equation) or (widened and _is_float(operand.dtype))):
        return Walk(operand, walk.dims, walk.scale)
    if equation.name in _WITHOUT_EFFECT:
        return Walk(equation.inputs[equation.outputs.index(walk.node)], walk.dims, walk.scale)
    return None


def takes_all(equation: Equation) -> bool:
    """A dynamic slice of the size of its operand, which starts at 0 wherever it is told to; vmap makes it a gather."""
    operand, p = equation.inputs[0], equation.params
    if equation.name == "dynamic_slice":
        return operand.shape == equation.outputs[0].shape
    if equation.name != "gather" or tuple(p["slice_sizes"]) != operand.shape or p["mode"] != lax.GatherScatterMode.CLIP:
        return False
    return tuple(map(int, p["dimension_numbers"].offset_dims)) == tuple(range(len(equation.outputs[0].shape)))


def _is_float(dtype: Any) -> bool:
    return np.dtype(dtype) in (np.dtype(np.float32), np.dtype(np.float64))


def past_scale(walk: Walk, equation: Equation) -> Walk | None:
    """Past a product with a constant number, or a quotient by one; None for any other."""
    left, right = equation.inputs
    if (value := static(right)) is not None and left.shape == walk.node.shape:
        return Walk(left, walk.dims, walk.scale * value if equation.name == "mul" else walk.scale / value)
    if equation.name == "mul" and (value := static(left)) is not None and right.shape == walk.node.shape:
        return Walk(right, walk.dims, walk.scale * value)
    return None


def static(node: Node) -> complex | None:
    """The value of a single number that depends on constants only; None for anything else."""
    if math.prod(node.shape) != 1:
        return None
    with jax.ensure_compile_time_eval():
        found = _evaluated(node, 8)
    return None if found is None else complex(np.asarray(found).reshape(()))


def _evaluated(node: Node, depth: int) -> Any:
    if node.constant:
        return np.asarray(node.value, node.dtype)
    equation = node.equation
    if equation is None or not depth or any(math.prod(n.shape) > 8 for n in equation.inputs):
        return None
    inputs = [_evaluated(n, depth - 1) for n in equation.inputs]
    if any(v is None for v in inputs) or equation.primitive.multiple_results:
        return None
    if equation.name == "convert_element_type":  # by far the most common; a program of XLA takes 50 ms to compile
        return inputs[0].astype(node.dtype)
    if equation.name == "reduce_prod":
        return np.prod(inputs[0], axis=equation.params["axes"], dtype=node.dtype)
    return np.asarray(equation.primitive.bind(*map(jnp.asarray, inputs), **equation.params))
