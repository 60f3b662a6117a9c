"""What choosing the next token costs, by setting: milliseconds of one call of jaxinfer.runtime.sampling.

    python benchmarks/sampling.py

Logits are normal with a standard deviation of 4, of SmolLM2's vocabulary. "flat" takes top-p of 0.9 at temperature 4,
where so many tokens are kept that whole rows are searched.
"""

import statistics
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.runtime.sampling import SamplingOptions, SamplingState, sample, top_logprobs

SETTINGS = {
    "greedy": SamplingOptions(),
    "temperature": SamplingOptions(0.7),
    "top-k 50": SamplingOptions(0.7, 50),
    "top-p 0.9": SamplingOptions(0.7, 0, 0.9),
    "top-k, top-p, min-p": SamplingOptions(0.7, 50, 0.9, 0.05),
    "top-p 0.9, flat": SamplingOptions(4.0, 0, 0.9),
}


def milliseconds(rounds: int, function, *args) -> list[float]:
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    parser = harness.parser(__doc__ or "", "sampling")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--vocab", type=int, default=49152)
    args = parser.parse_args()
    harness.bind(args.threads)
    choose = jax.jit(sample)
    logprobs = jax.jit(lambda logits: top_logprobs(logits, jnp.argmax(logits, axis=-1), 5))
    raw: dict[str, dict[int, list[float]]] = {name: {} for name in (*SETTINGS, "5 top logprobs")}
    for slots in args.slots:
        logits = jnp.asarray(4 * np.random.default_rng(0).normal(size=(slots, args.vocab)), jnp.float32)
        for name, options in SETTINGS.items():
            state = jax.device_put(SamplingState.stack([(options, 0, slot) for slot in range(slots)]))
            raw[name][slots] = milliseconds(args.rounds, choose, logits, jnp.arange(slots), state)
        raw["5 top logprobs"][slots] = milliseconds(args.rounds, logprobs, logits)
    rows = [[name, *(f"{statistics.median(times):.2f}" for times in cells.values())] for name, cells in raw.items()]
    parts = {"Milliseconds a call": harness.table(["slots", *map(str, args.slots)], rows)}
    harness.write(args.out, args, {"jax": f"jax {jax.__version__}, {jax.default_backend()}"}, parts, raw)


if __name__ == "__main__":
    main()
