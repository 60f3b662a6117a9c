"""Hardware figures and the cost model: worked by hand, and against simulations of rings and lines."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxinfer.errors import PlanError
from jaxinfer.sharding.calibration import (
    calibrate,
    calibration_path,
    fit_all_reduce,
    load_calibration,
    store_calibration,
)
from jaxinfer.sharding.hardware import (
    COLLECTIVES,
    EVERYWHERE,
    TABLE,
    Hardware,
    Link,
    collective_line,
    collective_time,
    compute_time,
    hardware_of,
)

GB = 1e9


def flat(*links: Link) -> Hardware:
    return Hardware("test", 4e12, 8e12, 16e12, 10**10, 1e12, links, 1e-6)


def levels(name: str) -> list[tuple[int, str]]:
    return [(link.size, link.topology) for link in hardware_of(name)[0].links if link.size < EVERYWHERE]


@pytest.mark.parametrize(
    ("name", "entry", "count"),
    [
        ("tpu-v5e-8", "tpu-v5e", 8),
        ("v5litepod-4", "tpu-v5e", 4),
        ("TPU-V6E-256", "tpu-v6e", 256),
        ("tpu-v5p-8", "tpu-v5p", 4),  # Google's names count TensorCores, two of which are a device
        ("tpu-v4-16", "tpu-v4", 8),
        ("tpu-v5px8", "tpu-v5p", 8),
        ("tpu7x-8", "tpu-v7", 8),
        ("h100x8", "h100", 8),
        ("h100-8", "h100", 8),
        ("nvidia-h200", "h200", 1),
        ("a100-40gb-4", "a100-40gb", 4),
        ("a100-80gbx4", "a100-80gb", 4),
        ("a100x8", "a100-80gb", 8),
        ("b200", "b200", 1),
        ("l4-2", "l4", 2),
        ("t4x4", "t4", 4),
        ("cpu-8", "cpu", 8),
    ],
)
def test_names(name, entry, count):
    hardware, found = hardware_of(name)
    assert (hardware.name, found) == (entry, count)


@pytest.mark.parametrize("name", ["tpu-v9-8", "", "h100-", "h100x8x2", "8", "tpu-v5p-x8"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(PlanError, match=r"a100-40gb, a100-80gb, b200, cpu, h100, h200, l4, t4, tpu-v4, tpu-v5e"):
        hardware_of(name)


def test_refusals():
    with pytest.raises(PlanError, match="40 devices or 40 GB"):
        hardware_of("a100-40")
    with pytest.raises(PlanError, match="TensorCores, 2 to a device"):
        hardware_of("v5p-7")
    with pytest.raises(PlanError, match="got 0"):
        hardware_of("h100x0")
    for what in (8, [], ["tpu"]):
        with pytest.raises(PlanError, match="JAX devices or a Mesh"):
            hardware_of(what)
    with pytest.raises(PlanError, match="knows the collectives all-reduce"):
        collective_time("broadcast", 1, 2, TABLE["cpu"])
    with pytest.raises(PlanError, match="topologies line, ring, switch"):
        Link(8, 1e9, 0, "torus")


def test_slices_of_the_torus():
    assert levels("tpu-v5e-8") == [(2, "line"), (8, "line")]
    assert levels("tpu-v5e-16") == [(4, "line"), (16, "line")]
    assert levels("tpu-v6e-256") == [(16, "ring"), (256, "ring")]  # whole axes of 16 wrap around
    assert levels("tpu-v5e-128") == [(8, "line"), (128, "ring")]
    assert levels("tpu-v4x8") == [(2, "line"), (4, "line"), (8, "line")]
    assert levels("tpu-v4x64") == [(4, "ring"), (16, "ring"), (64, "ring")]  # a cube
    assert levels("tpu-v4x32") == [(2, "line"), (8, "line"), (32, "line")]  # none
    assert levels("tpu-v7-8") == [(2, "switch"), (4, "line"), (8, "line")]  # two chiplets a chip
    assert levels("tpu-v5e-512") == levels("tpu-v5e-256")  # two pods, joined by the data centre's network
    assert hardware_of("tpu-v5e-8")[0].laid_out(16) == hardware_of("tpu-v5e-16")[0]


def test_the_table_is_plausible():
    """Figures in units that a slip of a power of ten would break."""
    for hardware in TABLE.values():
        assert 1e10 < hardware.f32 <= hardware.bf16 <= hardware.int8 < 1e16 or hardware.name == "cpu"
        assert 8e9 < hardware.hbm < 2e11
        assert 1e10 < hardware.hbm_bandwidth < 1e13
        sizes = [link.size for link in hardware.laid_out(64).links]
        assert sizes == sorted(sizes) and sizes[-1] == EVERYWHERE
        assert hardware.reduce_scatter == (hardware.name != "cpu")
    # Figures of the datasheets that readers know by heart.
    assert TABLE["h100"].bf16 / TABLE["h100"].hbm_bandwidth == pytest.approx(295, rel=0.01)
    assert TABLE["tpu-v5e"].bf16 / TABLE["tpu-v5e"].hbm_bandwidth == pytest.approx(240, rel=0.01)


def test_devices():
    assert hardware_of(jax.devices()) == (TABLE["cpu"], 8)
    assert hardware_of(jax.devices()[0]) == (TABLE["cpu"], 1)
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])
    assert hardware_of(mesh) == (TABLE["cpu"], 4)


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        ("TPU v4", "tpu-v4"),
        ("TPU v5 lite", "tpu-v5e"),
        ("TPU v5", "tpu-v5p"),
        ("TPU v5p", "tpu-v5p"),
        ("TPU v6 lite", "tpu-v6e"),
        ("TPU7x", "tpu-v7"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", "t4"),
    ],
)
def test_kinds_of_devices(kind, entry):
    assert hardware_of([SimpleNamespace(device_kind=kind)] * 4)[0].name == entry


def test_the_slice_is_read_from_coordinates():
    grid = [SimpleNamespace(device_kind="TPU v5 lite", coords=[x, y, 0]) for y in range(2) for x in range(4)]
    assert [link.size for link in hardware_of(grid)[0].links[:-1]] == [4, 8]
    with pytest.raises(PlanError, match="one kind, got TPU v4 and TPU v5"):
        hardware_of([SimpleNamespace(device_kind="TPU v4"), SimpleNamespace(device_kind="TPU v5")])
    for other in ("NVIDIA L40S", "NVIDIA GH200 480GB", "AMD MI300X"):
        with pytest.raises(PlanError, match=rf"no figures are known for '{other}'.*--calibrate"):
            hardware_of([SimpleNamespace(device_kind=other)])


def test_compute_time():
    hardware = flat(Link(EVERYWHERE, 1e9, 0, "switch"))
    assert compute_time(8e9, 1e6, "bfloat16", hardware) == pytest.approx(1e-3 + 1e-6)  # 8e9 / 8e12
    assert compute_time(8e9, 1e6, np.float32, hardware) == pytest.approx(2e-3 + 1e-6)
    assert compute_time(8e9, 1e6, "s8", hardware) == pytest.approx(5e-4 + 1e-6)
    assert compute_time(8e9, 5e9, jax.numpy.bfloat16, hardware) == pytest.approx(5e-3 + 1e-6)  # 5e9 / 1e12
    found = compute_time(np.array([8e9, 0.0]), np.array([0.0, 1e9]), "bf16", hardware)
    np.testing.assert_allclose(found, [1e-3 + 1e-6, 1e-3 + 1e-6])
    assert [TABLE["t4"].peak(d) for d in ("bf16", "f16", "int8", "float32", "f8e4m3fn")] == [
        8.1e12,
        6.5e13,
        1.3e14,
        8.1e12,
        1.3e14,
    ]


# 8 devices on a switch: 1 GB/s, 10 us a step, 3 steps. 8 MB: 7 ms for (n-1)/n of it.
@pytest.mark.parametrize(
    ("kind", "seconds"),
    [
        ("all-gather", 30e-6 + 7e-3),
        ("reduce-scatter", 30e-6 + 7e-3),
        ("all-reduce", 60e-6 + 14e-3),
        ("all-to-all", 30e-6 + 7e-3),
        ("collective-permute", 10e-6 + 8e-3),
    ],
)
def test_a_switch(kind, seconds):
    hardware = flat(Link(EVERYWHERE, GB, 10e-6, "switch"))
    assert collective_time(kind, 8e6, 8, hardware) == pytest.approx(seconds)
    assert collective_time(kind, 8e6, 8, hardware, stride=4) == pytest.approx(seconds)
    np.testing.assert_allclose(
        collective_time(kind, np.array([8e6, 0]), 8, hardware), [seconds, collective_time(kind, 0, 8, hardware)]
    )
    assert collective_time(kind, 8e6, 1, hardware) == 0


def test_two_hosts():
    """4 devices a host at 8 GB/s, 1 GB/s a device between hosts."""
    hardware = flat(Link(4, 8 * GB, 1e-6, "switch"), Link(EVERYWHERE, GB, 10e-6, "switch"))
    inside, across = 0.75 / (8 * GB), 0.5 / GB
    # The network carries what the host's devices have left to it, a quarter each.
    assert collective_line("all-gather", ((8, 1),), hardware) == pytest.approx((12e-6, inside + across / 4))
    assert collective_line("all-reduce", ((8, 1),), hardware) == pytest.approx((24e-6, 2 * inside + across / 2))
    assert collective_line("all-to-all", ((8, 1),), hardware) == pytest.approx((12e-6, inside + across))
    assert collective_line("all-gather", ((4, 1),), hardware) == pytest.approx((2e-6, inside))
    assert collective_line("all-gather", ((2, 4),), hardware) == pytest.approx((10e-6, across))
    assert collective_line("collective-permute", ((8, 1),), hardware) == pytest.approx((10e-6, 1 / GB))
    assert collective_line("collective-permute", ((4, 1),), hardware) == pytest.approx((1e-6, 1 / (8 * GB)))


def test_the_axes_of_a_torus_work_at_once():
    v5e = hardware_of("tpu-v5e-8")[0]  # 2 x 4 without wrap-around, 45 GB/s and 1 us a link
    assert collective_line("all-gather", ((2, 1),), v5e) == pytest.approx((1e-6, 0.5 / 4.5e10))
    assert collective_line("all-gather", ((4, 2),), v5e) == pytest.approx((3e-6, 0.75 / 4.5e10))
    assert collective_line("all-gather", ((8, 1),), v5e) == pytest.approx((4e-6, 0.875 / 9e10))
    assert collective_line("all-gather", ((4, 1),), v5e) == pytest.approx((2e-6, 0.75 / 9e10))  # a square of 2 x 2
    # Devices two links apart share the middle one with the other group.
    assert collective_line("all-gather", ((2, 4),), v5e) == pytest.approx((2e-6, 2 * 0.5 / 4.5e10))
    assert collective_line("collective-permute", ((2, 4),), v5e) == pytest.approx((2e-6, 2 / 4.5e10))
    assert collective_time("all-gather", 1e6, 4, v5e, ((2, 1), (2, 4))) == pytest.approx(
        3e-6 + 1e6 * (0.5 / 4.5e10 + 0.5 * 2 * 0.5 / 4.5e10) / 2
    )
    pod = hardware_of("tpu-v6e-256")[0]  # 16 x 16, rings of 90 GB/s each way
    assert collective_line("all-gather", ((16, 1),), pod) == pytest.approx((8e-6, 15 / 16 / 1.8e11))
    assert collective_line("all-reduce", ((256, 1),), pod) == pytest.approx((32e-6, 255 / 256 / 1.8e11))
    assert collective_line("all-to-all", ((16, 16),), pod) == pytest.approx((8e-6, 2 / 9e10))  # n/8


def loads(n: int, ring: bool, gap: int, gather: bool) -> float:
    """Bytes over the busiest link in one direction when `gap` interleaved groups, each of n devices `gap` apart, send:
    each device one byte in all to its group (all-to-all), or its 1/n of one byte to everyone (all-gather)."""
    total = n * gap
    links: dict[tuple[int, int], float] = {}

    def send(source: int, target: int, size: float, once: set | None) -> None:
        distance = (target - source) % total
        ways = [1 if target > source else -1]
        if ring:
            ways = [1] if distance * 2 < total else [-1] if distance * 2 > total else [1, -1]
        for way in ways:
            place = source
            while place != target:
                link = (place, (place + way) % total)
                # A broadcast passes each link once, however many it is for.
                if once is None or link not in once:
                    links[link] = links.get(link, 0.0) + size / len(ways)
                    if once is not None:
                        once.add(link)
                place = link[1]

    for group in range(gap):
        members = range(group, total, gap)
        for source in members:
            passed: set | None = set() if gather else None
            for target in members:
                if target != source:
                    send(source, target, 1 / n, passed)
    return max(links.values())


@pytest.mark.parametrize("gap", [1, 2, 3])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("topology", ["ring", "line"])
def test_links_carry_what_a_simulation_sends(topology, n, gap):
    ring = topology == "ring"
    if ring and n == 2:
        return  # a ring of two is a double link
    hardware = flat(Link(n * gap, 1.0, 0, topology), Link(EVERYWHERE, 1.0, 0, "switch"))
    exchange = collective_line("all-to-all", ((n, gap),), hardware)[1]
    gathered = collective_line("all-gather", ((n, gap),), hardware)[1]
    assert exchange == pytest.approx(loads(n, ring, gap, gather=False))
    # Messages of an even ring that go both ways alike split; broadcasts there can't be cut in the simulation.
    assert gathered == pytest.approx(loads(n, ring, gap, gather=True), rel=0.5 / n if ring else 1e-9, abs=1e-12)


def test_part_of_a_ring_is_a_line():
    hardware = flat(Link(16, 1.0, 1.0, "ring"), Link(EVERYWHERE, 1.0, 0, "switch"))
    assert collective_line("all-gather", ((8, 1),), hardware) == pytest.approx((7, 7 / 8))
    assert collective_line("all-gather", ((16, 1),), hardware) == pytest.approx((8, 15 / 32))
    assert collective_line("all-gather", ((8, 2),), hardware) == pytest.approx((8, 2 * 7 / 16))


def test_a_fit_finds_the_line_it_was_given():
    true = flat(Link(8, 3.3e9, 7e-6, "switch"), Link(EVERYWHERE, 1e8, 1e-4, "switch"))
    guess = flat(Link(8, 1e9, 1e-6, "switch"), Link(EVERYWHERE, 1e8, 1e-4, "switch"))
    sizes = (4096, 65536, 1 << 20)
    fitted = fit_all_reduce(guess, 8, sizes, [collective_time("all-reduce", s, 8, true) for s in sizes])
    assert fitted.links[0].bandwidth == pytest.approx(3.3e9)
    assert fitted.links[0].latency == pytest.approx(7e-6)
    assert fitted.links[1] == guess.links[1]  # what the group doesn't cross stays
    torus = hardware_of("tpu-v5e-8")[0]
    seconds = [3 * collective_time("all-reduce", s, 8, torus) for s in sizes]
    slow = fit_all_reduce(torus, 8, sizes, seconds)
    for s in sizes:
        assert collective_time("all-reduce", s, 8, slow) == pytest.approx(
            3 * collective_time("all-reduce", s, 8, torus)
        )
    noisy = fit_all_reduce(guess, 8, (1000, 2000), (2e-5, 1e-5))  # larger took less: noise
    assert noisy.links[0].bandwidth > 0 and noisy.links[0].latency > 0


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cache")
def test_calibration_measures_and_is_read_back():
    devices = jax.devices()[:2]
    steps = []
    measured = calibrate(devices, lambda step, fraction: steps.append((step, fraction)))
    assert steps[0][1] == 0 and steps[-1] == ("done", 1.0) and sorted(f for _, f in steps) == [f for _, f in steps]
    assert hardware_of(devices) == (measured, 2)
    assert hardware_of(jax.devices()) == (TABLE["cpu"], 8)  # of another number of them nothing is known
    assert measured.name == "cpu" and measured.hbm == TABLE["cpu"].hbm
    assert 1e9 < measured.f32 < 1e13 and 1e8 < measured.hbm_bandwidth < 1e12
    # Another way to measure, of which only the order of magnitude is sure while other processes run.
    x = jax.numpy.ones((512, 512))
    product = jax.jit(lambda x: x @ x).lower(x).compile()
    best = min(_timed(product, x) for _ in range(20))
    assert 0.1 < 2 * 512**3 / best / (measured.f32 * len(devices)) < 10


def _timed(function, x) -> float:
    import time

    start = time.perf_counter()
    jax.block_until_ready(function(x))
    return time.perf_counter() - start


@pytest.mark.usefixtures("cache")
def test_a_damaged_calibration_is_ignored_with_a_warning():
    measured = dataclasses.replace(TABLE["cpu"], f32=3e10)
    path = store_calibration("cpu", 8, measured)
    assert path == calibration_path("cpu", 8) and hardware_of(jax.devices())[0].f32 == 3e10
    good = json.loads(path.read_text())
    damaged = [
        "{",
        "",
        "[]",
        "null",
        json.dumps(good | {"version": 99}),
        json.dumps(good | {"kind": "TPU v4"}),
        json.dumps(good | {"hardware": good["hardware"] | {"f32": -1}}),
        json.dumps(good | {"hardware": good["hardware"] | {"f32": "fast"}}),
        json.dumps(good | {"hardware": good["hardware"] | {"links": [{"size": 8}]}}),
        json.dumps(good | {"hardware": good["hardware"] | {"unheard": 1}}),
    ]
    for text in damaged:
        path.write_text(text)
        with pytest.warns(UserWarning, match=r"is ignored, the table's figures are used.*--calibrate"):
            assert hardware_of(jax.devices()) == (TABLE["cpu"], 8)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="is ignored"):
        assert load_calibration("cpu", 8) is None
    path.unlink()
    assert load_calibration("cpu", 8) is None


def test_more_bytes_never_cost_less():
    for name in ("tpu-v5e-8", "tpu-v5p-16", "tpu7x-8", "h100x16", "l4-8", "cpu-8"):
        hardware, count = hardware_of(name)
        for kind in COLLECTIVES:
            for group in (2, 4, 8):
                latency, rate = collective_line(kind, ((group, 1),), hardware)
                assert 0 < latency < 1 and 0 < rate < 1 and math.isfinite(rate), (name, kind, group, count)
