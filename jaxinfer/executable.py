"""`compile`: a Program and its buckets to executables, compiled ahead of time or taken from the cache on disk."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax, specs
from jaxinfer.aot import CompileReport, Pending
from jaxinfer.buckets import bucket_for
from jaxinfer.errors import BatchMixingError, RequestError, TraceError
from jaxinfer.program import Program


@dataclass(eq=False)
class Executable:
    """A compiled Program: call it on a batch of any size up to the largest bucket. Made by `ji.compile`."""

    program: Program
    buckets: Mapping[str, Sequence[int]]
    device: Any
    params: list[jax.Array]
    report: CompileReport = field(default_factory=CompileReport)
    _compiled: dict[tuple[int, ...], Any] = field(default_factory=dict, repr=False)
    _paddable: dict[str, bool] = field(default_factory=dict, repr=False)
    _compiles_before: int = field(default_factory=_jax.compiles)

    def __call__(self, *inputs: Any) -> Any:
        """Runs a batch: pads each named dim up to its bucket and slices the results back.

        Args:
            inputs: one pytree of arrays an input, as the specs say.

        Returns:
            The forward's outputs as jax.Arrays: dispatched asynchronously where every size is a bucket; a padded call
            waits for its result, because slicing it on the device would compile a program for every size.

        Raises:
            RequestError: inputs that don't fit the specs, or a size over the largest bucket.
            BatchMixingError: padding is needed along a dim whose rows influence each other.
        """
        sizes, arrays = self._check(inputs)
        bucket = {name: bucket_for(sizes[name], self.buckets[name], f"{name} of") for name in sizes}
        padded = [name for name in sizes if bucket[name] != sizes[name]]
        for name in padded:
            self._check_padding(name)
        results = self._at(bucket)(*self.params, *self._padded(arrays, bucket))
        traced = self.program.output_axes
        names = jax.tree.leaves(traced, is_leaf=lambda x: isinstance(x, tuple))
        if padded:
            results = [_cut(r, dims, sizes) for r, dims in zip(results, names, strict=True)]
        tree = jax.tree.structure(traced, is_leaf=lambda x: isinstance(x, tuple))
        return jax.tree.unflatten(tree, results)

    @property
    def compile_count(self) -> int:
        """XLA compiles in this process since this executable was made, as jax.monitoring counts them."""
        return _jax.compiles() - self._compiles_before

    def hlo_text(self, bucket: Mapping[str, int]) -> str:
        """Optimised HLO of a bucket."""
        return self._at(dict(bucket)).as_text()

    def with_params(self, params: Any) -> "Executable":
        """The same executables on other weights of the same shapes; nothing is compiled again.

        Raises:
            RequestError: another tree structure, shape or dtype.
        """
        fresh = replace(self.program, params=params, _traces=self.program._traces)
        given, wanted = fresh.abstract_params, self.program.abstract_params
        if jax.tree.structure(given) != jax.tree.structure(wanted) or jax.tree.leaves(given) != jax.tree.leaves(wanted):
            raise RequestError(f"with_params needs the shapes and dtypes that {self.program.name} was compiled for")
        return replace(self, program=fresh, params=_placed(params, self.device))

    def warm_up(self) -> None:
        """Makes every bucket ready, and finds out which dims may be padded."""
        for sizes in itertools.product(*(self.buckets[name] for name in self.program.axes)):
            self._at(dict(zip(self.program.axes, sizes, strict=True)))
        for name in self.program.axes:
            if max(self.buckets[name]) > 1:
                self._check_padding(name, refuse=False)

    def _check(self, inputs: Sequence[Any]) -> tuple[dict[str, int], list[np.ndarray | jax.Array]]:
        wanted = self.program.inputs
        if jax.tree.structure(inputs) != jax.tree.structure(wanted, is_leaf=specs.is_spec):
            raise RequestError(
                f"{self.program.name} takes {len(wanted)} inputs ({_listed(wanted)}), got {_shapes(inputs)}"
            )
        sizes: dict[str, int] = {}
        arrays = jax.tree.leaves(inputs)
        for leaf, value in zip(specs.leaves(wanted), arrays, strict=True):
            shape = np.shape(value)
            if len(shape) != len(leaf.dims) or _jax.dtype_of(value) != _jax.dtype_of(leaf):
                raise RequestError(f"{self.program.name}: an input should be {leaf}, got {_shapes(value)}")
            for dim, size in zip(leaf.dims, shape, strict=True):
                expected = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
                if size != expected or size == 0:
                    raise RequestError(
                        f"{self.program.name}: {dim} should be {expected or 'at least 1'}, got {size} in {shape}"
                    )
        return sizes, arrays

    def _padded(self, arrays: Sequence[Any], bucket: Mapping[str, int], fill: Any = 0) -> list[Any]:
        """Inputs padded in numpy: padding a jax.Array would compile a program for every size."""
        padded = []
        for leaf, value in zip(specs.leaves(self.program.inputs), arrays, strict=True):
            shape = leaf.shape(bucket)
            if np.shape(value) != shape:
                full = np.full(shape, fill, leaf.dtype)
                full[tuple(slice(n) for n in np.shape(value))] = np.asarray(value)
                value = full
            padded.append(jax.device_put(value, self.device))
        return padded

    def _at(self, bucket: Mapping[str, int]) -> Any:
        key = tuple(bucket[name] for name in self.program.axes)
        if key not in self._compiled:
            self._compiled[key] = self._compile(dict(bucket))
        return self._compiled[key]

    def _compile(self, sizes: dict[str, int]) -> Any:
        abstract = jax.tree.leaves((self.program.abstract_params, *specs.structs(self.program.inputs, sizes)))
        n_out = len(jax.tree.leaves(self.program.output_axes, is_leaf=lambda x: isinstance(x, tuple)))

        def flat(*arrays: Any) -> tuple[Any, ...]:
            return tuple(_jax.evaluate(self.program.at(sizes).jaxpr, *arrays))

        return Pending(
            flat,
            abstract,
            n_out,
            program=self.program.fingerprint,
            bucket=sizes,
            device=self.device,
            report=self.report,
        ).result()

    def _check_padding(self, axis: str, refuse: bool = True) -> None:
        """Compares a padded run with an exact one on random inputs, once an axis: padding must change nothing."""
        if axis not in self._paddable:
            self._paddable[axis] = self._padding_is_safe(axis)
        if refuse and not self._paddable[axis]:
            raise BatchMixingError(
                f"{self.program.name}: padding {axis!r} changes the results of the real rows, so rows along it "
                f"influence each other. Compile the exact sizes you need: buckets={{{axis!r}: [...]}}"
            )

    def _padding_is_safe(self, axis: str) -> bool:
        bucket = {name: self.buckets[name][-1] if name == axis else self.buckets[name][0] for name in self.program.axes}
        bucket[axis] = next(b for b in self.buckets[axis] if b > 1)
        real = {**bucket, axis: bucket[axis] - 1}
        random = np.random.default_rng(0)
        arrays = [_random(random, leaf, real) for leaf in specs.leaves(self.program.inputs)]
        exact = self._compile(real)(*self.params, *self._padded(arrays, real))
        padded = self._at(bucket)(*self.params, *self._padded(arrays, bucket))
        names = jax.tree.leaves(self.program.output_axes, is_leaf=lambda x: isinstance(x, tuple))
        for want, got, dims in zip(exact, padded, names, strict=True):
            a, b = np.asarray(want, np.float64), np.asarray(_cut(got, dims, real), np.float64)
            if a.shape != b.shape or not np.allclose(
                a, b, rtol=1e-3, atol=1e-4 * (np.abs(a).max(initial=0) + 1e-6), equal_nan=True
            ):
                return False
        return True


def compile(
    program: Program,
    *,
    buckets: Mapping[str, Sequence[int]],
    dtype: Any = None,
    device: Any = None,
    ahead: bool = True,
) -> Executable:
    """Compiles a Program for one device.

    Args:
        buckets: for each named dim of the program, the sizes to compile.
        dtype: cast floating parameters to this first (and trace again at it); as they are by default.
        device: where to run; JAX's default device if not given.
        ahead: compile every bucket now, so that no call compiles. False compiles a bucket when it is first met.

    Raises:
        TraceError: a named dim without buckets or the reverse, or outputs in which named dims are merged.
    """
    if set(buckets) != set(program.axes):
        raise TraceError(f"{program.name} has the named dims {sorted(program.axes)}, got buckets for {sorted(buckets)}")
    if dtype is not None:
        program = replace(program, params=_cast(program.params, np.dtype(dtype)), _traces={})
    for dims in jax.tree.leaves(program.output_axes, is_leaf=lambda x: isinstance(x, tuple)):
        for dim in dims:
            if isinstance(dim, str) and dim not in program.axes:
                raise TraceError(
                    f"an output of {program.name} merges named dims ({dim}); return them as dims of their own"
                )
    sizes = {name: sorted(set(buckets[name])) for name in program.axes}
    if any(not ladder or ladder[0] < 1 for ladder in sizes.values()):
        raise TraceError(f"buckets must be sizes of at least 1, got {dict(buckets)}")
    device = device or jax.local_devices()[0]
    executable = Executable(program, sizes, device, _placed(program.params, device))
    if ahead:
        executable.warm_up()
    return executable


def _placed(params: Any, device: Any) -> list[jax.Array]:
    leaves = jax.tree.leaves(params)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        raise RequestError("the parameters are shapes only; give arrays to run the program")
    return [jax.device_put(leaf, device) for leaf in leaves]


def _cast(params: Any, dtype: np.dtype) -> Any:
    def one(leaf: Any) -> Any:
        if not jnp.issubdtype(_jax.dtype_of(leaf), np.floating):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype)
        return np.asarray(leaf).astype(dtype)

    return jax.tree.map(one, params)


def _random(random: np.random.Generator, leaf: specs.Spec, sizes: Mapping[str, int]) -> np.ndarray:
    """Floats from a normal distribution; integers 0 or 1, which are in range whatever they index or mask."""
    if jnp.issubdtype(leaf.dtype, np.floating):
        return random.standard_normal(leaf.shape(sizes)).astype(leaf.dtype)
    return random.integers(0, 2, leaf.shape(sizes)).astype(leaf.dtype)


def _cut(result: Any, dims: Sequence[str | int], sizes: Mapping[str, int]) -> jax.Array:
    index = tuple(slice(sizes[d]) if isinstance(d, str) else slice(None) for d in dims)
    return jax.device_put(np.asarray(result)[index])


def _listed(tree: Any) -> str:
    return ", ".join(map(str, specs.leaves(tree)))


def _shapes(tree: Any) -> str:
    return ", ".join(f"{_jax.dtype_of(x)}{list(np.shape(x))}" for x in jax.tree.leaves(tree)) or "nothing"
