"""Names of values by how they are made: equal names mean equal values."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr

from jaxinfer.graph import Equation, Graph, Node
from jaxinfer.passes.simplify import frozen


def digest_of(graph: Graph) -> bytes:
    """Names a graph with one output by what it computes: equal digests mean equal programs, in any process."""
    inputs = enumerate(graph.inputs)
    keys = {n: digest(b"input", str((i, n.shape, n.dtype, n.weak)).encode()) for i, n in inputs}
    for equation in graph.equations:
        operands = [constant_key(n) if n.constant else keys[n] for n in equation.inputs]
        key = equation_key(equation, operands)
        for number, node in enumerate(equation.outputs):
            keys[node] = key + number.to_bytes(2, "big")
    (output,) = graph.outputs
    return digest(keys[output], str(len(graph.inputs)).encode())


def constant_key(node: Node) -> bytes:
    """Names a literal or captured array by its value."""
    return digest(b"constant", np.asarray(node.value).tobytes(), str((node.shape, node.dtype, node.weak)).encode())


def equation_key(equation: Equation, operands: Sequence[bytes]) -> bytes:
    """Names what an equation makes of operands of these names."""
    params = [f"{k}={_param(v)}" for k, v in sorted(equation.params.items())]
    return digest(equation.name.encode(), ";".join(params).encode(), *operands)


_PROCESS = os.urandom(8).hex()
_HELD: dict[int, Any] = {}  # kept, so that no other object gets its id


def _param(value: Any) -> str:
    """A parameter as text; equal texts mean equal parameters. Functions and the like are equal only to themselves."""
    if isinstance(value, (tuple, list)):
        return f"({','.join(map(_param, value))})"
    if isinstance(value, ClosedJaxpr):
        # Constants of a jaxpr don't show in its text.
        text = str(value.jaxpr) if not value.consts and "jaxpr" not in str(value.jaxpr) else None
    else:
        text = repr(frozen(value))
    if text is None or " at 0x" in text:
        _HELD[id(value)] = value
        return f"object {_PROCESS} {id(value)}"
    return text


def digest(*parts: bytes) -> bytes:
    """One digest of several byte strings, each counted with its length."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.digest()
