"""Rows: what one request of an Executable looks like, and how requests become a batch and outputs results again."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from jaxinfer import _jax, specs
from jaxinfer.errors import RequestError
from jaxinfer.executable import Executable
from jaxinfer.runtime.copying import owned, snapshot, write
from jaxinfer.runtime.request import Batch
from jaxinfer.runtime.staging import Staging
from jaxinfer.specs import Spec

Sizes = tuple[tuple[str, int], ...]  # of named dims


@dataclass(frozen=True, eq=False)
class Row:
    """The checked inputs of one request: an array for each flat input that has a batch dim, without it."""

    arrays: Sequence[np.ndarray]
    sizes: Sizes  # of their named dims


@dataclass(frozen=True, eq=False)
class Shared:
    """The inputs without a batch dim, as they were bound: an array for each such flat input."""

    arrays: Sequence[np.ndarray] = ()
    sizes: Sizes = ()


class Rows:
    """The form of an Executable's requests. Its methods may be called by any thread."""

    def __init__(self, executable: Executable):
        self._name, self._inputs = executable.program.name, executable.program.inputs
        self.leaves = specs.leaves(self._inputs)
        self.batched = [leaf for leaf in self.leaves if "batch" in leaf.dims]
        self._masked = executable.padding.masked
        self._function = getattr(executable.program, "function", None)
        rows = (_without(tree, "batch") for tree in self._inputs)
        self._trees = tuple(tree for tree in rows if tree is not None)
        self._structure = jax.tree.structure(self._trees, is_leaf=specs.is_spec)
        self._dims = [tuple(d for d in leaf.dims if d != "batch") for leaf in self.batched]
        dims, self._results = jax.tree.flatten(executable.program.output_axes)
        self.output_dims: list[tuple[str | int, ...]] = [tuple(d) for d in dims]
        self._cuts = [_cutter(d) for d in self.output_dims]

    @property
    def inputs(self) -> int:
        """How many positional inputs a request has."""
        return len(self._trees)

    def check(self, row: tuple[Any, ...]) -> Row:
        """The inputs of one request, copied: their caller may write into its arrays again.

        Raises:
            RequestError: another structure, shape or dtype, or integers that the dtype can't hold.
        """
        try:
            values = self._structure.flatten_up_to(row)
        except (ValueError, TypeError, KeyError):
            raise RequestError(f"a request of {self._name} is {self}, got {_described(row)}") from None
        sizes: dict[str, int] = {}
        arrays = []
        for leaf, dims, value in zip(self.batched, self._dims, values, strict=True):
            array = _array(value, leaf.dtype)
            if array is None or array.ndim != len(dims):
                raise RequestError(f"a request of {self._name} is {self}, without a batch dim; got {_described(row)}")
            for dim, size in zip(dims, array.shape, strict=True):
                expected = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
                if size != expected or not size:
                    raise RequestError(
                        f"a request of {self._name} is {self}: {dim} should be {expected or 'at least 1'}, got {size} "
                        f"in {array.shape}"
                    )
            arrays.append(array)
        return Row(arrays, tuple(sizes.items()))

    @cached_property
    def shared(self) -> dict[str, Spec]:
        """The inputs without a batch dim by the names that `bind` takes, in flattening order."""
        given = []
        if self._function is not None:
            try:
                given = list(inspect.signature(self._function).parameters.values())[1:]
            except (TypeError, ValueError):  # a callable without a signature
                given = []
        plain = [p.name for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        found: dict[str, Spec] = {}
        for place, tree in enumerate(self._inputs):
            base = plain[place] if place < len(plain) else f"input{place}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=specs.is_spec):
                if "batch" in leaf.dims:
                    continue
                name = str(getattr(path[-1], "key", getattr(path[-1], "idx", ""))) if path else base
                name = name if name.isidentifier() and name not in found else f"{base}_{len(found)}"
                found[name] = leaf
        return found

    def bound(self, before: Shared | None, values: Mapping[str, Any]) -> Shared:
        """The shared inputs with new values for some of them.

        Raises:
            RequestError: an unknown name, one that never got a value, another shape or dtype.
        """
        if unknown := set(values) - set(self.shared):
            raise RequestError(
                f"bind({', '.join(sorted(unknown))}): {self._name} has "
                + (f"the shared inputs {sorted(self.shared)}" if self.shared else "no inputs without a batch dim")
            )
        known = dict(zip(self.shared, before.arrays, strict=True)) if before is not None else {}
        sizes: dict[str, int] = {}
        for name, leaf in self.shared.items():
            if name in values:
                array = _array(values[name], leaf.dtype)
                if array is None or array.ndim != len(leaf.dims):
                    raise RequestError(f"bind({name}=...): {leaf} is wanted, got {_described(values[name])}")
                known[name] = array
            elif name not in known:
                raise RequestError(f"bind: {name} ({leaf}) has no value yet; bind all of {sorted(self.shared)} at once")
            for dim, size in zip(leaf.dims, known[name].shape, strict=True):
                expected = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
                if size != expected or not size:
                    raise RequestError(f"bind({name}=...): {leaf} is wanted, got {dim} of {size}")
        return Shared([known[name] for name in self.shared], tuple(sizes.items()))

    def stack(self, batch: Batch, staging: Staging) -> list[np.ndarray]:
        """For each batched input an array of the batch's bucket, taken from `staging`.

        Rows are padded as `padding` pads: dims that a mask covers with zeros, others with repeats of their last entry;
        and so is the batch, with its last row."""
        bucket = dict(batch.shape)
        stacked = []
        for number, leaf in enumerate(self.batched):
            whole = staging.take(leaf.shape(bucket), leaf.dtype)
            rows = np.moveaxis(whole, leaf.dims.index("batch"), 0)
            zeros = [dim in self._masked for dim in self._dims[number]]
            for place, request in enumerate(batch.requests):
                _fill(rows[place, ...], request.payload.arrays[number], zeros)
            rows[len(batch.requests) :] = rows[len(batch.requests) - 1]
            stacked.append(whole)
        return stacked

    def pad(self, shared: Shared, bucket: Mapping[str, int]) -> list[np.ndarray]:
        """The shared inputs at the sizes of a bucket."""
        padded = []
        for leaf, array in zip(self.shared.values(), shared.arrays, strict=True):
            whole = np.empty(leaf.shape(bucket), leaf.dtype)
            _fill(whole, array, [dim in self._masked for dim in leaf.dims])
            padded.append(whole)
        return padded

    def merge(self, batched: Sequence[Any], shared: Sequence[Any]) -> list[Any]:
        """All flat inputs in their order."""
        with_rows, without = iter(batched), iter(shared)
        return [next(with_rows) if "batch" in leaf.dims else next(without) for leaf in self.leaves]

    def made_up(self, shape: Sizes, random: np.random.Generator) -> list[np.ndarray]:
        """Inputs of a bucket to try an executable with: normal floats, integers 0 or 1, in range whatever they do."""
        sizes, drawn = dict(shape), []
        for leaf in self.leaves:
            real = jax.numpy.issubdtype(leaf.dtype, np.inexact)
            values = random.standard_normal(leaf.shape(sizes)) if real else random.integers(0, 2, leaf.shape(sizes))
            drawn.append(np.asarray(values).astype(leaf.dtype))
        return drawn

    def cut(self, outputs: Sequence[np.ndarray], place: int, sizes: Mapping[str, int]) -> Any:
        """The result of the row at a place: a pytree of arrays of its own, writable, holding on to nothing else."""
        leaves = [owned(np.asarray(cut(output, place, sizes))) for cut, output in zip(self._cuts, outputs, strict=True)]
        return jax.tree.unflatten(self._results, leaves)

    def __str__(self) -> str:
        listed = [f"{leaf.dtype}[{' '.join(map(str, d))}]" for leaf, d in zip(self.batched, self._dims, strict=True)]
        return ", ".join(listed)


def _without(tree: Any, name: str) -> Any:
    """The specs that have this dim: others fall out of dicts, and leave None elsewhere; None if nothing is left."""
    if specs.is_spec(tree):
        return tree if name in tree.dims else None
    if isinstance(tree, dict):
        kept = {key: _without(value, name) for key, value in tree.items()}
        return {key: value for key, value in kept.items() if value is not None} or None
    pruned = jax.tree.map(lambda leaf: leaf if name in leaf.dims else None, tree, is_leaf=specs.is_spec)
    return pruned if jax.tree.leaves(pruned, is_leaf=specs.is_spec) else None


def _array(value: Any, dtype: np.dtype) -> np.ndarray | None:
    """A copy in this dtype; None where JAX would take the value in another one, or it is no array at all."""
    if isinstance(value, np.ndarray) and value.dtype == dtype:
        return snapshot(value)
    try:
        array = np.asarray(value)
        if array.dtype.kind in "OUSM" or _jax.dtype_of(array) != dtype:
            return None
    except (ValueError, TypeError):
        return None
    if array.dtype.kind in "iu" and array.dtype != dtype and array.size:
        limits, least, most = np.iinfo(dtype), array.min(), array.max()
        if least < limits.min or most > limits.max:
            raise RequestError(f"integers from {least} to {most} don't fit {dtype}, which the model takes")
    # A jax.Array never changes, so numpy's view of it may be kept.
    return array.astype(dtype, copy=not isinstance(value, jax.Array))


def _fill(into: np.ndarray, value: np.ndarray, zeros: Sequence[bool]) -> None:
    """Writes an array into the corner of a larger one and pads it: along some dims with zeros, then along the others
    with repeats of the last entry."""
    if into.shape == value.shape:
        write(into, value)
        return
    region = [slice(0, size) for size in value.shape]
    into[tuple(region)] = value
    for dim in sorted(range(value.ndim), key=lambda dim: not zeros[dim]):
        size = value.shape[dim]
        if size < into.shape[dim]:
            rest, last = list(region), list(region)
            rest[dim], last[dim] = slice(size, None), slice(size - 1, size)
            into[tuple(rest)] = 0 if zeros[dim] else into[tuple(last)]
        region[dim] = slice(None)


def _cutter(dims: tuple[str | int, ...]) -> Callable[[np.ndarray, int, Mapping[str, int]], np.ndarray]:
    """(output of a bucket, row, sizes of the row) -> the row's part."""
    named = [dim for dim in dims if isinstance(dim, str) and dim != "batch"]
    if not named and "batch" in dims:
        axis = dims.index("batch")
        return lambda output, place, sizes: output[(slice(None),) * axis + (place,)]

    def cut(output: np.ndarray, place: int, sizes: Mapping[str, int]) -> np.ndarray:
        whole = slice(None)
        index = (place if d == "batch" else slice(sizes[d]) if isinstance(d, str) else whole for d in dims)
        return output[tuple(index)]

    return cut


def _described(tree: Any) -> str:
    leaves = jax.tree.leaves(tree)
    numbers = (bool, int, float, complex)
    listed = [
        f"{_jax.dtype_of(x)}{list(np.shape(x))}" if hasattr(x, "dtype") or isinstance(x, numbers) else type(x).__name__
        for x in leaves[:8]
    ]
    return (", ".join(listed) or "nothing") + (f" and {len(leaves) - 8} more" if len(leaves) > 8 else "")
