"""What the engine's loop costs: the same rows through ji.Engine and through a bare loop over the executable.

    python benchmarks/engine.py [--rounds 7] [--seconds 2] [--out benchmarks/results/engine]

- saturation: N rows by `engine.map` against batches that were stacked beforehand and are called one after another, the
  next one dispatched before the last one's outputs are taken (no row is cut out, none copied). Ratios within a round,
  medians over rounds, of the time that passed and of processor time, which other work on the machine disturbs less;
  also by `submit` of all rows at once, as many callers would.
- lone: one request at a time, `submit(row).result()`, against `executable(row[None])` and its copy to numpy; medians
  over requests, the two taking turns. With max_delay_ms=0, so that what is left is the loop's own time.

MiniLM is all-MiniLM-L6-v2 with its pooling; the others are from tests/forwards, the tiny ones as they are there: they
show what a row costs the host.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxinfer as ji

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import forwards
import harness

MOST = 32


def minilm(length: int) -> tuple[Any, Callable[[int], list[Any]]]:
    """(executable, n -> rows)"""
    encoder: Any = ji.load("all-minilm-l6-v2")
    buckets = {"batch": [1, 8, MOST], "length": [length]}
    executable = ji.compile(encoder.program, buckets=buckets, masked=("length",))
    draw = np.random.default_rng(0)

    def rows(count: int) -> list[Any]:
        tokens = draw.integers(0, 30_000, (count, length)).astype(np.int32)
        return [(row, np.ones(length, np.int32)) for row in tokens]

    return executable, rows


def zoo(name: str, spec: str) -> tuple[Any, Callable[[int], list[Any]]]:
    """(executable, n -> rows)"""
    forward, params, _ = forwards.make(name)
    executable = ji.compile(ji.trace(forward, params, ji.spec(spec)), buckets={"batch": [1, 8, MOST]})
    shape, draw = [int(n) for n in spec.split()[1:]], np.random.default_rng(0)
    return executable, lambda count: [(row,) for row in draw.standard_normal((count, *shape)).astype(np.float32)]


CASES: dict[str, Callable[[], tuple[Any, Callable[[int], list[Any]]]]] = {
    "MiniLM, 32 tokens": lambda: minilm(32),
    "MiniLM, 128 tokens": lambda: minilm(128),
    "ResNet, 128 x 128": lambda: zoo("resnet", "batch 128 128 3"),
    "ResNet, 16 x 16": lambda: zoo("resnet", "batch 16 16 3"),
    "MLP-Mixer, 16 x 16": lambda: zoo("mlp_mixer", "batch 3 16 16"),
}


def bare(executable: Any, batches: list[tuple[Any, ...]]) -> None:
    """Every batch, the next one dispatched before the last one is taken."""
    last = None
    for batch in batches:
        now = executable(*batch)
        if last is not None:
            jax.tree.map(np.asarray, last)
        last = now
    jax.tree.map(np.asarray, last)


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def both(work: Callable[[], Any]) -> tuple[float, float]:
    """(seconds, seconds of processor time of all threads)"""
    started, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - used


def saturation(executable: Any, make: Callable[[int], list[Any]], rounds: int, budget: float) -> dict[str, Any]:
    """Medians of the rounds: milliseconds a row of the bare loop, and ratios to it."""
    batch = [np.stack(x) for x in zip(*make(MOST), strict=True)]
    bare(executable, [tuple(batch)])
    once = seconds(lambda: bare(executable, [tuple(batch)] * 4)) / 4
    count = MOST * min(max(round(budget / once), 8), 100)
    rows = make(count)
    batches = [tuple(np.stack(x) for x in zip(*rows[i : i + MOST], strict=True)) for i in range(0, count, MOST)]
    single = len(rows[0]) == 1
    with ji.Engine(executable, max_queue=count) as engine:

        def by_map() -> None:
            for _ in engine.map([row[0] for row in rows] if single else rows):
                pass

        def by_submit() -> None:
            for future in [engine.submit(*row) for row in rows]:
                future.result()

        ways = {"bare": lambda: bare(executable, batches), "map": by_map, "submit": by_submit}
        values: Any = harness.interleave({name: (lambda way=way: both(way)) for name, way in ways.items()}, rounds)  # pyright: ignore[reportArgumentType]
        stats = engine.stats()

    def ratio(name: str, which: int) -> float:
        return statistics.median(a[which] / b[which] for a, b in zip(values[name], values["bare"], strict=True))

    bare_ms, bare_cpu = (1e3 * statistics.median(v[which] for v in values["bare"]) / count for which in (0, 1))
    return {
        "rows": count,
        "bare ms a row": round(bare_ms, 4),
        "map / bare": round(ratio("map", 0), 4),
        "submit / bare": round(ratio("submit", 0), 4),
        "map / bare, processor time": round(ratio("map", 1), 4),
        "submit / bare, processor time": round(ratio("submit", 1), 4),
        "map, us of processor time a row more": round(1e3 * bare_cpu * (ratio("map", 1) - 1), 1),
        "occupancy": round(stats.occupancy, 3),
        "compiles": stats.compiles,
        "seconds": {name: [[round(x, 4) for x in v] for v in every] for name, every in values.items()},
    }


def lone(executable: Any, make: Callable[[int], list[Any]], budget: float) -> dict[str, float]:
    """Milliseconds, medians over requests."""
    (row,) = make(1)
    batch = tuple(x[None] for x in row)
    times: dict[str, list[float]] = {"bare": [], "engine": []}
    with ji.Engine(executable, max_delay_ms=0) as engine:
        until = time.perf_counter() + 2 * budget
        while time.perf_counter() < until or len(times["bare"]) < 20:
            times["bare"].append(seconds(lambda: jax.tree.map(np.asarray, executable(*batch))))
            times["engine"].append(seconds(lambda: engine.submit(*row).result()))
    middle = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    more = 1e3 * statistics.median(e - b for e, b in zip(times["engine"], times["bare"], strict=True))
    return {**{n: round(v, 3) for n, v in middle.items()}, "more": round(more, 3), "requests": len(times["bare"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of the bare loop, a round")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    harness.bind(os.cpu_count() or 1)
    measured, load = {}, [os.getloadavg()[0]]
    for name in options.cases:
        executable, make = CASES[name]()
        found = {
            "saturation": saturation(executable, make, options.rounds, options.seconds),
            "lone ms": lone(executable, make, options.seconds),
        }
        shown = {k: v for k, v in found["saturation"].items() if k != "seconds"}
        print(f"{name}: {json.dumps(shown)}; lone ms: {json.dumps(found['lone ms'])}", flush=True)
        measured[name] = found
    if options.out:
        command = f"python benchmarks/engine.py --rounds {options.rounds} --seconds {options.seconds:g}"
        about: dict[str, Any] = {"command": command, "machine": harness.machine(os.cpu_count() or 1)}
        about |= {"jax": jax.__version__, "load before and after": [*load, os.getloadavg()[0]]}
        options.out.with_suffix(".json").write_text(json.dumps({**about, "measured": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
