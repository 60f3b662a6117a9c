"""Layouts that are known to be best, found by search: collectives are counted in the HLO of the compiled program, on 8
virtual devices and abstract parameters. What was predicted is what XLA made of it, kind by kind and byte by byte.
"""

import itertools
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forwards import hyena, llama, moe_dense, t5_decoder
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxinfer as ji
from jaxinfer.sharding import hlo
from jaxinfer.sharding.hardware import hardware_of
from jaxinfer.sharding.moves import Layout, spec_of, steps
from jaxinfer.sharding.plan import Plan
from jaxinfer.sharding.planning import plan

pytestmark = pytest.mark.jax_defaults

XY = ("x", "y")
F32 = np.float32
# On which arithmetic costs so much that everything is sharded, whatever it takes to move it.
SLOW = replace(hardware_of("cpu-8")[0], name="slow", f32=1e6, hbm_bandwidth=1e6, launch=0.0)


def grid(*shape: int) -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(shape), XY[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def weight(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, F32)


def decoder(layers=2, width=4096, heads=32, groups=8, inner=14336, vocab=128256):
    """Llama 3 8B's layers, rotary positions left out: (forward, abstract parameters)."""
    size = width // heads

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale

    def forward(params, tokens):
        batch, time = tokens.shape
        x = params["embedding"][tokens]
        mask = jnp.tril(jnp.ones((time, time), bool))
        for p in params["layers"]:
            y = norm(x, p["norm1"])
            q = (y @ p["q"]).reshape(batch, time, heads, size)
            k, v = ((y @ p[name]).reshape(batch, time, groups, size) for name in "kv")
            k, v = (jnp.repeat(a, heads // groups, axis=2) for a in (k, v))
            scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(size)
            weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
            x = x + jnp.einsum("bhts,bshd->bthd", weights, v).reshape(batch, time, width) @ p["o"]
            y = norm(x, p["norm2"])
            x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
        return norm(x, params["norm"]) @ params["head"]

    shapes = {"norm1": (width,), "norm2": (width,), "q": (width, width), "o": (width, width)}
    shapes |= {"k": (width, groups * size), "v": (width, groups * size)}
    shapes |= {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
    layer = {name: weight(*shape) for name, shape in shapes.items()}
    outer = {"embedding": weight(vocab, width), "norm": weight(width), "head": weight(width, vocab)}
    return forward, {**outer, "layers": [layer] * layers}


def decode_step(batch: int, length: int, **sizes):
    """The Program of one decoding step: (params, tokens, positions, *state) -> (logits, *state)."""
    forward, params = decoder(**sizes)
    step = ji.incremental(ji.trace(forward, params, ji.spec("batch time", "int32")), length=length)

    def decode(params, tokens, positions, *state):
        (logits,), state = step(jax.tree.leaves(params), [tokens], positions, state)
        return logits, *state

    inputs = [jax.ShapeDtypeStruct((batch, 1, 1), np.int32), jax.ShapeDtypeStruct((batch,), np.int32)]
    given = [ji.spec(" ".join(map(str, a.shape)), str(a.dtype)) for a in (*inputs, *step.abstract_state(batch))]
    return ji.trace(decode, params, *given)


def collectives(found: Plan) -> Mapping[str, float]:
    assert found.compiled is not None
    return found.compiled.collectives


def check_prediction(found: Plan, *, sums_are_sliced: bool = False) -> None:
    """Collectives of each kind, their bytes and the arguments' bytes are as predicted.

    sums_are_sliced: the hardware planned for has a reduce-scatter; the CPU's XLA makes all-reduces of them.
    """
    predicted = Counter(found.predicted.collectives)
    if sums_are_sliced:
        predicted["all-reduce"] += predicted.pop("reduce-scatter", 0)
    assert found.compiled is not None
    assert found.compiled.collectives == +predicted
    assert found.compiled.collective_bytes == pytest.approx(found.predicted.collective_bytes, rel=1e-12)
    assert found.compiled.argument_bytes == pytest.approx(found.predicted.argument_bytes, rel=0.01)


@pytest.mark.parametrize("hardware", ["h100x8", "cpu-8"])
def test_a_perceptron_of_two_layers_adds_up_once(hardware):
    params = {"up": weight(8192, 32768), "down": weight(32768, 8192)}
    program = ji.trace(lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"], params, ji.spec("batch 8192"))
    found = plan(program, sizes={"batch": 4}, hardware=hardware)
    assert collectives(found) == {"all-reduce": 1}
    assert found.predicted.collective_bytes == 4 * 8192 * 4
    assert found.param_specs == {"up": P(None, "x"), "down": P("x", None)}
    check_prediction(found, sums_are_sliced=True)


@pytest.mark.parametrize(("groups", "mesh"), [(8, (8,)), (8, (4, 2)), (2, (4, 2))])
def test_decoding_adds_up_twice_a_layer(groups, mesh):
    """Also where there are fewer groups of keys and values than devices."""
    found = plan(decode_step(8, 2048, groups=groups), grid(*mesh), sizes={}, hardware="h100x8")
    assert collectives(found) == {"all-reduce": 4}  # the embedding's columns aren't sharded: memory is free
    assert found.predicted.collective_bytes == 4 * (8 * 4096 * 4)
    check_prediction(found)


def test_one_head_of_keys_and_values_is_sharded_by_batch():
    found = plan(decode_step(64, 2048, groups=1, layers=1), grid(4, 2), sizes={}, hardware="h100x8")
    for state in found.input_specs[2:]:
        assert tuple(state) == (XY, None, None, None, None)
    assert found.param_specs["layers"][0]["down"] == P(XY, None)  # beside weights that are sharded by what they add up
    check_prediction(found)


@pytest.mark.parametrize(("batch", "time", "mesh"), [(4, 1024, (4, 2)), (1, 512, (4, 2)), (1, 512, (8,))])
def test_prefill_moves_what_was_predicted(batch, time, mesh):
    forward, params = decoder(layers=1)
    program = ji.trace(forward, params, ji.spec("batch time", "int32"))
    found = plan(program, grid(*mesh), sizes={"batch": batch, "time": time}, hardware="h100x8")
    check_prediction(found, sums_are_sliced=True)


def test_a_mixer_over_many_images_is_sharded_by_image():
    def norm(x, scale):
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale

    def forward(params, images):
        x = images @ params["stem"]
        for p in params["layers"]:
            x = x + jnp.swapaxes(jax.nn.gelu(jnp.swapaxes(norm(x, p["norm1"]), 1, 2) @ p["t1"]) @ p["t2"], 1, 2)
            x = x + jax.nn.gelu(norm(x, p["norm2"]) @ p["c1"]) @ p["c2"]
        return jnp.mean(x, axis=1) @ params["head"]

    shapes = {"norm1": (512,), "norm2": (512,), "t1": (64, 256), "t2": (256, 64), "c1": (512, 2048), "c2": (2048, 512)}
    layer = {name: weight(*shape) for name, shape in shapes.items()}
    params = {"stem": weight(768, 512), "layers": [layer] * 2, "head": weight(512, 1000)}
    found = plan(ji.trace(forward, params, ji.spec("batch 64 768")), sizes={"batch": 512}, hardware="h100x8")
    assert collectives(found) == {}
    assert not any(axes for spec in jax.tree.leaves(found.param_specs) for axes in spec)
    assert found.input_specs == (P("x", None, None),)
    check_prediction(found)


def test_convolutions_are_sharded_by_image_and_a_large_head_by_its_columns():
    def forward(params, images):
        x = images
        for kernel in params["kernels"]:
            x = jax.nn.relu(jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=CHANNELS_LAST))
        return jax.nn.relu(x.reshape(x.shape[0], -1) @ params["hidden"]) @ params["head"]

    kernels = [weight(3, 3, 3, 128), weight(3, 3, 128, 256), weight(3, 3, 256, 256), weight(3, 3, 256, 64)]
    params = {"kernels": kernels, "hidden": weight(4096, 16384), "head": weight(16384, 32768)}
    program = ji.trace(forward, params, ji.spec("batch 128 128 3"))
    found = plan(program, grid(8), sizes={"batch": 64}, hardware="h100x8")
    assert found.input_specs == (P("x", None, None, None),)
    assert not any(axes for spec in found.param_specs["kernels"] for axes in spec)
    assert (found.param_specs["hidden"], found.param_specs["head"]) == (P(None, "x"), P(None, "x"))
    assert collectives(found) == {"all-gather": 2}  # of the images' features, and of what is hidden
    check_prediction(found)


CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize("module", [llama, t5_decoder, moe_dense, hyena], ids=lambda m: m.__name__)
def test_what_shards_everything_moves_what_was_predicted(module):
    """Four rows on 4 x 2 devices: rows alone don't fill them."""
    forward, params = module.make()
    program = ji.trace(forward, params, ji.spec("batch time", "int32"))
    found = plan(program, grid(4, 2), sizes={"batch": 4, "time": 16}, hardware=SLOW)
    assert found.predicted.collectives
    check_prediction(found)


def layouts_of(rank: int) -> list[Layout]:
    """Every way to shard a value over two mesh axes, also both on one dim in either order."""
    found = set()
    for places in itertools.product(range(-1, rank), repeat=2):
        for order in ((0, 1), (1, 0)):
            found.add(tuple(tuple(m for m in order if places[m] == d) for d in range(rank)))
    return sorted(found)


def test_each_step_of_a_move_compiles_to_its_collective():
    mesh, shape = grid(4, 2), (16, 8, 32)
    pairs = list(itertools.product(layouts_of(3), repeat=2))
    for before, after in random.Random(0).sample(pairs, 16):
        path = steps(before, after, shape, (4, 2))

        def move(value, *, layouts=(before, *(step.after for step in path))):
            value = jnp.sin(value)
            for layout in layouts:
                value = jax.lax.with_sharding_constraint(value, NamedSharding(mesh, spec_of(layout, XY)))
            return value

        start, end = (NamedSharding(mesh, spec_of(layout, XY)) for layout in (before, after))
        compiled = jax.jit(move, in_shardings=start, out_shardings=end).lower(weight(*shape)).compile()
        made = sorted((c.kind, c.bytes) for c in hlo.measure(compiled).collectives)
        assert made == sorted((s.kind, s.part * 16 * 8 * 32 * 4) for s in path if s.kind), (before, after)


def test_moves_reach_their_end_by_legal_layouts():
    """Every pair of layouts over three axes, some of them uneven; no axis twice, and slices alone are free."""
    mesh, shape = (4, 2, 2), (16, 4, 6)
    found = set()
    for places in itertools.product(range(-1, 3), repeat=3):
        for order in itertools.permutations(range(3)):
            layout = tuple(tuple(m for m in order if places[m] == d) for d in range(3))
            if all(n % np.prod([mesh[m] for m in dim]) == 0 for n, dim in zip(shape, layout, strict=True)):
                found.add(layout)
    for before, after in itertools.product(sorted(found), repeat=2):
        path = steps(before, after, shape, mesh)
        assert (path[-1].after if path else before) == after
        for step in path:
            axes = [m for dim in step.after for m in dim]
            assert len(axes) == len(set(axes))
            assert all(n % np.prod([mesh[m] for m in d]) == 0 for n, d in zip(shape, step.after, strict=True))
            assert bool(step.kind) == (step.part > 0)
