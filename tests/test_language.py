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


@pytest.mark.jax_defaults
@pytest.mark.parametrize("name", ["gpt2", "alibi", "linen_transformer", "nnx_library"])
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
