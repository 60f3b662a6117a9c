"""Products that share an operand made one, and the precision pass: both are asked for by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from passes_helpers import Outcome, random_like

import jaxinfer as ji
from jaxinfer.passes import PIPELINE, chosen

pytestmark = pytest.mark.jax_defaults
ALL = [p.name for p in PIPELINE if p.name != "precision"]
N = 256


def zeros(**shapes):
    return {k: jnp.zeros(s, jnp.float32) for k, s in shapes.items()}


def plain(p, x):
    return x @ p["a"], x @ p["b"], x @ p["c"]


def rows_first(p, x):
    """Weights [out, in], as checkpoints of torch store them."""
    return [jnp.einsum("bi,oi->bo", x, p[name].T) for name in "abc"]


def weights_left(p, x):
    return [(p[name].T @ x.T).T for name in "abc"]


def heads(p, x):
    a, b, c = (p[name].reshape(N, -1, 16) for name in "abc")
    return [jnp.einsum("bi,ihd->bhd", x, w) for w in (a, b, c)]


def biased(p, x):
    return jax.nn.silu(x @ p["a"] + 1) * (x @ p["b"] * p["a"][0, 0]), x @ p["c"]


SHAPES = {"a": (N, 64), "b": (N, 64), "c": (N, 160)}


@pytest.mark.parametrize("forward", [plain, rows_first, weights_left, heads, biased])
def test_products_of_one_value_become_one(forward):
    program = ji.trace(forward, zeros(**SHAPES), ji.spec(f"batch {N}"))
    outcome = Outcome(program, ["simplify", "merge"])
    assert outcome.names().count("dot_general") == 1
    assert outcome.error < 1e-5
    (note,) = outcome.notes("merge")
    assert note.startswith(f"3 products of one {[N, 11] if forward is weights_left else [11, N]} made one, ")
    assert sum(n.shape[0] * int(np.prod(n.shape[1:])) for n in outcome.prelude.outputs) >= N * 288
    assert Outcome(program, ["simplify"]).names().count("dot_general") == 3


def two_values(p, x):
    return x @ p["a"], (x * 2) @ p["b"]


def tied(p, x):
    return x @ p["a"], x @ p["b"], jnp.take(p["a"], 3, axis=0), p["b"].sum(), (x + 1) @ p["b"]


def batched(p, x):
    w = p["a"].reshape(8, 32, 128)
    return jnp.einsum("bei,eio->beo", x.reshape(-1, 8, 32), w), jnp.einsum("bei,eio->beo", x.reshape(-1, 8, 32), w * 2)


def of_inputs(p, x):
    return x @ (p["a"] * x.sum()), x @ p["b"]


def other_sums(p, x):
    return x @ p["a"], x.reshape(-1, 16, 16) @ p["b"].reshape(16, -1)[:, :64]


@pytest.mark.parametrize("forward", [two_values, tied, batched, of_inputs, other_sums])
def test_what_is_not_merged_stays_right(forward):
    shapes = {"a": (N, 128), "b": (N, 128)}
    outcome = Outcome(ji.trace(forward, zeros(**shapes), ji.spec(f"batch {N}")), ["simplify", "merge"])
    assert outcome.notes("merge") == []
    assert outcome.error < 1e-5


def block(p, x):
    """A Llama-like layer."""
    h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * p["norm"]
    q, k, v = (h @ p[n] for n in "qkv")
    split = lambda y: y.reshape(*y.shape[:2], -1, 16)  # noqa: E731
    y = jax.nn.dot_product_attention(split(q), split(k), split(v), is_causal=True).reshape(q.shape)
    x = x + y @ p["o"]
    return x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


BLOCK = zeros(norm=(N,), q=(N, N), k=(N, 64), v=(N, 64), o=(N, N), gate=(N, 512), up=(N, 512), down=(512, N))


def test_a_layer_compiled_with_everything():
    params = jax.tree.map(lambda a: a / 16 if a.ndim > 1 else a, random_like(BLOCK))
    program = ji.trace(block, params, ji.spec(f"batch time {N}"))
    every = ji.compile(program, buckets={"batch": [1, 2], "time": [4, 8]}, passes=ALL)
    none = ji.compile(program, buckets={"batch": [1, 2], "time": [4, 8]}, passes=[])
    main = every.prepared.main({"batch": 2, "time": 8})
    assert [e.name for e in main.equations].count("dot_general") == 4  # qkv, o, gate and up, down
    assert sum(p.size for p in every.params) == sum(p.size for p in none.params)
    for batch, time in ((1, 4), (2, 8), (2, 4)):
        x = np.random.default_rng(0).standard_normal((batch, time, N)).astype(np.float32)
        want = np.asarray(none(x))
        np.testing.assert_allclose(every(x), want, atol=1e-5 * np.abs(want).max())


def test_neither_is_on_unless_asked_for():
    assert not {"merge", "precision"} & set(chosen(None))
    assert "bfloat16" not in ji.trace(block, BLOCK, ji.spec(f"batch time {N}")).explain()


def test_bfloat16_products_with_float32_statistics():
    params = jax.tree.map(lambda a: a / 16 if a.ndim > 1 else a, random_like(BLOCK))
    program = ji.trace(block, params, ji.spec(f"batch time {N}"))
    outcome = Outcome(program, ["simplify", "precision"])
    assert 1e-6 < outcome.error < 2e-2
    for equation in outcome.main.equations:
        if equation.name == "dot_general":
            assert {n.dtype.name for n in equation.inputs} == {"bfloat16"}
        elif equation.name not in ("convert_element_type", "transpose", "reshape", "broadcast_in_dim"):
            assert "bfloat16" not in {n.dtype.name for n in (*equation.inputs, *equation.outputs)}
        assert equation.outputs[0].dtype.name != "bfloat16" or equation.name == "convert_element_type"
    executable = ji.compile(program, buckets={"batch": [1], "time": [4]}, passes=["simplify", "precision"])
    matrices = [p for p in executable.params if p.ndim > 1]
    assert {p.dtype.name for p in matrices} == {"bfloat16"}
    assert len(matrices) == 7
    text = program.explain(passes=["precision"])
    assert "dot_general[11, 13, 256] on bfloat16, summed in float32" in text


def test_a_product_that_asks_for_precision_keeps_it():
    exact = lambda p, x: jnp.dot(x, p["a"], precision="highest")  # noqa: E731
    outcome = Outcome(ji.trace(exact, zeros(**SHAPES), ji.spec(f"batch {N}")), ["precision"])
    assert outcome.error == 0
    assert outcome.notes("precision") == []
