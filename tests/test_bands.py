"""Fill analysis against execution: wherever a fact claims a fill, the value must be it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.graph import flatten
from jaxinfer.passes.incremental.bands import Bands

T = 7


def facts_of(function):
    """(facts of the output, its value) for a function of (query, key) index grids [T, T]."""
    closed = jax.make_jaxpr(lambda: function(jnp.arange(T)[:, None], jnp.arange(T)[None, :]))()
    graph = flatten(closed)
    value = np.asarray(jax.core.eval_jaxpr(closed.jaxpr, closed.consts)[0])
    return Bands.of(graph).facts.get(graph.outputs[0], ()), value


def assert_true(facts, value):
    index = np.indices(value.shape)
    for fact in facts:
        beyond = index[fact.b] - index[fact.a] > fact.gap
        np.testing.assert_array_equal(value[beyond], np.asarray(fact.fill, value.dtype), err_msg=str(fact))


def causal_gap(facts):
    return min((f.gap for f in facts if (f.a, f.b) == (0, 1)), default=None)


MASKS = {
    "ge": (lambda t, s: t >= s, 0),
    "gt": (lambda t, s: t > s, -1),
    "shifted": (lambda t, s: s <= t + 2, 2),
    "window": (lambda t, s: (s <= t) & (t - s < 3), 0),
    "negated": (lambda t, s: ~(s > t), 0),
    "difference": (lambda t, s: (t - s) >= 0, 0),
    "band of one": (lambda t, s: t == s, 0),
    "additive": (lambda t, s: jnp.where(t >= s, 0.0, -1e9), 0),
    "scaled": (lambda t, s: (1.0 - (t >= s).astype(jnp.float32)) * -1e9, 0),
    "tril": (lambda t, s: jnp.tril(jnp.ones((T, T))), 0),
    "constant": (lambda t, s: ~jnp.asarray(np.triu(np.ones((T, T), bool), 1)), 0),
    "exp of -inf": (lambda t, s: jnp.exp(jnp.where(t >= s, 0.0, -jnp.inf)), 0),
    "product": (lambda t, s: (t >= s) * (t * 1.5 + s), 0),
    "full": (lambda t, s: t + s >= 0, None),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str):
    function, gap = MASKS[name]
    facts, value = facts_of(function)
    assert_true(facts, value)
    assert causal_gap(facts) == gap


def test_a_finite_mask_is_an_assumption_once_scores_are_added():
    facts, _ = facts_of(lambda t, s: jnp.exp(jnp.where(t >= s, 0.0, -1e9) + jnp.sin(1.0 * t * s)))
    (fact,) = (f for f in facts if (f.a, f.b) == (0, 1))
    assert fact.fill == 0
    assert fact.assumed


def test_a_mild_mask_hides_nothing():
    facts, _ = facts_of(lambda t, s: jnp.exp(jnp.where(t >= s, 0.0, -30.0) + jnp.sin(1.0 * t * s)))
    assert not [f for f in facts if f.fill == 0]


@st.composite
def masks(draw, depth=3):
    """A random function of the index grids that returns a boolean or a number for each pair."""
    if depth == 0 or draw(st.booleans()):
        scale = draw(st.sampled_from([1, 2, -1]))
        shift = draw(st.integers(-3, 3))
        op = draw(st.sampled_from([jnp.greater_equal, jnp.greater, jnp.less, jnp.less_equal, jnp.equal]))
        swap = draw(st.booleans())
        return lambda t, s: op(*((scale * s + shift, scale * t) if swap else (scale * t, scale * s + shift)))
    left, right = draw(masks(depth - 1)), draw(masks(depth - 1))
    kind = draw(st.sampled_from(["and", "or", "not", "where", "multiply", "exp", "maximum"]))
    low = draw(st.sampled_from([0.0, -jnp.inf, -1e9, 1.0]))
    return {
        "and": lambda t, s: (left(t, s) != 0) & (right(t, s) != 0),
        "or": lambda t, s: (left(t, s) != 0) | (right(t, s) != 0),
        "not": lambda t, s: ~(left(t, s) != 0),
        "where": lambda t, s: jnp.where(left(t, s) != 0, 1.0 * right(t, s), low),
        "multiply": lambda t, s: (left(t, s) != 0) * jnp.where(right(t, s) != 0, 2.0, 1.0),
        "exp": lambda t, s: jnp.exp(jnp.where(left(t, s) != 0, 0.5, low)),
        "maximum": lambda t, s: jnp.maximum(
            jnp.where(left(t, s) != 0, 1.0, low), jnp.where(right(t, s) != 0, 3.0, low)
        ),
    }[kind]


@settings(max_examples=60, deadline=None)
@given(masks())
def test_facts_are_true(function):
    facts, value = facts_of(function)
    assert_true(facts, value)
