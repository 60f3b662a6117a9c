"""Measures devices at hand, and keeps the figures in the cache folder for the next plan."""

import dataclasses
import json
import math
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.errors import JaxInferError, PlanError
from jaxinfer.paths import cache_dir, cache_path
from jaxinfer.sharding.hardware_cost import collective_line
from jaxinfer.sharding.hardware_table import EVERYWHERE, Hardware, Link, table_entry

__all__ = ["calibrate", "calibration_path", "load_calibration", "store_calibration"]

_VERSION = 1
_REDUCED = (4 << 10, 64 << 10, 1 << 20, 8 << 20)  # bytes of the all-reduces that are timed
_REPEATS = 8  # inside one program, so that its dispatch counts for little

Progress = Callable[[str, float], None]


def calibration_path(kind: str, count: int) -> Path:
    """The file that holds what was measured on `count` devices of a kind; nothing is created."""
    slug = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    return cache_path() / "hardware" / f"{slug}-x{count}.json"


def load_calibration(kind: str, count: int) -> Hardware | None:
    """What was measured on as many devices of a kind, or None; a damaged file warns and counts as none."""
    path = calibration_path(kind, count)
    try:
        text = path.read_bytes()
    except OSError:
        return None
    try:
        data = json.loads(text)
        if (data["version"], data["kind"], data["count"]) != (_VERSION, kind, count):
            raise ValueError("it is another version's, or of other devices")
        links = tuple(Link(**link) for link in data["hardware"].pop("links"))
        hardware = Hardware(**data["hardware"], links=links)
        rates = (hardware.f32, hardware.bf16, hardware.int8, hardware.hbm, hardware.hbm_bandwidth)
        if not all(isinstance(rate, int | float) and 0 < rate < math.inf for rate in rates) or hardware.launch < 0:
            raise ValueError("its rates aren't all positive numbers")
    except (ValueError, TypeError, KeyError, AttributeError, PlanError) as error:
        warnings.warn(
            f"the calibration {path} is ignored, the table's figures are used: {error}; "
            "`jaxinfer plan --calibrate` writes it anew",
            stacklevel=2,
        )
        return None
    return hardware


def store_calibration(kind: str, count: int, hardware: Hardware) -> Path:
    """Writes what was measured, whole or not at all.

    Raises:
        JaxInferError: the cache folder can't be written.
    """
    cache_dir()  # the checks and the mode of the folder above
    path = calibration_path(kind, count)
    text = json.dumps({"version": _VERSION, "kind": kind, "count": count, "hardware": dataclasses.asdict(hardware)})
    try:
        path.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as file:
            file.write(text)
        Path(file.name).replace(path)
    except OSError as error:
        raise JaxInferError(
            f"the calibration {path} can't be written: {error.strerror}; set JAXINFER_CACHE to a folder you can write"
        ) from error
    return path


def calibrate(
    devices: Sequence[Any] | None = None, progress: Progress | None = None, base: Hardware | None = None
) -> Hardware:
    """Measures products, memory and all-reduce on devices, all busy at once, and stores it for `hardware_of`.

    It takes seconds to a minute. Devices that share cores, such as virtual CPU devices, measure what each gets.

    Args:
        devices: of one kind; None: all.
        progress: called before each step with its name and the fraction done, and at the end with ("done", 1.0).
        base: whose memory, shape and network are kept; None: the table's entry for these devices or, for a kind that
            it doesn't have, one switch that joins them all.

    Raises:
        PlanError: devices of several kinds.
        JaxInferError: the cache folder can't be written.
    """
    import jax

    chosen = list(jax.devices() if devices is None else devices)
    kinds = sorted({device.device_kind for device in chosen})
    if len(kinds) != 1:
        raise PlanError(f"devices of one kind are calibrated together, got {' and '.join(kinds) or 'none'}")
    say = progress or (lambda step, fraction: None)
    hardware = base or _base(chosen)
    peaks = {}
    for i, (field, dtype) in enumerate((("f32", "float32"), ("bf16", "bfloat16"), ("int8", "int8"))):
        say(f"products in {dtype}", i / 5)
        peaks[field] = _products(chosen, dtype)
    say("memory", 0.6)
    hardware = dataclasses.replace(hardware, **peaks, hbm_bandwidth=_copy(chosen))
    if len(chosen) > 1:
        say("all-reduce", 0.8)
        hardware = fit_all_reduce(hardware, len(chosen), _REDUCED, [_all_reduce(chosen, size) for size in _REDUCED])
    store_calibration(kinds[0], len(chosen), hardware)
    say("done", 1.0)
    return hardware


def fit_all_reduce(hardware: Hardware, count: int, sizes: Sequence[int], seconds: Sequence[float]) -> Hardware:
    """The hardware whose all-reduce over all `count` devices takes what was measured: least squares of
    seconds = latency + bytes x rate, each point weighted by 1/seconds; all levels that the group crosses are scaled
    alike."""
    weights = 1 / np.asarray(seconds)
    matrix = np.stack([np.ones(len(sizes)), np.asarray(sizes, float)], axis=1)
    latency, rate = np.linalg.lstsq(matrix * weights[:, None], np.ones(len(sizes)), rcond=None)[0]
    # Noise may push either below zero; then the smallest and the largest transfer tell it.
    latency = latency if latency > 0 else seconds[0]
    rate = rate if rate > 0 else seconds[-1] / sizes[-1]
    modelled, slope = collective_line("all-reduce", ((count, 1),), hardware)
    inner, links = 1, []
    for link in hardware.links:
        if inner < count:
            faster, slower = slope / rate, latency / modelled
            link = dataclasses.replace(
                link, bandwidth=float(link.bandwidth * faster), latency=float(link.latency * slower)
            )
        inner = max(inner, link.size)
        links.append(link)
    return dataclasses.replace(hardware, links=tuple(links))


def _base(devices: list[Any]) -> Hardware:
    if entry := table_entry(devices):
        return entry
    stats = devices[0].memory_stats() or {}
    memory = int(stats.get("bytes_limit", 16 << 30))
    link = Link(EVERYWHERE, 1e10, 1e-5, "switch")
    name = devices[0].device_kind.lower().replace(" ", "-")
    return Hardware(name, 1e12, 1e12, 1e12, memory, 1e11, (link,), 2e-6)


def _seconds(devices: list[Any], body: Callable[..., Any], shape: tuple[int, ...], dtype: str) -> float:
    """Seconds of one application of body(x) on every device at once, x [shape] on each; the best of some runs."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(devices), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("d")

    def repeated(x: Any) -> Any:
        return jax.lax.scan(lambda y, _: (body(y), None), x[0], None, length=_REPEATS)[0][None]

    mapped = jax.shard_map(repeated, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    run = jax.jit(mapped)
    x = jax.device_put(np.ones((len(devices), *shape), np.dtype(dtype)), NamedSharding(mesh, spec))
    jax.block_until_ready(run(x))
    best, until = math.inf, time.perf_counter() + 0.15
    runs = 0
    while runs < 3 or time.perf_counter() < until:
        start = time.perf_counter()
        jax.block_until_ready(run(x))  # JAX 0.10's CPU collectives hang when steps queue up
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return best / _REPEATS


def _products(devices: list[Any], dtype: str) -> float:
    """FLOP/s of a device in square products; the size doubles until one takes 2 ms."""
    import jax
    import jax.numpy as jnp

    wide = jnp.int32 if dtype == "int8" else None

    def product(x: Any) -> Any:
        return jnp.matmul(x, x, preferred_element_type=wide).astype(x.dtype)

    n = 256
    while True:
        seconds = _seconds(devices, product, (n, n), str(jax.numpy.dtype(dtype)))
        if seconds > 2e-3 or n >= 8192:
            return 2.0 * n**3 / seconds
        n *= 2


def _copy(devices: list[Any]) -> float:
    """Bytes/s of a device that reads an array and writes one, too large for caches on accelerators."""
    n = (16 << 20) if devices[0].platform == "cpu" else (256 << 20)
    return 2.0 * n / _seconds(devices, lambda x: x + 1, (n // 4,), "float32")


def _all_reduce(devices: list[Any], size: int) -> float:
    """Seconds of an all-reduce of `size` bytes over all devices."""
    import jax

    return _seconds(devices, lambda x: jax.lax.psum(x, "d") * 0.5, (size // 4,), "float32")
