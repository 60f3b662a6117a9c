"""The derived step against the forward it came from: every position, any chunking, any mix of slots."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji

pytestmark = pytest.mark.jax_defaults

T = 48
# name -> (axes, bytes that a hand-written float32 cache of this architecture keeps for each token of a sequence)
FORWARDS = {
    "gpt2": ("batch time", 4 * 2 * 2 * 32),  # 2 layers x (K and V) x 4 heads of 8
    "linen_transformer": ("batch time", 4 * 2 * 2 * 32),
    "alibi": ("time", 4 * 2 * 6),  # one layer, one shared head
    "gemma2": ("batch time", 4 * 4 * 2 * 2 * 8),  # before the heads are repeated
    "nnx_library": ("batch time", 4 * 2 * 2 * 24),
    "token_mask": ("batch time", 4 * 2 * 16 + 1),  # and one bool: whether the token is padding
}


def program_of(name: str) -> tuple[ji.Program, int]:
    module = importlib.import_module(f"forwards.{name}")
    forward, params = module.make()
    arguments = () if params is None else (params,)
    return ji.trace(forward, *arguments, ji.spec(FORWARDS[name][0], "int32")), module.VOCAB


@pytest.fixture(scope="module", params=FORWARDS)
def case(request):
    """(name, program, step at length T, tokens [3, T], the forward's logits of each)"""
    with jax.numpy_rank_promotion("allow"):
        program, vocab = program_of(request.param)
        step = ji.incremental(program, length=T)
        tokens = np.random.default_rng(0).integers(0, vocab, (3, T)).astype(np.int32)
        batched = "batch" in program.axes
        forward = jax.jit(program.function)
        full = [np.asarray(forward(program.params, t[None] if batched else t)).reshape(T, -1) for t in tokens]
        return request.param, program, step, tokens, full


def driver(program, step):
    """step over plain [slots, k] tokens, jitted; logits [slots, k, vocab]."""
    params = jax.tree.leaves(program.params)
    batched = "batch" in program.axes

    @jax.jit
    def run(tokens, positions, counts, state):
        rows = tokens[:, None] if batched else tokens
        (logits,), state = step(params, [rows], positions, state, counts)
        return logits.reshape(*tokens.shape, -1), state

    return run


def test_any_chunking_and_mix_of_slots(case):
    """Chunks of random real lengths 0 to k; padded rows hold another token and must leave no trace."""
    _, program, step, tokens, full = case
    run, k = driver(program, step), 7
    random = np.random.default_rng(1)
    state, done = step.init(3), np.zeros(3, np.int32)
    largest = max(np.abs(f).max() for f in full)
    seen = set()
    while (done < T).any():
        counts = np.minimum(random.integers(0, k + 1, 3), T - done).astype(np.int32)
        seen |= set(counts.tolist())
        chunk = np.full((3, k), 2, np.int32)
        for i in range(3):
            chunk[i, : counts[i]] = tokens[i, done[i] : done[i] + counts[i]]
        logits, state = run(chunk, done, counts, state)
        for i in range(3):
            got, want = np.asarray(logits)[i, : counts[i]], full[i][done[i] : done[i] + counts[i]]
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * largest)
        done = done + counts
    assert seen == set(range(k + 1))


def test_one_by_one_and_last(case):
    """k = 1 decodes; `last` gives a chunk's last real row only, the same numbers."""
    _, program, step, tokens, full = case
    run, params = driver(program, step), jax.tree.leaves(program.params)
    state = step.init(3)
    for t in range(10):
        logits, state = run(tokens[:, t : t + 1], np.full(3, t, np.int32), np.ones(3, np.int32), state)
        for i in range(3):
            np.testing.assert_allclose(np.asarray(logits)[i, 0], full[i][t], rtol=0, atol=1e-5 * np.abs(full[i]).max())
    rows = tokens[:, None, 10:18] if "batch" in program.axes else tokens[:, 10:18]
    counts = np.array([8, 3, 1], np.int32)
    (last,), _ = jax.jit(lambda s: step(params, [rows], np.full(3, 10, np.int32), s, counts, last=True))(state)
    for i, n in enumerate(counts):
        np.testing.assert_allclose(
            np.asarray(last)[i].reshape(-1), full[i][9 + n], rtol=0, atol=1e-5 * np.abs(full[i]).max()
        )


def test_no_rows_change_nothing(case):
    _, program, step, tokens, _ = case
    run = driver(program, step)
    _, state = run(tokens[:, :5], np.zeros(3, np.int32), np.full(3, 5, np.int32), step.init(3))
    before = [np.asarray(s) for s in state]
    _, after = run(tokens[:, 5:10], np.full(3, 5, np.int32), np.zeros(3, np.int32), state)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_slot_is_used_again(case):
    """A slot at position 0 starts anew, whatever its state still holds."""
    _, program, step, tokens, full = case
    run = driver(program, step)
    _, state = run(tokens, np.zeros(3, np.int32), np.full(3, T, np.int32), step.init(3))
    logits, _ = run(tokens[::-1, :9], np.zeros(3, np.int32), np.full(3, 9, np.int32), state)
    for i in range(3):
        want = full[2 - i]
        np.testing.assert_allclose(np.asarray(logits)[i], want[:9], rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_shorter_state_reads_less(case):
    _, program, step, tokens, full = case
    logits, _ = driver(program, step)(tokens[:, :16], np.zeros(3, np.int32), np.full(3, 16, np.int32), step.init(3, 16))
    for i in range(3):
        np.testing.assert_allclose(np.asarray(logits)[i], full[i][:16], rtol=0, atol=1e-5 * np.abs(full[i]).max())


def test_rows_past_the_end_are_dropped(case):
    """A chunk that overhangs the state neither shifts back over older rows nor wraps."""
    _, program, step, tokens, full = case
    run = driver(program, step)
    _, state = run(tokens[:, :12], np.zeros(3, np.int32), np.full(3, 12, np.int32), step.init(3, 16))
    logits, _ = run(tokens[:, 12:18], np.full(3, 12, np.int32), np.full(3, 4, np.int32), state)
    for i in range(3):
        np.testing.assert_allclose(np.asarray(logits)[i, :4], full[i][12:16], rtol=0, atol=1e-5 * np.abs(full[i]).max())


def test_state_is_what_a_hand_written_cache_keeps(case):
    name, _, step, _, _ = case
    assert step.bytes_per_token == FORWARDS[name][1]
    assert f"{step.bytes_per_token} bytes a token" in step.explain()


def test_decoding_copies_no_state_and_nothing_quadratic_is_built():
    """A 1-row step donates its state: aliased, no copy of a whole array of it, no value of time x time."""
    program, _ = program_of("gpt2")
    length = 89  # the context is 96; a prime, so that no other dim has this size
    step = ji.incremental(program, length=length)
    for slots in (1, 4):
        state = step.abstract_state(slots)
        ints = jax.ShapeDtypeStruct((slots,), np.int32)
        params = jax.tree.leaves(program.abstract_params)
        rows = jax.ShapeDtypeStruct((slots, 1, 1), np.int32)
        function = jax.jit(lambda p, r, at, s: step(p, [r], at, s), donate_argnums=3)
        text = function.lower(params, rows, ints, state).compile().as_text()
        shape = re.escape(",".join(map(str, state[0].shape)))
        assert not re.search(rf"f32\[{shape}\]\S* copy\(", text)
        assert text.count("may-alias") + text.count("must-alias") >= len(state)
        assert not re.search(rf"\b{length},(\d+,)*{length}\b", text)


def test_a_long_context_derives_without_anything_quadratic():
    program = ji.trace(
        importlib.import_module("forwards.alibi").forward,
        importlib.import_module("forwards.alibi").make()[1],
        ji.spec("time", "int32"),
    )
    step = ji.incremental(program, length=131072)
    assert step.bytes_per_token == 48


def softmax_model(mask, extra=lambda x: x):
    params = {"embed": jnp.ones((11, 8)), "w": jnp.ones((8, 8))}

    def forward(p, tokens):
        x = p["embed"][tokens]
        scores = jnp.einsum("btd,bsd->bts", x @ p["w"], x)
        time = jnp.arange(tokens.shape[1])
        return extra(jax.nn.softmax(mask(scores, time[:, None], time[None, :])) @ x) @ p["embed"].T

    return ji.trace(forward, params, ji.spec("batch time", "int32"))


LEAKS = {
    "no mask": (lambda s, i, j: s, lambda x: x, "no mask was found"),
    "one ahead": (lambda s, i, j: jnp.where(j <= i + 1, s, -jnp.inf), lambda x: x, "reads up to 1 rows ahead"),
    "mild": (lambda s, i, j: jnp.where(j <= i, s, -30.0), lambda x: x, "no mask was found"),
    "pooled": (lambda s, i, j: jnp.where(j <= i, s, -jnp.inf), lambda x: x.mean(1, keepdims=True), "combines all rows"),
    "reversed": (lambda s, i, j: jnp.where(j <= i, s, -jnp.inf), lambda x: jnp.flip(x, 1), "as a whole"),
    "centred": (lambda s, i, j: jnp.where(j <= i, s, -jnp.inf), lambda x: x - x.mean(1, keepdims=True), "combines all"),
}


@pytest.mark.parametrize("name", LEAKS)
def test_leaks_are_refused(name: str):
    mask, extra, message = LEAKS[name]
    with pytest.raises(ji.NotCausalError, match=message) as refused:
        ji.incremental(softmax_model(mask, extra), length=16)
    assert "test_incremental.py" in str(refused.value)  # the line to look at


def test_assume_causal_overrides_a_missing_proof_but_not_a_leak():
    mild = LEAKS["mild"][0]
    step = ji.incremental(softmax_model(mild), length=16, assume_causal=True)
    assert "assume_causal" in step.explain()
    with pytest.raises(ji.NotCausalError, match="1 rows ahead"):
        ji.incremental(softmax_model(LEAKS["one ahead"][0]), length=16, assume_causal=True)


def test_an_assumption_is_told():
    mask = lambda s, i, j: s + jnp.where(j <= i, 0.0, -1e9)  # noqa: E731
    assert "scores stay above the mask value" in ji.incremental(softmax_model(mask), length=16).explain()


def test_no_such_axis():
    program, _ = program_of("alibi")
    with pytest.raises(ji.TraceError, match="no axis 'frames'"):
        ji.incremental(program, axis="frames")
