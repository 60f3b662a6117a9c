"""x.at[i].set(y) with i known, as the concatenation of rows that it is: x[:i], y, x[i + 1:].

A scatter says where its updates go by values, which no rule of rows follows; here they are constants.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.graph import Equation, Graph, Node, in_place_of

Array = jax.Array

_COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    "scatter": lambda old, new: new,
    "scatter-add": jnp.add,
    "scatter-sub": jnp.subtract,
    "scatter-mul": jnp.multiply,
    "scatter-min": jnp.minimum,
    "scatter-max": jnp.maximum,
}
_LARGEST = 64  # elements of an index worth a look


def settled(graph: Graph, rows: Sequence[Node]) -> Graph:
    """The graph with such updates of what depends on `rows`, the inputs made of rows in time, rewritten."""
    reached = set(rows)
    equations: list[Equation] = []
    for equation in graph.equations:
        new = None
        if any(n in reached for n in equation.inputs):
            reached.update(equation.outputs)
            if equation.name in _COMBINE:
                new = _rewritten(equation)
        equations += new or [equation]
    return Graph(graph.inputs, graph.outputs, equations)


def _rewritten(equation: Equation) -> list[Equation] | None:
    """The equations in place of a scatter of one block that spans every dim but one; None for any other."""
    operand, indices, updates = equation.inputs
    numbers = equation.params["dimension_numbers"]
    index = _known(indices)
    if index is None or index.ndim != 1 or numbers.operand_batching_dims:
        return None
    inserted = numbers.inserted_window_dims
    sizes = iter(updates.shape)
    window = [1 if d in inserted else next(sizes) for d in range(len(operand.shape))]
    starts = [0] * len(window)
    for d, start in zip(numbers.scatter_dims_to_operand_dims, index.tolist(), strict=True):
        starts[d] = start
    part = [d for d, n in enumerate(operand.shape) if (starts[d], window[d]) != (0, n)]
    if len(part) != 1 or not 0 <= starts[part[0]] <= operand.shape[part[0]] - window[part[0]]:
        return None
    (dim,) = part
    start, end = starts[dim], starts[dim] + window[dim]

    def joined(old: Array, new: Array) -> list[Array]:
        block = jax.lax.slice_in_dim(old, start, end, axis=dim)
        block = _COMBINE[equation.name](block, new.reshape(block.shape)).astype(old.dtype)
        pieces = [jax.lax.slice_in_dim(old, 0, start, axis=dim), block]
        pieces.append(jax.lax.slice_in_dim(old, end, old.shape[dim], axis=dim))
        return [jax.lax.concatenate([p for p in pieces if p.shape[dim]], dim)]

    return in_place_of(equation.outputs, joined, (operand, updates), equation.source)


def _known(node: Node) -> np.ndarray | None:
    """The value of a small array that constants alone decide."""
    if int(np.prod(node.shape)) > _LARGEST:
        return None
    if node.constant:
        return np.asarray(node.value)
    equation = node.equation
    if equation is None or equation.primitive.multiple_results:
        return None
    operands = [_known(n) for n in equation.inputs]
    if any(value is None for value in operands):
        return None
    with jax.ensure_compile_time_eval():
        arrays = [jnp.asarray(v, n.dtype) for v, n in zip(operands, equation.inputs, strict=True)]
        result: Any = equation.primitive.bind(*arrays, **equation.params)
    return np.asarray(result)
