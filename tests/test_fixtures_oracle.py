"""Our forwards against transformers on tiny random checkpoints (scripts/make_fixtures.py made both)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_helpers import fixtures, load_module
from flax import nnx

# Of the largest logit. Both sides sum in float32 in their own order, and each is about 1.1e-6 of it away from the same
# model in float64 (2.3e-5 where logits reach 22); the rest is room for other seeds and kernels. A wrong rotation
# differs by more than 1e-2 (test_the_limit_tells_a_wrong_rotation).
LIMIT = 5e-6

LLAMAS = sorted(path.name for path in fixtures().glob("llama-*") if (path / "config.json").exists())
BERTS = sorted(path.name for path in fixtures().glob("bert-*"))


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):  # GPUs and TPUs multiply float32 in fewer bits otherwise
        yield


def reference(name: str) -> dict[str, np.ndarray]:
    with np.load(fixtures() / name) as file:
        return dict(file)


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(want).max() > 1  # not vacuous
    np.testing.assert_allclose(got, want, rtol=0, atol=LIMIT * np.abs(want).max())


def run(module: nnx.Module, *inputs: Any) -> np.ndarray:
    return np.asarray(nnx.jit(lambda module, *inputs: module(*inputs))(module, *inputs))


def test_the_set_is_complete():
    assert len(LLAMAS) == 8
    assert len(BERTS) == 2
    assert {path.name for path in (fixtures() / "llama-gguf").glob("*.gguf")} == {"f32.gguf", "q8_0.gguf"}
    assert (fixtures() / "llama-sharded" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("name", LLAMAS)
def test_llama(name: str):
    """Logits of whole sequences, and 16 greedy tokens by full forwards; one shape, so that one program is compiled."""
    config, module = load_module(fixtures() / name, check=True)
    expected = reference(f"{name}/reference.npz")
    forward = nnx.jit(lambda module, tokens: module(tokens))
    prompts, greedy = expected["prompts"], expected["greedy"]
    start, length = prompts.shape[1], expected["tokens"].shape[1]
    tokens = np.zeros((2, start + greedy.shape[1]), np.int32)

    tokens[:, :length] = expected["tokens"]  # causal: what lies to the right is not seen
    logits = np.asarray(forward(module, tokens))[:, :length]
    assert logits.shape == (2, length, config.vocab_size)
    assert_close(logits, expected["logits"])

    tokens[:] = 0
    tokens[:, :start] = prompts
    for at in range(start, tokens.shape[1]):
        tokens[:, at] = np.asarray(forward(module, tokens))[:, at - 1].argmax(-1)
    np.testing.assert_array_equal(tokens[:, start:], greedy)


def test_the_limit_tells_a_wrong_rotation():
    expected = reference("llama-rope-llama3/reference.npz")
    _, module = load_module(fixtures() / "llama-rope-llama3")
    module.config = dataclasses.replace(module.config, rope_scaling=None)
    assert np.abs(run(module, expected["tokens"]) - expected["logits"]).max() > 1e-2


@pytest.mark.parametrize("name", BERTS)
def test_bert_hidden(name: str):
    _, module = load_module(fixtures() / name, check=True)
    expected = reference(f"{name}/reference.npz")
    hidden = run(module, expected["tokens"], expected["mask"])
    real = expected["mask"] == 1  # what stands at padding means nothing
    assert not real.all()
    assert_close(hidden[real], expected["hidden"][real])


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_gguf_logits(kind: str):
    _, module = load_module(fixtures() / "llama-gguf" / f"{kind}.gguf")
    expected = reference(f"llama-gguf/{kind}.npz")
    assert_close(run(module, expected["tokens"]), expected["logits"])


def test_gguf_equals_the_folder_it_was_made_from():
    config, module = load_module(fixtures() / "llama-gqa")
    gguf_config, gguf_module = load_module(fixtures() / "llama-gguf" / "f32.gguf")
    assert gguf_config == config
    want, got = (nnx.to_pure_dict(nnx.state(m)) for m in (module, gguf_module))
    assert jax.tree.structure(want) == jax.tree.structure(got)
    jax.tree.map(np.testing.assert_array_equal, want, got)


def test_one_forward_runs_in_bfloat16():
    expected = reference("llama-bf16/reference.npz")
    _, module = load_module(fixtures() / "llama-bf16", jnp.bfloat16)
    logits = run(module, expected["tokens"])
    assert logits.dtype == jnp.bfloat16
    # 8 bits of mantissa through two layers; the greatest logit is about 8
    assert np.abs(logits.astype(np.float32) - expected["logits"]).max() < 0.5
