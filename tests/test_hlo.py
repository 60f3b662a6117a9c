"""What is read from compiled HLO: programs whose collectives, arithmetic and traffic are known by hand, compiled on 8
virtual devices, and texts in the manner of TPU and GPU compilers."""

import itertools
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfer.errors import PlanError
from jaxinfer.sharding.hardware import collective_time, hardware_of
from jaxinfer.sharding.hlo import Memory, collectives, flops_and_bytes, measure, memory
from jaxinfer.sharding.hlo_groups import factors_of
from jaxinfer.sharding.hlo_text import parse

ROWS = ((0, 1, 2, 3), (4, 5, 6, 7))
COLUMNS = ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def compiled(function, *arguments, **keywords):
    return jax.jit(function, **keywords).lower(*arguments).compile()


def shaped(*shape, dtype="float32", sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def told(found) -> list[tuple]:
    return sorted(
        (c.kind, c.bytes, c.group_size, tuple(sorted(tuple(sorted(g)) for g in c.groups)), c.weight) for c in found
    )


# Compiled on the devices at hand.


def test_every_collective(mesh):
    def body(x):  # 8 x 8 floats, 256 bytes, on each device
        return (
            jax.lax.psum(x, "b"),
            jax.lax.all_gather(x, "a", tiled=True),
            jax.lax.psum_scatter(x, "b", scatter_dimension=1, tiled=True),
            jax.lax.all_to_all(x, "b", 1, 0, tiled=True),
            jax.lax.ppermute(x, "b", [(0, 1), (1, 2), (2, 3), (3, 0)]),
        )

    specs = (P("a"), P(None, "b"), P("a", "b"), P(), P("a", "b"))
    program = compiled(
        jax.shard_map(body, mesh=mesh, in_specs=P("a", "b"), out_specs=specs, check_vma=False), shaped(16, 32)
    )
    measured = measure(program)
    assert told(measured.collectives) == [
        ("all-gather", 512, 2, COLUMNS, 1),
        ("all-reduce", 256, 4, ROWS, 1),
        ("all-to-all", 256, 4, ROWS, 1),
        ("collective-permute", 256, 4, ROWS, 1),
        ("reduce-scatter", 256, 4, ROWS, 1),
    ]
    assert {c.dtype for c in measured.collectives} == {"f32"} and all(c.combined == 1 for c in measured.collectives)
    reduced = next(c for c in measured.collectives if c.kind == "all-reduce")
    assert reduced.source.endswith("shard_map/psum") and reduced.where.startswith("test_hlo.py:")
    assert measured.flops == 0 and measured.collective_bytes == 512 + 4 * 256
    hardware = hardware_of("tpu-v5e-8")[0]
    sent = sum(collective_time(c.kind, c.bytes, c.group_size, hardware, c.factors) for c in measured.collectives)
    assert sent == pytest.approx(sum(c.time(hardware) for c in measured.collectives))
    assert measured.time(hardware) == pytest.approx(sent + hardware.launch + measured.bytes / hardware.hbm_bandwidth)


def test_loops_and_branches(mesh):
    def body(x, weights):
        def layer(x, w):
            return jnp.tanh(jax.lax.psum(x @ w, "b")), None

        x, _ = jax.lax.scan(layer, x, weights)
        x = jax.lax.fori_loop(2, 9, lambda _, x: jax.lax.ppermute(x, "a", [(0, 1), (1, 0)]) * 0.5, x)
        _, x = jax.lax.while_loop(lambda s: s[1].sum() < 100, lambda s: (s[0], jax.lax.pmax(s[1] * 2, "b")), (0, x))
        more = lambda x: jax.lax.psum(jax.lax.psum(x * 2, "a"), "b")  # noqa: E731
        return jax.lax.cond(x[0, 0] > 0, lambda x: jax.lax.psum(x, "a"), more, x)

    mapped = jax.shard_map(body, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    measured = measure(compiled(mapped, shaped(8, 32), shaped(5, 32, 32)))
    assert told(measured.collectives) == [
        ("all-reduce", 1024, 2, COLUMNS, 1),  # of the branches the one that sends more
        ("all-reduce", 1024, 4, ROWS, 1),
        ("all-reduce", 1024, 4, ROWS, 1),  # how often the while runs, nobody knows
        ("all-reduce", 1024, 4, ROWS, 5),
        ("collective-permute", 1024, 2, COLUMNS, 7),
    ]
    assert measured.unknown_loops == 1
    assert measured.counts() == {"all-reduce": 8, "collective-permute": 7}
    assert measured.flops == 5 * 2 * 8 * 32 * 32
    # A scan's turn takes its slice of the weights, writes and reads it, and handles a dozen kilobytes of activations;
    # were all the weights read in each turn, it were 5 x 16 KiB more.
    assert measured.bytes < 5 * (3 * 4096) + 60 * 1024


def test_the_partitioner(mesh):
    def sharding(*axes):
        return NamedSharding(mesh, P(*axes))

    def mlp(x, up, down):
        return jax.nn.relu(x @ up) @ down

    arguments = (
        shaped(64, 128, sharding=sharding("a")),
        shaped(128, 512, sharding=sharding(None, "b")),
        shaped(512, 128, sharding=sharding("b")),
    )
    tensor = measure(compiled(mlp, *arguments, out_shardings=sharding("a")))
    assert told(tensor.collectives) == [("all-reduce", 32 * 128 * 4, 4, ROWS, 1)]
    assert tensor.flops == 2 * (2 * 32 * 128 * 128)
    assert tensor.memory.argument == 4 * (32 * 128 + 2 * 128 * 128) and tensor.memory.output == 4 * 32 * 128
    assert tensor.memory.peak >= tensor.memory.argument
    # FSDP: everything is cut over all devices, and the weights are gathered.
    everywhere = ("a", "b")
    arguments = (
        shaped(64, 128, sharding=sharding(everywhere)),
        shaped(128, 512, sharding=sharding(everywhere)),
        shaped(512, 128, sharding=sharding(everywhere)),
    )
    gathered = measure(compiled(mlp, *arguments, out_shardings=sharding(everywhere)))
    assert told(gathered.collectives) == [("all-gather", 128 * 512 * 4, 8, (tuple(range(8)),), 1)] * 2
    assert gathered.flops == 2 * (2 * 8 * 128 * 512)
    assert gathered.memory.argument == (64 * 128 + 2 * 128 * 512) * 4 // 8


def test_what_the_combiner_joins_is_one(mesh):
    def two(x, y):
        return jax.lax.psum(x, "b"), jax.lax.psum(y, "b")

    mapped = jax.shard_map(two, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    found = collectives(compiled(mapped, shaped(16, 4), shaped(8)).as_text())
    assert told(found) == [("all-reduce", 4 * (64 + 8), 4, ROWS, 1)] and found[0].combined == 2


def test_an_update_in_place_counts_the_update():
    def decode(cache, new, place, query):
        cache = jax.lax.dynamic_update_slice(cache, new, (0, place, 0))
        return cache, jnp.einsum("bd,btd->bt", query, cache)

    arguments = (shaped(4, 128, 64), shaped(4, 1, 64), shaped(dtype="int32"), shaped(4, 64))
    program = compiled(decode, *arguments, donate_argnums=0)
    flops, moved = flops_and_bytes(program.as_text())
    assert flops == 2 * 4 * 128 * 64
    read = 4 * (4 * 128 * 64 + 4 * 64 + 4 * 128)  # the product: cache, query, result
    assert read + 2 * 4 * 64 * 4 <= moved <= read + 2 * 4 * 64 * 4 + 64  # the update, read and written; a few scalars
    held = memory(program)
    assert held.alias == 4 * 128 * 64 * 4 and held.argument == 4 * (4 * 128 * 64 + 2 * 4 * 64 + 1)


def test_a_backend_that_cannot_tell():
    class Silent:
        def memory_analysis(self):
            return None

    class Refusing:
        def memory_analysis(self):
            raise NotImplementedError

    assert memory(Silent()) == memory(Refusing()) == Memory()
    with pytest.raises(PlanError, match="expected the text of an HLO module"):
        measure("module @jit_f {")
    with pytest.raises(PlanError, match="no ENTRY computation"):
        measure("HloModule m\n\n%f (x: f32[]) -> f32[] {\n}\n")


# Arithmetic of products and convolutions, from HLO before optimisation (nothing is compiled).


def flops(function, *arguments) -> float:
    return flops_and_bytes(jax.jit(function).lower(*arguments).as_text(dialect="hlo"))[0]


def test_products():
    assert flops(lambda a, b: a @ b, shaped(3, 5), shaped(5, 7)) == 2 * 3 * 5 * 7
    assert flops(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), shaped(2, 3, 5), shaped(2, 7, 5)) == 2 * 2 * 3 * 5 * 7
    assert flops(lambda a, b: jnp.einsum("ijk,jkl->il", a, b), shaped(3, 5, 7), shaped(5, 7, 2)) == 2 * 3 * 5 * 7 * 2
    assert flops(lambda a: a + 1, shaped(3)) == 0


@pytest.mark.parametrize(
    ("stride", "padding", "dilate", "spread"), [(1, 0, 1, 1), (2, 1, 1, 1), (1, 2, 2, 1), (3, 3, 2, 2)]
)
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(stride, padding, dilate, spread, groups):
    """Against a count of the pairs of elements that meet."""
    n, c, f, size, taps = 2, 4, 6, (9, 8), (3, 2)

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride, 1), ((padding, padding), (0, 1)), (spread, 1), (dilate, 1), feature_group_count=groups
        )

    arguments = shaped(n, c, *size), shaped(f, c // groups, *taps)
    out = jax.eval_shape(convolve, *arguments).shape
    pairs = 1
    for d, (s, p, r, e) in enumerate(((stride, padding, dilate, spread), (1, 0, 1, 1))):
        places = (o * s + k * r - p for o, k in itertools.product(range(out[2 + d]), range(taps[d])))
        pairs *= sum(0 <= place < (size[d] - 1) * e + 1 and place % e == 0 for place in places)
    assert flops(convolve, *arguments) == 2 * n * f * (c // groups) * pairs


# Texts as other compilers print them.


def module(body: str, attributes: str = "num_partitions=8") -> str:
    return f"HloModule jit_f, is_scheduled=true, {attributes}\n\n" + textwrap.dedent(body)


def of_one(operation: str, attributes: str = "num_partitions=8"):
    text = f"ENTRY %main (x: f32[8,4]) -> f32[] {{\n  %x = f32[8,4]{{1,0}} parameter(0)\n  {operation}\n}}\n"
    (found,) = collectives(module(text, attributes))
    return found


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ROWS),
        ("{}", (tuple(range(8)),)),
        ("[2,4]<=[8]", ROWS),
        ("[4,2]<=[2,4]T(1,0)", COLUMNS),
        ("[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", ROWS),
        ("mesh['a'=2,'b'=4] {'a'}", COLUMNS),
        ("mesh['a'=2,'b'=4] {'b','a'}", ((0, 4, 1, 5, 2, 6, 3, 7),)),
        ("mesh['x'=2,'y'=2,'z'=2] {'x','z'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", ROWS),
        (
            "mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_1'}",
            ((0, 2), (1, 3), (4, 6), (5, 7)),
        ),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,0,2) {'b'}", ((3, 1), (0, 2))),
        ("mesh['a'=8] {'a':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=8] {'a':(4)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
    ],
)
def test_spellings_of_groups(groups, expected):
    found = of_one(
        f"ROOT %r = f32[8,4]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={groups}, use_global_device_ids=true, "
        f'to_apply=%add, metadata={{op_name="jit(f)/replica_groups={{{{0}}}}, channel_id=7"}}'
    )
    assert found.groups == expected and found.group_size == len(expected[0])
    assert found.bytes == 128 and found.source == "jit(f)/replica_groups={{0}}, channel_id=7"


def test_groups_of_replicas_bring_their_partitions():
    operation = "ROOT %r = f32[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0}}, to_apply=%add"
    assert of_one(operation, "num_partitions=4").groups == ((0, 1, 2, 3),)
    assert of_one(
        operation.replace("channel_id=1, ", "").replace("{{0}}", "{{0,1},{2,3}}"), "replica_count=4"
    ).groups == (
        (0, 1),
        (2, 3),
    )


def test_factors_are_the_axes_of_the_mesh():
    ids = np.arange(48).reshape(2, 3, 2, 4)
    for axes in itertools.chain.from_iterable(itertools.combinations(range(4), r) for r in range(1, 5)):
        group = np.moveaxis(ids, axes, range(4 - len(axes), 4)).reshape(-1, np.prod([ids.shape[a] for a in axes]))[-1]
        factors = factors_of(tuple(int(i) for i in np.random.default_rng(0).permutation(group)))
        offsets = {0}
        for size, stride in factors:
            offsets = {o + k * stride for o in offsets for k in range(size)}
        assert offsets == set((group - group.min()).tolist()), axes
        assert int(np.prod([size for size, _ in factors])) == len(group)
    assert factors_of((0, 1, 5)) == ((3, 2),)  # irregular
    assert factors_of((3,)) == ()


TPU = """
    %all-reduce-scatter (input: bf16[512,1024]) -> bf16[512,256] {
      %input = bf16[512,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
      %all-reduce.1 = bf16[512,1024]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%add
      %zero = u32[] constant(0)
      %shard = u32[]{:T(128)} partition-id()
      ROOT %slice = bf16[512,256]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %zero, %shard), dynamic_slice_sizes={512,256}
    }

    %start (p: bf16[1,128,64]) -> (bf16[1,128,64], bf16[1,1024,64], s32[2]) {
      %p = bf16[1,128,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
      %gather.1 = bf16[1,1024,64]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=2, replica_groups=[1,8]<=[8], dimensions={1}, frontend_attributes={chain_id="0"}
      ROOT %c.1 = (bf16[1,128,64]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,1024,64]{2,1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
    }

    %middle (q0: bf16[1,128,64], q1: bf16[1,1024,64], q2: s32[2], q3: bf16[64,128], q4: bf16[128,32]) -> bf16[64,32] {
      %q0 = bf16[1,128,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
      %q3 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(3)
      %q4 = bf16[128,32]{1,0:T(8,128)(2,1)} parameter(4)
      %gather.2 = bf16[1,1024,64]{2,1,0:T(8,128)(2,1)} all-gather(%q0), channel_id=2, replica_groups=[1,8]<=[8], dimensions={1}, frontend_attributes={chain_id="0"}
      ROOT %conv = bf16[64,32]{1,0:T(8,128)(2,1)} convolution(%q3, %q4), dim_labels=bf_io->bf
    }

    %done (d0: bf16[1,128,64], d1: bf16[1,1024,64], d2: s32[2]) -> bf16[1,1024,64] {
      %d0 = bf16[1,128,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
      %gather.3 = bf16[1,1024,64]{2,1,0:T(8,128)(2,1)} all-gather(%d0), channel_id=2, replica_groups=[1,8]<=[8], dimensions={1}, frontend_attributes={chain_id="0"}
      ROOT %c.3 = bf16[1,1024,64]{2,1,0:T(8,128)(2,1)} custom-call(%d0, %gather.3), custom_call_target="AsyncCollectiveDone"
    }

    %batched (e: bf16[4,128,1], f: bf16[4,4096,128]) -> bf16[4,1,4096] {
      %e = bf16[4,128,1]{1,2,0:T(2,128)(2,1)} parameter(0)
      %f = bf16[4,4096,128]{2,1,0:T(8,128)(2,1)} parameter(1)
      ROOT %dilated = bf16[4,1,4096]{2,1,0:T(2,128)(2,1)S(1)} convolution(%e, %f), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0fb_0oi->0bf
    }

    %sparse (s: bf16[16,64], t: token[]) -> bf16[64,64] {
      %s = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
      ROOT %gather.4 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%s), channel_id=3, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
    }, execution_thread="sparsecore"

    %body (state: (s32[], bf16[64,64], s32[])) -> (s32[], bf16[64,64], s32[]) {
      %one = s32[]{:T(128)} constant(1)
      %state = (s32[]{:T(128)}, bf16[64,64]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
      %i = s32[]{:T(128)} get-tuple-element(%state), index=0
      %i2 = s32[]{:T(128)S(6)} copy(%i)
      %v = bf16[64,64]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
      %n = s32[]{:T(128)} get-tuple-element(%state), index=2
      %next = s32[]{:T(128)} add(%i2, %one)
      %sum = bf16[64,64]{1,0:T(8,128)(2,1)} all-reduce(%v), channel_id=4, replica_groups={{0,1},{2,3},{4,5},{6,7}}, use_global_device_ids=true, to_apply=%add
      ROOT %out = (s32[]{:T(128)}, bf16[64,64]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) tuple(%next, %sum, %n)
    }

    %condition (c: (s32[], bf16[64,64], s32[])) -> pred[] {
      %c = (s32[]{:T(128)}, bf16[64,64]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
      %j = s32[]{:T(128)} get-tuple-element(%c), index=0
      %m = s32[]{:T(128)} get-tuple-element(%c), index=2
      ROOT %lt = pred[]{:T(512)} compare(%j, %m), direction=LT
    }

    ENTRY %main (a: bf16[512,1024], b: bf16[1,128,64], w: bf16[64,128], z: bf16[128,32], k: bf16[4,4096,128]) -> bf16[64,64] {
      %a = bf16[512,1024]{1,0:T(8,128)(2,1)} parameter(0)
      %b = bf16[1,128,64]{2,1,0:T(8,128)(2,1)} parameter(1)
      %w = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(2)
      %z = bf16[128,32]{1,0:T(8,128)(2,1)} parameter(3)
      %k = bf16[4,4096,128]{2,1,0:T(8,128)(2,1)} parameter(4)
      %copy-start = (bf16[1,128,64]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,128,64]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%b), cross_program_prefetch_index=0
      %copy-done = bf16[1,128,64]{2,1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
      %scattered = bf16[512,256]{1,0:T(8,128)(2,1)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter, metadata={op_name="jit(f)/dot_general"}
      %async-start = (bf16[1,128,64]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,1024,64]{2,1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}) fusion(%copy-done), kind=kCustom, calls=%start
      %g0 = bf16[1,128,64]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%async-start), index=0
      %g1 = bf16[1,1024,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%async-start), index=1
      %g2 = s32[2]{0:S(4)} get-tuple-element(%async-start), index=2
      %product = bf16[64,32]{1,0:T(8,128)(2,1)} fusion(%g0, %g1, %g2, %w, %z), kind=kOutput, calls=%middle
      %async-done = bf16[1,1024,64]{2,1,0:T(8,128)(2,1)} fusion(%g0, %g1, %g2), kind=kCustom, calls=%done
      %e = bf16[4,128,1]{1,2,0:T(2,128)(2,1)S(1)} custom-call(%copy-done), custom_call_target="ConcatBitcast"
      %scores = bf16[4,1,4096]{2,1,0:T(2,128)(2,1)S(1)} fusion(%e, %k), kind=kOutput, calls=%batched
      %permute-start = (bf16[64,32]{1,0:T(8,128)(2,1)}, bf16[64,32]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%product), channel_id=5, source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,4}}
      %permute-done = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%permute-start)
      %x = bf16[16,64]{1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
      %token = token[] after-all()
      %call-start = ((bf16[16,64]{1,0:T(8,128)(2,1)}, token[]), bf16[64,64]{1,0:T(8,128)(2,1)}) call-start(%x, %token), async_execution_thread="sparsecore", to_apply=%sparse
      %call-done = bf16[64,64]{1,0:T(8,128)(2,1)} call-done(%call-start)
      %from = s32[]{:T(128)} constant(2)
      %to = s32[]{:T(128)} constant(8)
      %init = (s32[]{:T(128)}, bf16[64,64]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) tuple(%from, %call-done, %to)
      %while = (s32[]{:T(128)}, bf16[64,64]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) while(%init), condition=%condition, body=%body
      ROOT %result = bf16[64,64]{1,0:T(8,128)(2,1)} get-tuple-element(%while), index=1
    }
"""  # noqa: E501


def test_tpu_text():
    """A fused reduce-scatter, a gather spread over three fusions, one on the sparse core, a loop without a trip count,
    on-chip memory."""
    measured = measure(module(TPU))
    everyone = (tuple(range(8)),)
    pairs = ((0, 1), (2, 3), (4, 5), (6, 7))
    assert told(measured.collectives) == [
        ("all-gather", 64 * 64 * 2, 4, ROWS, 1),
        ("all-gather", 1024 * 64 * 2, 8, everyone, 1),
        ("all-reduce", 64 * 64 * 2, 2, pairs, 6),
        ("collective-permute", 64 * 32 * 2, 2, pairs[:2], 1),
        ("reduce-scatter", 512 * 1024 * 2, 4, ROWS, 1),
    ]
    assert measured.unknown_loops == 0 and measured.memory == Memory()
    assert next(c for c in measured.collectives if c.kind == "reduce-scatter").source == "jit(f)/dot_general"
    product, scores = 2 * 64 * 128 * 32, 2 * 4 * 128 * 4096
    assert measured.flops == product + scores
    # The prefetch reads %b; the product reads %w and %z and writes; the scores read %k and stay on the chip; the loop's
    # counter moves 4 bytes to the chip and 4 bytes come of the sum of it and a constant.
    moved = 128 * 64 * 2 + 2 * (64 * 128 + 128 * 32 + 64 * 32) + 4 * 4096 * 128 * 2
    assert moved <= measured.bytes <= moved + 6 * 16


GPU = """
    %gemm (p: f32[16,32], q: f32[32,8]) -> f32[16,8] {
      %p = f32[16,32]{1,0} parameter(0)
      %q = f32[32,8]{1,0} parameter(1)
      ROOT %dot = f32[16,8]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    }

    %wrapped (r: f32[64]) -> f32[8] {
      %r = f32[64]{0} parameter(0)
      ROOT %scatter = f32[8]{0} reduce-scatter(%r), channel_id=6, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add, use_global_device_ids=true
    }

    %yes (y: (f32[16,8])) -> (f32[16,8]) {
      %y = (f32[16,8]{1,0}) parameter(0)
      %y0 = f32[16,8]{1,0} get-tuple-element(%y), index=0
      ROOT %y1 = (f32[16,8]{1,0}) tuple(%y0)
    }

    %no (n: (f32[16,8])) -> (f32[16,8]) {
      %n = (f32[16,8]{1,0}) parameter(0)
      %n0 = f32[16,8]{1,0} get-tuple-element(%n), index=0
      %n1 = f32[16,8]{1,0} all-to-all(%n0), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
      ROOT %n2 = (f32[16,8]{1,0}) tuple(%n1)
    }

    %once (o: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
      %o = (s32[], f32[16,8]{1,0}) parameter(0)
      %o0 = s32[] get-tuple-element(%o), index=0
      %o1 = f32[16,8]{1,0} get-tuple-element(%o), index=1
      %start.1 = f32[16,8]{1,0} all-reduce-start(%o1), channel_id=8, replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%add, backend_config={"collective_backend_config":{"is_sync":false}}
      %done.1 = f32[16,8]{1,0} all-reduce-done(%start.1)
      ROOT %o2 = (s32[], f32[16,8]{1,0}) tuple(%o0, %done.1)
    }

    %test (t: (s32[], f32[16,8])) -> pred[] {
      %t = (s32[], f32[16,8]{1,0}) parameter(0)
      ROOT %true = pred[] constant(true)
    }

    ENTRY %main (a: f32[16,32], b: f32[32,8], c: f32[64], d: pred[], e: bf16[4,4]) -> f32[16,8] {
      %a = f32[16,32]{1,0} parameter(0)
      %b = f32[32,8]{1,0} parameter(1)
      %c = f32[64]{0} parameter(2)
      %d = pred[] parameter(3)
      %e = bf16[4,4]{1,0} parameter(4)
      %fused = f32[16,8]{1,0} fusion(%a, %b), kind=kCustom, calls=%gemm, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
      %library = (f32[16,8]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
      %g0 = f32[16,8]{1,0} get-tuple-element(%library), index=0
      %gather-start = ((f32[64]{0}, bf16[4,4]{1,0}), (f32[256]{0}, bf16[16,4]{1,0})) all-gather-start(%c, %e), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, use_global_device_ids=true
      %gather-done = (f32[256]{0}, bf16[16,4]{1,0}) all-gather-done(%gather-start)
      %reduce-start = (f32[16,8]{1,0}, f32[16,8]{1,0}) all-reduce-start(%fused, /*index=1*/%g0), channel_id=2, replica_groups={}, use_global_device_ids=true, to_apply=%add
      %reduce-done = (f32[16,8]{1,0}, f32[16,8]{1,0}) all-reduce-done(%reduce-start)
      %scatter-start = ((f32[64]{0}), f32[8]{0}) async-start(%c), calls=%wrapped
      %scatter-done = f32[8]{0} async-done(%scatter-start)
      %sugar-start = ((f32[64]{0}), f32[8]{0}) reduce-scatter-start(%c), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add, use_global_device_ids=true
      %sugar-done = f32[8]{0} reduce-scatter-done(%sugar-start)
      %in = (f32[16,8]{1,0}) tuple(%g0)
      %picked = (f32[16,8]{1,0}) conditional(%d, %in, %in), true_computation=%yes, false_computation=%no
      %picked.0 = f32[16,8]{1,0} get-tuple-element(%picked), index=0
      %zero = s32[] constant(0)
      %init = (s32[], f32[16,8]{1,0}) tuple(%zero, %picked.0)
      %while = (s32[], f32[16,8]{1,0}) while(%init), condition=%test, body=%once, backend_config={"known_trip_count":{"n":"12"},"known_init_step":{"init":"0","step":"1"}}
      ROOT %result = f32[16,8]{1,0} get-tuple-element(%while), index=1
    }
"""  # noqa: E501


def test_gpu_text():
    """Asynchronous starts of every shape, libraries' products, a branch with a collective, a loop with a trip count."""
    measured = measure(module(GPU))
    everyone = (tuple(range(8)),)
    assert told(measured.collectives) == [
        ("all-gather", 4 * (64 * 4 + 16 * 2), 4, ROWS, 1),
        ("all-reduce", 16 * 8 * 4, 4, ROWS, 12),
        ("all-reduce", 2 * 16 * 8 * 4, 8, everyone, 1),
        ("all-to-all", 16 * 8 * 4, 4, ROWS, 1),
        ("reduce-scatter", 64 * 4, 8, everyone, 1),
        ("reduce-scatter", 64 * 4, 8, everyone, 1),
    ]
    gathered = measured.collectives[0]
    assert (gathered.combined, gathered.dtype) == (2, "f32")
    assert measured.flops == 2 * (2 * 16 * 32 * 8)
    operands = 4 * (16 * 32 + 32 * 8)
    assert measured.bytes == (operands + 4 * 16 * 8) * 2 + 4096
    hardware = hardware_of("h100x8")[0]
    (looped,) = (c for c in measured.collectives if c.weight == 12)
    assert looped.time(hardware) == pytest.approx(12 * collective_time("all-reduce", 512, 4, hardware))
    assert measured.time(hardware, by_operation=True) == pytest.approx(measured.time(hardware), rel=1e-3)


def test_traffic_of_slices_and_updates():
    text = """
    %step (cache: f32[64,16], new: f32[1,16], at: s32[], query: f32[16]) -> (f32[64,16], f32[64]) {
      %cache = f32[64,16]{1,0} parameter(0)
      %new = f32[1,16]{1,0} parameter(1)
      %at = s32[] parameter(2)
      %query = f32[16]{0} parameter(3)
      %zero = s32[] constant(0)
      %updated = f32[64,16]{1,0} dynamic-update-slice(%cache, %new, %at, %zero)
      %scores = f32[64]{0} dot(%updated, %query), lhs_contracting_dims={1}, rhs_contracting_dims={0}
      ROOT %both = (f32[64,16]{1,0}, f32[64]{0}) tuple(%updated, %scores)
    }

    ENTRY %main (a: f32[64,16], b: f32[1,16], c: s32[], d: f32[16]) -> f32[64] {
      %a = f32[64,16]{1,0} parameter(0)
      %b = f32[1,16]{1,0} parameter(1)
      %c = s32[] parameter(2)
      %d = f32[16]{0} parameter(3)
      OPERATION
    }
    """

    def moved(operation: str) -> float:
        return flops_and_bytes(module(text.replace("OPERATION", operation)))[1]

    # The cache is read once, for the scores; of it one row is written.
    fused = "%r = (f32[64,16]{1,0}, f32[64]{0}) fusion(%a, %b, %c, %d), kind=kLoop, calls=%step"
    assert moved(fused) == 4 * (64 * 16 + 16 + 1 + 16 + 16 + 64)
    row = 4 * 16
    index = "%z = s32[] constant(0)\n      ROOT "
    assert moved(index + "%r = f32[1,16]{1,0} dynamic-slice(%a, %c, %z), dynamic_slice_sizes={1,16}") == 2 * row + 8
    assert moved(index + "%r = f32[64,16]{1,0} dynamic-update-slice(%a, %b, %c, %z)") == 2 * row + 8
    assert moved("ROOT %r = f32[64,16]{1,0} copy(%a)") == 2 * 64 * row
    assert moved("ROOT %r = f32[1024]{0} bitcast(%a)") == 0
    assert moved("ROOT %r = f32[64]{0} iota(), iota_dimension=0") == 4 * 64


@pytest.mark.parametrize("direction", ["LT", "LE", "GT", "GE", "NE"])
@pytest.mark.parametrize("form", ["plain", "fused", "swapped"])
@pytest.mark.parametrize(
    ("start", "bound", "step"), [(0, 7, 1), (2, 9, 3), (9, 2, -2), (5, 5, 1), (8, 0, -1), (0, 12, 4)]
)
def test_trip_counts(direction, form, start, bound, step):
    """Against running the loop."""
    passes = {
        "LT": lambda i: i < bound,
        "LE": lambda i: i <= bound,
        "GT": lambda i: i > bound,
        "GE": lambda i: i >= bound,
        "NE": lambda i: i != bound,
    }[direction]
    runs, i = 0, start
    while passes(i) and runs <= 100:
        runs, i = runs + 1, i + step
    compare = f"compare(%j, %n), direction={direction}"
    if form == "fused":
        compare = "fusion(%n, %j), kind=kLoop, calls=%compared"
    elif form == "swapped":
        mirrored = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}.get(direction, direction)
        compare = f"compare(%n, %j), direction={mirrored}"
    text = f"""
    %compared (l: s32[], r: s32[]) -> pred[] {{
      %l = s32[] parameter(0)
      %r = s32[] parameter(1)
      ROOT %lt = pred[] compare(%r, %l), direction={direction}
    }}

    %body (s: (s32[], f32[4])) -> (s32[], f32[4]) {{
      %s = (s32[], f32[4]) parameter(0)
      %i = s32[] get-tuple-element(%s), index=0
      %v = f32[4] get-tuple-element(%s), index=1
      %step = s32[] constant({step})
      %next = s32[] add(%i, %step)
      %sum = f32[4] all-reduce(%v), replica_groups={{}}, to_apply=%add
      ROOT %out = (s32[], f32[4]) tuple(%next, %sum)
    }}

    %condition (c: (s32[], f32[4])) -> pred[] {{
      %c = (s32[], f32[4]) parameter(0)
      %n = s32[] constant({bound})
      %j = s32[] get-tuple-element(%c), index=0
      ROOT %go = pred[] {compare}
    }}

    ENTRY %main (x: f32[4]) -> f32[4] {{
      %x = f32[4] parameter(0)
      %zero = s32[] constant({start})
      %init = (s32[], f32[4]) tuple(%zero, %x)
      %while = (s32[], f32[4]) while(%init), condition=%condition, body=%body
      ROOT %r = f32[4] get-tuple-element(%while), index=1
    }}
    """
    measured = measure(module(text))
    (found,) = measured.collectives
    if runs > 100:  # never ends
        assert measured.unknown_loops == 1 and found.weight == 1
    else:
        assert measured.unknown_loops == 0 and found.weight == runs


def test_text_without_percent_signs_and_with_old_metadata():
    text = """
    add {
      a = f32[] parameter(0)
      b = f32[] parameter(1)
      ROOT c = f32[] add(f32[] a, f32[] b)
    }

    ENTRY main {
      x = f32[<=8,4]{1,0} parameter(0)
      ROOT r = f32[<=8,4]{1,0} all-reduce(f32[<=8,4]{1,0} x), replica_groups={{0,1}}, to_apply=add, metadata={op_type="add" op_name="jit(f)/say \\"hi\\"" source_file="/home/me/model.py" source_line=12}
    }
    """  # noqa: E501
    (found,) = collectives(module(text, "replica_count=2"))
    assert (found.bytes, found.groups, found.source, found.where) == (128, ((0, 1),), 'jit(f)/say "hi"', "model.py:12")
    assert parse(module(text)).entry.root is not None
