"""The derived step against the forward it came from: every position, any chunking, any mix of slots."""

import re
from functools import cache
from pathlib import Path

import hand_written
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forwards import BY_NAME, ZOO, draw, trace

import jaxinfer as ji

pytestmark = pytest.mark.jax_defaults

T = 48
# A token's place in an expert's buffer is read by that token alone; nothing here proves it, so these are refused.
REFUSED = ("moe_capacity", "moe_groups")
KINDS = ("gpt2", "gemma2", "causal_conv", "gru")  # one of each kind of state: rows, windows, shifts, carries
CAUSAL = [row for row in ZOO if row.causal and not row.more and row.name not in REFUSED]


@pytest.fixture(scope="module", params=[row.name for row in CAUSAL])
def case(request):
    """(name, program, step at length T, rows [3, T, ...], the forward's outputs of each)"""
    return derived(request.param)


@cache
def derived(name: str):
    """What `case` holds."""
    with jax.numpy_rank_promotion("allow"):
        program = trace(name)
        step = ji.incremental(program, length=T)
        random = np.random.default_rng(0)
        axis = {"axis": program.inputs[0].dims.index("batch")} if "batch" in program.axes else None
        drawn = [draw(name, {"batch": 1, "time": T}, random)[0] for _ in range(3)]
        rows = np.stack([d.squeeze(**axis) if axis else d for d in drawn])
        forward = jax.jit(program.function)
        full = [np.asarray(forward(program.params, sequence(program, r))).reshape(T, -1) for r in rows]
        return name, program, step, rows, full


def sequence(program, rows, leading=0):
    """Rows as the forward takes them: with a batch dim of 1 where it has one, after so many leading dims."""
    dims = program.inputs[0].dims
    return jnp.expand_dims(rows, leading + dims.index("batch")) if "batch" in dims else rows


def driver(program, step):
    """step over plain [slots, k, ...] rows, jitted; outputs [slots, k, -1]."""
    params = jax.tree.leaves(program.params)

    @jax.jit
    def run(rows, positions, counts, state):
        given = sequence(program, rows, 1)
        (out,), state = step(params, [given], positions, state, counts)
        return out.reshape(*rows.shape[:2], -1), state

    return run


def tolerance(full):
    """1e-5 of the largest output."""
    return 1e-5 * max(np.abs(f).max() for f in full)


def test_any_chunking_and_mix_of_slots(case):
    """Chunks of random real lengths 0 to k; padded rows hold other content and must leave no trace. A slot whose
    sequence has ended starts another at position 0, whatever its state still holds."""
    _, program, step, rows, full = case
    run, k, slots = driver(program, step), 7, 2
    random = np.random.default_rng(1)
    state, done = step.init(slots), np.zeros(slots, np.int32)
    serves, waiting = list(range(slots)), list(range(slots, len(rows)))
    seen = set()
    while waiting or (done < T).any():
        for i in range(slots):
            if done[i] == T and waiting:
                serves[i], done[i] = waiting.pop(), 0
        counts = np.minimum(random.integers(0, k + 1, slots), T - done).astype(np.int32)
        seen |= set(counts.tolist())
        chunk = np.full((slots, k, *rows.shape[2:]), 2, rows.dtype)
        for i, s in enumerate(serves):
            chunk[i, : counts[i]] = rows[s, done[i] : done[i] + counts[i]]
        outputs, after = run(chunk, done, counts, state)
        for i, s in enumerate(serves):
            got, want = np.asarray(outputs)[i, : counts[i]], full[s][done[i] : done[i] + counts[i]]
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerance(full))
            if counts[i] == 0 and done[i]:
                for a, b in zip(state, after, strict=True):
                    np.testing.assert_array_equal(np.asarray(a)[i], np.asarray(b)[i])
        state, done = after, done + counts
    assert seen == set(range(k + 1))


# One of each kind of state in the fast part, the others in the heavy one.
EACH = pytest.mark.parametrize(
    "name", [pytest.param(row.name, marks=() if row.name in (*KINDS, "s4d") else pytest.mark.heavy) for row in CAUSAL]
)


@EACH
def test_one_by_one_and_last(name):
    """k = 1 decodes; `last` gives a chunk's last real row only, the same numbers."""
    _, program, step, rows, full = derived(name)
    run, params = driver(program, step), jax.tree.leaves(program.params)
    state = step.init(3)
    for t in range(12):
        outputs, state = run(rows[:, t : t + 1], np.full(3, t, np.int32), np.ones(3, np.int32), state)
        for i in range(3):
            np.testing.assert_allclose(np.asarray(outputs)[i, 0], full[i][t], rtol=0, atol=tolerance(full))
    chunk = sequence(program, rows[:, 12:20], 1)
    counts = np.array([8, 3, 1], np.int32)
    (last,), _ = jax.jit(lambda s: step(params, [chunk], np.full(3, 12, np.int32), s, counts, last=True))(state)
    for i, n in enumerate(counts):
        np.testing.assert_allclose(np.asarray(last)[i].reshape(-1), full[i][11 + n], rtol=0, atol=tolerance(full))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """As `case`, one of each kind of state: rows, windows, shifts, carries."""
    return derived(request.param)


def test_a_shorter_state_reads_less(kind):
    _, program, step, rows, full = kind
    outputs, _ = driver(program, step)(rows[:, :16], np.zeros(3, np.int32), np.full(3, 16, np.int32), step.init(3, 16))
    for i in range(3):
        np.testing.assert_allclose(np.asarray(outputs)[i], full[i][:16], rtol=0, atol=tolerance(full))


def test_rows_past_the_end_are_dropped(kind):
    """A chunk that overhangs the state neither shifts back over older rows nor wraps."""
    _, program, step, rows, full = kind
    run = driver(program, step)
    _, state = run(rows[:, :12], np.zeros(3, np.int32), np.full(3, 12, np.int32), step.init(3, 16))
    outputs, _ = run(rows[:, 12:18], np.full(3, 12, np.int32), np.full(3, 4, np.int32), state)
    for i in range(3):
        np.testing.assert_allclose(np.asarray(outputs)[i, :4], full[i][12:16], rtol=0, atol=tolerance(full))


def poisoned(state):
    """A state as an ended sequence may have left it at worst."""
    return tuple(jnp.full_like(a, jnp.nan if jnp.issubdtype(a.dtype, jnp.inexact) else 3) for a in state)


@EACH
def test_nothing_of_a_slots_last_sequence_is_left(name):
    """From position 0 on, slots full of NaN give what empty ones do, bit for bit: prefilled, decoded, idle between."""
    _, program, step, rows, _ = derived(name)
    run = driver(program, step)
    results = []
    for state in (step.init(2), poisoned(step.init(2))):
        told, done = [], np.zeros(2, np.int32)
        for k, counts in ((5, (3, 0)), (5, (5, 1)), (1, (1, 1)), (1, (0, 1)), (1, (1, 1))):
            chunk = np.full((2, k, *rows.shape[2:]), 2, rows.dtype)
            for i, n in enumerate(counts):
                chunk[i, :n] = rows[i, done[i] : done[i] + n]
            outputs, state = run(chunk, done, np.array(counts, np.int32), state)
            told += [np.asarray(outputs)[i, :n] for i, n in enumerate(counts)]
            done += counts
        results.append(np.concatenate(told))
    np.testing.assert_array_equal(*results)
    assert np.isfinite(results[0]).all()


def test_an_idle_slot_is_left_alone():
    """No real rows at position 0: no sequence starts, and nothing is cleared for one."""
    _, program, step, rows, _ = derived("gpt2")
    state = poisoned(step.init(2))
    _, after = driver(program, step)(rows[:2, :5], np.zeros(2, np.int32), np.zeros(2, np.int32), state)
    for a, b in zip(state, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_state_is_what_a_hand_written_cache_keeps(case):
    name, _, step, _, _ = case
    by_hand = (BY_NAME[name].per_token, BY_NAME[name].constant)
    # Windows beside a column that isn't time aren't kept as windows: all rows of both layers are.
    by_hand = {"attention_sink": (256, 0)}.get(name, by_hand)
    assert (step.bytes_per_token, step.bytes_per_sequence) == by_hand
    assert f"{step.bytes_per_token} bytes a token" in step.explain()


def test_decoding_copies_no_state_and_nothing_quadratic_is_built():
    """A 1-row step donates its state: aliased, no copy of a whole array of it, no value of time x time."""
    program = trace("gpt2")
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
    program = trace("alibi")
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
    "nothing seen": (lambda s, i, j: jnp.where(j < i, s, -1e9), lambda x: x, "shows the first 1 rows nothing"),
    "pairs": (lambda s, i, j: jnp.cumsum(jnp.where(j <= i, s, 0), 2), lambda x: x, "values of pairs of rows"),
    "reversed": (lambda s, i, j: jnp.where(j <= i, s, -jnp.inf), lambda x: jnp.flip(x, 1), "as a whole"),
    "one ahead beside a sink": (
        lambda s, i, j: jax.nn.log_softmax(
            jnp.concatenate([jnp.zeros((*s.shape[:-1], 1)), jnp.where(j <= i + 1, s, -jnp.inf)], -1)
        )[..., 1:],
        lambda x: x,
        "reads up to 1 rows ahead",
    ),
    "almost a mask": (lambda s, i, j: jnp.where(j <= i, s, -9999.0), lambda x: x, "no mask was found"),
    "largest": (
        lambda s, i, j: s - jax.lax.top_k(jnp.where(j <= i + 1, s, -jnp.inf), 2)[0][..., 1:],
        lambda x: x,
        "reads up to 1 rows ahead",
    ),
    "row put ahead": (lambda s, i, j: jnp.where(j <= i, s, -jnp.inf), lambda x: x.at[:, 1].set(x[:, 2]), "as a whole"),
    "second row": (lambda s, i, j: jnp.where(j <= i, s, -jnp.inf), lambda x: x - x[:, 1:2], "as a whole"),
    "running ahead": (
        lambda s, i, j: jnp.where(j <= i, s, -jnp.inf),
        lambda x: jnp.cumsum(jnp.pad(x, ((0, 0), (2, 0), (0, 0))), 1)[:, 2:],
        "up to 2 rows further on",
    ),
    "centred": (lambda s, i, j: jnp.where(j <= i, s, -jnp.inf), lambda x: x - x.mean(1, keepdims=True), "combines all"),
}


@pytest.mark.parametrize("name", LEAKS)
def test_leaks_are_refused(name: str):
    mask, extra, message = LEAKS[name]
    with pytest.raises(ji.NotCausalError, match=message) as refused:
        ji.incremental(softmax_model(mask, extra), length=16)
    assert "test_incremental.py" in str(refused.value)  # the line to look at


@pytest.mark.parametrize("name", [*REFUSED, "bert", "bidirectional", "expert_choice", "gla_leaky"])
def test_what_is_not_proved_is_refused(name: str):
    with pytest.raises(ji.NotCausalError, match=f"at {name.replace('moe_groups', 'moe_capacity')}.py"):
        ji.incremental(trace(name), length=16)


def test_a_request_is_encoded_once():
    """What the source alone decides is state, made by `begin`; the step has no product over the source's layers."""
    program, length, source = trace("encoder_decoder"), 24, 10
    step = ji.incremental(program, length=length, sizes={"source": source})
    row = BY_NAME["encoder_decoder"]
    assert (step.bytes_per_token, step.bytes_per_sequence) == (row.per_token, source * row.per_source)
    params = jax.tree.leaves(program.params)
    tokens, given = draw("encoder_decoder", {"batch": 2, "time": length, "source": source}, np.random.default_rng(3))
    full = np.asarray(jax.jit(program.function)(program.params, tokens, given))
    state = jax.jit(step.begin)(params, [given[:, None]], poisoned(step.init(2)))
    run = jax.jit(lambda rows, at, state: step(params, [rows], at, state))
    for a, b in ((0, 8), (8, 16), (16, 24)):
        (out,), state = run(tokens[:, None, a:b], np.full(2, a, np.int32), state)
        np.testing.assert_allclose(np.asarray(out)[:, 0], full[:, a:b], rtol=0, atol=1e-5 * np.abs(full).max())
    # Two decoder layers: 4 products of self-attention, 2 + 2 of cross-attention, 2 of the MLP each (K and V of the
    # source aren't among them), q k and p v counted with those; and the vocabulary.
    dots = str(jax.make_jaxpr(run)(tokens[:, None, :1], np.zeros(2, np.int32), state)).count("dot_general")
    assert dots == 2 * (4 + 2 + 2 + 2 + 2) + 1


def test_assume_causal_overrides_a_missing_proof_but_not_a_leak():
    mild = LEAKS["mild"][0]
    step = ji.incremental(softmax_model(mild), length=16, assume_causal=True)
    assert "assume_causal" in step.explain()
    with pytest.raises(ji.NotCausalError, match="1 rows ahead"):
        ji.incremental(softmax_model(LEAKS["one ahead"][0]), length=16, assume_causal=True)


@pytest.mark.parametrize("value", [-1e4, -1e9])
def test_an_assumption_is_told(value):
    for mask in (
        lambda s, i, j: s + jnp.where(j <= i, 0.0, value),
        lambda s, i, j: jnp.where(j <= i, s, value),
    ):
        assert "scores stay above the mask value" in ji.incremental(softmax_model(mask), length=16).explain()


@pytest.mark.parametrize("pick", [jnp.argmax, lambda s, axis: s.max(axis)])
def test_a_window_knows_its_place_and_its_ends(pick):
    """A mask captured as a constant, in chunks that overhang the length: no row past the end is seen; argmax counts
    from the sequence's first row."""
    length, wide = 11, np.tril(np.ones((11, 11), bool)) & ~np.tril(np.ones((11, 11), bool), -4)
    params = {"embed": jnp.asarray(np.random.default_rng(0).standard_normal((13, 8)), jnp.float32)}

    def forward(p, tokens):
        x = p["embed"][tokens]
        scores = jnp.where(wide, x @ x.T, -jnp.inf)
        return jnp.concatenate([jax.nn.softmax(scores) @ x, pick(scores, axis=-1)[:, None].astype(x.dtype)], -1)

    program = ji.Program("windowed", forward, params, (ji.spec("time", "int32"),))
    step = ji.incremental(program, length=length)
    tokens = np.random.default_rng(1).integers(0, 13, length).astype(np.int32)
    full, state = np.asarray(forward(params, tokens)), step.init(1)
    run = driver(program, step)
    for start in range(0, length, 4):
        chunk = np.full((1, 4), 5, np.int32)
        count = min(4, length - start)
        chunk[0, :count] = tokens[start : start + count]
        out, state = run(chunk, np.array([start], np.int32), np.array([count], np.int32), state)
        np.testing.assert_allclose(out[0, :count], full[start : start + count], rtol=0, atol=1e-4)


def test_rows_not_yet_written_may_be_divided_by():
    """One over a stored 0 is infinite, and 0 times that NaN: what isn't there yet must count nothing, masked or not."""
    params = {"w": jnp.arange(1.0, 4.0)}

    def forward(p, x):
        mask, size = jnp.tril(jnp.ones((len(x),) * 2)), 1 + x.sum(1) ** 2  # kept for all that is made of it
        values = p["w"] / size[:, None]
        near = mask * jnp.triu(jnp.ones((len(x),) * 2), -2)
        return jnp.concatenate([(mask * (x[:, :1] / size)) @ values, (near * (x[:, :1] / size)) @ values], -1)

    decoded_is_whole(forward, params, 5)


UPDATES = {
    "set": lambda x, w: x.at[0].set(0.5),
    "add": lambda x, w: x.at[2:4].add(w[:2]),
    "its own": lambda x, w: x.at[:1].set(3 * x[:1]),
    "shift": lambda x, w: jnp.zeros_like(x).at[1:].set(x[:-1]),
    "reference": lambda x, w: x - x[:1],
    "its product": lambda x, w: jnp.where(x > x[0], x, jnp.tanh(x[0] @ w)),
    "spread": lambda x, w: jax.nn.softmax(causal((x - x[0]) @ x.T)) @ jnp.concatenate([x, 0 * x + x[:1]], 1),
    "vmapped": lambda x, w: jax.vmap(lambda c: c.at[-2].multiply(7.0), 1, 1)(x),
    "kernels": lambda x, w: jax.vmap(lambda c, k: jnp.convolve(c, k)[: len(c)], 1, 1)(x, w),
    # Kept as numbers, of which that of a row before the first, 0, would look up a row of w.
    "looked up": lambda x, w: jax.lax.conv_general_dilated(
        w[jnp.floor(5 * jax.nn.sigmoid(x[:, 0])).astype(jnp.int32)].T[None],
        w[:2, :, None] + jnp.zeros((1, 1, 3)),
        (1,),
        [(4, 0)],
        dimension_numbers=("NCW", "OIW", "NCW"),
        rhs_dilation=(2,),
    )[0].T[: len(x)],
    # A window of 3 holds the chunk's padded rows, too, which are NaN.
    "near": lambda x, w: jax.nn.softmax(jnp.where(jnp.tri(len(x), k=-3, dtype=bool), -jnp.inf, causal(x @ x.T))) @ x,
    "most alike": lambda x, w: jnp.where(jnp.isfinite(v := jax.lax.top_k(causal(x @ x.T), 3)[0]), v, 0),
    "their places": lambda x, w: jax.lax.top_k(causal(x @ x.T), 5)[1].astype(x.dtype),
    "sparse": lambda x, w: jax.nn.softmax(kept(causal(x @ x.T))) @ x,
}


def causal(scores):
    return jnp.where(jnp.tri(len(scores), dtype=bool), scores, -jnp.inf)


def kept(scores):
    return jnp.where(scores >= jax.lax.top_k(scores, 2)[0][:, -1:], scores, -jnp.inf)


@pytest.mark.parametrize("name", UPDATES)
def test_rows_put_in_place_and_picked(name):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((5, 5)), jnp.float32)
    decoded_is_whole(lambda p, x: UPDATES[name](x, p["w"]), {"w": w}, 5)


def test_rows_ahead_that_are_moved_back():
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((5, 5)), jnp.float32)}

    def forward(p, x):
        return jnp.pad(jnp.diff(x @ p["w"], axis=0), ((1, 0), (0, 0)))

    decoded_is_whole(forward, params, 5)


def test_an_associative_scan_inside_scanned_layers():
    random = np.random.default_rng(0)
    params = {"a": jnp.asarray(random.uniform(0.5, 1, (3, 5)), jnp.float32)}

    def forward(p, x):
        def layer(x, a):
            pair = (jnp.broadcast_to(a, x.shape), x)
            return jax.lax.associative_scan(lambda x, y: (x[0] * y[0], x[1] * y[0] + y[1]), pair)[1], None

        return jax.lax.scan(layer, x, p["a"])[0]

    decoded_is_whole(forward, params, 5)


def decoded_is_whole(forward, params, features, length=13):
    """A forward over float rows [time, features], in chunks of 4, the last of which NaN, and that overhang the end."""
    program = ji.trace(forward, params, ji.spec(f"time {features}", "float32"))
    step, random = ji.incremental(program, length=length), np.random.default_rng(1)
    rows = random.standard_normal((length, features)).astype(np.float32)
    full, state, run = np.asarray(forward(params, jnp.asarray(rows))), step.init(1), driver(program, step)
    for start in range(0, length, 3):
        count = min(3, length - start)
        chunk = np.full((1, 4, features), np.nan, np.float32)
        chunk[0, :count] = rows[start : start + count]
        out, state = run(chunk, np.array([start], np.int32), np.array([count], np.int32), state)
        np.testing.assert_allclose(out[0, :count], full[start : start + count], rtol=0, atol=1e-5 * np.abs(full).max())


def test_no_such_axis():
    program = trace("alibi")
    with pytest.raises(ji.TraceError, match="no axis 'frames'"):
        ji.incremental(program, axis="frames")


def test_the_step_is_the_one_written_by_hand():
    """Llama: the same numbers, as many products and as much state aliased as a cache written by hand, no copy of it."""
    lm = ji.load(Path(__file__).parent / "fixtures" / "llama-gqa")
    params, slots, length = lm.program.params, 2, 61  # a prime, so that no other dim has this size
    step = ji.incremental(lm.program, length=length)
    by_hand = jax.jit(lambda p, t, at, c: hand_written.decode(lm.config, p, t, at, c), donate_argnums=3)
    derived = jax.jit(lambda p, t, at, s: step(jax.tree.leaves(p), [t[:, None, None]], at, s), donate_argnums=3)
    cache, state = hand_written.empty_cache(lm.config, slots, length), step.init(slots)
    random = np.random.default_rng(0)
    for t in range(6):
        tokens, at = random.integers(0, lm.config.vocab_size, slots).astype(np.int32), np.full(slots, t, np.int32)
        want, cache = by_hand(params, tokens, at, cache)
        (got,), state = derived(params, tokens, at, state)
        np.testing.assert_allclose(got[:, 0, 0], want, rtol=0, atol=1e-5 * np.abs(want).max())
    counts = []
    for function, kept in ((by_hand, cache), (derived, state)):
        text = function.lower(params, tokens, at, kept).compile().as_text()
        shape = re.escape(",".join(map(str, jax.tree.leaves(kept)[0].shape)))
        assert not re.search(rf"f32\[{shape}\]\S* copy\(", text)
        counts.append((len(re.findall(r" dot\(", text)), text.count("may-alias") + text.count("must-alias")))
    assert counts[0] == counts[1]
    assert counts[1][1] == 2 * lm.config.num_hidden_layers
