"""Sampling: options, filters against transformers and brute force, invariance to the batch, the distribution drawn."""

import math

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxinfer.errors import RequestError
from jaxinfer.runtime import sampling
from jaxinfer.runtime.sampling import SamplingOptions, SamplingState, sample, top_logprobs

INF = math.inf
jitted = jax.jit(sample)
SLOTS, WIDE = 8, 3001  # one shape for most tests: a compile takes a second


def stack(options: list[SamplingOptions], seed: int = 0) -> SamplingState:
    return SamplingState.stack([(option, seed, index) for index, option in enumerate(options)])


@jax.jit
def kept_by(logits, state):
    return sampling._filter(logits, sampling._weights(logits, state.temperature), state, state.temperature > 0)


# Options


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -0.1}, ["temperature", "at least 0", "-0.1"]),
        ({"temperature": math.nan}, ["temperature", "finite", "nan"]),
        ({"temperature": INF}, ["temperature", "finite", "inf"]),
        ({"temperature": 1e39}, ["temperature", "finite"]),
        ({"temperature": True}, ["temperature", "a number", "True"]),
        ({"temperature": "1"}, ["temperature", "a number", "'1'"]),
        ({"top_k": -1}, ["top_k", "an integer", "-1"]),
        ({"top_k": 2.0}, ["top_k", "an integer", "2.0"]),
        ({"top_k": 2**31}, ["top_k", "2147483647", "2147483648"]),
        ({"top_p": 1.5}, ["top_p", "at most 1", "1.5"]),
        ({"top_p": math.nan}, ["top_p", "nan"]),
        ({"min_p": -1}, ["min_p", "at least 0", "-1"]),
        ({"seed": -1}, ["seed", "at least 0", "-1"]),
        ({"seed": 2**64}, ["seed", "18446744073709551615"]),
        ({"seed": 0.5}, ["seed", "an integer", "0.5"]),
    ],
)
def test_options_out_of_range_are_refused(values, words):
    with pytest.raises(RequestError) as caught:
        SamplingOptions(**values)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_options_take_numpy_numbers_and_limits():
    SamplingOptions(np.float32(0.5), np.int64(3), np.float32(1), 1, seed=2**64 - 1)
    SamplingOptions(top_p=0, min_p=0.0)


def test_seeded_draws_a_seed_only_where_none_is_set():
    assert SamplingOptions(seed=7).seeded().seed == 7
    drawn = {SamplingOptions(1.0).seeded().seed for _ in range(4)}
    assert len(drawn) == 4 and all(isinstance(seed, int) and 0 <= seed < 2**53 for seed in drawn)


def test_stack_gives_a_row_a_slot_and_fills_with_greedy():
    options = SamplingOptions(0.5, 4, 0.9, 0.1)
    state = SamplingState.stack([(options, 1, 0), (options, 1, 1), (options, 2, 0)], slots=4)
    assert [field.dtype.name for field in state] == ["float32", "int32", "float32", "float32", "uint32"]
    assert state.key.shape == (4, 2) and len({tuple(key) for key in state.key}) == 4
    np.testing.assert_array_equal(state.temperature, np.float32([0.5, 0.5, 0.5, 0]))
    # Pinned: a seed means the same tokens in every release.
    assert state.key[:3].tolist() == PINNED_KEYS
    with pytest.raises(ValueError, match="3 rows don't fit in 2 slots"):
        SamplingState.stack([(options, 1, 0)] * 3, slots=2)


PINNED_KEYS = [[1835504127, 1731038949], [1189033389, 18114953], [2834126987, 2358157858]]


# Greedy


def test_greedy_takes_the_lowest_index_on_ties():
    rows = [[0, 3, 3, 1], [-INF, -INF, -INF, -INF], [1, 2, INF, INF], [-0.0, 0.0, -1, -2]]
    logits = np.full((SLOTS, WIDE), -INF, np.float32)
    logits[:4, :4] = rows
    assert jitted(logits, jnp.arange(SLOTS), stack([SamplingOptions()] * SLOTS)).tolist()[:4] == [1, 0, 2, 0]


def test_greedy_and_sampled_slots_share_a_batch():
    logits = jax.random.normal(jax.random.key(0), (SLOTS, WIDE))
    tokens = jitted(logits, jnp.arange(SLOTS), stack([SamplingOptions(), SamplingOptions(5.0)] * 4))
    assert (tokens[1::2] != jnp.argmax(logits, axis=-1)[1::2]).any()
    np.testing.assert_array_equal(tokens[::2], jnp.argmax(logits, axis=-1)[::2])
    assert tokens.dtype == jnp.int32


def test_an_all_greedy_batch_does_not_pay_for_sampling():
    jaxpr = jax.make_jaxpr(sample)(jnp.zeros((2, 9)), jnp.arange(2), stack([SamplingOptions()] * 2)).jaxpr
    names = {equation.primitive.name for equation in jaxpr.eqns}
    assert "cond" in names
    assert not names & {"random_bits", "random_wrap", "threefry2x32", "exp", "log1p", "top_k", "while", "scan"}


def test_one_program_serves_every_setting():
    traces = []

    @jax.jit
    def counted(*args):
        traces.append(args)
        return sample(*args)

    for options in (SamplingOptions(), SamplingOptions(1.0), SamplingOptions(0.5, 3, 0.5, 0.1)):
        counted(jnp.zeros((2, 9)), jnp.arange(2), stack([options] * 2))
    assert len(traces) == 1


# Filters

# transformers 5.23: TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper in its order, on
# `reference_logits`; (temperature, top_k, top_p, min_p) -> a row's kept tokens as bits, token 0 the highest.
TRANSFORMERS = {
    (1.0, 5, 1.0, 0.0): [0x5004A, 0x3094, 0x80E02, 0x124044, 0x102182, 0x11E00],
    (0.7, 0, 0.9, 0.0): [0x5000A, 0x2094, 0x88E22, 0x120040, 0x100082, 0x51E00],
    (1.5, 0, 1.0, 0.1): [0x5204B, 0x3994, 0x1AAE6B, 0x1240D4, 0x3521A2, 0x651E44],
    (0.8, 12, 0.8, 0.0): [0x4000A, 0x2084, 0x88E02, 0x120040, 0x100082, 0x11E00],
    (1.3, 10, 0.95, 0.05): [0x5204B, 0x3B94, 0x18AE62, 0x1240D4, 0x352182, 0x251E40],
    (2.0, 3, 0.3, 0.5): [0x2, 0x2000, 0x800, 0x20000, 0x80, 0x200],
    (1.0, 0, 0.0, 0.0): [0x2, 0x2000, 0x800, 0x20000, 0x80, 0x200],
    (0.5, 1, 1.0, 1.0): [0x2, 0x2000, 0x800, 0x20000, 0x80, 0x200],
}


def reference_logits() -> np.ndarray:
    row, token = np.mgrid[:6, :24]
    logits = (((token * token * 37 + row * 101 + token * row * 17) % 997) / 100 - 3).astype(np.float32)
    logits[1, :6] = -INF
    logits[2, [3, 10, 17]] = 5.0
    return logits


@pytest.mark.parametrize("values", TRANSFORMERS)
def test_filters_keep_what_transformers_keeps(values):
    kept = kept_by(reference_logits(), stack([SamplingOptions(*values)] * 6))
    assert [int("".join("01"[bit] for bit in row), 2) for row in np.asarray(kept, int)] == TRANSFORMERS[values]


def brute_force(logits: np.ndarray, options: SamplingOptions, top_p: float) -> np.ndarray:
    """The kept tokens of one row by sorting, in float64."""
    row = logits.astype(np.float64)
    kept = np.ones(row.shape, bool)
    if options.top_k:
        kept &= row >= np.sort(row)[-min(options.top_k, len(row))]
    weights = np.exp(np.where(row == row.max(), 0.0, row - row.max()) / np.float32(options.temperature))
    if options.top_p < 1:
        masses = np.where(kept, weights, 0.0)
        order = np.argsort(-row, kind="stable")
        reached = np.cumsum(masses[order]) >= top_p * masses.sum()
        kept &= row >= row[order[np.argmax(reached)]]
    return kept & (weights >= np.float32(options.min_p) * (1 - 1e-6))


VOCAB = 24
rows = st.one_of(
    # XLA:CPU flushes subnormals, so two of them tie.
    hnp.arrays(np.float32, VOCAB, elements=st.floats(-9, 9, width=32, allow_subnormal=False)),
    hnp.arrays(np.float32, VOCAB, elements=st.sampled_from([-INF, -1.0, 0.0, -0.0, 1.0, 1.5])),
    hnp.arrays(np.float32, VOCAB, elements=st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False)),
).filter(lambda row: row.max() > -INF)
tenths = st.integers(0, 20).map(lambda n: n / 20)
options = st.builds(SamplingOptions, st.floats(0.1, 4), st.integers(0, VOCAB + 2), tenths, tenths)


@pytest.mark.parametrize("candidates", [3, 256])
def test_filters_equal_brute_force(monkeypatch, candidates):
    monkeypatch.setattr(sampling, "_CANDIDATES", candidates)  # 3: most searches go through the whole row
    kept_by = jax.jit(lambda *args: globals()["kept_by"].__wrapped__(*args))

    @settings(max_examples=120, deadline=None)
    @example(np.zeros(VOCAB, np.float32), SamplingOptions(1.0, 1, 0.0, 1.0))
    @example(np.float32([3e38, -3e38] + [0] * (VOCAB - 2)), SamplingOptions(0.1, 0, 0.95, 0.0))
    @given(rows, options)
    def check(row, options):
        found = np.asarray(kept_by(row[None], stack([options])))[0]
        # A sum that falls on the limit itself may round either way.
        low, high = (brute_force(row, options, np.clip(options.top_p * f, 0, 1 - 1e-9)) for f in (1 - 3e-6, 1 + 3e-6))
        assert (low <= found).all() and (found <= high).all()
        assert found[np.argmax(row)]

    check()


def test_min_p_is_a_share_of_the_likeliest():
    logits = np.full((6, VOCAB), -INF, np.float32)
    logits[0, :3] = np.log([0.5, 0.26, 0.24])
    kept = kept_by(logits, stack([SamplingOptions(1.0, min_p=0.5)] * 6))
    assert kept[0].tolist() == [True, True] + [False] * (VOCAB - 2)


def test_searching_rows_equals_searching_candidates(monkeypatch):
    """So a slot can't tell that a neighbour's settings sent the batch through the other road."""
    logits = 4 * jax.random.normal(jax.random.key(1), (16, 2000)).round(1)
    state = stack([SamplingOptions(0.3, k, p) for k in (0, 5, 40, 1999) for p in (0.1, 0.5, 0.9, 1.0)])
    few = kept_by(logits, state)
    monkeypatch.setattr(sampling, "_CANDIDATES", 1)
    whole = jax.jit(lambda *args: kept_by.__wrapped__(*args))(logits, state)
    np.testing.assert_array_equal(few, whole)


# Draws

MIXED = [
    SamplingOptions(0.7),
    SamplingOptions(),
    SamplingOptions(1.0, top_k=40),
    SamplingOptions(2.0, top_p=0.9),
    SamplingOptions(0.9, 300, 0.95, 0.01),
    SamplingOptions(1.0, min_p=0.1),
    SamplingOptions(30.0),
    SamplingOptions(1.0, top_p=0.99),
]


def test_a_sample_depends_on_its_own_row_alone():
    logits = 3 * jax.random.normal(jax.random.key(2), (SLOTS, WIDE))
    positions, state = jnp.arange(8) * 13, stack(MIXED)
    together = np.asarray(jitted(logits, positions, state))
    order = np.random.default_rng(0).permutation(8)

    def pick(index):
        return logits[index], positions[index], jax.tree.map(lambda field: field[index], state)

    np.testing.assert_array_equal(jitted(*pick(order)), together[order])
    for slot in range(8):
        assert jitted(*pick(np.array([slot])))[0] == together[slot]
    pairs = jax.tree.map(lambda x: jnp.asarray(x).reshape(4, 2, *x.shape[1:]), (logits, positions, state))
    np.testing.assert_array_equal(jax.jit(jax.vmap(sample))(*pairs).reshape(8), together)


def test_seed_sample_and_position_each_change_the_draw():
    flat, one = jnp.zeros((1, WIDE)), SamplingOptions(1.0)

    def draw(seed, index, position):
        return int(jitted(flat, jnp.array([position]), SamplingState.stack([(one, seed, index)]))[0])

    base = draw(0, 0, 0)
    assert draw(0, 0, 0) == base
    assert len({base, draw(1, 0, 0), draw(0, 1, 0), draw(0, 0, 1), draw(2**63, 0, 0)}) == 5


@pytest.mark.parametrize(
    ("options", "vary"),
    [
        (SamplingOptions(1.0), "position"),
        (SamplingOptions(1.0), "sample"),
        (SamplingOptions(2.0, 5, 0.9), "position"),
        (SamplingOptions(0.5, 0, 1, 0.05), "position"),
    ],
)
def test_draws_follow_the_distribution(options, vary):
    logits, draws = np.float32([2, 1.5, 1, 0.5, 0, -0.5, -1, -4] + [-INF] * (VOCAB - 8)), 8192
    rows = [(options, 11, index if vary == "sample" else 0) for index in range(draws)]
    positions = np.arange(draws) if vary == "position" else np.full(draws, 5)
    state = SamplingState.stack(rows)
    batch = np.tile(logits, (draws, 1))
    counts = np.bincount(jitted(batch, positions, state), minlength=len(logits))
    expected = np.where(
        kept_by(batch[:1], SamplingState.stack(rows[:1]))[0], np.exp(logits.astype(float) / options.temperature), 0
    )
    expected *= draws / expected.sum()
    assert (counts[expected == 0] == 0).all()
    seen = expected > 0
    # Seeds are fixed, so this either always passes or never does.
    assert scipy.stats.chisquare(counts[seen], expected[seen]).pvalue > 1e-3


def test_noise_resolves_rare_tokens():
    """The noise of Gumbel's upper tail, which alone lets rare tokens win: 23-bit noise ends at 2**-23."""
    keys = SamplingState.stack([(SamplingOptions(1.0), 0, sample) for sample in range(64)]).key
    noise = np.asarray(jax.jit(sampling._exponentials, static_argnums=2)(keys, jnp.zeros(64, jnp.int32), 2**16))
    assert noise.min() >= 2.0**-33 and noise.max() < 17
    for tail in (2.0**-10, 2.0**-14, 2.0**-18):
        expected = noise.size * -math.expm1(-tail)
        assert abs((noise < tail).sum() - expected) < 5 * math.sqrt(expected)
    small = noise[noise < 2.0**-8]
    assert len(np.unique(small)) > 0.999 * len(small)


# Log probabilities


def test_top_logprobs_are_the_models_own():
    logits = np.random.default_rng(3).normal(size=(3, 40)).astype(np.float32) * 4
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    chosen, values, ids = jax.jit(top_logprobs, static_argnums=2)(logits, jnp.array([0, 5, 39]), 4)
    order = np.argsort(-logits, axis=1)[:, :4]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(values, np.take_along_axis(expected, order, axis=1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(chosen, expected[np.arange(3), [0, 5, 39]], rtol=1e-6, atol=1e-6)
    assert chosen.dtype == values.dtype == jnp.float32 and ids.dtype == jnp.int32


def test_top_logprobs_of_none():
    chosen, values, ids = top_logprobs(jnp.zeros((2, 4)), jnp.array([1, 2]), 0)
    np.testing.assert_allclose(chosen, -math.log(4), rtol=1e-6)
    assert values.shape == ids.shape == (2, 0)
