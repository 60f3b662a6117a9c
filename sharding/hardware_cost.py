"""The cost model: seconds that arithmetic and collectives take on a kind of hardware. Pure functions."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from jaxinfer.errors import PlanError
from jaxinfer.sharding.hardware_table import Hardware, Link

__all__ = ["COLLECTIVES", "collective_line", "collective_time", "compute_time"]

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

Stride = int | Sequence[tuple[int, int]]


def compute_time(flops: Any, bytes: Any, dtype: Any, hardware: Hardware) -> Any:
    """Seconds of a program on one device: max(flops / peak, bytes / HBM bandwidth) + launch.

    Args:
        flops: floating-point operations, a multiplication and an addition being two; a float or an array.
        bytes: read from and written to memory; likewise.
        dtype: of the products' operands.
    """
    return np.maximum(flops / hardware.peak(dtype), bytes / hardware.hbm_bandwidth) + hardware.launch


def collective_time(kind: str, bytes: Any, group_size: int, hardware: Hardware, stride: Stride = 1) -> Any:
    """Seconds of one collective, all groups of the mesh running it at once.

    Args:
        kind: one of COLLECTIVES.
        bytes: on one device. all-reduce, reduce-scatter, all-to-all, collective-permute: the operand's;
            all-gather: the full result's. A float or an array.
        group_size: devices of a group; 1 costs nothing.
        stride: how far apart in device ids neighbours of the group are: it tells which links they use. A group over
            several mesh axes that aren't adjacent gives a (size, stride) pair for each instead.

    Raises:
        PlanError: an unknown kind.
    """
    factors = ((group_size, stride),) if isinstance(stride, int) else tuple((int(n), int(s)) for n, s in stride)
    latency, rate = collective_line(kind, factors, hardware)
    return latency + bytes * rate


@lru_cache(maxsize=4096)
def collective_line(kind: str, factors: tuple[tuple[int, int], ...], hardware: Hardware) -> tuple[float, float]:
    """(seconds, seconds a byte) of a collective over a group: its time is the first + bytes x the second.

    With n devices on a switch, links of W bytes/s and steps of alpha seconds:

        all-gather, reduce-scatter   ceil(log2 n) alpha + (n-1)/n bytes / W
        all-reduce                   twice that
        all-to-all                   ceil(log2 n) alpha + (n-1)/n bytes / W
        collective-permute           alpha + bytes / W

    On a ring both directions carry: n/2 hops, 2 W, and for all-to-all n/8 bytes / W, since a byte crosses n/4 links on
    average. On a line without the wrap-around link: n-1 hops, W, and n/4 bytes / W through the middle. Groups that
    interleave on one torus axis share its links. Levels are crossed one after the other, each with what the levels
    inside leave to it (an all-reduce over 2 hosts of 8 sends 1/8 over the network); the axes of one torus at once, each
    with its share.
    """
    if kind not in COLLECTIVES:
        raise PlanError(f"the cost model knows the collectives {', '.join(COLLECTIVES)}, got {kind!r}")
    levels = _levels(factors, hardware.links)
    if not levels:
        return 0.0, 0.0
    if kind == "collective-permute":
        link, _, gap, _ = levels[-1]
        return link.latency * gap, gap / link.bandwidth
    exchange = kind == "all-to-all"
    hops, network, torus = 0.0, 0.0, []
    share = 1.0  # of the bytes that reach this level
    for link, n, gap, closed in levels:
        hops += link.latency * _hops(link, n, gap, closed)
        seconds = _traffic(link, n, closed, exchange) * gap * share / link.bandwidth
        share = share if exchange else share / n
        if link.topology == "switch":
            network += seconds
        else:
            torus.append(seconds)
    if torus:
        network += max(torus) if exchange else sum(torus) / len(torus)
    twice = 2 if kind == "all-reduce" else 1
    return hops * twice, network * twice


def _levels(factors: tuple[tuple[int, int], ...], links: tuple[Link, ...]) -> list[tuple[Link, int, int, bool]]:
    """(link, devices of the group along it, how far apart they are on it, whether they close a ring) of each level."""
    levels, inner = [], 1
    for link in links:
        n, gap = 1, 0
        for size, stride in sorted(factors, key=lambda factor: factor[1]):
            start, stop = max(inner, stride), min(link.size, stride * size)
            if stop > start:
                n *= math.ceil(stop / start)
                gap = gap or start // inner
        if n > 1:
            spread = gap if link.topology != "switch" else 1
            levels.append((link, n, spread, link.topology == "ring" and n * gap * inner >= link.size))
        inner = max(inner, link.size)
    return levels


def _hops(link: Link, n: int, gap: int, closed: bool) -> int:
    if link.topology == "switch":
        return math.ceil(math.log2(n))
    return gap * (n // 2 if closed else n - 1)


def _traffic(link: Link, n: int, closed: bool, exchange: bool) -> float:
    """Bytes through the busiest link in one direction, for each byte of the collective."""
    if not exchange or link.topology == "switch":
        return (n - 1) / n / (2 if closed else 1)
    crossing = (n // 2) * ((n + 1) // 2)  # pairs on two sides of a cut, and the sum of a device's distances on a ring
    return crossing / n / (2 if closed else 1)
