"""Ahead-of-time compilation of a flat function: from the cache on disk, else by XLA."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from jaxinfer import _jax, cache, native


@dataclass
class CompileReport:
    """Programs made ready since load."""

    compiled: int = 0  # by XLA
    loaded: int = 0  # from the cache on disk
    seconds: float = 0.0  # that callers waited


# Loading links machine code for half a second a program: a prefill and a decode program load beside each other.
POOL = ThreadPoolExecutor(2, thread_name_prefix="jaxinfer-load")


class Ready(Protocol):
    """A program that is ready or on its way."""

    origin: str  # "XLA", "the cache on disk", ...; "" until it is ready
    seconds: float  # that the first asker waited

    def result(self) -> Any:
        """The compiled function: (*arrays) -> tuple of arrays."""
        ...

    def to_bytes(self) -> bytes:
        """What `native.load` takes; ValueError where it can't be serialised."""
        ...

    def export(self, platforms: Sequence[str] | None) -> bytes:
        """The function as StableHLO, serialised by jax.export; ValueError or NotImplementedError where it can't be."""
        ...


class Pending:
    """A flat function of flat arrays, to be made ready for one device.

    If the cache on disk has it, it is loaded in the background from now on. Else it is traced and compiled when first
    asked for, in the asker's thread, whose JAX settings it follows: two compiles at once share the cores, hold 260 MB
    more, and make whoever waits for the first of them wait for both.

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
        self.origin, self.seconds = "", 0.0  # where the program came from, how long the asker waited
        self._lock = threading.Lock()
        found = cache.has(self._key)
        self._loading = POOL.submit(cache.load, self._key, len(arguments), n_out, device) if found else None

    def result(self) -> Any:
        """The compiled function."""
        with self._lock:
            if self._compiled is None:
                started = time.perf_counter()
                loaded = self._loading.result() if self._loading is not None else None
                self._compiled = self._compile() if loaded is None else loaded
                self.origin = "XLA" if loaded is None else "the cache on disk"
                self.seconds = time.perf_counter() - started
                self._report.loaded += loaded is not None
                self._report.compiled += loaded is None
                self._report.seconds += self.seconds
            return self._compiled

    def to_bytes(self) -> bytes:
        """What `native.load` takes.

        Raises:
            ValueError: the backend or this program can't be serialised.
        """
        compiled = self.result()
        if self.origin == "XLA":
            return native.pack(compiled)
        return cache.read(self._key) or native.pack(self._compile())

    def export(self, platforms: Sequence[str] | None) -> bytes:
        """The function as StableHLO, serialised by jax.export for these platforms, or for its device's.

        Raises:
            ValueError, NotImplementedError: it can't be exported for one of them.
        """
        from jax import export

        function = jax.jit(self._function, keep_unused=True)
        with jax.default_device(self._device):
            return bytes(export.export(function, platforms=platforms)(*self._arguments).serialize())

    def _compile(self) -> Any:
        sharding = jax.sharding.SingleDeviceSharding(self._device)
        placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in self._arguments]
        # keep_unused: a cached entry is called with the same arguments whatever XLA found it could do without.
        lowered = jax.jit(self._function, donate_argnums=self._donate, keep_unused=True).lower(*placed)
        compiled = _jax.compile_lowered(lowered, self._device, runs_seldom=self._runs_seldom)
        cache.store(self._key, compiled)
        return compiled


class Moved:
    """A program that is ready on one device, for another of the same kind (a Ready). Its machine code is taken over;
    where that can't be done, `again` makes it anew."""

    def __init__(self, ready: Ready, again: Callable[[], Ready], device: Any, report: CompileReport):
        self._from, self._again, self._device, self._report = ready, again, device, report
        self._made: Ready | None = None
        self._compiled: Any = None
        self.origin, self.seconds = "", 0.0
        self._lock = threading.Lock()

    def result(self) -> Any:
        """The compiled function."""
        with self._lock:
            if self._compiled is None:
                started = time.perf_counter()
                try:
                    self._from.result()
                    self._compiled = native.load(self._from.to_bytes(), self._device)
                    self.origin = "another device"
                    self._report.loaded += 1
                    self._report.seconds += time.perf_counter() - started
                except ValueError:
                    self._made = self._again()
                    self._compiled, self.origin = self._made.result(), self._made.origin
                self.seconds = time.perf_counter() - started
            return self._compiled

    def to_bytes(self) -> bytes:
        """What `native.load` takes."""
        return self._from.to_bytes() if self._made is None else self._made.to_bytes()

    def export(self, platforms: Sequence[str] | None) -> bytes:
        """The function as StableHLO: see `Ready.export`."""
        return self._from.export(platforms)
