"""The BERT forward and its weight table; values against the oracle are in test_fixtures_oracle."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_helpers import fixtures, load_module, write_folder
from flax import nnx

from jaxinfer.checkpoints import open_checkpoint
from jaxinfer.errors import CheckpointError, RequestError

FOLDER = "bert-sentence"


@pytest.fixture(scope="module")
def bert() -> Any:
    return load_module(fixtures() / FOLDER)[1]


def stored() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with open_checkpoint(fixtures() / FOLDER) as checkpoint:
        return {name: checkpoint.read(name, np.float32).copy() for name in checkpoint.tensors}, checkpoint.config


def rows(count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(0).integers(5, 128, (count, length), dtype=np.int32), np.ones(
        (count, length), np.int32
    )


forward = nnx.jit(lambda module, *inputs: module(*inputs))


def run(module: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.asarray(forward(module, tokens, mask))


def test_shapes_and_names(bert: Any):
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(bert))}
    tensors, _ = stored()
    assert paths == {name for name in tensors if not name.startswith("pooler.")}
    assert run(bert, *rows(2, 7)).shape == (2, 7, 32)


def test_padding_changes_nothing(bert: Any):
    tokens, mask = rows(2, 7)
    alone = run(bert, tokens, mask)
    for batch, length in ((2, 8), (5, 24)):
        wide, wide_mask = np.zeros((2, batch, length), np.int32)
        wide[:2, :7], wide_mask[:2, :7] = tokens, mask
        wide[:2, 7:] = 99  # whatever stands where the mask is 0
        np.testing.assert_allclose(run(bert, wide, wide_mask)[:2, :7], alone, rtol=0, atol=1e-5)


def test_the_mask_does_something(bert: Any):
    tokens, mask = rows(2, 8)
    shorter = mask.copy()
    shorter[:, 5:] = 0
    assert np.abs(run(bert, tokens, mask) - run(bert, tokens, shorter))[:, :5].max() > 0.1


def test_a_row_of_padding_is_finite(bert: Any):
    tokens, mask = rows(2, 8)
    mask[1] = 0
    assert np.isfinite(run(bert, tokens, mask)).all()


def test_every_token_sees_both_sides(bert: Any):
    tokens, mask = rows(2, 8)
    other = tokens.copy()
    other[:, 7] = (other[:, 7] + 1) % 128
    assert (np.abs(run(bert, tokens, mask) - run(bert, other, mask)).max(axis=-1) > 1e-4).all()


def test_too_long_is_refused(bert: Any):
    with pytest.raises(RequestError, match="25 tokens; this model has positions for 24"):
        bert(*map(jnp.asarray, rows(1, 25)))


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("old_norms", [False, True])
def test_names_of_every_kind_of_checkpoint(tmp_path: Path, bert: Any, prefix: str, old_norms: bool):
    tensors, config = stored()
    names = {name: prefix + name for name in tensors}
    if old_norms:
        spelling = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        names = {
            name: next((new.replace(old, to) for old, to in spelling.items() if old in new), new)
            for name, new in names.items()
        }
    renamed = {names[name]: value for name, value in tensors.items()}
    renamed[f"{prefix}embeddings.position_ids"] = np.arange(24)[None]
    renamed["cls.predictions.bias"] = np.zeros(128, np.float32)
    renamed["cls.seq_relationship.weight"] = np.zeros((2, 32), np.float32)
    _, module = load_module(write_folder(tmp_path / "checkpoint", renamed, config))
    want, got = (nnx.to_pure_dict(nnx.state(m)) for m in (bert, module))
    jax.tree.map(np.testing.assert_array_equal, want, got)


def test_both_prefixes_at_once_are_an_error(tmp_path: Path):
    tensors, config = stored()
    tensors["bert.embeddings.LayerNorm.gamma"] = tensors["embeddings.LayerNorm.weight"]
    with pytest.raises(CheckpointError, match=r"'embeddings.LayerNorm.weight' is filled twice"):
        load_module(write_folder(tmp_path / "checkpoint", tensors, config))


def test_other_heads_are_an_error(tmp_path: Path):
    tensors, config = stored()
    tensors["classifier.weight"] = np.zeros((2, 32), np.float32)
    with pytest.raises(CheckpointError, match=r"no place in the model: 'classifier.weight'"):
        load_module(write_folder(tmp_path / "checkpoint", tensors, config))
