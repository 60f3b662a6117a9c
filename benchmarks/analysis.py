"""How long it takes to analyse an 80-layer model of 70B shapes (9,217 equations), beside JAX's own trace of it.

    python benchmarks/analysis.py [--layers 80] [--rounds 3] [--out benchmarks/results/analysis]

No weights exist: shapes alone are traced. Seconds are process time, medians of the rounds, each on a fresh trace.

- JAX's trace: of the forward at one size.
- derive: `ji.incremental` at a length of 8,192, its flatten included.
- proof: `why("batch")` once the two traces that it compares are made.
- passes: the pipeline that `ji.compile` runs, with staging.
- beyond JAX's traces: the sum of these three.

A model of fewer layers (`--long-layers`) is then derived at 131,072 tokens, and its step for one new token traced; of
all that this step holds, the largest constant and the largest value beside its state are told, in elements.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

import jaxinfer as ji
from jaxinfer.graph import flatten
from jaxinfer.passes import optimise, stage

WIDTH, HEADS, GROUPS, DIM, HIDDEN, VOCAB, LENGTH = 8192, 64, 8, 128, 28672, 128256, 8192


def shapes(layers: int) -> dict:
    """The parameters, as shapes."""

    def of(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    layer = {
        "norms": (of(WIDTH), of(WIDTH)),
        "q": of(WIDTH, HEADS * DIM),
        "k": of(WIDTH, GROUPS * DIM),
        "v": of(WIDTH, GROUPS * DIM),
        "o": of(HEADS * DIM, WIDTH),
        "gate": of(WIDTH, HIDDEN),
        "up": of(WIDTH, HIDDEN),
        "down": of(HIDDEN, WIDTH),
    }
    return {"embed": of(VOCAB, WIDTH), "layers": [layer] * layers, "norm": of(WIDTH), "head": of(WIDTH, VOCAB)}


def norm(x, weight):
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5)).astype(x.dtype) * weight


def rope(x):
    angles = jnp.arange(x.shape[1])[:, None] * 500_000.0 ** (-jnp.arange(0, DIM, 2) / DIM)
    cos, sin = (f(angles)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def forward(params, tokens):
    batch, time_ = tokens.shape
    x = params["embed"][tokens]
    for p in params["layers"]:
        h = norm(x, p["norms"][0])
        q = rope((h @ p["q"]).reshape(batch, time_, HEADS, DIM)).reshape(batch, time_, GROUPS, -1, DIM)
        k, v = (a.reshape(batch, time_, GROUPS, DIM) for a in (h @ p["k"], h @ p["v"]))
        scores = jnp.einsum("btgrd,bsgd->bgrts", q, rope(k)).astype(jnp.float32) / DIM**0.5
        index = jnp.arange(time_)
        scores = jnp.where(index[:, None] >= index[None, :], scores, -jnp.inf)
        mixed = jnp.einsum("bgrts,bsgd->btgrd", jax.nn.softmax(scores, -1).astype(x.dtype), v)
        x = x + mixed.reshape(batch, time_, -1) @ p["o"]
        h = norm(x, p["norms"][1])
        x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
    return norm(x, params["norm"]) @ params["head"]


def one_round(params: dict) -> dict[str, float]:
    """Seconds of each analysis of one fresh trace."""
    seconds: dict[str, float] = {}

    def timed(name, function):
        started = time.process_time()
        result = function()
        seconds[name] = time.process_time() - started
        return result

    jax.clear_caches()
    program = timed("JAX's trace", lambda: ji.trace(forward, params, ji.spec("batch time", "int32")))
    program.at({"batch": 1, "time": LENGTH})
    step = timed("derive", lambda: ji.incremental(program, length=LENGTH))
    assert step.bytes_per_token == 2 * 2 * GROUPS * DIM * len(params["layers"])
    program.why("batch")  # makes the second trace, which the copy shares
    timed("proof", lambda: program.with_params(program.params).why("batch"))
    graph, count = flatten(program.jaxpr), len(jax.tree.leaves(params))
    timed("passes", lambda: stage(optimise(graph, count)[0], count))
    return seconds | {"equations": len(graph.equations)}


def long_context(layers: int, length: int) -> dict[str, float]:
    """Seconds to derive at a length, and the largest arrays that the step for one token holds."""
    program = ji.trace(forward, shapes(layers), ji.spec("batch time", "int32"))
    started = time.process_time()
    program.at({"batch": 1, "time": length})
    traced = time.process_time()
    step = ji.incremental(program, length=length)
    derived = time.process_time()
    ints, rows = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1,), (1, 1, 1)))
    params, state = jax.tree.leaves(program.params), step.abstract_state(1)
    closed = jax.make_jaxpr(lambda p, r, at, s: step(p, [r], at, s))(params, rows, ints, state)
    kept = {dims(a.shape) for a in (*params, *state)}
    constants, values = arrays(closed)
    return {
        "layers": layers,
        "tokens": length,
        "JAX's trace": round(traced - started, 3),
        "derive": round(derived - traced, 3),
        "largest constant": max(constants, default=0),
        "largest value beside parameters and state": max(math.prod(v) for v in values if dims(v) not in kept),
        "time x time": length**2,
    }


def dims(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape whatever the order of its dims, without those of size 1: state is read transposed, too."""
    return tuple(sorted(n for n in shape if n > 1))


def arrays(closed: ClosedJaxpr) -> tuple[list[int], list[tuple[int, ...]]]:
    """(elements of every constant, shapes of every value) of a jaxpr and the ones it calls."""
    graph = flatten(closed)
    nodes = {n for e in graph.equations for n in (*e.inputs, *e.outputs)}
    return [math.prod(n.shape) for n in nodes if n.constant], [n.shape for n in nodes if not n.constant]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long-layers", type=int, default=4)
    parser.add_argument("--long-length", type=int, default=131_072)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rounds = [one_round(shapes(options.layers)) for _ in range(options.rounds)]
    result = {name: round(statistics.median(r[name] for r in rounds), 3) for name in rounds[0]}
    result |= {"beyond JAX's traces": round(sum(result[name] for name in ("derive", "proof", "passes")), 3)}
    result |= {"layers": options.layers, "rounds": options.rounds, "jax": jax.__version__}
    result |= {"long context": long_context(options.long_layers, options.long_length)}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
