"""Factor rules against execution: a claim that dims are aligned must survive a change at a single index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinfer.axes import factors_of, known_primitives
from jaxinfer.axes.factors import describe, reshape_groups
from jaxinfer.graph import flatten


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


EXAMPLES = {
    "add": (lambda x, y: lax.add(x, y), arrays((3, 4), (3, 4)), "ab,ab->ab"),
    "scalar": (lambda x: x * 2.0, arrays((3, 4)), "ab,->ab"),
    "select": (lambda x, y: jnp.where(x > 0, x, y), arrays((3, 4), (3, 4)), None),
    "broadcast": (lambda x: lax.broadcast_in_dim(x, (2, 3, 4), (0, 2)), arrays((2, 4)), "ac->abc"),
    "stretch": (lambda x: lax.broadcast_in_dim(x, (3, 4), (0, 1)), arrays((3, 1)), "a_->ab"),
    "transpose": (lambda x: x.transpose(2, 0, 1), arrays((2, 3, 4)), "abc->cab"),
    "squeeze": (lambda x: lax.squeeze(x, (1,)), arrays((2, 1, 4)), "a_c->ac"),
    "expand": (lambda x: lax.expand_dims(x, (1,)), arrays((2, 4)), None),
    "split dims": (lambda x: x.reshape(5, 2, 3), arrays((5, 6)), "a_->a__"),
    "merge dims": (lambda x: x.reshape(6, 5), arrays((2, 3, 5)), "__b->_b"),
    "sum": (lambda x: x.sum(1), arrays((3, 4, 5)), "abc->ac"),
    "max": (lambda x: x.max((0, 2)), arrays((3, 4, 5)), "abc->b"),
    "argmax": (lambda x: jnp.argmax(x, 1), arrays((3, 4)), "ab->a"),
    "einsum": (lambda x, y: jnp.einsum("bthd,bshd->bhts", x, y), arrays((2, 3, 4, 5), (2, 6, 4, 5)), None),
    "concatenate": (lambda x, y: lax.concatenate([x, y], 1), arrays((3, 4), (3, 2)), "a_,a_->a_"),
    "split": (lambda x: lax.split(x, (1, 3), axis=1), arrays((3, 4)), "a_->a_,a_"),
    "stack": (lambda x, y: jnp.stack([x, y], 1), arrays((3, 4), (3, 4)), None),
    "unstack": (lambda x: jnp.unstack(x, axis=1), arrays((3, 2, 4)), None),
    "slice": (lambda x: x[:2, 1:], arrays((3, 4)), None),
    "strided": (lambda x: x[:, ::2], arrays((3, 4)), None),
    "flip": (lambda x: jnp.flip(x, 1), arrays((3, 4)), "a_->a_"),
    "cumsum": (lambda x: lax.cumsum(x, 1), arrays((3, 4)), "a_->a_"),
    "sort": (lambda x: lax.sort(x, dimension=1), arrays((3, 4)), "a_->a_"),
    "top_k": (lambda x: lax.top_k(x, 2), arrays((3, 4)), "a_->a_,a_"),
    "pad": (lambda x: lax.pad(x, 0.0, [(0, 0, 0), (1, 0, 0)]), arrays((3, 4)), "a_,->a_"),
    "take rows": (lambda x: x[jnp.array([2, 0, 1, 1])], arrays((3, 4)), None),
    "take along": (lambda x: jnp.take_along_axis(x, jnp.array([[0], [1], [3]]), 1), arrays((3, 4)), None),
    "dynamic slice": (lambda x: lax.dynamic_slice(x, (0, 1), (3, 2)), arrays((3, 4)), None),
    "barrier": (lambda x, y: lax.optimization_barrier((x, y)), arrays((3,), (3, 4)), "a,bc->a,bc"),
    "fft": (lambda x: jnp.fft.fft(x).real, arrays((3, 4)), None),  # no rule: blocked
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_claims_hold(name: str):
    """Change an operand at index i of an aligned dim: results may change at index i of the same factor only."""
    function, inputs, expected = EXAMPLES[name]
    graph = flatten(jax.make_jaxpr(function)(*inputs))
    told = [describe(factors_of(e)) for e in graph.equations]
    if expected is not None:
        assert expected in told
    values = dict(zip(graph.inputs, inputs, strict=True))
    for equation in graph.equations:
        operands = [jnp.asarray(values.get(n, n.value)) for n in equation.inputs]
        results = run(equation, operands)
        values.update(zip(equation.outputs, results, strict=True))
        check(equation, operands, results)


def run(equation, operands):
    found = equation.primitive.bind(*operands, **equation.params)
    return found if equation.primitive.multiple_results else [found]


def check(equation, operands, results):
    factors = factors_of(equation)
    for number, dims in enumerate(factors.inputs):
        if operands[number].dtype.kind != "f":
            continue
        for d, factor in enumerate(dims):
            if factor is None:
                continue
            i = operands[number].shape[d] - 1
            changed = list(operands)
            where = (slice(None),) * d + (i,)
            changed[number] = operands[number].at[where].set(9.0)
            for before, after, out in zip(results, run(equation, changed), factors.outputs, strict=True):
                differs = np.asarray(before != after)
                if factor in out:
                    differs = np.delete(differs, [i] if i < differs.shape[out.index(factor)] else [], out.index(factor))
                    assert not differs.any(), (str(equation), describe(factors))


def test_a_product_names_its_factors():
    graph = flatten(jax.make_jaxpr(lambda x, y: jnp.einsum("bthd,bshd->bhts", x, y))(*EXAMPLES["einsum"][1]))
    (dot,) = (e for e in graph.equations if e.name == "dot_general")
    assert len(factors_of(dot).reduced) == 1
    assert factors_of(dot).reduction == "dot"


@pytest.mark.parametrize(
    ("before", "after", "groups"),
    [
        ((2, 3, 4), (6, 4), [([0, 1], [0]), ([2], [1])]),
        ((5, 1, 6), (5, 2, 3), [([0], [0]), ([2], [1, 2])]),
        ((1, 7, 8), (7, 8), [([1], [0]), ([2], [1])]),
        ((4, 6), (6, 4), [([0, 1], [0, 1])]),
        ((), (1, 1), []),
    ],
)
def test_reshape_groups(before, after, groups):
    assert reshape_groups(before, after) == groups


def test_what_has_a_rule():
    assert {"dot_general", "gather", "reshape", "select_n", "iota"} <= known_primitives()


def test_calls_are_inlined_and_dead_code_is_gone():
    @jax.jit
    def inner(x):
        return jax.nn.silu(x), x.sum()

    graph = flatten(jax.make_jaxpr(lambda x: jax.checkpoint(inner)(x)[0])(jnp.ones(3)))
    assert [e.name for e in graph.equations] == ["logistic", "mul"]
    assert all("test_factors.py" in e.source for e in graph.equations)
