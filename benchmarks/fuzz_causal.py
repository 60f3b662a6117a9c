"""Random programs over time by the hundred: no program that looks ahead may be derived, every derived step must decode
what its forward computes, and few causal programs may be refused.

python benchmarks/fuzz_causal.py --programs 300 --output benchmarks/results/fuzz_causal.json

Half of the programs are causal by construction (those refused are listed), half look ahead in one step.
tests/fuzz_time.py builds them, tests/fuzz_decode.py holds every claim against runs.
"""

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

EACH = 10  # programs a task


def programs(seed: int, count: int) -> list[tuple[bool, list[tuple[str, int]]]]:
    """(whether it is built causal, its steps)"""
    import fuzz_time

    rng, found = random.Random(seed), []
    causal, ahead = sorted(fuzz_time.CAUSAL), sorted(fuzz_time.AHEAD)
    for number in range(count):
        names = [rng.choice(causal) for _ in range(rng.randint(1, 5))]
        if number % 2:
            names = names[:3]
            names.insert(rng.randint(0, len(names)), rng.choice(ahead))
        found.append((number % 2 == 0, [(name, rng.randrange(1 << 20)) for name in names]))
    return found


def task(seed: int) -> list[dict[str, Any]]:
    """Checks EACH programs."""
    import jax
    from fuzz_decode import check

    results = []
    for number, (causal, steps) in enumerate(programs(seed, EACH)):
        entry: dict[str, Any] = {"causal": causal, "steps": steps, "refused": "", "wrong": "", "crash": ""}
        try:
            entry["refused"] = check(steps, last=number % 8 == 0)
        except AssertionError as error:
            entry["wrong"] = str(error)
        except Exception as error:  # whatever isn't a refusal is what this looks for
            entry["crash"] = f"{type(error).__name__}: {error}"[:1000]
        results.append(entry)
    jax.clear_caches()
    return results


def summary(done: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    import jax

    causal = [entry for entry in done if entry["causal"]]
    refused = [entry for entry in causal if entry["refused"]]
    derived = [entry for entry in causal if not (entry["refused"] or entry["wrong"] or entry["crash"])]
    return {
        "jax": jax.__version__,
        "programs": len(done),
        "built_causal": len(causal),
        "derived": len(derived),
        "derived_share": round(len(derived) / max(len(causal), 1), 4),
        "looking_ahead": len(done) - len(causal),
        "looking_ahead_refused": sum(not entry["causal"] and bool(entry["refused"]) for entry in done),
        "looking_ahead_derived_and_causal": sum(
            not any((e["causal"], e["refused"], e["wrong"], e["crash"])) for e in done
        ),
        "wrong": [entry for entry in done if entry["wrong"]],
        "crashes": [entry for entry in done if entry["crash"]],
        "refused_at": Counter(entry["refused"].split("(")[0] for entry in refused),
        "refused": [{"steps": entry["steps"], "why": entry["refused"]} for entry in refused],
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--programs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the first task; each task of 10 programs takes one")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long, with what is done")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    import multiprocessing

    started, done = time.perf_counter(), []
    tasks = range(options.seed, options.seed - (-options.programs // EACH))
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        for results in pool.map(task, tasks):
            done += results
            if time.perf_counter() - started > options.seconds:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    report = summary(done, time.perf_counter() - started)
    print(json.dumps({k: v for k, v in report.items() if k != "refused"}, indent=1))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    if report["wrong"] or report["crashes"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
