"""Weights land exactly once, or loading fails and names the key."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_helpers import open_tensors, raw_safetensors, write_folder

from jaxinfer.checkpoints import open_checkpoint
from jaxinfer.errors import CheckpointError
from jaxinfer.models.weights import Weight, load_params, same_names, unpermute_rope

TABLE = [
    *same_names("embed.weight", "layers.{i}.proj.weight"),
    Weight("head.weight", "head.weight", tied_to="embed.weight"),
    Weight("embed.weight", "old.embed"),
]
FLOATS = {
    "embed.weight": np.arange(12, dtype=np.float32).reshape(4, 3),
    "layers.0.proj.weight": np.full((2, 3), 0.5, np.float32),
    "layers.1.proj.weight": np.full((2, 3), 1.5, np.float32),
}


def abstract(head: bool = False) -> dict[str, Any]:
    def shape(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.float32)

    tree: dict[str, Any] = {"embed": {"weight": shape(4, 3)}}
    tree["layers"] = {i: {"proj": {"weight": shape(2, 3)}} for i in range(2)}
    return tree | ({"head": {"weight": shape(4, 3)}} if head else {})


def load(
    folder: Path, tensors: dict[str, np.ndarray], dtype: Any = np.float32, head: bool = False, **options: Any
) -> Any:
    with open_tensors(folder / "checkpoint", tensors) as checkpoint:
        return load_params(abstract(head), checkpoint, TABLE, None, dtype, **options)


def test_every_weight_lands_in_its_place(tmp_path: Path):
    reports: list[tuple[int, int]] = []
    params = load(tmp_path, FLOATS, progress=lambda done, total: reports.append((done, total)))
    assert jax.tree.structure(params) == jax.tree.structure(abstract())  # int keys stay ints
    np.testing.assert_array_equal(params["embed"]["weight"], FLOATS["embed.weight"])
    np.testing.assert_array_equal(params["layers"][1]["proj"]["weight"], FLOATS["layers.1.proj.weight"])
    assert reports[-1] == (96, 96)
    assert [done for done, _ in reports] == sorted({done for done, _ in reports})


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64, np.float32])
@pytest.mark.parametrize("wanted", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_any_floating_dtype_to_any(tmp_path: Path, stored: Any, wanted: Any):
    values = np.random.default_rng(0).standard_normal((4, 3)).astype(stored)
    params = load(tmp_path, {**FLOATS, "embed.weight": values}, wanted)
    assert all(leaf.dtype == wanted for leaf in jax.tree.leaves(params))
    np.testing.assert_array_equal(params["embed"]["weight"], values.astype(wanted))


def test_missing(tmp_path: Path):
    tensors = {name: value for name, value in FLOATS.items() if name != "layers.1.proj.weight"}
    with pytest.raises(CheckpointError, match=r"1 weight\(s\) of the model are missing: 'layers.1.proj.weight'"):
        load(tmp_path, tensors)


@pytest.mark.parametrize(
    "name", ["unheard.of", "layers.2.proj.weight", "layers.00.proj.weight", "xlayers.0.proj.weight"]
)
def test_unused(tmp_path: Path, name: str):
    with pytest.raises(CheckpointError, match=rf"1 stored tensor\(s\) have no place in the model: '{name}'"):
        load(tmp_path, {**FLOATS, name: np.zeros((2, 3), np.float32)})


def test_ignored_by_name_and_only_as_a_whole(tmp_path: Path):
    tensors = {**FLOATS, "pooler.weight": np.zeros(2, np.float32)}
    assert load(tmp_path, tensors, ignore=[r"pooler\..*"])
    with pytest.raises(CheckpointError, match=r"pooler\.weight"):
        load(tmp_path, tensors, ignore=["pooler"])


def test_filled_twice(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"'embed.weight' is filled twice: by 'embed.weight' and by 'old.embed'"):
        load(tmp_path, {**FLOATS, "old.embed": FLOATS["embed.weight"]})


def test_ambiguous_table(tmp_path: Path):
    with open_tensors(tmp_path / "checkpoint", FLOATS) as checkpoint:
        table = [*TABLE, Weight("embed.weight", "embed.weight")]
        with pytest.raises(CheckpointError, match=r"'embed.weight' matches 2 rows"):
            load_params(abstract(), checkpoint, table, None, np.float32)


@pytest.mark.parametrize("shape", [(3, 4), (4, 4), (12,), (4, 3, 1)])
def test_wrong_shape(tmp_path: Path, shape: tuple[int, ...]):
    with pytest.raises(CheckpointError, match=r"'embed.weight' has shape .*; the config asks .* to be \(4, 3\)"):
        load(tmp_path, {**FLOATS, "embed.weight": np.zeros(shape, np.float32)})


def test_integers_are_no_weights(tmp_path: Path):
    with pytest.raises(CheckpointError, match="stored as I8"):
        load(tmp_path, {**FLOATS, "embed.weight": np.zeros((4, 3), np.int8)})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_check_finds_what_is_not_finite(tmp_path: Path, value: float):
    damaged = FLOATS["embed.weight"].copy()
    damaged[3, 2] = value
    tensors = {**FLOATS, "embed.weight": damaged}
    assert not np.isfinite(load(tmp_path, tensors)["embed"]["weight"]).all()
    with pytest.raises(CheckpointError, match=r"'embed.weight' holds NaN or infinity"):
        load(tmp_path, tensors, check=True)
    with pytest.raises(CheckpointError, match=r"'embed.weight' holds NaN or infinity"):
        load(tmp_path, tensors, ml_dtypes.bfloat16, check=True)
    assert load(tmp_path, FLOATS, check=True)


def test_overflow_in_float16_is_always_found(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"'embed.weight' holds NaN or infinity in float16"):
        load(tmp_path, {**FLOATS, "embed.weight": np.full((4, 3), 1e6, np.float32)}, np.float16)


def test_tied_weight_may_be_stored_again_only_if_equal(tmp_path: Path):
    twice = {**FLOATS, "head.weight": FLOATS["embed.weight"]}
    assert "head" not in load(tmp_path, twice)
    with pytest.raises(CheckpointError, match="their values differ"):
        load(tmp_path, {**FLOATS, "head.weight": FLOATS["embed.weight"] + 1})
    with pytest.raises(CheckpointError, match="their values differ"):
        load(tmp_path, {**FLOATS, "head.weight": FLOATS["embed.weight"].reshape(3, 4)})


def test_untied_weight_is_loaded_and_required(tmp_path: Path):
    params = load(tmp_path, {**FLOATS, "head.weight": FLOATS["embed.weight"] + 1}, head=True)
    np.testing.assert_array_equal(params["head"]["weight"], FLOATS["embed.weight"] + 1)
    with pytest.raises(CheckpointError, match=r"missing: 'head.weight'"):
        load(tmp_path, FLOATS, head=True)


def test_loaded_weights_do_not_follow_the_file(tmp_path: Path):
    header = b'{"x": {"dtype": "F32", "shape": [1024, 1024], "data_offsets": [0, 4194304]}}'
    padded = header.ljust(64 * 3 - 8)  # JAX may alias host memory that is aligned to 64 bytes
    path = write_folder(tmp_path / "checkpoint", {}) / "model.safetensors"
    path.write_bytes(raw_safetensors(padded, np.ones(1 << 20, np.float32).tobytes()))
    shape = {"x": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    with open_checkpoint(path.parent) as checkpoint:
        assert checkpoint.read("x", np.float32).ctypes.data % 64 == 0
        params = load_params(shape, checkpoint, same_names("x"), None, np.float32)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert (np.asarray(params["x"]) == 1).all()


def test_unpermute_rope_by_hand():
    # One head of 6 features: llama.cpp pairs (0, 3), (1, 4), (2, 5) side by side.
    stored = np.array([0, 3, 1, 4, 2, 5, 10, 13, 11, 14, 12, 15])
    np.testing.assert_array_equal(unpermute_rope(stored, 2), [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15])
    matrix = np.stack([stored, -stored], axis=1)
    np.testing.assert_array_equal(unpermute_rope(matrix, 2)[:, 1], -unpermute_rope(stored, 2))
    with pytest.raises(CheckpointError, match="12 rows of q or k can't be split into pairs for 4 heads"):
        unpermute_rope(stored, 4)
