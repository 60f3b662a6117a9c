"""Padding a batch up to a bucket: only along dims where it provably changes nothing, or where the caller vouches.

- A dim whose rows are proved independent is padded with repeats of its last row: values that the forward is known to
  take, so that padding can neither be slow (a loop that never ends on zeros) nor trip a check for NaN.
- A dim in `masked` is padded with zeros: its rows mix, and the caller says that the model's own mask hides the zeros.
- Any other dim is never padded; sizes that are buckets still run.

Both claims are checked by running what is compiled anyhow, once, before a bucket is first padded to; a bucket that
nothing is padded to costs nothing. The outcome is kept on disk beside the executables.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import cache, specs
from jaxinfer.axes import report
from jaxinfer.buckets import padded_to
from jaxinfer.errors import BatchMixingError, JaxInferError
from jaxinfer.program import Program

# (inputs of a bucket's shapes, the bucket) -> the flat outputs
Run = Callable[[Sequence[Any], Mapping[str, int]], Sequence[Any]]


@dataclass(eq=False)
class Padding:
    """Which dims of a program may be padded, and the padding itself."""

    program: Program
    buckets: Mapping[str, Sequence[int]]
    masked: frozenset[str]
    device: Any
    # (dim, bucket) -> "" or why it can't be padded, as far as it was found out; what a bundle keeps.
    found: dict[tuple[str, int], str] = field(default_factory=dict)

    def require(self, axis: str, bucket: int, size: int, run: Run) -> None:
        """Checks, once a bucket, that padding a dim up to it changes no result of the real rows.

        Raises:
            BatchMixingError: it does, or nothing proves the contrary; says which equation mixes the rows.
        """
        refusal = self.refusal(axis, bucket, run)
        if refusal:
            raise BatchMixingError(
                f"{self.program.name}: {axis} of {size} is none of the buckets {list(self.buckets[axis])}, and padding "
                f"{axis!r} up to {bucket} would change the results of the real rows. {refusal}"
            )

    def refusal(self, axis: str, bucket: int, run: Run) -> str:
        """Why a dim can't be padded up to a bucket; "" where it can."""
        if (axis, bucket) not in self.found:
            self.found[axis, bucket] = self._decide(axis, bucket, run)
        return self.found[axis, bucket]

    def padded_to(self, axis: str) -> list[int]:
        """The buckets that some size is padded up to."""
        return padded_to(self.buckets[axis])

    def _decide(self, axis: str, bucket: int, run: Run) -> str:
        key = cache.key_of(
            self.program.fingerprint,
            {"padding": axis, "bucket": bucket, "masked": axis in self.masked, "buckets": list(self.buckets[axis])},
            self.device,
        )
        if cache.load_note(key) == "safe":
            return ""
        refusal = self._masked(axis, bucket, run) if axis in self.masked else self._proved(axis, bucket, run)
        if not refusal:
            cache.store_note(key, "safe")
        return refusal

    def _proved(self, axis: str, bucket: int, run: Run) -> str:
        verdict = self.program.verdict(axis)
        if verdict.independent:
            verdict = report.verdict_at(self.program, axis, bucket)
        if verdict.mixed is not None:
            return f"{report.reason(self.program, verdict)}. {report.advice(axis)}"
        if not report.has_loops(self.program):
            cross_check(self.program, axis, self._smallest(axis, bucket), run)
        return ""

    def _smallest(self, axis: str, size: int) -> dict[str, int]:
        return {name: size if name == axis else ladder[0] for name, ladder in self.buckets.items()}

    def _masked(self, axis: str, bucket: int, run: Run) -> str:
        """Compares a run at an exact size with one padded up to the bucket, on random inputs."""
        below = [b for b in self.buckets[axis] if 1 < b < bucket]
        exact = self._smallest(axis, below[-1] if below else bucket - 1)
        random = np.random.default_rng(0)
        arrays = [_random(random, leaf, exact) for leaf in specs.leaves(self.program.inputs)]
        padded = self.pad(arrays, self._smallest(axis, bucket))
        names = _output_dims(self.program)
        pairs = zip(run(arrays, exact), run(padded, self._smallest(axis, bucket)), names, strict=True)
        if all(_close(want, cut(got, dims, exact), 1e-3) for want, got, dims in pairs):
            return ""
        return (
            f"It was said to be masked, but a run on {exact[axis]} of {axis!r} and one padded with zeros to {bucket} "
            "differ: the model's mask doesn't hide the padding. Is it among the inputs, and 0 where there is padding?"
        )

    def pad(self, arrays: Sequence[Any], bucket: Mapping[str, int]) -> list[Any]:
        """Inputs of a bucket's shapes, padded in numpy: padding a jax.Array would compile a program for every size."""
        padded = []
        for leaf, value in zip(specs.leaves(self.program.inputs), arrays, strict=True):
            shape = leaf.shape(bucket)
            if np.shape(value) != shape:
                value = np.asarray(value)
                for zeros in (True, False):  # what is repeated has its masked dims whole
                    value = _grow(value, leaf, shape, [(d in self.masked) == zeros for d in leaf.dims], zeros)
            padded.append(value)
        return padded


def _grow(value: np.ndarray, leaf: specs.Spec, shape: tuple[int, ...], chosen: Sequence[bool], zeros: bool) -> Any:
    widths = [(0, n - m if pick else 0) for n, m, pick in zip(shape, value.shape, chosen, strict=True)]
    if not any(after for _, after in widths):
        return value
    return np.pad(value, widths, mode="constant" if zeros else "edge")


def cross_check(program: Program, axis: str, bucket: Mapping[str, int], run: Run) -> None:
    """Changes one row of random inputs, then poisons it with NaN: no other row's results may change.

    Raises:
        JaxInferError: they do, against the proof.
    """
    random = np.random.default_rng(0)
    leaves = specs.leaves(program.inputs)
    arrays = [_random(random, leaf, bucket) for leaf in leaves]
    row = bucket[axis] // 2
    before = [np.asarray(x) for x in run(arrays, bucket)]
    for poison in (False, True):
        changed = [_with_row(a, leaf, axis, row, poison, random) for a, leaf in zip(arrays, leaves, strict=True)]
        after = run(changed, bucket)
        for number, (a, b, dims) in enumerate(zip(before, after, _output_dims(program), strict=True)):
            one, two = ((np.delete(x, row, dims.index(axis)) if axis in dims else x) for x in (a, np.asarray(b)))
            if not _close(one, two, 1e-5):
                raise JaxInferError(
                    f"internal error: {program.name} is proved to keep the rows of {axis!r} apart, yet changing row "
                    f"{row} of {bucket[axis]}{' to NaN' if poison else ''} changes other rows of output {number}. "
                    "Please report this with the forward; until then compile the exact sizes you need"
                )


def _with_row(value: Any, leaf: specs.Spec, axis: str, row: int, poison: bool, random: np.random.Generator) -> Any:
    if axis not in leaf.dims:
        return value
    where = (slice(None),) * leaf.dims.index(axis) + (row,)
    value = np.array(value)
    if jnp.issubdtype(leaf.dtype, np.inexact):
        value[where] = np.nan if poison else random.standard_normal(value[where].shape)
    else:
        value[where] = 1 - value[where]
    return value


def _random(random: np.random.Generator, leaf: specs.Spec, sizes: Mapping[str, int]) -> np.ndarray:
    """Floats from a normal distribution; integers 0 or 1, which are in range whatever they index or mask."""
    if jnp.issubdtype(leaf.dtype, np.inexact):
        return random.standard_normal(leaf.shape(sizes)).astype(leaf.dtype)
    return random.integers(0, 2, leaf.shape(sizes)).astype(leaf.dtype)


def _close(want: Any, got: Any, tolerance: float) -> bool:
    a, b = (np.asarray(x) for x in (want, got))
    kind = np.complex128 if a.dtype.kind == "c" else np.float64
    a, b = a.astype(kind), b.astype(kind)
    scale = np.abs(a[np.isfinite(a)]).max(initial=0) + 1e-6
    return a.shape == b.shape and np.allclose(a, b, rtol=tolerance, atol=tolerance / 10 * scale, equal_nan=True)


def _output_dims(program: Program) -> list[Any]:
    return jax.tree.leaves(program.output_axes)


def cut(result: Any, dims: Sequence[str | int], sizes: Mapping[str, int]) -> np.ndarray:
    """The real part of a padded result."""
    return np.asarray(result)[tuple(slice(sizes[d]) if isinstance(d, str) else slice(None) for d in dims)]
