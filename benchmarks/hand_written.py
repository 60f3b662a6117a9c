"""SmolLM2-135M's derived decode step beside one written by hand (tests/hand_written.py), as bare jitted calls.

    python benchmarks/hand_written.py [--checkpoint FILE] [--rounds 15] [--out benchmarks/results/hand_written]

Both donate their state, write a row at each slot's own position and read all rows that the state has room for. They
take turns of `--steps` steps; a figure is the median of the rounds, the ratio the median of the rounds' own ratios
(above 1: the derived step is slower).
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np

import jaxinfer as ji

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import hand_written


def measure(lm, slots: int, length: int, steps: int, rounds: int) -> dict[str, float]:
    """Milliseconds a step of each, and their ratio."""
    params, config = jax.device_put(lm.program.params), lm.config
    step = ji.incremental(lm.program, length=length)
    by_hand = jax.jit(lambda p, t, at, c: hand_written.decode(config, p, t, at, c), donate_argnums=3)
    derived = jax.jit(lambda p, t, at, s: step(jax.tree.leaves(p), [t[:, None, None]], at, s), donate_argnums=3)
    states = [hand_written.empty_cache(config, slots, length), step.init(slots)]
    tokens = np.arange(slots, dtype=np.int32)
    seconds: list[list[float]] = [[], []]
    for round_ in range(rounds + 1):  # the first isn't counted
        for turn in (0, 1) if round_ % 2 else (1, 0):
            started = time.perf_counter()
            for t in range(steps):
                at = np.full(slots, t, np.int32)
                logits, states[turn] = (by_hand, derived)[turn](params, tokens, at, states[turn])
            jax.block_until_ready(logits)
            seconds[turn].append((time.perf_counter() - started) / steps)
    hand, ours = (s[1:] for s in seconds)
    return {
        "by hand, ms": round(1e3 * statistics.median(hand), 3),
        "derived, ms": round(1e3 * statistics.median(ours), 3),
        "ratio": round(statistics.median(b / a for a, b in zip(hand, ours, strict=True)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lm = ji.load(options.checkpoint)
    result: dict = {"length": options.length, "rounds": options.rounds, "steps": options.steps, "jax": jax.__version__}
    for slots in options.slots:
        result[f"{slots} slots"] = measure(lm, slots, options.length, options.steps, options.rounds)
        print(slots, result[f"{slots} slots"], flush=True)
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
