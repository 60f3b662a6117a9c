"""Forwards by others, unmodified: causal by brute force, and decoded as they are computed whole."""

import importlib
import importlib.util
from functools import cache

import jax
import numpy as np
import pytest

import jaxinfer as ji
from third_party import hf_flax, others

NEEDS = {"griffin": "recurrentgemma", "mamba2": "mamba2_jax", "mamba2_chunked": "mamba2_jax"}
NEEDS |= {"hmm_filter": "dynamax", "kalman_filter": "dynamax"}
PROGRAMS = hf_flax.PROGRAMS | others.PROGRAMS
T, SOURCE = 24, 7

pytestmark = [
    pytest.mark.third_party,
    pytest.mark.jax_defaults,
    pytest.mark.filterwarnings("default"),  # what others' code is deprecated for is not ours to mend
]


@cache
def program(name: str) -> tuple[ji.Program, int]:
    package = NEEDS.get(name, "transformers")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} isn't installed here")
    function, params, specs, vocab = PROGRAMS[name]()
    return ji.trace(function, params, *(ji.spec(*spec) for spec in specs), name=name), vocab


def draw(name: str, random: np.random.Generator, batch: int = 1) -> list[np.ndarray]:
    """Random inputs, [batch, ...] even for programs over one sequence."""
    traced, vocab = program(name)
    arrays = []
    for spec in traced.inputs:
        dims = [{"time": T, "source": SOURCE}.get(d, d) for d in spec.dims if d != "batch"]
        shape = [batch, *map(int, dims)]
        # Token 1 upwards: 0 and 1 are padding or the end of text in most of these vocabularies.
        drawn = random.integers(2, vocab, shape) if vocab else random.standard_normal(shape)
        arrays.append(drawn.astype(spec.dtype))
    return arrays


def whole(name: str, inputs: list[np.ndarray]) -> np.ndarray:
    """The forward over whole sequences -> [batch, time, ...]."""
    traced, _ = program(name)
    run = _jitted(name)
    batched = "batch" in traced.axes
    rows = [run(traced.params, *(a[i : i + 1] if batched else a[i] for a in inputs)) for i in range(len(inputs[0]))]
    return np.stack([np.asarray(r)[0] if batched else np.asarray(r) for r in rows])


@cache
def _jitted(name: str):
    return jax.jit(program(name)[0].function)


@pytest.mark.parametrize("name", PROGRAMS)
def test_they_are_causal_in_truth(name: str):
    random = np.random.default_rng(1)
    inputs = draw(name, random)
    before = whole(name, inputs)
    largest = np.abs(before).max()
    assert before.shape[1] == T and np.isfinite(before).all() and before.std() > 0.01
    for position in range(T - 1):
        changed = [inputs[0].copy(), *inputs[1:]]
        changed[0][:, position + 1 :] = draw(name, random)[0][:, position + 1 :]
        difference = np.abs(whole(name, changed) - before).reshape(T, -1).max(1)
        assert difference[: position + 1].max() <= 1e-5 * largest
        assert difference[position + 1 :].max() > 0


def test_chunks_keep_their_state_and_the_rows_since_they_began():
    """Mamba-2 in chunks of 8, 2 layers: a state of 4 heads x 16 x 8; 7 rows of 4 steps; 7 rows and the 3 before them
    of what is convolved (x of 64, B and C of 8 each), which is written as shifts and so made again."""
    step = ji.incremental(program("mamba2_chunked")[0], length=T)
    assert (step.bytes_per_token, step.bytes_per_sequence) == (0, 4 * 2 * (4 * 16 * 8 + 7 * 4 + 10 * (64 + 2 * 8)))


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "bart"])
def test_decoded_is_whole(name: str):
    """Chunks of many lengths from each of two slots, padded rows of other content: every row as the forward has it."""
    traced, _ = program(name)
    random = np.random.default_rng(2)
    rows, other = draw(name, random, 2)[0], draw(name, random, 2)[0]
    full = whole(name, [rows]).reshape(2, T, -1)
    step = ji.incremental(traced, length=T)
    params, batched, k = jax.tree.leaves(traced.params), "batch" in traced.axes, 5

    @jax.jit
    def run(chunk, positions, counts, state):
        (out,), state = step(params, [chunk[:, None] if batched else chunk], positions, state, counts)
        return out.reshape(2, k, -1), state

    state, done = step.init(2), np.zeros(2, np.int32)
    while (done < T).any():
        counts = np.minimum(random.integers(0, k + 1, 2), T - done).astype(np.int32)
        chunk = other[:, :k].copy()
        for i in range(2):
            chunk[i, : counts[i]] = rows[i, done[i] : done[i] + counts[i]]
        out, state = run(chunk, done, counts, state)
        for i in range(2):
            got, want = np.asarray(out)[i, : counts[i]], full[i, done[i] : done[i] + counts[i]]
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(full).max())
        done = done + counts
