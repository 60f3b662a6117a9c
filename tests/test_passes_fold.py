"""BatchNorm and its like folded into weights: every spelling, against the forward as it was traced."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from passes_helpers import Outcome, random_like

import jaxinfer as ji

pytestmark = pytest.mark.jax_defaults
SCALES = {"mul", "div", "sub", "rsqrt", "sqrt", "neg"}  # what must not be left of a BatchNorm


def linen(layers, shape):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for layer in layers():
                x = layer(x)
            return x

    model = Model()
    variables = model.init(jax.random.key(0), jnp.ones((2, *shape)))
    return ji.trace(model, random_like(variables), ji.spec(f"batch {' '.join(map(str, shape))}"))


def module(build, shape):
    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.List(build(nnx.Rngs(0)))

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    return ji.trace(Model(), ji.spec(f"batch {' '.join(map(str, shape))}"))


def norm(**keywords):
    return nn.BatchNorm(use_running_average=True, **keywords)


FOLDED = {
    "linen conv": lambda: linen(lambda: [nn.Conv(5, (3, 3)), norm(), nn.relu], (8, 8, 3)),
    "linen no bias": lambda: linen(lambda: [nn.Conv(5, (3, 3), use_bias=False), norm()], (8, 8, 3)),
    "linen no scale": lambda: linen(lambda: [nn.Conv(5, (3, 3)), norm(use_scale=False, use_bias=False)], (8, 8, 3)),
    "linen groups": lambda: linen(lambda: [nn.Conv(6, (3, 3), feature_group_count=3), norm()], (8, 8, 3)),
    "linen depthwise": lambda: linen(lambda: [nn.Conv(8, (3, 3), feature_group_count=4), norm()], (8, 8, 4)),
    "linen strided": lambda: linen(lambda: [nn.Conv(5, (3, 3), strides=2, kernel_dilation=2), norm()], (8, 8, 3)),
    "linen transpose": lambda: linen(lambda: [nn.ConvTranspose(5, (3, 3), strides=(2, 2)), norm()], (8, 8, 3)),
    "linen transposed kernel": lambda: linen(
        lambda: [nn.ConvTranspose(5, (3, 3), transpose_kernel=True), norm()], (8, 8, 3)
    ),
    "linen conv of one dim": lambda: linen(lambda: [nn.Conv(5, (3,)), norm()], (8, 3)),
    "linen dense": lambda: linen(lambda: [nn.Dense(7), norm(), nn.relu], (6,)),
    "linen dense over more dims": lambda: linen(lambda: [nn.Dense(7), norm()], (4, 5, 6)),
    "linen two dims": lambda: linen(lambda: [nn.DenseGeneral((3, 7)), norm(axis=(-2, -1))], (6,)),
    "linen one of two dims": lambda: linen(lambda: [nn.DenseGeneral((3, 7)), norm(axis=1)], (6,)),
    "nnx conv": lambda: module(
        lambda r: [nnx.Conv(3, 5, (3, 3), rngs=r), nnx.BatchNorm(5, use_running_average=True, rngs=r)], (8, 8, 3)
    ),
    "nnx transpose": lambda: module(
        lambda r: [nnx.ConvTranspose(3, 5, (2, 2), rngs=r), nnx.BatchNorm(5, use_running_average=True, rngs=r)],
        (8, 8, 3),
    ),
    "nnx linear": lambda: module(
        lambda r: [nnx.Linear(6, 5, rngs=r), nnx.BatchNorm(5, use_running_average=True, rngs=r)], (6,)
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_a_batch_norm_leaves_one_product_and_one_addition(name: str):
    outcome = Outcome(FOLDED[name]())
    assert outcome.error < 1e-5
    assert not SCALES & set(outcome.names())
    assert outcome.names().count("add") == 1
    assert len(outcome.staged.keys) == 2  # weights and bias
    assert outcome.staged.kept == ()
    (note,) = outcome.notes("fold")
    assert "folded into the weights of" in note


def plain(forward, **params):
    """A program of its own parameters: a conv or dense kernel `w` and vectors."""
    tree = {k: jnp.zeros(v, jnp.float32) for k, v in params.items()}
    return ji.trace(forward, tree, ji.spec("batch 6 6 3") if params["w"][-2:] == (3, 5) else ji.spec("batch 6"))


def conv(p, x):
    return jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def channels_first(p, x):
    y = jax.lax.conv_general_dilated(
        x.transpose(0, 3, 1, 2), p["w"], (1, 1), "SAME", dimension_numbers=("NCHW", "HWIO", "NCHW")
    )
    return (y - p["m"][:, None, None]) * p["g"].reshape(-1, 1, 1) + p["b"][None, :, None, None]


CONV = {"w": (3, 3, 3, 5), "m": (5,), "v": (5,), "g": (5,), "b": (5,)}
DENSE = {"w": (6, 8), "m": (8,), "v": (8,), "g": (8,), "b": (8,)}
SPELLINGS = {
    "by a root": (lambda p, x: p["b"] + p["g"] * (conv(p, x) - p["m"]) / jnp.sqrt(p["v"] + 1e-3), CONV),
    "written out": (lambda p, x: conv(p, x) * (p["g"] / jnp.sqrt(p["v"])) + (p["b"] - p["m"] * p["g"]), CONV),
    "mean first": (lambda p, x: p["g"] * (p["m"] - conv(p, x)) + p["b"], CONV),
    "negated": (lambda p, x: -(conv(p, x) + p["m"]) * p["g"] - p["b"], CONV),
    "scale alone": (lambda p, x: conv(p, x) * p["g"], CONV),
    "a number": (lambda p, x: conv(p, x) / 3.0 + p["b"], CONV),
    "additions alone": (lambda p, x: conv(p, x) + p["b"] - p["m"], CONV),
    "channels first": (channels_first, CONV),
    "transposed after": (lambda p, x: conv(p, x).transpose(3, 0, 1, 2) * p["g"][:, None, None, None], CONV),
    "dense": (lambda p, x: (x @ p["w"] - p["m"]) * p["g"] + p["b"], DENSE),
    "weights first": (lambda p, x: ((p["w"].T @ x.T).T - p["m"]) * p["g"] + p["b"], DENSE),
    "reshaped": (lambda p, x: (x @ p["w"]).reshape(-1, 1, 8, 1) * p["g"][None, None, :, None], DENSE),
    "heads scaled": (lambda p, x: (x @ p["w"] + p["b"]).reshape(-1, 2, 4) * 0.125, DENSE),
    "einsum": (lambda p, x: jnp.einsum("bi,io->ob", x, p["w"]) * p["g"][:, None], DENSE),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str):
    forward, shapes = SPELLINGS[name]
    outcome = Outcome(plain(forward, **shapes))
    assert outcome.error < 1e-5
    assert "folded" in "".join(outcome.notes("fold"))
    assert not SCALES & set(outcome.names())
    assert outcome.names().count("add") <= 1


def twice(p, x):
    y = x @ p["w"]
    return (y - p["m"]) * p["g"], y


def shared(p, x):
    return (x @ p["w"]) * p["g"] + (x * 2) @ p["w"]


BIG = {"w": (6, 4096), "g": (4096,)}  # over the size up to which a weight may be kept in two forms
LEFT = {
    "group norm": lambda: linen(lambda: [nn.Conv(6, (3, 3)), nn.GroupNorm(2)], (8, 8, 3)),
    "layer norm": lambda: linen(lambda: [nn.Dense(7), nn.LayerNorm()], (6,)),
    "nothing but a bias": lambda: linen(lambda: [nn.Dense(7)], (6,)),
    "relu between": lambda: plain(lambda p, x: jax.nn.relu(conv(p, x)) * p["g"], **CONV),
    "along space": lambda: plain(lambda p, x: conv(p, x) * p["m"][:, None, None], **{**CONV, "m": (6,)}),
    "read elsewhere": lambda: plain(twice, **DENSE),
    "shared weights": lambda: plain(shared, **BIG),
    "weights that depend on the input": lambda: plain(lambda p, x: (x @ (p["w"] * x.sum())) * p["g"], **DENSE),
    "cast between": lambda: plain(lambda p, x: (x @ p["w"]).astype(jnp.bfloat16).astype(jnp.float32) * p["g"], **DENSE),
    "divides": lambda: plain(lambda p, x: p["g"] / (x @ p["w"]), **DENSE),
    "part of a dim": lambda: plain(
        lambda p, x: (x @ p["w"]).reshape(-1, 2, 4) * p["g"][None, None], **{**DENSE, "g": (4,)}
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_folded_stays_right(name: str):
    outcome = Outcome(LEFT[name]())
    assert outcome.error < 1e-5
    assert not any("folded into" in note for note in outcome.notes("fold"))


def test_shared_weights_are_told():
    (note,) = Outcome(LEFT["shared weights"]()).notes("fold")
    assert "its weights are read elsewhere too" in note


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.relu(norm()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        y = norm()(nn.Conv(8, (3, 3), use_bias=False)(y))
        return nn.relu(y + norm()(nn.Conv(8, (1, 1), use_bias=False)(x)))


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = Block()(x)
        return nn.Dense(10)(x.mean((1, 2)))


@pytest.fixture(scope="module")
def resnet():
    model = ResNet()
    variables = random_like(model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3))))
    variables = jax.tree.map(lambda a: a / a.size**0.5, variables)
    return ji.trace(model, variables, ji.spec("batch 8 8 3"))


def test_compiled_for_every_bucket_with_one_list_of_weights(resnet):
    folded = ji.compile(resnet, buckets={"batch": [1, 2, 4]})
    plainly = ji.compile(resnet, buckets={"batch": [1, 2, 4]}, passes=[])
    assert (len(folded.params), len(plainly.params)) == (9 * 2 + 2, 9 * 5 + 2)
    for n in (1, 2, 3, 4):
        x = np.random.default_rng(n).standard_normal((n, 8, 8, 3)).astype(np.float32)
        want = np.asarray(plainly(x))
        np.testing.assert_allclose(folded(x), want, atol=1e-5 * np.abs(want).max())
    scales = [e for e in folded.prepared.main({"batch": 2}).equations if e.name in SCALES]
    assert len(scales) == 1  # the mean over space
    ready = [e.prepared.ready({"batch": 4}, e.device, e.report).result() for e in (folded, plainly)]
    assert ready[0].cost_analysis()["bytes accessed"] < ready[1].cost_analysis()["bytes accessed"]


def test_other_weights_are_folded_anew_without_compiling(resnet):
    folded = ji.compile(resnet, buckets={"batch": [2]})
    before = folded.compile_count
    other = jax.tree.map(lambda a: np.asarray(a) * np.float32(1.25), resnet.params)
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    got = np.asarray(folded.with_params(other)(x))
    assert folded.compile_count == before
    want = np.asarray(ResNet().apply(other, x))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_explain_names_lines_and_savings(resnet):
    text = resnet.explain()
    assert "sub, mul, add folded into the weights of conv_general_dilated" in text
    assert "test_passes_fold.py" in text
    assert "45 weights" in text
    assert "; a call is spared" in text
    assert "folded" not in resnet.explain(passes=["simplify"])
