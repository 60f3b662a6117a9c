"""Attention recognised in its spellings, each against the forward as it was traced; what must not be taken for it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from passes_helpers import Outcome

import jaxinfer as ji
from jaxinfer.passes.attention_equation import softcap

pytestmark = pytest.mark.jax_defaults
HEADS, DIM, WIDTH = 4, 8, 32
ROWS = ji.spec(f"batch time {HEADS} {DIM}")  # of q, k and v
softmax = jax.nn.softmax


def causal(q):
    return jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))


def scores(q, k):
    return jnp.einsum("bthd,bshd->bhts", q, k)


def mix(weights, v):
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def heads_first(q, k, v):
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    return (softmax(q @ k.swapaxes(-1, -2) * DIM**-0.5) @ v).transpose(0, 2, 1, 3)


def merged_batch(q, k, v):
    batch, time = q.shape[:2]
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(batch * HEADS, time, DIM) for x in (q, k, v))
    s = jax.lax.batch_matmul(q, k.transpose(0, 2, 1)).reshape(batch, HEADS, time, time)
    s = jnp.where(jnp.tri(time, dtype=bool), s, -1e9)
    weights = softmax(s, -1).reshape(batch * HEADS, time, time)
    return jax.lax.batch_matmul(weights, v).reshape(batch, HEADS, time, DIM).transpose(0, 2, 1, 3)


def by_hand(q, k, v):
    s = scores(q, k) / jnp.sqrt(DIM)
    e = jnp.exp(s - s.max(-1, keepdims=True))
    return mix(e / e.sum(-1, keepdims=True), v)


def keys_first(q, k, v):
    """Scores as [.., key, query], the softmax over dim 2."""
    return jnp.einsum("bhst,bshd->bthd", softmax(jnp.einsum("bshd,bthd->bhst", k, q), 2), v)


def capped(q, k, v):
    s = 5.0 * jnp.tanh(scores(q, k) / 5.0)
    return mix(softmax(jnp.where(causal(q)[None, None], s, jnp.finfo(s.dtype).min)), v)


def repeated(q, k, v):
    k, v = (jnp.repeat(x[:, :, :2], 2, axis=2) for x in (k, v))
    return mix(softmax(scores(q, k)), v)


def broadcast_heads(q, k, v):
    def spread(x):
        shape = (*x.shape[:2], 2, 2, DIM)
        return jnp.broadcast_to(x[:, :, :2, None], shape).reshape(q.shape)

    return mix(softmax(scores(q, spread(k))), spread(v))


def grouped(q, k, v):
    batch, time = q.shape[:2]
    q, k, v = q.reshape(batch, time, 2, 2, DIM), k[:, :, :2], v[:, :, :2]
    s = jnp.einsum("btgrd,bsgd->bgrts", q, k) * DIM**-0.5
    weights = softmax(jnp.where(causal(q), s, -jnp.inf))
    return jnp.einsum("bgrts,bsgd->btgrd", weights, v).reshape(batch, time, HEADS, DIM)


def one_key_head(q, k, v):
    weights = softmax(jnp.einsum("bthd,bsd->bhts", q, k[:, :, 0]))
    return jnp.einsum("bhts,bsd->bthd", weights, v[:, :, 0])


def alibi(q, k, v):
    time = jnp.arange(q.shape[1])
    slopes = 2.0 ** -jnp.arange(1, HEADS + 1)
    bias = -slopes[:, None, None] * (time[:, None] - time[None])
    return mix(softmax(scores(q, k) + bias + jnp.where(causal(q), 0.0, -1e9)), v)


def wide(q, k, v):
    """bfloat16, the softmax in float32."""
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    s = scores(q, k).astype(jnp.float32) * 0.3
    return mix(softmax(jnp.where(causal(q), s, -1e30)).astype(jnp.bfloat16), v).astype(jnp.float32)


def padded(q, k, v):
    """A mask computed from the input."""
    real = q[:, :, 0, 0] > 0
    return mix(softmax(scores(q, k) + jnp.where(real[:, None, None, :], 0, -1e9)), v)


def guarded(q, k, v):
    mask = causal(q)
    return mix(jnp.where(mask, softmax(jnp.where(mask, scores(q, k), -jnp.inf)), 0.0), v)


def counted(q, k, v):
    s = scores(q, k)
    return mix(softmax(s, where=jnp.broadcast_to(causal(q), s.shape)), v)


def one_sequence(q, k, v):
    run = lambda q, k, v: softmax(q @ k.T / 3) @ v  # noqa: E731
    return jax.vmap(jax.vmap(run, 1, 1))(q, k, v)


def temperature(q, k, v):
    return mix(softmax(scores(q, k) * (1 + jnp.abs(q[:, 0, :, 0]))[:, :, None, None]), v)


def relative(q, k, v):
    """Scores that are the sum of two products: the second is a bias."""
    table = jnp.sin(jnp.arange(q.shape[1])[:, None] * jnp.arange(1, DIM + 1) * 0.1)
    return mix(softmax(scores(q, k) + jnp.einsum("bthd,sd->bhts", q, table)), v)


SPELLINGS = {
    # function, (groups, heads of each), names of what happens to the scores
    "einsum": (lambda q, k, v: mix(softmax(scores(q, k)), v), (4, 1), []),
    "scale before": (lambda q, k, v: mix(softmax(scores(q * 0.25, k)), v), (4, 1), []),
    "scale after": (lambda q, k, v: mix(softmax(scores(q, k) * 0.25), v), (4, 1), ["scale"]),
    "matmul": (heads_first, (4, 1), ["scale"]),
    "batch and heads merged": (merged_batch, (4, 1), ["mask"]),
    "by hand": (by_hand, (4, 1), ["divide"]),
    "keys first": (keys_first, (4, 1), []),
    "boolean mask": (lambda q, k, v: mix(softmax(jnp.where(causal(q), scores(q, k), -1e9)), v), (4, 1), ["mask"]),
    "mask the other way": (
        lambda q, k, v: mix(softmax(jnp.where(~causal(q), -jnp.inf, scores(q, k))), v),
        (4, 1),
        ["mask"],
    ),
    "additive mask": (lambda q, k, v: mix(softmax(scores(q, k) + (causal(q) - 1.0) * 1e9), v), (4, 1), ["bias"]),
    "softcap": (capped, (4, 1), ["divide", "tanh", "scale", "mask"]),
    "heads repeated": (repeated, (2, 2), []),
    "heads broadcast": (broadcast_heads, (2, 2), []),
    "grouped heads": (grouped, (2, 2), ["scale", "mask"]),
    "one key head": (one_key_head, (1, 4), []),
    "alibi": (alibi, (4, 1), ["bias", "bias"]),
    "float32 softmax": (wide, (4, 1), ["cast", "scale", "mask"]),
    "padding": (padded, (4, 1), ["bias"]),
    "masked after too": (guarded, (4, 1), ["mask"]),
    "where of softmax": (counted, (4, 1), ["mask"]),
    "vmapped": (one_sequence, (4, 1), ["divide"]),
    "temperature by head": (temperature, (4, 1), ["factor"]),
    "a second product as bias": (relative, (4, 1), ["bias"]),
    "jax.nn": (jax.nn.dot_product_attention, (4, 1), ["scale"]),
    "jax.nn causal": (lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True), (4, 1), ["scale", "mask"]),
    "jax.nn grouped": (
        lambda q, k, v: jax.nn.dot_product_attention(q, k[:, :, :2], v[:, :, :2], scale=0.5),
        (2, 2),
        ["scale"],
    ),
    "jax.nn mask and bias": (
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, bias=1.0 * causal(q)[None], mask=causal(q)[None]),
        (4, 1),
        ["scale", "bias", "mask"],
    ),
    "jax.nn window": (
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, local_window_size=(3, 0)),
        (4, 1),
        ["scale", "mask"],
    ),
}  # fmt: skip


def attended(outcome):
    return [e for e in outcome.main.equations if e.name == "attention"]


def trace(function):
    return ji.trace(lambda p, *rows: function(*rows), (), ROWS, ROWS, ROWS)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str):
    function, (groups, heads), steps = SPELLINGS[name]
    outcome = Outcome(trace(function))
    (equation,) = attended(outcome)
    batch, time = 11, 13
    q, k, v = (n.shape for n in equation.inputs[:3])
    assert (q, k, v) == (
        (batch, time, groups, heads, DIM),
        (batch, time, groups, DIM),
        (batch, time, groups, DIM),
    )
    assert [s[0] for s in equation.params["steps"]] == steps
    assert "exp" not in outcome.names()
    assert outcome.error < (1e-2 if name == "float32 softmax" else 2e-6)


def test_masks_and_biases_are_not_materialised():
    masked = attended(Outcome(trace(SPELLINGS["jax.nn causal"][0])))[0]
    assert masked.inputs[3].shape == (1, 1, 1, 13, 13)
    assert masked.params["steps"][1][2:] == (pytest.approx(-2.38e38, rel=1e-2), True)
    slopes, mask = attended(Outcome(trace(alibi)))[0].inputs[3:]
    assert (slopes.shape, mask.shape) == ((1, 4, 1, 13, 13), (1, 1, 1, 13, 13))
    assert attended(Outcome(trace(padded)))[0].inputs[3].shape == (11, 1, 1, 1, 13)
    assert attended(Outcome(trace(temperature)))[0].inputs[3].shape == (11, 4, 1, 1, 1)


def test_softcap_is_found():
    assert softcap(attended(Outcome(trace(capped)))[0].params["steps"]) == 5.0
    assert softcap((("scale", 0.2), ("tanh",), ("scale", 5.0))) == 5.0
    assert softcap((("scale", 0.2), ("tanh",), ("scale", 4.0))) is None
    assert softcap((("tanh",),)) is None


def test_a_bias_of_two_products_stays_a_product():
    outcome = Outcome(trace(relative))
    assert outcome.names().count("dot_general") == 1


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x, context=None):
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(x, mask=mask)
        return x + nn.MultiHeadDotProductAttention(num_heads=HEADS, qkv_features=16)(x, x)


class NNXModel(nnx.Module):
    def __init__(self):
        keywords = {"in_features": WIDTH, "decode": False, "rngs": nnx.Rngs(0)}
        self.first = nnx.MultiHeadAttention(num_heads=HEADS, **keywords)
        self.second = nnx.MultiHeadAttention(num_heads=2, **keywords)

    def __call__(self, x):
        x = x + self.first(x, mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.second(x)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_flax_modules(kind: str):
    spec = ji.spec(f"batch time {WIDTH}")
    if kind == "nnx":
        program = ji.trace(NNXModel(), spec)
    else:
        program = ji.trace(LinenModel(), LinenModel().init(jax.random.key(0), jnp.ones((1, 3, WIDTH))), spec)
    outcome = Outcome(program)
    heads = [e.inputs[0].shape[2] * e.inputs[0].shape[3] for e in attended(outcome)]
    assert heads == [4, 4 if kind == "linen" else 2]
    assert "exp" not in outcome.names()
    assert outcome.error < 2e-6
    assert all("test_passes_attention.py" in e.source for e in attended(outcome))


def cross(p, x, memory):
    q, k, v = jnp.split(x, 1, -1)[0], memory * 2, memory
    return softmax(jnp.einsum("btd,bsd->bts", q, k)) @ v


def test_cross_attention():
    outcome = Outcome(ji.trace(cross, (), ji.spec(f"batch time {WIDTH}"), ji.spec(f"batch source {WIDTH}")))
    (equation,) = attended(outcome)
    assert [n.shape for n in equation.inputs] == [(11, 13, 1, 1, WIDTH), (11, 17, 1, WIDTH), (11, 17, 1, WIDTH)]
    assert outcome.error < 1e-5


def sink(q, k, v):
    """A learned column in the softmax that has no value (StreamingLLM, gpt-oss)."""
    s = jnp.concatenate([scores(q, k), jnp.zeros((*q.shape[:1], HEADS, q.shape[1], 1))], -1)
    return mix(softmax(s)[..., :-1], v)


def returned(q, k, v):
    weights = softmax(scores(q, k))
    return mix(weights, v), weights


def scores_returned(q, k, v):
    s = scores(q, k)
    return mix(softmax(s), v), s


def peak_of_others(q, k, v):
    s = scores(q, k)
    e = jnp.exp(s - (2 * s).max(-1, keepdims=True))
    return mix(e / e.sum(-1, keepdims=True), v)


def peak_of_queries(q, k, v):
    s = scores(q, k)
    e = jnp.exp(s - s.max(-2, keepdims=True))
    return mix(e / e.sum(-1, keepdims=True), v)


def sum_of_queries(q, k, v):
    s = scores(q, k)
    e = jnp.exp(s - s.max(-1, keepdims=True))
    return mix(e / e.sum(-2, keepdims=True), v)


def misaligned(q, k, v):
    """The sum of query t divides the row of query time - t."""
    s = scores(q, k)
    e = jnp.exp(s - s.max(-1, keepdims=True))
    return mix(e / e.sum(-1)[..., ::-1, None], v)


NEAR_MISSES = {
    "over queries": lambda q, k, v: mix(softmax(scores(q, k), axis=-2), v),
    "over heads": lambda q, k, v: mix(softmax(scores(q, k), axis=1), v),
    "over both": lambda q, k, v: mix(softmax(scores(q, k), axis=(-1, -2)), v),
    "values along queries": lambda q, k, v: jnp.einsum("bhts,bthd->bshd", softmax(scores(q, k)), v),
    "a factor after": lambda q, k, v: mix(softmax(scores(q, k)) * (scores(k, q) > 0), v),
    "kept at random, scaled": lambda q, k, v: mix(jnp.where(causal(q), softmax(scores(q, k)) / 0.9, 0), v),
    "filled with another number": lambda q, k, v: mix(jnp.where(causal(q), softmax(scores(q, k)), 0.1), v),
    "a sink": sink,
    "weights returned": returned,
    "scores returned": scores_returned,
    "no product before": lambda q, k, v: mix(softmax(-jnp.abs(q.sum(3).mT[..., None] - k.sum(3).mT[:, :, None])), v),
    "a sigmoid": lambda q, k, v: mix(jax.nn.sigmoid(scores(q, k)), v),
    "values without heads": lambda q, k, v: jnp.einsum("bhts,bsd->bthd", softmax(scores(q, k)), v[:, :, 0]),
    "maximum of other scores": peak_of_others,
    "maximum over queries": peak_of_queries,
    "sum over queries": sum_of_queries,
    "sums in another order": misaligned,
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left(name: str):
    outcome = Outcome(trace(NEAR_MISSES[name]))
    assert attended(outcome) == []
    assert outcome.error < 2e-6


def test_a_transposed_mask_stays_transposed():
    outcome = Outcome(trace(lambda q, k, v: mix(softmax(jnp.where(causal(q).T, scores(q, k), -1e9)), v)))
    assert len(attended(outcome)) == 1
    assert outcome.error < 2e-6
    straight = trace(SPELLINGS["boolean mask"][0])
    assert not np.allclose(Outcome(straight).got[0], outcome.got[0], atol=1e-3)


def test_switched_off_and_told():
    program = trace(heads_first)
    assert attended(Outcome(program, ["simplify", "fold"])) == []
    assert "attention of 4 heads, 13 queries on 13 keys  # test_passes_attention.py" in program.explain()
    assert "a softmax that is not one of attention's" in trace(sink).explain()


def test_compiled_at_sizes_that_coincide():
    """Batch, time, heads and dim of equal or unit size."""
    program = trace(SPELLINGS["grouped heads"][0])
    on = ji.compile(program, buckets={"batch": [1, 4], "time": [1, 2, 4, 8]})
    off = ji.compile(program, buckets={"batch": [1, 4], "time": [1, 2, 4, 8]}, passes=[])
    for batch in (1, 4):
        for time in (1, 2, 4, 8):
            rows = [
                np.random.default_rng(i).standard_normal((batch, time, HEADS, DIM)).astype(np.float32) for i in range(3)
            ]
            np.testing.assert_allclose(on(*rows), off(*rows), atol=2e-6)
            found = [e for e in on.prepared.main({"batch": batch, "time": time}).equations if e.name == "attention"]
            assert len(found) == (time > 1)
