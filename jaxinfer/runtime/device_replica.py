"""A replica in this process: one copy of an Executable on one device."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import jax
import numpy as np

from jaxinfer.axes import report
from jaxinfer.errors import BatchMixingError, NonFiniteError, RequestError
from jaxinfer.executable import Executable
from jaxinfer.program import Program
from jaxinfer.runtime.batcher import Rows, Shared
from jaxinfer.runtime.replica import Shape
from jaxinfer.runtime.request import Batch, Request
from jaxinfer.runtime.staging import Staging

_SECOND_RUN = 1.0  # seconds; a first run that takes longer is not repeated to be timed


class DeviceReplica:
    """Runs batches on a device (`replica.Replica`).

    Args:
        executable: what to run; copied if it lies on another device.
        shapes: the buckets that batches may have.
        warmup: make all of them ready at `start`, and time them.
        positions: check at `start` that a row's bits don't depend on its place in the batch.
        check_finite: a request whose outputs hold NaN or infinity fails.
    """

    def __init__(
        self,
        executable: Executable,
        device: Any,
        rows: Rows,
        shapes: Sequence[Shape],
        *,
        warmup: bool,
        positions: bool,
        check_finite: bool,
    ):
        self.name = f"{device.platform}:{device.id}"
        self._source, self._device, self._rows, self._shapes = executable, device, rows, shapes
        self._warmup, self._positions, self._check = warmup, positions, check_finite
        self._executable, self._staging = executable, Staging()
        self._shared: WeakKeyDictionary[Shared, dict[Shape, Any]] = WeakKeyDictionary()

    def start(self) -> Mapping[Shape, float]:
        """Copies the weights to the device, and warms up. See `replica.Replica.start`."""
        if self._device != self._source.device:
            self._executable = self._source.on(self._device)
        if not self._warmup:
            return {}
        self._executable.warm_up()
        for shape in self._shapes:
            self._check_rows(dict(shape)["batch"])
        if not _safe_to_try(self._executable):
            return {}
        if self._positions:
            for shape in self._shapes:
                self._check_positions(shape)
        return {shape: self._timed(shape) for shape in self._shapes}

    def run(self, batch: Batch) -> "DeviceBatch":
        """Stacks the rows and begins them on the device."""
        bucket = dict(batch.shape)
        self._check_rows(bucket["batch"])
        started = time.perf_counter()
        stacked = self._rows.stack(batch, self._staging)
        inputs = self._rows.merge(stacked, self._bound(batch.group.shared, batch.shape))
        prepare = time.perf_counter() - started
        outputs = self._executable.start(inputs, bucket)
        for output in outputs:
            output.copy_to_host_async()
        release = lambda: self._staging.give(stacked)  # noqa: E731
        return DeviceBatch(self._rows, batch.requests, outputs, self._check, prepare, release)

    def close(self) -> None:
        """Lets go of the copy."""
        self._executable = self._source
        self._shared.clear()

    def _check_rows(self, size: int) -> None:
        """A forward may take another way at this size than the one that was proved to keep rows apart."""
        if size > 1 and (refusal := self._executable.refusal("batch", size)):
            raise BatchMixingError(f"requests can't share a batch of {size}. {refusal}")

    def _bound(self, shared: Shared | None, shape: Shape) -> Sequence[Any]:
        """The shared inputs on the device, moved there once."""
        if shared is None:
            return ()
        placed = self._shared.setdefault(shared, {})
        if shape not in placed:
            placed[shape] = [jax.device_put(x, self._device) for x in self._rows.pad(shared, dict(shape))]
        return placed[shape]

    def _timed(self, shape: Shape) -> float:
        """Seconds of a run on made-up inputs: of the second one, since the first may build what later ones use."""
        inputs = self._rows.made_up(shape, np.random.default_rng(0))

        def once() -> float:
            started = time.perf_counter()
            jax.block_until_ready(self._executable.start(inputs, dict(shape)))
            return time.perf_counter() - started

        first = once()
        return first if first > _SECOND_RUN else once()

    def _check_positions(self, shape: Shape) -> None:
        """Each row moves one place on: it must take its bits with it.

        Raises:
            RequestError: it doesn't.
        """
        inputs = self._rows.made_up(shape, np.random.default_rng(0))
        given, dims = list(zip(inputs, self._rows.leaves, strict=True)), self._rows.output_dims
        moved = [np.roll(x, 1, s.dims.index("batch")) if "batch" in s.dims else x for x, s in given]
        pair = [self._executable.start(arrays, dict(shape)) for arrays in (inputs, moved)]
        for number, (one, two, axes) in enumerate(zip(*pair, dims, strict=True)):
            expected = np.roll(np.asarray(one), 1, axes.index("batch")) if "batch" in axes else np.asarray(one)
            if expected.tobytes() != np.asarray(two).tobytes():
                raise RequestError(
                    f"deterministic=True promises that a row's bits don't depend on its company, but output {number} "
                    f"at {dict(shape)} on {self.name} depends on the row's place in the batch. Try another max_batch, "
                    "or max_batch=1"
                )


class DeviceBatch:
    """A batch on its way (`replica.Running`)."""

    def __init__(
        self,
        rows: Rows,
        requests: Sequence[Request],
        outputs: Sequence[jax.Array],
        check_finite: bool,
        prepare: float,
        release: Callable[[], None],
    ):
        self._rows, self._requests, self._outputs, self._check = rows, requests, outputs, check_finite
        self.prepare = prepare
        self._release = release  # of the inputs' memory, which outputs may share

    def wait(self) -> None:
        """Returns when the device is done; raises what went wrong there."""
        jax.block_until_ready(self._outputs)

    def results(self) -> list[Any]:
        """For each request its outputs, a pytree of numpy arrays, or NonFiniteError."""
        whole = [np.asarray(output) for output in self._outputs]
        results = [self._result(whole, place, request) for place, request in enumerate(self._requests)]
        del whole
        self._outputs = ()
        self._release()
        return results

    def _result(self, whole: Sequence[np.ndarray], place: int, request: Request) -> Any:
        shared = request.group.shared
        sizes = dict(request.payload.sizes) | (dict(shared.sizes) if shared is not None else {})
        result = self._rows.cut(whole, place, sizes)
        if self._check:
            for number, leaf in enumerate(jax.tree.leaves(result)):
                real = jax.numpy.issubdtype(leaf.dtype, np.inexact)
                if real and (bad := leaf.size - np.count_nonzero(np.isfinite(leaf))):
                    return NonFiniteError(
                        f"{bad} of the {leaf.size} numbers of output {number} are NaN or infinite, and the engine was "
                        "made with check_finite=True; look at this request's inputs"
                    )
        return result


def _safe_to_try(executable: Executable) -> bool:
    """Whether made-up inputs surely end: not where a loop's length may depend on values."""
    if isinstance(executable.program, Program):
        return not report.has_loops(executable.program)
    smallest = {name: ladder[0] for name, ladder in executable.buckets.items()}
    return " while(" not in executable.hlo_text(smallest)
