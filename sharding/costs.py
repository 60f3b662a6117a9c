"""Seconds that layouts cost: what a value's move from one layout to another takes, and what an equation computes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from jaxinfer.graph import Equation
from jaxinfer.sharding.hardware import Hardware, collective_line
from jaxinfer.sharding.layouts import PARTIAL, REPLICATED, Codes, layout
from jaxinfer.sharding.moves import steps

Shape = tuple[int, ...]
Parts = tuple[int, ...]
How = Literal["gathered", "reduced", "picked"]
Collectives = tuple[tuple[str, tuple[int, ...], float], ...]


@dataclass(frozen=True)
class Costs:
    """Of one mesh on one kind of hardware."""

    hardware: Hardware
    mesh: tuple[int, ...]  # sizes of its axes

    def reshard(self, before: Codes, after: Codes, size: float, shape: Shape, parts: Parts) -> np.ndarray:
        """Seconds to bring a value of `size` bytes from each layout to each other: float [before, after].

        Codes are places in the value, or REPLICATED; before, also PARTIAL: sums that are still to be added up, which
        comes first; the steps of `moves.steps` follow.

        Args:
            parts: how many places each dim of the value has.
        """
        firsts, mine = np.unique(before, axis=0, return_inverse=True)
        lasts, theirs = np.unique(after, axis=0, return_inverse=True)
        table = np.zeros((len(firsts), len(lasts)))
        for i, a in enumerate(firsts.tolist()):
            for j, b in enumerate(lasts.tolist()):
                if a != b:
                    fixed, rate = self._line(tuple(a), tuple(b), shape, parts)
                    table[i, j] = fixed + size * rate
        return table[mine.ravel()][:, theirs.ravel()]

    def freeing(
        self, codes: Codes, gone: Sequence[int], size: float, shape: Shape, parts: Parts, how: How
    ) -> np.ndarray:
        """Seconds to have some places of a value unsharded, by gathering it or by combining what each device
        reduced over them: float [options].

        Args:
            gone: the places.
            size: bytes of the whole value, or of the whole result of the reduction.
        """
        rows, mine = np.unique(codes, axis=0, return_inverse=True)
        found = [self.freed(row, gone, shape, parts, how) for row in rows.tolist()]
        return np.array([self._seconds(collectives, size) for collectives in found])[mine.ravel()]

    def collectives(self, before: Sequence[int], after: Sequence[int], shape: Shape, parts: Parts) -> Collectives:
        """(kind, mesh axes, bytes for each byte of the whole value) of the collectives of one change of layout."""
        return _collectives(tuple(before), tuple(after), shape, parts, self.mesh, self.hardware.reduce_scatter)

    def freed(self, codes: Sequence[int], gone: Sequence[int], shape: Shape, parts: Parts, how: How) -> Collectives:
        """The collectives of one option of `freeing`."""
        if how == "gathered":
            return self.collectives(codes, [REPLICATED if code in gone else code for code in codes], shape, parts)
        axes = tuple(m for m, code in enumerate(codes) if code in gone)
        held = math.prod(n for n, code in zip(self.mesh, codes, strict=True) if code >= 0 and code not in gone)
        if how == "reduced":
            return (("all-reduce", axes, 1 / held),) if axes else ()
        candidates = math.prod(self.mesh[m] for m in axes)  # values and their places, of each device
        return (("all-gather", axes, candidates / held),) * 2 if axes else ()

    def _line(self, before: tuple[int, ...], after: tuple[int, ...], shape: Shape, parts: Parts) -> tuple[float, float]:
        return _line(before, after, shape, parts, self.mesh, self.hardware)

    def _seconds(self, collectives: Collectives, size: float) -> float:
        fixed, rate = _sum(collectives, self.mesh, self.hardware)
        return fixed + size * rate


def _sum(collectives: Collectives, mesh: tuple[int, ...], on: Hardware) -> tuple[float, float]:
    """(seconds, seconds a byte of the whole value)"""
    fixed, rate = 0.0, 0.0
    for kind, axes, part in collectives:
        factors = tuple((mesh[m], math.prod(mesh[m + 1 :])) for m in axes)
        latency, slope = collective_line(kind, factors, on)
        fixed, rate = fixed + on.launch + latency, rate + slope * part
    return fixed, rate


@lru_cache(maxsize=1 << 17)
def _line(
    before: tuple[int, ...], after: tuple[int, ...], shape: Shape, parts: Parts, mesh: tuple[int, ...], on: Hardware
) -> tuple[float, float]:
    return _sum(_collectives(before, after, shape, parts, mesh, on.reduce_scatter), mesh, on)


def _collectives(
    before: tuple[int, ...], after: tuple[int, ...], shape: Shape, parts: Parts, mesh: tuple[int, ...], scatter: bool
) -> Collectives:
    there = layout(after, parts)
    here = layout(before, parts)
    moves = steps(here, there, shape, mesh)
    found = [(s.kind, s.axes, s.part) for s in moves if s.kind]
    if summed := tuple(m for m, code in enumerate(before) if code == PARTIAL):
        # Whoever then keeps but its slice of the sums needs no more than a reduce-scatter, if the backend has one.
        sliced = moves[0].axes if moves and not moves[0].kind else ()
        kind = "reduce-scatter" if scatter and set(summed) <= set(sliced) else "all-reduce"
        held = math.prod(mesh[m] for dim in here for m in dim)
        found.insert(0, (kind, summed, 1 / held))
    return tuple(found)


def flops(equation: Equation) -> float:
    """Of a product or convolution: a multiplication and an addition each; 0 for others."""
    out = math.prod(equation.outputs[0].shape)
    if equation.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2.0 * out * math.prod(equation.inputs[0].shape[d] for d in contracted)
    if equation.name == "conv_general_dilated":
        feature = equation.params["dimension_numbers"].rhs_spec[0]
        kernel = equation.inputs[1].shape
        return 2.0 * out * math.prod(kernel) / kernel[feature]
    return 0.0
