"""Where scans are found, and where they aren't: each against the forward as it was traced."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy_graph import computed
from recognise_helpers import SCANS, assert_same_values, assert_xla_agrees, found, graphs, mamba, uniform

from jaxinfer.graph import Graph, evaluate, flatten
from jaxinfer.passes.recognise import recognise

pytestmark = pytest.mark.jax_defaults  # the forwards here are written as users write them


@pytest.mark.parametrize("name", SCANS)
def test_scans_are_recognised(name: str):
    (function, make_inputs, expected), rows = SCANS[name], 8 + len(name) % 6
    inputs = make_inputs(rows)
    graph, new = graphs(function, *inputs)
    scans = found(new)
    assert [(e.params["axes"], e.params["reverse"], e.params["carried"]) for e in scans] == expected
    assert not [e for e in new.equations if e.scope]
    assert new.inputs == graph.inputs
    assert_same_values(new, graph, inputs)
    assert "recognise_helpers.py" in scans[0].source


@pytest.mark.parametrize("name", ["complex diagonal", "dict", "booleans", "quaternions", "vmap of vmap, reverse"])
def test_xla_agrees(name: str):
    function, inputs, _ = SCANS[name]
    assert_xla_agrees(function, inputs(7))


@pytest.mark.parametrize("rows", range(1, 9))
def test_few_rows(rows: int):
    """Up to 3 rows a tree doesn't show what becomes of the decay, and is left as it is."""
    inputs = uniform(rows, 3), uniform(rows, 3, seed=1)
    graph, new = graphs(mamba, *inputs)
    assert len(found(new)) == (rows > 3) and (rows > 3 or new is graph)
    assert_same_values(new, graph, inputs)


def test_in_the_body_of_a_scan():
    def function(x, ws):
        return lax.scan(lambda h, w: (jnp.tanh(mamba(jax.nn.sigmoid(w) * jnp.ones_like(h), h)), None), x, ws)[0]

    (outer,) = graphs(function, uniform(9, 3), uniform(4, 3))[0].equations
    body = flatten(outer.params["jaxpr"])
    new = recognise(body)
    assert [e.params["axes"] for e in found(new)] == [(0, 0)]
    inputs = [uniform(*n.shape, seed=i) for i, n in enumerate(body.inputs)]
    assert_same_values(new, body, inputs)


def test_under_jit_and_vmap():
    a, b = uniform(2, 5, 3), uniform(2, 5, 3, seed=1)
    graph, new = graphs(mamba, a[0], b[0])
    got = jax.jit(jax.vmap(lambda a, b: evaluate(new, [a, b])[0]))(a, b)
    expected = [computed(graph, pair)[0] for pair in zip(a, b, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_long_scans_are_recognised_fast():
    a, b = (jax.ShapeDtypeStruct((131072, 4), jnp.float32),) * 2
    graph = flatten(jax.make_jaxpr(mamba)(a, b))
    start = time.process_time()
    assert len(recognise(graph).equations) == 1
    assert time.process_time() - start < 1.0  # 0.04 to 0.12 s on the slowest machine seen


def own_tree(operator, x):
    """Not JAX's: nobody said that the operator is associative."""
    if x.shape[0] < 2:
        return x
    odd = own_tree(operator, operator(x[0:-1:2], x[1::2]))
    left = odd[:-1] if x.shape[0] % 2 == 0 else odd
    even = jnp.concatenate([x[:1], operator(left, x[2::2])])
    pads = ((0, int(even.shape[0] == odd.shape[0]), 1), (1, int(even.shape[0] != odd.shape[0]), 1))
    return sum(lax.pad(v, 0.0, [p, (0, 0, 0)]) for v, p in zip((even, odd), pads, strict=True))


LEFT_ALONE = {
    "own tree": lambda x: own_tree(jnp.add, x),
    "mean over rows": lambda x: lax.associative_scan(lambda a, b: a + b * b.mean(0, keepdims=True), x),
    "sum over rows": lambda x: lax.associative_scan(lambda a, b: a + b + b.sum(0), x),
    "rows turned": lambda x: lax.associative_scan(lambda a, b: a + b[::-1], x),
    "rows shifted": lambda x: lax.associative_scan(lambda a, b: a + jnp.roll(b, 1, 0), x),
    "rows dropped": lambda x: lax.associative_scan(lambda a, b: a + jnp.pad(b[:-1], ((0, 1), (0, 0))), x),
    "cumsum of rows": lambda x: lax.associative_scan(lambda a, b: a + jnp.cumsum(b, 0), x),
    "row number": lambda x: lax.associative_scan(lambda a, b: a + b + jnp.arange(len(b))[:, None], x),
    "number of rows": lambda x: lax.associative_scan(lambda a, b: a + b * len(b), x),
    "rows in a parameter": lambda x: lax.associative_scan(lambda a, b: a + lax.reduce_precision(b, 8, 4 + len(b)), x),
    "one row for all": lambda x: lax.associative_scan(lambda a, b: a + b[:1], x),
    "outer product of rows": lambda x: lax.associative_scan(lambda a, b: a + (b @ b.T) @ b, x),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name: str):
    x = uniform(9, 3)
    graph, new = graphs(LEFT_ALONE[name], x)
    assert not found(new)
    if name != "own tree":
        assert new is graph


def mutations(graph: Graph):
    """One change each to the tree of a scan: other rows sliced or padded, operands swapped, another operator."""
    for number, equation in enumerate(graph.equations):
        p = equation.params
        if equation.name == "slice" and equation.outputs[0].shape[0]:
            starts, limits = p["start_indices"], p["limit_indices"]
            for by in (-1, 1):
                start, limit = starts[0] + by, limits[0] + by
                if start >= 0 and limit <= equation.inputs[0].shape[0]:
                    moved = {**p, "start_indices": (start, *starts[1:]), "limit_indices": (limit, *limits[1:])}
                    yield number, f"slice {number} by {by}", {"params": moved}
        if equation.name == "pad" and sum(p["padding_config"][0][:2]):
            lo, hi, inside = p["padding_config"][0]
            if lo != hi:
                yield number, f"pad {number}", {"params": {**p, "padding_config": ((hi, lo, inside), (0, 0, 0))}}
        if equation.name in ("mul", "sub") and not equation.scope and equation.outputs[0].shape[0]:
            yield number, f"operator {number}", {"primitive": lax.max_p, "params": {}}
        if equation.name == "sub" and not equation.scope and equation.outputs[0].shape[0]:
            yield number, f"sides {number}", {"inputs": equation.inputs[::-1]}


@pytest.mark.parametrize("rows", [6, 9])
def test_every_mutation_of_a_tree_is_left_alone(rows: int):
    """Each changes one equation; where the first combination is changed, all others are unlike it."""
    function = lambda x: lax.associative_scan(lambda a, b: a - b * 2.0, x)  # noqa: E731
    graph = flatten(jax.make_jaxpr(function)(uniform(rows, 3)))
    cases = list(mutations(graph))
    assert len(cases) > 12 and len(recognise(graph).equations) == 1
    for number, what, changes in cases:
        equation = graph.equations[number]
        before = {k: getattr(equation, k) for k in changes}
        for name, value in changes.items():
            setattr(equation, name, value)
        try:
            new = recognise(graph)
            # A level that is still whole is a scan of its own rows; the changed one isn't, nor the whole.
            assert not [e for e in found(new) if e.inputs[0].shape[0] == rows], what
            if new is not graph:
                inputs = [uniform(rows, 3)]
                assert_same_values(new, graph, inputs)
        finally:
            for name, value in before.items():
                setattr(equation, name, value)
