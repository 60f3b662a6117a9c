"""Precision: bfloat16 weights and products, with softmax and norm statistics kept in float32. Off by default.

Switched on by name, `ji.compile(program, passes=["simplify", "fold", "precision", "attention"])`. In it

- each product or convolution of float32 values is done on operands rounded to bfloat16, summed in float32, and its
  result is float32: what hardware with bfloat16 units does in one instruction;
- so weights that only products read are staged as bfloat16: half the bytes;
- everything else (softmax, norms, sums, positions, the residual stream) stays float32.

Products that ask for a precision themselves (`precision="highest"`) are left. `ji.compile(dtype="bfloat16")` is another
thing: it casts the weights and traces the forward again, which then decides by its own rules of promotion.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinfer.graph import Equation, Graph, Node
from jaxinfer.passes.report import Note
from jaxinfer.passes.rewriting import Rewriter, nbytes, static_nodes

_HALF = np.dtype(jnp.bfloat16)
_SINGLE = np.dtype(np.float32)


def precision(graph: Graph, params: int) -> tuple[Graph, list[Note]]:
    """Graph -> Graph."""
    rewriter, static, notes = Rewriter(graph), static_nodes(graph, params), []
    for equation in graph.equations:
        if not _single(equation):
            continue
        rewriter.replace(equation.outputs[0], lambda new, e=equation: _halved(new, e))
        weights = [n for n in equation.inputs if n in static]
        what = f"{equation.name}{list(equation.outputs[0].shape)} on bfloat16, summed in float32"
        notes.append(Note(what, equation.source, 0, sum(nbytes([n]) for n in weights) // 2))
    return rewriter.finish(), notes


def _single(equation: Equation) -> bool:
    if equation.name not in ("dot_general", "conv_general_dilated") or equation.params["precision"] is not None:
        return False
    return all(n.dtype == _SINGLE for n in (*equation.inputs, *equation.outputs))


def _halved(new: Rewriter, equation: Equation) -> Node:
    operands = [new.emit(_half, new(n), source=equation.source) for n in equation.inputs]
    params = {**equation.params, "preferred_element_type": _SINGLE}
    return new.add(equation.primitive, params, operands, equation.outputs[0], equation.source)


def _half(x: Any) -> Any:
    return x.astype(_HALF)
