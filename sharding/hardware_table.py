"""What accelerators are: peak arithmetic, memory, and how devices are joined.

A device is what JAX calls one: a TPU v4 or v5p chip (two TensorCores fused), one of the two chiplets of a TPU7x chip, a
GPU, a virtual CPU device. Rates are a device's own and dense (no sparsity); bandwidths are bytes a second in one
direction.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from jaxinfer.errors import PlanError

__all__ = ["EVERYWHERE", "TABLE", "Hardware", "Link", "dtype_class", "table_entry"]

EVERYWHERE = 1 << 40  # the size of a link that joins all devices there are
_TOPOLOGIES = ("line", "ring", "switch")


@dataclass(frozen=True)
class Link:
    """One level of how devices are joined.

    Attributes:
        size: devices within one such level, those of inner levels included; device ids count from the inside out.
        bandwidth: bytes/s of a device into this level, one direction. On a "ring" or "line" of one link of the torus.
        latency: seconds of one hop (ring, line) or of one step of an exchange (switch).
        topology: "ring" | "line" (a torus axis with or without its wrap-around link) | "switch".
    """

    size: int
    bandwidth: float
    latency: float
    topology: str

    def __post_init__(self) -> None:
        if self.topology not in _TOPOLOGIES or self.size < 1 or not self.bandwidth > 0 or not self.latency >= 0:
            raise PlanError(
                f"a link has a size from 1, a bandwidth above 0, a latency from 0 and one of the topologies "
                f"{', '.join(_TOPOLOGIES)}, got {self.size}, {self.bandwidth}, {self.latency}, {self.topology!r}"
            )


@dataclass(frozen=True)
class Hardware:
    """One kind of device, and how `links[-1].size` of them are joined.

    Attributes:
        f32, bf16, int8: peak FLOP/s of products at JAX's default precision; f16: where it differs from bf16.
        hbm: bytes of memory that a program may use.
        hbm_bandwidth: bytes/s.
        links: levels from the inside out; the last one joins everything.
        launch: seconds that a program costs besides its work.
        reduce_scatter: whether the SPMD partitioner makes reduce-scatters; on CPU it leaves all-reduce + slice.
        axes: axes of the torus, 0 where there is none. wrap: a torus axis closes into a ring at multiples of this.
        pod: most devices that one torus joins.
    """

    name: str
    f32: float
    bf16: float
    int8: float
    hbm: int
    hbm_bandwidth: float
    links: tuple[Link, ...]
    launch: float
    reduce_scatter: bool = True
    f16: float | None = None
    axes: int = 0
    wrap: int = 0
    pod: int = 0

    def peak(self, dtype: object) -> float:
        """FLOP/s of products of a dtype: a NumPy or JAX dtype, its name, or HLO's ("bf16", "s8", "f8e4m3fn")."""
        return {"int8": self.int8, "f16": self.f16 or self.bf16, "bf16": self.bf16}.get(dtype_class(dtype), self.f32)

    def laid_out(self, count: int, shape: tuple[int, ...] | None = None) -> "Hardware":
        """The same with its torus cut to a slice of `count` devices; without a torus, itself.

        Args:
            shape: chips along each axis, the axis whose neighbours have neighbouring ids first; None: as Google cuts
                slices of that many chips (8 -> 2x4, on three axes 2x2x2).
        """
        if not self.axes:
            return self
        inner = [link for link in self.links if link.topology == "switch" and link.size < EVERYWHERE]
        torus = next(link for link in self.links if link.topology != "switch")
        size = inner[-1].size if inner else 1
        chips = shape or _slice_shape(math.ceil(min(count, self.pod) / size), self.axes)
        # v4, v5p and v7 close rings by optical switches between cubes of 4x4x4: all axes or none.
        cubes = self.axes < 3 or all(n % self.wrap == 0 for n in chips)
        levels = []
        for n in chips:
            if n > 1:
                size *= n
                levels.append(replace(torus, size=size, topology="ring" if cubes and n % self.wrap == 0 else "line"))
        return replace(self, links=(*inner, *(levels or [replace(torus, size=size)]), self.links[-1]))


def _slice_shape(chips: int, axes: int) -> tuple[int, ...]:
    """The most cubic shape: prime factors, the largest first, to the axis that is shortest so far."""
    shape, factor = [1] * axes, 2
    factors = []
    while chips > 1:
        if chips % factor:
            factor += 1
        else:
            factors.append(factor)
            chips //= factor
    for factor in reversed(factors):
        shape[shape.index(min(shape))] *= factor
    return tuple(sorted(shape))


def dtype_class(dtype: object) -> str:
    """ "int8" | "f16" | "bf16" | "f32": which peak a dtype's products run at; what is wider than 16 bits is f32."""
    name = dtype if isinstance(dtype, str) else str(np.dtype(cast(Any, dtype)))
    name = name.lower().replace("float", "f").replace("uint", "u").replace("int", "s")
    if name in ("f16", "bf16"):
        return name
    return "int8" if name.startswith(("s8", "u8", "s4", "u4", "s2", "u2", "f8", "f4")) else "f32"


def _tpu(name: str, bf16: float, int8: float, gib: float, bandwidth: float, ici: float, dcn: float, **more) -> Hardware:
    # Latencies: about 1 us a hop on ICI (scaling book, "Sharded matrices", worked problem 2); 10 us over the data
    # centre network and 1 us a program are estimates.
    links = (*more.pop("inner", ()), Link(1, ici, 1e-6, "line"), Link(EVERYWHERE, dcn, 1e-5, "switch"))
    # JAX's default precision runs f32 products as one bf16 pass on TPU.
    return Hardware(name, bf16, bf16, int8, int(gib * 2**30), bandwidth, links, 1e-6, **more)


def _gpu(
    name: str, f32: float, bf16: float, int8: float, hbm: float, bandwidth: float, *links: Link, **more
) -> Hardware:
    # 2 us to launch a program's kernels as a CUDA graph is an estimate.
    return Hardware(name, f32, bf16, int8, int(hbm), bandwidth, links, 2e-6, **more)


def _nvlink(bandwidth: float, network: float) -> tuple[Link, Link]:
    # NCCL's tables (src/graph/tuning.cc, LL protocol) give an all-reduce 6.6 us + 0.6 us a hop on NVLink: 15 us on 8
    # devices, that is 2 x 3 steps of 2.5 us; between hosts 2.7 us a hop more.
    return Link(8, bandwidth, 2.5e-6, "switch"), Link(EVERYWHERE, network, 5e-6, "switch")


# TPU peaks, HBM bandwidth: docs.cloud.google.com/tpu/docs/{v4,v5p,v5e,v6e,tpu7x}; int8 of v5p and ICI per link and
# direction, DCN per device and direction: jax-ml.github.io/scaling-book/tpus, "TPU specs". Memory is what libtpu 0.0.42
# gives a program ("exceeds available HBM (15.75G)"); the chips have 32, 16, 95, 32 and 192 GiB.
# GPU peaks, dense (from A100 on the datasheets print twice as much, with sparsity), f32 in TF32, JAX's default there:
# NVIDIA's datasheets A100 (nvidia-1758950-r4), H100, H200, HGX B200, L4, T4. Memory is the datasheet's, in units of
# 10^9; the driver shows up to 7 % more. NVLink: half the datasheet's bidirectional figure. The network is one NIC a GPU
# as in DGX systems: HDR 200 Gb/s (A100), NDR 400 Gb/s (later ones).
# One 100 Gb/s NIC shared by 8 devices, and the latencies, are estimates.
_PCIE4 = (Link(8, 3.15e10, 1e-5, "switch"), Link(EVERYWHERE, 1.6e9, 2e-5, "switch"))
_ENTRIES = (
    _tpu("tpu-v4", 2.75e14, 2.75e14, 30.75, 1.2e12, 4.5e10, 6.25e9, axes=3, wrap=4, pod=4096),
    _tpu("tpu-v5e", 1.97e14, 3.93e14, 15.75, 8.19e11, 4.5e10, 3.125e9, axes=2, wrap=16, pod=256),
    _tpu("tpu-v5p", 4.59e14, 9.18e14, 95.74, 2.765e12, 9e10, 6.25e9, axes=3, wrap=4, pod=8960),
    _tpu("tpu-v6e", 9.18e14, 1.836e15, 31.25, 1.64e12, 9e10, 1.25e10, axes=2, wrap=16, pod=256),
    # Two devices share a chip's figures and ICI links; between them is six times an ICI link (tpu7x page).
    # No int8 figure is published: fp8's is taken for both.
    _tpu(
        "tpu-v7", 1.1535e15, 2.307e15, 94.75, 3.69e12, 4.5e10, 6.25e9, axes=3, wrap=4, pod=18432,
        inner=(Link(2, 5.4e11, 1e-6, "switch"),),
    ),
    _gpu("a100-40gb", 1.56e14, 3.12e14, 6.24e14, 40e9, 1.555e12, *_nvlink(3e11, 2.5e10)),
    _gpu("a100-80gb", 1.56e14, 3.12e14, 6.24e14, 80e9, 2.039e12, *_nvlink(3e11, 2.5e10)),
    _gpu("h100", 4.945e14, 9.89e14, 1.979e15, 80e9, 3.35e12, *_nvlink(4.5e11, 5e10)),
    _gpu("h200", 4.945e14, 9.89e14, 1.979e15, 141e9, 4.8e12, *_nvlink(4.5e11, 5e10)),
    _gpu("b200", 1.1e15, 2.25e15, 4.5e15, 180e9, 8e12, *_nvlink(9e11, 5e10)),
    # No NVLink: PCIe 4.0 x16 and 3.0 x16 (T4) through the host.
    _gpu("l4", 6e13, 1.21e14, 2.425e14, 24e9, 3e11, *_PCIE4),
    # bf16 isn't native on T4 and runs as f32.
    _gpu(
        "t4", 8.1e12, 8.1e12, 1.3e14, 16e9, 3.2e11,
        replace(_PCIE4[0], bandwidth=1.575e10), _PCIE4[1], f16=6.5e13,
    ),
    # Nominal, for want of a datasheet: a virtual device as one server core with its share of the memory's bandwidth,
    # that "sends" by copying. Calibrate where it matters.
    Hardware(
        "cpu", 1e11, 1e11, 1e11, 16 * 2**30, 2e10, (Link(EVERYWHERE, 1e10, 5e-6, "switch"),), 1e-6, reduce_scatter=False
    ),
)  # fmt: skip

TABLE: dict[str, Hardware] = {entry.name: entry for entry in _ENTRIES}

# What jax.Device.device_kind says, by its first words; the longest match counts.
_KINDS = {
    "TPU v4": "tpu-v4",
    "TPU v5 lite": "tpu-v5e",
    "TPU v5e": "tpu-v5e",
    "TPU v5": "tpu-v5p",
    "TPU v5p": "tpu-v5p",
    "TPU v6 lite": "tpu-v6e",
    "TPU v6e": "tpu-v6e",
    "TPU7x": "tpu-v7",
    "TPU v7": "tpu-v7",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "NVIDIA A100": "a100-80gb",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA L4": "l4",
    "Tesla T4": "t4",
    "NVIDIA T4": "t4",
    "cpu": "cpu",
}


def table_entry(devices: list[Any]) -> Hardware | None:
    """The table's figures for JAX devices of one kind, laid out for them, or None where it has none."""
    kind = str(devices[0].device_kind)
    prefix = max((known for known in _KINDS if re.match(rf"{known}(?!\w)", kind)), key=len, default=None)
    return None if prefix is None else TABLE[_KINDS[prefix]].laid_out(len(devices), _slice_of(devices))


def _slice_of(devices: list[Any]) -> tuple[int, ...] | None:
    """Chips along each axis of the TPU slice that the devices fill, or None where they fill none."""
    if not all(hasattr(device, "coords") for device in devices):
        return None
    coords = {tuple(device.coords) for device in devices}
    shape = tuple(len({c[axis] for c in coords}) for axis in range(len(next(iter(coords)))))
    filled = 1
    for n in shape:
        filled *= n
    return shape if filled == len(coords) else None
