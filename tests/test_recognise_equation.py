"""The equation that stands for a scan: its operator, its results at other lengths, its factors. Scans by definition:
folded row by row."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from numpy_graph import computed, run
from recognise_helpers import SCANS, found, graphs, make, mamba, uniform

from jaxinfer.axes.factors import describe, factors_of
from jaxinfer.graph import flatten

pytestmark = pytest.mark.jax_defaults  # the forwards here are written as users write them


def fold(operator, elements, axes, reverse=False):
    """The scan by definition: rows combined one after another, on slices of one row."""
    rows = [
        [np.take(x, [t], a) for x, a in zip(elements, axes, strict=True)] for t in range(elements[0].shape[axes[0]])
    ]
    results = list(itertools.accumulate(rows[::-1] if reverse else rows, operator))
    results = results[::-1] if reverse else results
    return [np.concatenate([r[i] for r in results], axis) for i, axis in enumerate(axes)]


def bound(equation):
    return functools.partial(equation.primitive.bind, **equation.params)


@pytest.mark.parametrize("name", SCANS)
def test_scans_run_at_other_lengths(name: str):
    """The operator and the scan, from a trace of 9 rows, on 1 and 6 rows: as a fold of single rows gives it."""
    function, inputs, _ = SCANS[name]
    for equation in found(graphs(function, *inputs(9))[1]):
        p = equation.params
        axes, count = p["axes"], p["count"]
        extras = [make(n, None, 0, 5) for n in equation.inputs[count:]]

        def operands(rows, e=equation):
            return [make(n, a, rows, i) for i, (n, a) in enumerate(zip(e.inputs, e.params["axes"], strict=False))]

        combine = flatten(jax.make_jaxpr(p["operator"])(operands(1), operands(1), extras))
        for rows in (1, 6):
            got = run(bound(equation), *operands(rows), *extras)
            step = lambda a, b, g=combine, e=extras: computed(g, [*a, *b, *e])  # noqa: E731
            expected = fold(step, operands(rows), axes, p["reverse"])
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_operator_is_the_users():
    """Not only equal to a fold of itself: the numbers are the recurrence's."""
    a, b = uniform(9, 3), uniform(9, 3, seed=1)
    (scan,) = found(graphs(mamba, a, b)[1])
    h, expected = np.zeros(3), []
    for t in range(9):
        h = a[t] * h + b[t]
        expected.append(h)
    np.testing.assert_allclose(run(bound(scan), a, b)[1], expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(bound(scan))(a, b)[1], expected, rtol=1e-5)
    np.testing.assert_allclose(scan.params["operator"]([a[:2], b[:2]], [a[4:6], b[4:6]])[1], a[4:6] * b[:2] + b[4:6])


@given(cuts=st.lists(st.integers(0, 12), max_size=4))
@settings(max_examples=8, deadline=None)
def test_going_on_from_a_carry(cuts):
    """Chunks of any size, each from the last row of `carried` alone, give what the whole gives."""
    a, b = uniform(12, 3), uniform(12, 3, seed=1)
    (scan,) = found(graphs(mamba, a, b)[1])
    p, pieces = scan.params, []
    carry = None
    for lo, hi in zip([0, *sorted(cuts)], [*sorted(cuts), 12], strict=True):
        if lo == hi:
            continue
        out = run(bound(scan), a[lo:hi], b[lo:hi])
        if carry is not None:
            out = run(p["operator"], [np.broadcast_to(c, o.shape) for c, o in zip(carry, out, strict=True)], out)
        carry = [o[-1:] if i in p["carried"] else np.full_like(o[-1:], np.nan) for i, o in enumerate(out)]
        pieces.append(out[1])
    np.testing.assert_allclose(np.concatenate(pieces), run(mamba, a, b)[0], rtol=1e-5)


@given(
    rows=st.integers(1, 70),
    axis=st.integers(0, 2),
    reverse=st.booleans(),
    operator=st.sampled_from([(jnp.add, np.add), (jnp.maximum, np.maximum), (jnp.logaddexp, np.logaddexp)]),
)
@settings(max_examples=12, deadline=None)
def test_any_length_and_axis(rows: int, axis: int, reverse: bool, operator):
    def function(x):
        return lax.associative_scan(operator[0], x, axis=axis, reverse=reverse)

    shape = [2, 3]
    shape.insert(axis, rows)
    x = uniform(*shape) * np.float32(0.1)
    graph, new = graphs(function, x)
    assert len(new.equations) == (1 if rows > 1 else len(graph.equations))
    (got,) = computed(new, [x])
    turned = np.flip(x, axis) if reverse else x
    expected = np.stack(list(itertools.accumulate(np.moveaxis(turned, axis, 0), operator[1])), axis)
    np.testing.assert_allclose(got, np.flip(expected, axis) if reverse else expected, rtol=1e-4)


def changed(function, inputs, which, index):
    """Where the first output changes when one element's slice of an input does."""
    inputs = list(inputs)
    before = function(*inputs)[0]
    inputs[which] = inputs[which].copy()
    inputs[which][index] += 0.25
    return np.abs(function(*inputs)[0] - before) > 1e-6


@pytest.mark.parametrize("name", ["mamba", "batch first", "reverse", "matrices", "vmap of matrices", "quaternions"])
def test_factors_of_scans_hold(name: str):
    function, inputs, _ = SCANS[name]
    (scan,) = found(graphs(function, *inputs(9))[1])
    factors = factors_of(scan)
    assert set(factors.cumulative.values()) == {"reverse" if scan.params["reverse"] else "forward"}
    count = scan.params["count"]
    result = scan.params["carried"][0]

    operands = [make(n, None, 0, i) for i, n in enumerate(scan.inputs)]
    whole = flatten(jax.make_jaxpr(lambda *x: bound(scan)(*x)[result])(*operands))
    assert count == len(operands)
    for which in range(count):
        for dim, factor in enumerate(factors.inputs[which]):
            index = (slice(None),) * dim + (1,)
            seen = changed(lambda *x: computed(whole, x), operands, which, index).any(
                axis=tuple(d for d, f in enumerate(factors.outputs[result]) if f != factor)
            )
            if factor is None:
                continue
            at = np.arange(len(seen))
            allowed = at == 1 if factor not in factors.cumulative else at <= 1 if scan.params["reverse"] else at >= 1
            assert not seen[~allowed].any() and seen[allowed].any(), (which, dim)


def test_factors_of_scans_say_what_mixes():
    told = {name: describe(factors_of(found(graphs(SCANS[name][0], *SCANS[name][1](9))[1])[0])) for name in SCANS}
    assert told["mamba"] == "abc,abc->abc,abc"
    assert told["matrices"] == "a__->a__"
    assert told["vmap of matrices"] == "ba__->ba__"
    assert told["quaternions"] == "a_->a_"
    assert told["vmap, decay shared"] == "ab,cab->ab,cab"
    assert told["vmap over channels"] == "ba,ba->ba,ba"
