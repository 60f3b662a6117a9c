"""Random programs by the ten thousand: no claim of the batch proof may be wrong, and few true ones may be missed.

python benchmarks/fuzz_axes.py --programs 10000 --workers 2 --output benchmarks/results/fuzz_axes.json

Half of the programs are built to keep rows apart (at least 98 % of them should be proved, the others are listed), half
mix rows somewhere, which leaves the proof little to claim, but nothing wrong. tests/fuzz_rows.py builds them,
tests/fuzz_check.py holds every claim against runs.
"""

import argparse
import json
import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

EACH = 25  # programs a task


def programs(seed: int, count: int) -> list[tuple[bool, list[tuple[str, int]]]]:
    """(whether it is built to keep rows apart, its steps)"""
    import fuzz_rows

    rng, found = random.Random(seed), []
    apart, mixing = sorted(fuzz_rows.APART), sorted(fuzz_rows.MIXING)
    for number in range(count):
        names = [rng.choice(apart) for _ in range(rng.randint(1, 5))]
        if number % 2:
            names.insert(rng.randint(0, len(names)), rng.choice(mixing))
        found.append((number % 2 == 0, [(name, rng.randrange(1 << 20)) for name in names]))
    return found


def task(seed: int) -> list[dict[str, Any]]:
    """Checks EACH programs."""
    import jax
    from fuzz_check import check

    results = []
    for apart, steps in programs(seed, EACH):
        entry: dict[str, Any] = {"apart": apart, "steps": steps, "refused": "", "false": ""}
        try:
            entry["refused"] = check(steps, sizes=random.Random(seed).random() < 0.25)
        except AssertionError as error:
            entry["false"] = str(error)
        results.append(entry)
    jax.clear_caches()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--programs", type=int, default=10000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long, with what is done")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    import multiprocessing

    import jax

    started, done = time.perf_counter(), []
    tasks = -(-options.programs // EACH)
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        for results in pool.map(task, range(tasks)):
            done += results
            if time.perf_counter() - started > options.seconds:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    apart = [entry for entry in done if entry["apart"]]
    missed = [entry for entry in apart if entry["refused"]]
    report = {
        "jax": jax.__version__,
        "programs": len(done),
        "built_apart": len(apart),
        "proved": len(apart) - len(missed),
        "proved_share": round(1 - len(missed) / max(len(apart), 1), 5),
        "mixing_proved_and_true": sum(not e["apart"] and not e["refused"] and not e["false"] for e in done),
        "false_claims": [entry for entry in done if entry["false"]],
        "not_proved": [{"steps": entry["steps"], "why": entry["refused"]} for entry in missed],
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps({k: v for k, v in report.items() if k not in ("not_proved",)}, indent=1))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    if report["false_claims"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
