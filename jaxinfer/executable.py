"""Executable: a compiled Program. Called on a batch, it pads to a bucket, runs it and slices back."""

import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinfer import _jax, bundle, specs
from jaxinfer.aot import CompileReport, Moved, Ready
from jaxinfer.buckets import bucket_for
from jaxinfer.bundled import Bundle
from jaxinfer.compile_log import CompileLog, WhyCompiled
from jaxinfer.errors import RequestError
from jaxinfer.padding import Padding, cut
from jaxinfer.passes.prepared import Prepared
from jaxinfer.program import Program


@dataclass(eq=False)
class Executable:
    """A compiled Program: call it on a batch of any size up to the largest bucket. Made by `ji.compile`."""

    program: Program | Bundle
    buckets: Mapping[str, Sequence[int]]
    device: Any
    params: list[jax.Array]  # what every compiled bucket takes first: `prepared.weights`, not the program's own params
    prepared: Prepared | Bundle  # the rewritten program, and which of its work is done at load
    padding: Padding  # which dims may be padded
    report: CompileReport = field(default_factory=CompileReport)
    _programs: dict[tuple[int, ...], Ready] = field(default_factory=dict, repr=False)
    _log: CompileLog = field(default_factory=CompileLog, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)
    _origin: str = "compile"
    _compiles_before: int = field(default_factory=_jax.compiles)

    def __call__(self, *inputs: Any) -> Any:
        """Runs a batch: pads each named dim up to its bucket and slices the results back.

        A dim is padded only where that provably changes nothing (`program.why(axis)` tells), or where `ji.compile` was
        told that the model masks it. Rows are never run one by one instead: a forward that mixes them would give other
        results then. Sizes that are buckets always run.

        Args:
            inputs: one pytree of arrays an input, as the specs say.

        Returns:
            The forward's outputs as jax.Arrays: dispatched asynchronously where every size is a bucket; a padded call
            waits for its result, because slicing it on the device would compile a program for every size.

        Raises:
            RequestError: inputs that don't fit the specs, or a size over the largest bucket.
            BatchMixingError: padding is needed along a dim whose rows influence each other; names the equation.
        """
        sizes, arrays = self._check(inputs)
        bucket = self.bucket_of(sizes)
        results = self._run(arrays, bucket, sizes)
        names, tree = jax.tree.flatten(self.program.output_axes)
        if bucket != sizes:
            results = [jax.device_put(cut(r, dims, sizes), self.device) for r, dims in zip(results, names, strict=True)]
        return jax.tree.unflatten(tree, results)

    def bucket_of(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The bucket that these sizes of the named dims are padded up to.

        Raises:
            RequestError, BatchMixingError: as a call of these sizes would.
        """
        bucket = {name: bucket_for(sizes[name], self.buckets[name], f"{name} of") for name in sizes}
        for name in sizes:
            if bucket[name] != sizes[name]:
                self.padding.require(name, bucket[name], sizes[name], partial(self._tried, sizes))
        return bucket

    def start(self, arrays: Sequence[Any], bucket: Mapping[str, int]) -> list[jax.Array]:
        """Begins a run on flat inputs that have a bucket's shapes already: nothing is checked, padded, cut or waited
        for. The flat outputs, whole buckets; numpy inputs may be read until these are ready."""
        return list(self._run(arrays, bucket, bucket))

    def on(self, device: Any) -> "Executable":
        """The same executables, with a copy of the weights, on another device of the same kind. Machine code is taken
        over; where the backend can't do that, every bucket is compiled again when it is first met."""
        params = [jax.device_put(array, device) for array in self.params]
        report, programs = CompileReport(), {}
        for sizes, ready in self.programs():
            key = tuple(sizes[name] for name in self.program.axes)
            programs[key] = Moved(ready, partial(self.prepared.ready, sizes, device, report), device, report)
        fresh: dict[str, Any] = {"_log": CompileLog(), "_lock": threading.Lock(), "_origin": "on"}
        fresh |= {"_programs": programs, "_compiles_before": _jax.compiles(), "report": report}
        return replace(self, device=device, params=params, padding=replace(self.padding, device=device), **fresh)

    @property
    def compile_count(self) -> int:
        """XLA compiles in this process since this executable was made, as jax.monitoring counts them."""
        return _jax.compiles() - self._compiles_before

    def hlo_text(self, bucket: Mapping[str, int]) -> str:
        """Optimised HLO of a bucket."""
        return self._at(dict(bucket), "hlo_text").as_text()

    def why_compiled(self) -> WhyCompiled:
        """For every program made ready: the call that first needed it, when, how long it took and where it came from.
        Prints as a table."""
        return self._log()

    def with_params(self, params: Any) -> "Executable":
        """The same executables on other weights of the same shapes; nothing is compiled again.

        Raises:
            RequestError: another tree structure, shape or dtype.
        """
        given, wanted = specs.shapes_of(params), self.program.abstract_params
        if jax.tree.structure(given) != jax.tree.structure(wanted) or jax.tree.leaves(given) != jax.tree.leaves(wanted):
            raise RequestError(f"with_params needs the shapes and dtypes that {self.program.name} was compiled for")
        check_values(params)
        weights = self.prepared.weights(params, self.device, self.report)
        program: Any = self.program.with_params(params)
        return replace(self, program=self.prepared.without_values(program), params=weights)

    def explain(self) -> str:
        """What each pass did to the program, and what a call is spared."""
        return self.prepared.explain()

    def warm_up(self) -> None:
        """Makes every bucket ready, and finds out which dims may be padded."""
        for sizes, _ in self.programs():
            self._at(sizes, f"ahead, at {self._origin}")
        for name in self.program.axes:
            for bucket in self.padding.padded_to(name):
                self.refusal(name, bucket)

    def refusal(self, name: str, bucket: int) -> str:
        """Why the rows along a named dim can't be kept apart at a bucket, as far as anyone can know; "" where they
        can. Found out once, by running it."""
        if (name, bucket) not in self.padding.found and not isinstance(self.program, Program):
            return ""  # a bundle says what was asked when it was saved: nothing is ever padded up to this bucket
        return self.padding.refusal(name, bucket, partial(self._tried, f"ahead, at {self._origin}"))

    def programs(self) -> list[tuple[dict[str, int], Ready]]:
        """The program of every bucket, ready or on its way: what is on disk loads in the background from now on."""
        found = []
        for sizes in itertools.product(*(self.buckets[name] for name in self.program.axes)):
            bucket = dict(zip(self.program.axes, sizes, strict=True))
            with self._lock:
                if sizes not in self._programs:
                    self._programs[sizes] = self.prepared.ready(bucket, self.device, self.report)
            found.append((bucket, self._programs[sizes]))
        return found

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes a bundle: a folder with the weights, every bucket's machine code and StableHLO, and how to call them.

        `load` starts from it without the code that was traced. It appears at `path` whole or not at all.

        Args:
            overwrite: take the place of a bundle that is there already.

        Raises:
            CheckpointError: something is at `path` already, the disk fails, parameters, inputs or outputs in containers
                other than dict, list, tuple and None, or a forward that calls back into Python.
        """
        bundle.save(self, Path(path), overwrite)

    @classmethod
    def load(
        cls, path: str | Path, *, device: Any = None, ahead: bool = True, machine_code: bool = True
    ) -> "Executable":
        """The executable of a bundle. With the JAX, the kind of device and the processor that saved it, nothing is
        traced or compiled; otherwise its programs are compiled from their StableHLO, and a warning is logged.

        Args:
            device: where to run; JAX's default device if not given.
            ahead: make every bucket ready now. False does so when it is first met.
            machine_code: run the bundle's machine code, which does whatever its writer wants. False never does.

        Raises:
            CheckpointError: no bundle, a damaged one, or one of an unknown version.
        """
        device = device or jax.local_devices()[0]
        program, weights, padding = bundle.load(Path(path), device, machine_code)
        loaded = cls(program, padding.buckets, device, weights, program, padding, _origin="load")
        if ahead:
            loaded.warm_up()
        return loaded

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

    def _run(self, arrays: Sequence[Any], bucket: Mapping[str, int], cause: Mapping[str, int] | str) -> Sequence[Any]:
        """The flat outputs of a bucket, its inputs padded."""
        padded = [jax.device_put(value, self.device) for value in self.padding.pad(arrays, bucket)]
        return self._at(bucket, cause)(*self.params, *padded)

    def _tried(self, cause: Mapping[str, int] | str, arrays: Sequence[Any], sizes: Mapping[str, int]) -> Sequence[Any]:
        """A run to see whether padding is safe; at an exact size, which isn't kept, if there is no such bucket."""
        if all(size in self.buckets[name] for name, size in sizes.items()):
            return self._run(arrays, sizes, cause)
        placed = [jax.device_put(value, self.device) for value in arrays]
        ready = self.prepared.ready(sizes, self.device, self.report)
        return self._made(sizes, ready, "a check that padding is safe")(*self.params, *placed)

    def _at(self, bucket: Mapping[str, int], cause: Mapping[str, int] | str) -> Any:
        key = tuple(bucket[name] for name in self.program.axes)
        with self._lock:
            if key not in self._programs:
                self._programs[key] = self.prepared.ready(bucket, self.device, self.report)
        return self._made(bucket, self._programs[key], cause)

    def _made(self, sizes: Mapping[str, int], ready: Ready, cause: Mapping[str, int] | str) -> Any:
        compiled = ready.result()
        self._log.add(sizes, cause, ready)
        return compiled


def check_values(params: Any) -> None:
    """RequestError where parameters are shapes only."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        raise RequestError("the parameters are shapes only; give arrays to run the program")


def _listed(tree: Any) -> str:
    return ", ".join(map(str, specs.leaves(tree)))


def _shapes(tree: Any) -> str:
    return ", ".join(f"{_jax.dtype_of(x)}{list(np.shape(x))}" for x in jax.tree.leaves(tree)) or "nothing"
