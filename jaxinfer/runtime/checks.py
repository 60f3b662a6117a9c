"""Checks of the Engine's options: each refusal says what, the rule, what was got and what to do."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxinfer.errors import BatchMixingError, RequestError, TraceError
from jaxinfer.executable import Executable
from jaxinfer.runtime.replica import Shape


def check_executable(executable: Any) -> None:
    """An Executable whose requests are rows."""
    if not isinstance(executable, Executable):
        raise RequestError(
            f"Engine serves an Executable, made by ji.compile(program, buckets=...); got {type(executable).__name__}. "
            "A LanguageModel is served by its own generate and stream, an Encoder by embed"
        )
    if "batch" not in executable.program.axes:
        raise TraceError(
            f"{executable.program.name} has no dim named 'batch' (but {list(executable.program.axes)}): requests are "
            "its rows. Name it in the spec, e.g. ji.spec('batch 32 32 3')"
        )


def check_workers(workers: str) -> None:
    """What replicas are."""
    if workers == "process":
        raise RequestError("workers='process' is not available in this version; use workers='thread'")
    if workers != "thread":
        raise RequestError(f"workers should be 'thread', got {workers!r}")


def check_rows(executable: Executable, most: int) -> None:
    """Rows that mix may not share a batch."""
    program = executable.program
    if most == 1:
        if executable.buckets["batch"][0] != 1 and "batch" not in program.independent_axes:
            raise BatchMixingError(f"max_batch=1 needs a bucket of 1 where rows mix. {program.why('batch')}")
    elif "batch" not in program.independent_axes:
        raise BatchMixingError(
            f"requests to {program.name} can't share batches. {program.why('batch')}\nWith max_batch=1 every request "
            "runs by itself, as a batch of one"
        )


def places(executable: Executable, replicas: int, devices: Sequence[Any] | None) -> list[Any]:
    """The device of each replica."""
    if devices is None:
        own = executable.device
        alike = [d for d in jax.local_devices(backend=own.platform) if d.device_kind == own.device_kind and d != own]
        devices = [own, *alike]
    given = list(devices)
    if not given:
        raise RequestError("devices is empty; name at least one, or leave it out")
    return list(itertools.islice(itertools.cycle(given), replicas))


def shapes(executable: Executable, sizes: Sequence[int]) -> list[Shape]:
    """The buckets of batches; the batch first, as `Group.shape` has it."""
    others = [name for name in executable.program.axes if name != "batch"]
    ladders = (sizes, *(executable.buckets[name] for name in others))
    return [tuple(zip(("batch", *others), chosen, strict=True)) for chosen in itertools.product(*ladders)]


def flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise RequestError(f"{name} should be True or False, got {value!r}")


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """An integer within limits."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        limit = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise RequestError(f"{name} should be an integer {limit}, got {value!r}")
    return value


def number(name: str, value: Any, least: float) -> float:
    """A finite number, not too small."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < least:
        raise RequestError(f"{name} should be a number of at least {least:g}, got {value!r}")
    return float(value)
