"""Ahead-of-time compilation of a flat function: from the cache on disk, else by XLA."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax

from jaxinfer import _jax, cache


@dataclass
class CompileReport:
    """Programs made ready since load."""

    compiled: int = 0  # by XLA
    loaded: int = 0  # from the cache on disk
    seconds: float = 0.0  # that callers waited


# Two at a time: a prefill and a decode program compile, or load, on two cores in the time of one.
_POOL = ThreadPoolExecutor(2, thread_name_prefix="jaxinfer-compile")


class Pending:
    """A flat function of flat arrays being made ready for one device: loaded from the cache on disk, else compiled by
    XLA and then cached. Tracing happens in the caller's thread, whose JAX settings it follows; the rest beside it.

    Args:
        function: (*arrays) -> tuple of `n_out` arrays; traced only when the cache has nothing.
        program, bucket: what names the computation in the cache (see cache.key_of).
        donate: arguments whose memory the results may take.
        runs_seldom: prefer a short first run to fast later ones.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Any, ...]],
        arguments: Sequence[jax.ShapeDtypeStruct],
        n_out: int,
        *,
        program: str,
        bucket: Mapping[str, Any],
        device: Any,
        donate: Sequence[int] = (),
        runs_seldom: bool = False,
        report: CompileReport,
    ):
        self._function, self._arguments, self._device = function, arguments, device
        self._donate, self._runs_seldom, self._report = tuple(donate), runs_seldom, report
        more = {"donate": self._donate, "runs_seldom": runs_seldom, "shapes": str(list(arguments))}
        self._key = cache.key_of(program, {**bucket, **more}, device)
        self._compiled: Any = None
        self._lock = threading.Lock()
        self._loading = cache.has(self._key)
        if self._loading:
            self._future = _POOL.submit(cache.load, self._key, len(arguments), n_out, device)
        else:
            self._future = self._compile()

    def result(self) -> Any:
        """The compiled function; waits for it."""
        with self._lock:
            if self._compiled is None:
                started = time.perf_counter()
                self._compiled = self._future.result()
                if self._compiled is None:  # an entry that didn't load
                    self._loading = False
                    self._compiled = self._compile().result()
                self._report.loaded += self._loading
                self._report.compiled += not self._loading
                self._report.seconds += time.perf_counter() - started
            return self._compiled

    def _compile(self) -> "Future[Any]":
        started = time.perf_counter()
        sharding = jax.sharding.SingleDeviceSharding(self._device)
        placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in self._arguments]
        # keep_unused: a cached entry is called with the same arguments whatever XLA found it could do without.
        lowered = jax.jit(self._function, donate_argnums=self._donate, keep_unused=True).lower(*placed)
        self._report.seconds += time.perf_counter() - started
        return _POOL.submit(self._finish, lowered)

    def _finish(self, lowered: Any) -> Any:
        compiled = _jax.compile_lowered(lowered, self._device, runs_seldom=self._runs_seldom)
        cache.store(self._key, compiled)
        return compiled
