"""LanguageModel: generation against a loop over the full forward, and that a request's result is its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_helpers import fixtures

import jaxinfer as ji
from jaxinfer.runtime import generation, programs
from jaxinfer.runtime.sampling import SamplingOptions, SamplingState, sample

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5], list(range(2, 40))]


@pytest.fixture(scope="module")
def lm():
    return ji.load(fixtures() / "llama-gqa")


@pytest.fixture(scope="module")
def forward(lm):
    """logits [time, vocab] of one sequence by the forward as it is, at one padded length so that it compiles once."""
    run = jax.jit(lm.program.function)

    def logits(ids):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(run(lm.program.params, padded))[0, : len(ids)]

    return logits


def greedy(forward, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(forward(ids)[-1].argmax()))
    return tuple(ids[len(prompt) :])


def test_greedy_is_the_forward_called_again_and_again(lm, forward):
    found = lm.generate(PROMPTS, max_tokens=20, ignore_eos=True)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        assert completion.tokens == greedy(forward, prompt, 20)
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (len(prompt), 20)
        assert completion.finish_reason == "length"
        assert completion.seed is None


def test_logits_of_a_batch_are_the_forwards(lm, forward):
    batch = np.random.default_rng(0).integers(0, lm.vocab_size, (3, 41))
    got = lm(batch)
    for row, logits in zip(batch, got, strict=True):
        np.testing.assert_allclose(logits, forward(row), rtol=0, atol=1e-5 * np.abs(logits).max())


def test_alone_or_together_in_any_order(lm):
    options = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.95, "seed": 7, "ignore_eos": True}
    together = lm.generate(PROMPTS, **options)
    backwards = lm.generate(PROMPTS[::-1], **options)[::-1]
    alone = [lm.generate(p, **options) for p in PROMPTS]
    assert [c.tokens for c in together] == [c.tokens for c in backwards] == [c.tokens for c in alone]
    assert together[0].seed == 7


def test_samples_of_a_prompt_differ_and_repeat(lm):
    options = {"max_tokens": 10, "temperature": 1.5, "ignore_eos": True}
    four = lm.generate(PROMPTS[0], n=4, seed=1, **options)
    assert len({c.tokens for c in four}) > 1
    two = lm.generate(PROMPTS[0], n=2, seed=1, **options)
    assert [c.tokens for c in two] == [c.tokens for c in four[:2]]
    drawn = lm.generate(PROMPTS[0], **options)
    assert lm.generate(PROMPTS[0], seed=drawn.seed, **options).tokens == drawn.tokens


def test_a_draw_is_the_samplers_at_the_tokens_position(lm, forward):
    options = SamplingOptions(temperature=1.0, seed=5)
    tokens = lm.generate(PROMPTS[0], max_tokens=6, temperature=1.0, seed=5, ignore_eos=True).tokens
    ids, state = list(PROMPTS[0]), SamplingState.stack([(options, 5, 0)])
    for token in tokens:
        assert token == int(sample(jnp.asarray(forward(ids)[-1:]), np.array([len(ids)]), state)[0])
        ids.append(token)


def test_a_stream_is_the_same_completion(lm):
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        whole = lm.generate(PROMPTS[1], max_tokens=24, logprobs=2, **options)
        deltas = list(lm.stream(PROMPTS[1], max_tokens=24, logprobs=2, **options))
        assert sum((d.tokens for d in deltas), ()) == whole.tokens
        assert "".join(d.text for d in deltas) == whole.text
        assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason == whole.finish_reason
        np.testing.assert_allclose(
            [t.logprob for d in deltas for t in d.logprobs], [t.logprob for t in whole.logprobs], atol=1e-4
        )


def test_the_state_grows_past_its_first_bucket(lm, forward, monkeypatch):
    """More than 8 decode calls' worth of tokens: the sequence outgrows the room it was given at first."""
    prompt, n = PROMPTS[0], 60
    wide = ji.load(fixtures() / "llama-gqa")
    wide._programs().lengths = [8, 16, 64]
    monkeypatch.setattr(generation, "STEPS", 1)  # room is made for 8 calls' worth of tokens
    completion = wide.generate(prompt, max_tokens=n, ignore_eos=True)
    assert completion.tokens == greedy(forward, prompt, n)


def test_no_room_is_made_beyond_the_last_token(lm, forward):
    """A prompt and answer that exactly fill a bucket stay in it."""
    exact = ji.load(fixtures() / "llama-gqa")
    exact._programs().lengths = [16, 64]
    assert exact.generate(PROMPTS[0], max_tokens=13, ignore_eos=True).tokens == greedy(forward, PROMPTS[0], 13)
    assert exact.compile_report()["compiled"] + exact.compile_report()["loaded"] == 2


def test_stop_tokens(lm, forward):
    tokens = greedy(forward, PROMPTS[1], 20)
    stop = tokens[6]
    first = tokens.index(stop)
    completion = lm.generate(PROMPTS[1], max_tokens=20, stop=stop, ignore_eos=True)
    assert completion.tokens == tokens[: first + 1]
    assert completion.finish_reason == "stop"
    assert completion.text == lm.tokenizer.decode(tokens[:first])
    many = [t for t in range(lm.vocab_size) if t not in tokens[:first]]  # more than the device has room for
    assert lm.generate(PROMPTS[1], max_tokens=20, stop=many).tokens == tokens[: first + 1]


def test_stop_strings(lm):
    whole = lm.generate(PROMPTS[1], max_tokens=30, ignore_eos=True)
    stop = whole.text[5:8]
    cut = lm.generate(PROMPTS[1], max_tokens=30, ignore_eos=True, stop=[stop, "never seen"])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    assert "".join(d.text for d in lm.stream(PROMPTS[1], max_tokens=30, ignore_eos=True, stop=stop)) == cut.text


def test_logprobs_are_the_forwards(lm, forward):
    completion = lm.generate(PROMPTS[1], max_tokens=8, logprobs=5, ignore_eos=True)
    rows = forward([*PROMPTS[1], *completion.tokens])[len(PROMPTS[1]) - 1 : -1].astype(np.float64)
    want = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    for token, info, row in zip(completion.tokens, completion.logprobs, want, strict=True):
        assert info.token == token
        assert abs(info.logprob - row[token]) < 1e-4
        assert [t for t, _ in info.top] == np.argsort(-row, kind="stable")[:5].tolist()


def test_score_is_the_forwards(lm, forward):
    texts = [PROMPTS[3], PROMPTS[1]]
    for ids, score in zip(texts, lm.score(texts), strict=True):
        rows = forward(ids).astype(np.float64)
        want = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
        np.testing.assert_allclose(score.logprobs, [want[i, t] for i, t in enumerate(ids[1:])], atol=1e-4)
        assert abs(score.total - score.logprobs.sum()) < 1e-3
    assert lm.score(PROMPTS[1]).tokens == tuple(PROMPTS[1])


def test_text_in_text_out(lm):
    completion = lm.generate("hello", max_tokens=5, ignore_eos=True)
    assert completion.usage.prompt_tokens == len(lm.tokenizer.encode("hello"))
    assert completion.text == lm.tokenizer.decode(completion.tokens)
    assert str(completion) == completion.text


def test_chat_goes_through_the_template(lm):
    messages = [{"role": "user", "content": "hi"}]
    prompt = lm.tokenizer.encode(lm.tokenizer.apply_chat_template(messages), add_special=False)
    answer = lm.chat(messages, max_tokens=6)
    assert answer.tokens == lm.generate(prompt, max_tokens=6).tokens
    assert "".join(d.text for d in lm.chat(messages, max_tokens=6, stream=True)) == answer.text


def test_the_context_ends_an_answer(lm):
    small = ji.load(fixtures() / "llama-gqa", max_len=16)
    completion = small.generate(list(range(1, 11)), max_tokens=50, ignore_eos=True)
    assert len(completion.tokens) == 6
    assert completion.finish_reason == "length"
    assert completion.tokens == lm.generate(list(range(1, 11)), max_tokens=6, ignore_eos=True).tokens


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[]], {}, "at least 1 token"),
        ("", {}, "at least 1 token"),
        ([1] * 64, {}, "the prompt has 64 tokens, but the context holds 64 with 1 to be generated"),
        ([1, 10**6], {}, "token id 1000000 is out of range"),
        ([-1, 2], {}, "token id -1 is out of range"),
        ([1], {"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
        ([1], {"temperature": -1}, "temperature"),
        ([1], {"top_p": 1.5}, "top_p"),
        ([1], {"n": 0}, "n must be"),
        ([1], {"stop": [""]}, "stop takes non-empty strings"),
        ([1], {"logprobs": 21}, "logprobs may be at most 20"),
    ],
)
def test_bad_requests(lm, prompt, options, message):
    if prompt == "" and lm.tokenizer.encode(""):
        pytest.fail("the fixture's tokenizer adds tokens to an empty text; this case needs one that doesn't")
    with pytest.raises(ji.RequestError, match=message):
        lm.generate(prompt, **options)


def test_no_prompts_no_completions(lm):
    assert lm.generate([]) == []
    with pytest.raises(ji.RequestError, match="at least 1 token"):
        lm.stream([])


def test_unknown_options_are_errors(lm):
    with pytest.raises(TypeError, match="temprature"):
        lm.generate([1], temprature=1.0)
    with pytest.raises(TypeError, match="temprature"):
        lm.stream([1], temprature=1.0)


def test_nothing_compiles_once_warm(lm):
    from jaxinfer import _jax

    def work():
        lm.generate(PROMPTS, max_tokens=9, temperature=0.7, seed=1)
        list(lm.stream(PROMPTS[1], max_tokens=9))
        lm.generate([[7] * 5, [8] * 11, [9] * 2], max_tokens=5, top_k=3, temperature=1.0)

    work()
    before = _jax.compiles()
    work()
    lm.generate([[4, 4], [1, 2, 3, 4], [5] * 9, [6]], max_tokens=30)
    assert _jax.compiles() == before


def test_a_second_model_loads_its_programs(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    tokens = []
    for expected in ({"compiled": 2, "loaded": 0}, {"compiled": 0, "loaded": 2}):
        lm = ji.load(fixtures() / "llama-gqa")
        tokens.append(lm.generate(PROMPTS[0], max_tokens=4).tokens)
        report = lm.compile_report()
        assert {k: report[k] for k in expected} == expected
        assert lm.program.trace_count == expected["compiled"] // 2  # once for both programs, then not at all
    assert tokens[0] == tokens[1]


def test_more_sequences_than_slots(lm, forward, monkeypatch):
    monkeypatch.setattr("jaxinfer.language.SLOTS", (1, 2))
    found = lm.generate(PROMPTS, max_tokens=3, ignore_eos=True)
    assert [c.tokens for c in found] == [greedy(forward, p, 3) for p in PROMPTS]


def test_chunked_prefill_is_the_same(lm, forward, monkeypatch):
    monkeypatch.setattr(programs, "CHUNKS", (16,))
    (got,) = lm.generate([PROMPTS[3]], max_tokens=5, ignore_eos=True)
    assert got.tokens == greedy(forward, PROMPTS[3], 5)


OTHERS = ("alibi", "linen_transformer", "nnx_library")


@pytest.mark.jax_defaults
@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(n, marks=pytest.mark.heavy) for n in OTHERS)])
def test_your_own_forward(name):
    """The door for any causal forward: function, linen or NNX, batched or over a single sequence."""
    import importlib

    module = importlib.import_module(f"forwards.{name}")
    own, params = module.make()
    axes = "time" if name == "alibi" else "batch time"
    lm = ji.LanguageModel(own, params, max_len=64, axes=axes)
    prompt = [3, 1, 4, 1, 5]
    completion = lm.generate(prompt, max_tokens=8)
    assert completion.text is None
    forward = jax.jit(lm.program.function)
    ids = list(prompt)
    for _ in range(8):
        row = jnp.asarray(ids + [0] * (64 - len(ids)))  # causal: what lies to the right is not seen
        logits = forward(lm.program.params, row if axes == "time" else row[None]).reshape(64, -1)
        ids.append(int(logits[len(ids) - 1].argmax()))
    assert completion.tokens == tuple(ids[5:])
    with pytest.raises(ji.RequestError, match="no tokenizer"):
        lm.generate("text")


@pytest.fixture(scope="module")
def translator():
    """(model, forward) of the zoo's encoder-decoder: 48 tokens, a source of any length beside them.

    forward(ids, source) -> logits [time, vocab] by the whole forward.
    """
    from forwards import encoder_decoder

    with jax.numpy_rank_promotion("allow"):
        own, params = encoder_decoder.make()
        model = ji.LanguageModel(own, params, max_len=48, inputs={"source": ji.spec("batch source", "int32")})
        run = jax.jit(own)

        def forward(ids, source):
            padded = np.zeros((1, 48), np.int32)  # causal: what lies to the right is not seen
            padded[0, : len(ids)] = ids
            return np.asarray(run(params, padded, np.asarray(source)[None]))[0, : len(ids)]

        yield model, forward


def sources(*lengths):
    random = np.random.default_rng(5)
    return [random.integers(1, 47, n).astype(np.int32) for n in lengths]


def translated(forward, prompt, source, n):
    return greedy(lambda ids: forward(ids, source), prompt, n)


@pytest.mark.jax_defaults
def test_requests_with_inputs_of_their_own(translator):
    """Prompts and sources of several lengths in one call, each as the whole forward goes on from it by itself."""
    lm, forward = translator
    prompts = [[1], [1, 5, 9, 2, 6], [1], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]]
    given = sources(6, 9, 6, 9)
    given[3][7:] = 0  # padding, which the forward's own mask hides
    found = lm.generate(prompts, max_tokens=5, logprobs=1, inputs=[{"source": s} for s in given])
    for prompt, source, completion in zip(prompts, given, found, strict=True):
        assert completion.tokens == translated(forward, prompt, source, 5)
        rows = forward([*prompt, *completion.tokens], source)[len(prompt) - 1 : -1].astype(np.float64)
        want = rows.max(-1) - np.log(np.exp(rows).sum(-1))
        np.testing.assert_allclose([info.logprob for info in completion.logprobs], want, atol=1e-4)
    assert abs(found[0].logprobs[0].logprob - found[2].logprobs[0].logprob) > 1e-2  # one prompt: the sources differ


@pytest.mark.heavy
@pytest.mark.jax_defaults
def test_inputs_in_every_door(translator):
    """A single prompt, its samples, a stream, a score and a call with a batch take them alike."""
    lm, forward = translator
    (source,) = sources(9)
    single = lm.generate([1, 2], max_tokens=6, inputs={"source": source.tolist()})
    assert single.tokens == translated(forward, [1, 2], source, 6)
    pair = lm.generate([1, 2], max_tokens=6, n=2, logprobs=1, inputs={"source": source})
    assert [c.tokens for c in pair] == [single.tokens] * 2
    stream = lm.stream([1, 2], max_tokens=6, inputs={"source": source})
    assert tuple(t for delta in stream for t in delta.tokens) == single.tokens
    ids = [1, 2, *single.tokens]
    rows = forward(ids, source).astype(np.float64)
    want = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    np.testing.assert_allclose(
        lm.score(ids, inputs={"source": source}).logprobs, [want[i, t] for i, t in enumerate(ids[1:])], atol=1e-4
    )
    np.testing.assert_allclose(lm([ids], source=source[None])[0], rows, rtol=0, atol=1e-5 * np.abs(rows).max())


@pytest.mark.jax_defaults
def test_the_encoder_runs_once_a_request(translator, monkeypatch):
    """One call of `begin` for all requests of a batch; the encoder's weights are gone (NaN) from then on."""
    lm, forward = translator
    given = sources(9, 9)
    own = lm._programs((("source", 9),))
    before, begin, called = list(own.params), own.begin, []
    encoder = ["encoder" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(lm.program.params)]
    assert sum(encoder) == 2 * (4 + 2 + 2)  # two layers of Q, K, V, O, the MLP's two and two norms

    def counted(slots, length):
        def run(*arguments):
            called.append(slots)
            started = begin(slots, length)(*arguments)
            pairs = zip(before, encoder, strict=True)
            own.params = [jnp.full_like(p, jnp.nan) if gone else p for p, gone in pairs]
            return started

        return run

    monkeypatch.setattr(own, "params", before)  # so that it is put back
    monkeypatch.setattr(own, "begin", counted)
    monkeypatch.setattr(programs, "CHUNKS", (16,))
    prompts = [[1], list(range(1, 20))]  # two chunks of prefill
    found = lm.generate(prompts, max_tokens=20, logprobs=1, inputs=[{"source": s} for s in given])
    assert called == [2]  # slots
    assert [c.tokens for c in found] == [translated(forward, p, s, 20) for p, s in zip(prompts, given, strict=True)]


@pytest.mark.jax_defaults
@pytest.mark.parametrize(
    ("prompts", "inputs", "message"),
    [
        ([1], None, r"has the inputs \['source'\], got \[\]"),
        ([1], {}, r"has the inputs \['source'\], got \[\]"),
        ([1], {"sauce": [1, 2]}, r"has the inputs \['source'\], got \['sauce'\]"),
        ([1], {"source": [1], "style": [2]}, r"got \['source', 'style'\]"),
        ([1], [1, 2, 3], "got list: give {name: array}"),
        ([1], {"source": [1.5, 2.0]}, r"should be int32\[source\], got float64\[2\]"),
        ([1], {"source": [[1, 2]]}, r"should be int32\[source\], got int64\[1, 2\]"),
        ([1], {"source": 3}, r"should be int32\[source\], got int64\[\]"),
        ([1], {"source": np.zeros(0, np.int32)}, "source should be at least 1, got 0"),
        ([1], {"source": [1, 2**40]}, "1099511627776 doesn't fit int32"),
        ([[1], [2]], {"source": [1, 2]}, "a list with the inputs of each of 2 prompts, got dict"),
        ([[1], [2]], [{"source": [1, 2]}], "a list with the inputs of each of 2 prompts, got 1 of them"),
        ([1] * 48, {"source": [1, 2]}, "the prompt has 48 tokens, but the context holds 48 with 1 to be generated"),
    ],
)
def test_bad_inputs(translator, prompts, inputs, message):
    with pytest.raises(ji.RequestError, match=message):
        translator[0].generate(prompts, inputs=inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"source": "int32"}, "should be a ji.spec, got str"),
        ({"source": ji.spec("source", "int32")}, "has a 'batch' dim and no 'time'"),
        ({"source": ji.spec("batch time", "int32")}, "has a 'batch' dim and no 'time'"),
    ],
)
def test_bad_specs_of_inputs(inputs, message):
    with pytest.raises(ji.TraceError, match=message):
        ji.LanguageModel(lambda params, tokens, source: tokens, {}, inputs=inputs)


def test_a_model_without_inputs_takes_none(lm):
    with pytest.raises(ji.RequestError, match=r"has the inputs \[\], got \['source'\]"):
        lm.generate([1], inputs={"source": [1]})
