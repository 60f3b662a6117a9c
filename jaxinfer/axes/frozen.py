"""A while loop over many rows, written to run until no row wants to go on and to leave alone those that are done.

cond = any(want(carry)) and body = where(want(carry), step(carry), carry). That a row's result doesn't depend on when
the others finish holds only if both compute the same `want`, and only if nothing else is carried. (vmap of a while loop
needs none of this: its condition keeps a dim for the rows.)
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxinfer.axes.factors import factors_of
from jaxinfer.axes.states import Mixed, Rows, State
from jaxinfer.graph import Equation, Graph, Node

if TYPE_CHECKING:
    from jaxinfer.axes.proof import Walk


def frozen_rows(walk: "Walk", equation: Equation, condition: Graph, body: Graph, states: list[State]) -> bool:
    """Whether a while loop over several rows leaves each row alone once it is done.

    Args:
        states: of the condition's inputs (its constants, then what is carried).
    """
    first = equation.params["cond_nconsts"]
    second = equation.params["body_nconsts"]
    any_of = condition.outputs[0].equation
    if any_of is None or any_of.name != "reduce_or" or any(isinstance(s, Mixed) for s in states):
        return False
    want = any_of.inputs[0]
    if not isinstance(walk.states.get(want), Rows) or factors_of(any_of).outputs != ((),):
        return False
    outer = equation.inputs
    asked = _keys([*outer[:first], *(("carry", i) for i in range(len(body.outputs)))], condition)
    made = _keys([*outer[first : first + second], *(("carry", i) for i in range(len(body.outputs)))], body)
    wanted = asked(want)
    for number, node in enumerate(body.outputs):
        before = body.inputs[second + number]
        if node is before:
            continue
        select = node.equation
        if select is None or select.name != "select_n" or len(select.inputs) != 3 or select.inputs[1] is not before:
            return False
        if made(_unbroadcast(select.inputs[0])) != wanted:
            return False
    return True


def _unbroadcast(node: Node) -> Node:
    """The condition of each row, before it is spread over the row's other dims."""
    while node.equation is not None and node.equation.name in ("broadcast_in_dim", "reshape", "expand_dims"):
        before = node.equation.inputs[0]
        if sum(n != 1 for n in before.shape) < 1 or before.constant:
            break
        node = before
    return node


def _keys(inputs: list[Any], graph: Graph) -> Any:
    """A function from a node to a value that is equal for equal computations on the same inputs."""
    known: dict[Node, Any] = dict(zip(graph.inputs, inputs, strict=True))

    def key(node: Node) -> Any:
        if node.constant:
            return ("constant", str(node.dtype), node.shape, np.asarray(node.value).tobytes())
        if node not in known:
            equation = node.equation
            assert equation is not None
            params = tuple(sorted((name, _told(value)) for name, value in equation.params.items()))
            operands = tuple(map(key, equation.inputs))
            known[node] = (equation.name, params, operands, equation.outputs.index(node))
        return known[node]

    return key


def _told(value: Any) -> str:
    """A parameter as text; inner jaxprs and arrays, whose text leaves values out, are equal only to themselves."""
    held = value if isinstance(value, tuple) else (value,)
    opaque = any(isinstance(v, ClosedJaxpr | Jaxpr | np.ndarray | jax.Array) for v in held)
    return str(id(value)) if opaque else repr(value)
