"""ATTENTION: the one equation that stands for softmax(QK^T)V.

Its operands are brought to one layout, without any repeated heads:

    q       [batch, query, groups, heads, dim]      heads: query heads of each group of keys (1 without grouping)
    k       [batch, key, groups, dim]
    v       [batch, key, groups, value dim]
    others  masks, biases and factors of the scores: [batch, groups, heads, query, key], each dim its size or 1
    result  [batch, query, groups, heads, value dim]

with the params `steps`, what happens to the scores between the product and the softmax, in order:

    ("scale" | "divide", number)   ("tanh",)   ("cast", dtype)   ("mask", operand, fill, value that keeps a score)
    ("bias" | "less" | "factor" | "over", operand)               + - * /

A softcap is a division, a tanh and a scale (`softcap` finds it). `weights` are the casts and masks after the softmax,
`counted` the mask on what its sum counts (`jax.nn.softmax(where=...)`), `first` and `second` the params of the two
products. `lower` is the reference; it does the forward's own steps.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.graph import Composite


def lower(
    q: Any,
    k: Any,
    v: Any,
    *others: Any,
    steps: tuple[Any, ...],
    counted: tuple[Any, ...],
    weights: tuple[Any, ...],
    first: Any,
    second: Any,
) -> tuple[Any]:
    """The reference: see the module."""
    scores = lax.dot_general(q, k, (((4,), (3,)), ((0, 2), (0, 2))), **dict(first))  # b g t r s
    scores = jnp.transpose(scores, (0, 1, 3, 2, 4))
    for name, *rest in steps:
        scores = _STEPS[name](scores, others, *rest)
    shifted = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    found = shifted
    for name, *rest in counted:
        shifted = _STEPS[name](shifted, others, *rest)
    found = found / jnp.sum(shifted, axis=-1, keepdims=True)
    for name, *rest in weights:
        found = _STEPS[name](found, others, *rest)
    mixed = lax.dot_general(found, v, (((4,), (1,)), ((0, 1), (0, 2))), **dict(second))  # b g r t e
    return (jnp.transpose(mixed, (0, 3, 1, 2, 4)),)


_STEPS: dict[str, Any] = {
    "scale": lambda s, others, number: s * jnp.asarray(number, s.dtype),
    "divide": lambda s, others, number: s / jnp.asarray(number, s.dtype),
    "tanh": lambda s, others: jnp.tanh(s),
    "cast": lambda s, others, dtype: s.astype(dtype),
    "bias": lambda s, others, i: s + jnp.broadcast_to(others[i], s.shape),
    "less": lambda s, others, i: s - jnp.broadcast_to(others[i], s.shape),
    "over": lambda s, others, i: s / jnp.broadcast_to(others[i], s.shape),
    "factor": lambda s, others, i: s * jnp.broadcast_to(others[i], s.shape),
    "mask": lambda s, others, i, fill, kept: jnp.where(
        jnp.broadcast_to(others[i] == kept, s.shape), s, jnp.asarray(fill, s.dtype)
    ),
}

ATTENTION = Composite("attention", lower)


def softcap(steps: tuple[Any, ...]) -> float | None:
    """c where the steps have c * tanh(scores / c)."""
    for before, middle, after in zip(steps, steps[1:], steps[2:], strict=False):
        if middle == ("tanh",) and before[0] in ("scale", "divide") and after[0] == "scale":
            inverse = before[1] if before[0] == "scale" else 1 / before[1]
            return float(after[1]) if np.isclose(inverse * after[1], 1) else None
    return None
