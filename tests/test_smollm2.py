"""The real checkpoint: SmolLM2-135M-Instruct from its GGUF against transformers (scripts/make_smollm2_reference.py)."""

from pathlib import Path

import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.checkpoints import hub

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def lm():
    return ji.load(hub.fetch("smollm2-135m"), max_len=256, dtype="float32")


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parent / "data" / "smollm2_reference.npz") as file:
        found = dict(file)
    return [
        {name: found[f"{name}{i}"] for name in ("ids", "prompt_length", "logits", "largest", "lead")}
        | {"text": str(text), "columns": found["columns"]}
        for i, text in enumerate(found["prompts"])
    ]


@pytest.fixture(scope="module")
def logits(lm, reference):
    """Our logits of each prompt and its answer, by the derived step in chunks: [time, vocab] each."""
    return [lm(case["ids"][None])[0] for case in reference]


def test_logits_are_transformers(reference, logits):
    """Within 1e-3 of transformers on the same weights; logits reach 44, and seen was 2.5e-4."""
    for case, got in zip(reference, logits, strict=True):
        np.testing.assert_allclose(got[:, case["columns"]], case["logits"], rtol=0, atol=1e-3)
        np.testing.assert_allclose(got.max(-1), case["largest"], rtol=0, atol=1e-3)


def test_greedy_tokens_are_transformers(lm, reference):
    """64 tokens on 10 prompts, all in one batch. The smallest lead of a best logit over the second is 5e-3."""
    prompts = [case["ids"][: case["prompt_length"]].tolist() for case in reference]
    assert [lm.tokenizer.encode(case["text"]) for case in reference] == prompts
    for case, completion in zip(reference, lm.generate(prompts, max_tokens=64, ignore_eos=True), strict=True):
        assert list(completion.tokens) == case["ids"][case["prompt_length"] :].tolist()


def test_decoding_is_the_forward(lm, reference, logits):
    """The forward as it is, a whole sequence at once, against the derived step: within 1e-5 of the largest logit."""
    import jax

    forward = jax.jit(lm.program.function)
    for case, got in zip(reference[:3], logits, strict=False):
        ids = np.zeros((1, 80), np.int32)
        ids[0, : len(case["ids"])] = case["ids"]
        want = np.asarray(forward(lm.program.params, ids))[0, : len(case["ids"])]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_step_by_step_is_the_forward(lm, reference, logits):
    """Token by token with the logits of each step, in batches of 1 and 3 at different positions: chunks of 1 to 16."""
    import jax

    step, params = lm._programs().step, jax.tree.leaves(lm.program.params)
    run = jax.jit(lambda params, rows, at, n, state: step(params, [rows], at, state, n))
    random = np.random.default_rng(0)
    for k in (1, 16):
        done, state = np.zeros(3, np.int32), step.init(3, 128)
        for _ in range(12):
            room = np.array([len(c["ids"]) for c in reference[:3]]) - done
            counts = np.minimum(random.integers(0, k + 1, 3), room).astype(np.int32)
            rows = np.zeros((3, 1, k), np.int32)
            for i in range(3):
                rows[i, 0, : counts[i]] = reference[i]["ids"][done[i] : done[i] + counts[i]]
            (out,), state = run(params, rows, done, counts, state)
            for i in range(3):
                want = logits[i][done[i] : done[i] + counts[i]]
                # One-row products round otherwise than many-row ones: 2e-4 at logits of 44 (0.5e-5 of the largest).
                np.testing.assert_allclose(np.asarray(out)[i, 0, : counts[i]], want, rtol=0, atol=1e-5 * 44)
            done = done + counts


def test_state_is_a_llama_cache(lm):
    assert lm._programs().bytes_per_token == 30 * 2 * 3 * 64 * 4  # layers x (K, V) x groups x dim x float32


def test_chat(lm):
    answer = lm.chat([{"role": "user", "content": "What is the capital of France?"}], max_tokens=24)
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
