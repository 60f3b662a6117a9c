"""Factor rules against execution: a claim that dims are aligned must survive a change at a single index."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive

from jaxinfer import _jax
from jaxinfer.axes import factors_of, known_primitives
from jaxinfer.axes.blocked import BLOCKED
from jaxinfer.axes.factors import describe, misunderstood, reshape_groups
from jaxinfer.axes.proof import WITH_BODIES
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
    "concatenate": (lambda x, y: lax.concatenate([x, y], 1), arrays((3, 4), (3, 2)), "ab,ab->ab"),
    "split": (lambda x: lax.split(x, (1, 3), axis=1), arrays((3, 4)), "a_->a_,a_"),
    "stack": (lambda x, y: jnp.stack([x, y], 1), arrays((3, 4), (3, 4)), None),
    "unstack": (lambda x: jnp.unstack(x, axis=1), arrays((3, 2, 4)), None),
    "slice": (lambda x: x[:2, 1:], arrays((3, 4)), None),
    "strided": (lambda x: x[:, ::2], arrays((3, 4)), None),
    "flip": (lambda x: jnp.flip(x, 1), arrays((3, 4)), "a_->a_"),
    "cumsum": (lambda x: lax.cumsum(x, 1), arrays((3, 4)), "ab->ab"),
    "cummax": (lambda x: lax.cummax(x, 0, reverse=True), arrays((3, 4)), "ab->ab"),
    "sort": (lambda x: lax.sort(x, dimension=1), arrays((3, 4)), "a_->a_"),
    "top_k": (lambda x: lax.top_k(x, 2), arrays((3, 4)), "a_->a_,a_"),
    "pad": (lambda x: lax.pad(x, 0.0, [(0, 0, 0), (1, 0, 0)]), arrays((3, 4)), "ab,->ab"),
    "pad inside": (lambda x: lax.pad(x, 0.0, [(0, 0, 1), (-1, 2, 0)]), arrays((3, 4)), "_b,->_b"),
    "take rows": (lambda x: x[jnp.array([2, 0, 1, 1])], arrays((3, 4)), None),
    "take along": (lambda x: jnp.take_along_axis(x, jnp.array([[0], [1], [3]]), 1), arrays((3, 4)), None),
    "dynamic slice": (lambda x: lax.dynamic_slice(x, (0, 1), (3, 2)), arrays((3, 4)), None),
    "barrier": (lambda x, y: lax.optimization_barrier((x, y)), arrays((3,), (3, 4)), "a,bc->a,bc"),
    "fft": (lambda x: jnp.fft.fft(x).real, arrays((3, 4)), "a_->a_"),
    "rfft2": (lambda x: jnp.abs(jnp.fft.rfft2(x)), arrays((2, 3, 4)), "a__->a__"),
    "update": (lambda x, y: lax.dynamic_update_slice(x, y, (0, 1)), arrays((3, 4), (3, 2)), "a_,a_,,->a_"),
    "scatter": (lambda x, y: x.at[:, 2].set(y), arrays((3, 4), (3,)), "a_,_,a->a_"),
    "scatter rows": (lambda x, y: x.at[jnp.array([2, 0, 2])].add(y), arrays((3, 4), (3, 4)), "_b,__,_b->_b"),
    "scatter batching": (
        lambda x, y: jax.vmap(lambda r, i, u: r.at[i].mul(u, mode="drop"))(x, jnp.array([[0], [5], [3]]), y),
        arrays((3, 4), (3, 1)),
        "a_,a__,a_->a_",
    ),
    "scatter clip": (lambda x, y: x.at[jnp.array([7]), :].max(y, mode="clip"), arrays((3, 4), (1, 4)), None),
    "cholesky": (lambda x: jnp.linalg.cholesky(x @ jnp.swapaxes(x, 1, 2)), arrays((2, 3, 3)), "a__->a__"),
    "qr": (lambda x: jnp.linalg.qr(x), arrays((2, 3, 3)), "a__->a__,a__"),
    "eigh": (lambda x: jnp.linalg.eigh(x + jnp.swapaxes(x, 1, 2)), arrays((2, 3, 3)), "a__->a__,a_"),
    "svd": (lambda x: jnp.linalg.svd(x), arrays((2, 3, 3)), "a__->a_,a__,a__"),
    "lu": (lambda x: lax.linalg.lu(x), arrays((2, 3, 3)), "a__->a__,a_,a_"),
    "triangular": (
        lambda x, y: lax.linalg.triangular_solve(x, y, left_side=True),
        arrays((2, 3, 3), (2, 3, 4)),
        "a__,a_d->a_d",
    ),
    "triangular right": (lambda x, y: lax.linalg.triangular_solve(x, y), arrays((3, 3), (4, 3)), "__,c_->c_"),
    "tridiagonal": (
        lambda x, y: lax.linalg.tridiagonal_solve(x, x + 5, x, y),
        arrays((2, 3), (2, 3, 4)),
        "a_,a_,a_,a__->a__",
    ),
    "householder": (lambda x: lax.linalg.householder_product(x, x[..., 0]), arrays((2, 3, 3)), "a__,a_->a__"),
    "max pool": (
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 1), (1, 2, 1), "VALID"),
        arrays((2, 4, 3)),
        "a_c->a_c",
    ),
    "any pool": (lambda x: lax.reduce_window(x, 1.0, lax.mul, (1, 2), (1, 1), "SAME"), arrays((3, 4)), "a_,->a_"),
    "pool gradient": (
        lambda x: jax.grad(lambda v: lax.reduce_window(v, -jnp.inf, lax.max, (1, 2), (1, 2), "VALID").sum())(x),
        arrays((3, 4)),
        "a_,a_->a_",
    ),
    "pool tangent": (
        lambda x, y: jax.jvp(lambda v: lax.reduce_window(v, -jnp.inf, lax.max, (1, 2), (1, 2), "VALID"), [x], [y])[1],
        arrays((3, 4), (3, 4)),
        "a_,a_->a_",
    ),
    "reduce": (lambda x: lax.reduce(x, 0.0, lambda a, b: a + b * 2, (1,)), arrays((3, 4, 2)), "a_c,->ac"),
    "approximate top k": (lambda x: lax.approx_max_k(x, 2), arrays((3, 4)), "a_->a_,a_"),
    "tile": (lambda x: jnp.tile(x, (1, 2)), arrays((3, 4)), None),
    "bitcast": (lambda x: lax.bitcast_convert_type(x, jnp.uint8), arrays((3, 4)), "ab->ab_"),
    "device": (lambda x: jax.device_put(x), arrays((3, 4)), None),
    "convolution": (
        lambda x, k: lax.conv_general_dilated(x, k, (1,), [(1, 0)]),
        arrays((2, 3, 5), (4, 3, 2)),
        None,
    ),
    "grouped convolution": (
        lambda x, k: lax.conv_general_dilated(x, k, (2,), "SAME", feature_group_count=3),
        arrays((2, 3, 5), (6, 1, 2)),
        "a__,___->a__",
    ),
    "clamp": (lambda x: lax.clamp(-1.0, x, 1.0), arrays((3, 4)), ",ab,->ab"),
    "take clip": (lambda x: jnp.take(x, jnp.array([9, -2]), axis=1, mode="clip"), arrays((3, 4)), None),
    "take fill": (lambda x: jnp.take(x, jnp.array([9, -2]), axis=1, mode="fill"), arrays((3, 4)), None),
    "ragged": (lambda x, y: lax.ragged_dot(x, y, jnp.array([2, 1])), arrays((3, 4), (2, 4, 5)), "__,___,_->__"),
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
                if factor in out:
                    differs = np.asarray(before != after) & ~(np.isnan(before) & np.isnan(after))
                    where = out.index(factor)
                    told = reached(factors, number, d, factor, i, differs.shape[where])
                    assert not np.delete(differs, told, where).any(), (str(equation), describe(factors))


def reached(factors, number, d, factor, index, size):
    """The indices of a result that one index of an operand may reach."""
    if factor in factors.cumulative:
        return range(index, size) if factors.cumulative[factor] == "forward" else range(index + 1)
    low, high = factors.halo.get((number, d), (0, 0))
    return [i for i in range(size) if i + low <= index <= i + high]


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


def primitives_of_jax() -> set[str]:
    """Names of all primitives that the modules of jax.lax and jax.numpy define, and that jax.extend exports."""
    found = set()
    for name in [n for n in sys.modules if n.startswith(("jax._src.", "jax.extend."))]:
        for value in list(vars(sys.modules[name]).values()):
            if isinstance(value, Primitive):
                found.add(value.name)
    return found


def test_every_primitive_of_jax_has_a_rule_or_a_reason():
    """A new JAX release fails here: give what it names a rule, or a line in axes/blocked.py that says why not."""
    for module in ("random", "scipy.special", "experimental.pjit"):
        importlib.import_module(f"jax.{module}")
    told = known_primitives() | set(BLOCKED) | set(_jax.CALLS) | WITH_BODIES
    missing = sorted(primitives_of_jax() - told)
    assert not missing, f"no rule and no reason in axes/blocked.py: {missing}"
    assert {"dot_general", "gather", "reshape", "select_n", "iota", "scatter-add"} <= primitives_of_jax()


def test_the_table_of_reasons():
    assert not known_primitives() & set(BLOCKED)
    assert all(len(reason) > 10 for reason in BLOCKED.values())


def test_what_is_not_understood_is_blocked():
    graph = flatten(jax.make_jaxpr(lambda x: lax.cumsum(x, 1))(jnp.ones((3, 4))))
    (equation,) = graph.equations
    assert factors_of(equation).outputs == ((0, 1),)
    equation.params["a_new_one"] = None
    assert factors_of(equation).outputs == ((None, None),)
    assert misunderstood(equation) == ("a_new_one",)
    (equation,) = flatten(jax.make_jaxpr(lambda x: lax.reshape(x, (12,), (1, 0)))(jnp.ones((3, 4)))).equations[-1:]
    if equation.params.get("dimensions"):  # a value that isn't understood
        assert misunderstood(equation) == ("dimensions",)


def test_random_keys():
    """Every row draws from its own key; from one key all rows are drawn at once."""

    def draw(keys):
        return jax.vmap(lambda k: jax.random.bits(jax.random.fold_in(k, 3), (4,)))(keys)

    graph = flatten(jax.make_jaxpr(draw)(jax.random.split(jax.random.key(0), 3)))
    told = {e.name: describe(factors_of(e)) for e in graph.equations}
    assert told["random_fold_in"] in ("a,a->a", "a,->a")
    assert told["random_bits"] == "a->a_"
    one = flatten(jax.make_jaxpr(lambda k: jax.random.bits(k, (3, 4)))(jax.random.key(0)))
    assert [describe(factors_of(e)) for e in one.equations] == ["->__"]


def test_calls_are_inlined_and_dead_code_is_gone():
    @jax.jit
    def inner(x):
        return jax.nn.silu(x), x.sum()

    graph = flatten(jax.make_jaxpr(lambda x: jax.checkpoint(inner)(x)[0])(jnp.ones(3)))
    assert [e.name for e in graph.equations] == ["logistic", "mul"]
    assert all("test_factors.py" in e.source for e in graph.equations)
