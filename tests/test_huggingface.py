"""Hugging Face folders: what they hold is read exactly, and hostile files are refused."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_helpers import fixtures, open_tensors, raw_safetensors, write_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxinfer.checkpoints import open_checkpoint
from jaxinfer.checkpoints.safetensors_file import MAX_HEADER_BYTES, SafetensorsFile
from jaxinfer.errors import CheckpointError

VALUES: dict[str, Any] = {
    "BOOL": np.array([True, False, True]),
    "U8": np.array([0, 255], np.uint8),
    "I8": np.array([[-128], [127]], np.int8),
    "U16": np.array([0, 65535], np.uint16),
    "I16": np.array([-(2**15)], np.int16),
    "U32": np.array([2**32 - 1], np.uint32),
    "I32": np.array([-(2**31)], np.int32),
    "U64": np.array([2**64 - 1], np.uint64),
    "I64": np.array([-(2**63)], np.int64),
    "F16": np.array([[1.5, -2.0]], np.float16),
    "BF16": np.array([[[1.5]], [[-3.0]]], ml_dtypes.bfloat16),
    "F32": np.arange(6, dtype=np.float32).reshape(1, 2, 3),
    "F64": np.array(0.1),  # a scalar
    "F8_E4M3": np.array([448.0, -0.5], ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.array([57344.0], ml_dtypes.float8_e5m2),
    "empty": np.zeros((0, 5), np.float32),
}


def entry(begin: int, end: int, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def folder_of(tmp_path: Path, data: bytes) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(data)
    return tmp_path


def test_every_dtype_as_the_reference_writes_it(tmp_path: Path):
    with open_tensors(tmp_path / "checkpoint", VALUES) as checkpoint:
        assert (checkpoint.format, checkpoint.naming) == ("huggingface", "hf")
        assert checkpoint.tensors.keys() == VALUES.keys()
        for name, want in VALUES.items():
            info = checkpoint.tensors[name]
            assert (info.name, info.shape, info.nbytes) == (name, want.shape, want.nbytes)
            assert info.dtype == (name if name != "empty" else "F32")
            got = checkpoint.read(name, want.dtype)
            assert got.dtype == want.dtype and got.shape == want.shape
            assert got.tobytes() == want.tobytes()
            assert not got.flags.writeable
        assert checkpoint.nbytes == sum(value.nbytes for value in VALUES.values())


def test_reads_are_views_where_the_dtype_fits_and_outlive_the_checkpoint(tmp_path: Path):
    checkpoint = open_tensors(tmp_path / "checkpoint", VALUES)
    view, other = checkpoint.read("F32", np.float32), checkpoint.read("BF16", np.float32)
    assert not view.flags.owndata and other.dtype == np.float32
    checkpoint.release("F32")
    checkpoint.close()
    del checkpoint
    gc.collect()
    np.testing.assert_array_equal(view, VALUES["F32"])
    np.testing.assert_array_equal(other.ravel(), [1.5, -3.0])


def test_reads_after_close_and_of_unknown_names(tmp_path: Path):
    checkpoint = open_tensors(tmp_path / "checkpoint", VALUES)
    with pytest.raises(CheckpointError, match="no tensor 'F99'"):
        checkpoint.read("F99", np.float32)
    with pytest.raises(CheckpointError, match="'F32' is stored as F32 and can't be read as int32"):
        checkpoint.read("F32", np.int32)
    checkpoint.close()
    with pytest.raises(CheckpointError, match="is closed"):
        checkpoint.read("F32", np.float32)


def test_shards_by_their_index():
    names = {info.file.name for info in open_checkpoint(fixtures() / "llama-sharded").tensors.values()}
    assert names == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}


def test_a_file_cut_short_after_opening_is_an_error_and_not_a_crash(tmp_path: Path):
    path = write_folder(tmp_path / "checkpoint", {"x": np.zeros(10_000, np.float32)})
    with open_checkpoint(path) as checkpoint:
        os.truncate(path / "model.safetensors", 4096)
        with pytest.raises(CheckpointError, match="cut short after it was opened"):
            checkpoint.read("x", np.float32)


HEADERS = {
    "no header": (b"\0" * 7, "needs 8"),
    "length over the file": (raw_safetensors({}, length=3), "header of 3 bytes in a file of 10"),
    "length over the limit": (raw_safetensors({}, length=2**63), f"limit is {MAX_HEADER_BYTES}"),
    "not JSON": (raw_safetensors(b"{'a': 1}"), "not valid JSON"),
    "not UTF-8": (raw_safetensors(b'{"\xff": 1}'), "not valid JSON"),
    "not an object": (raw_safetensors([1]), "must hold a JSON dict"),
    "deep": (raw_safetensors(b"[" * 200_000), "not valid JSON"),
    "huge integer": (raw_safetensors(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "key twice": (raw_safetensors(b'{"a": {}, "b": {}, "a": {}}'), "key 'a' twice"),
    "field twice": (raw_safetensors(b'{"a": {"dtype": "F32", "dtype": "F64"}}'), "key 'dtype' twice"),
    "entry is no object": (raw_safetensors({"a": 3}), "must hold dtype, shape and data_offsets"),
    "field missing": (raw_safetensors({"a": {"dtype": "F32", "shape": [1]}}), "must hold dtype"),
    "field too many": (raw_safetensors({"a": {**entry(0, 0), "x": 1}}), "must hold dtype"),
    "metadata": (raw_safetensors({"__metadata__": {"a": 1}}), "__metadata__ must map"),
    "dtype unknown": (raw_safetensors({"a": entry(0, 4, "F128")}, b"\0" * 4), "dtype 'F128'; supported: BOOL"),
    "dtype no string": (raw_safetensors({"a": entry(0, 4, ["F32"])}, b"\0" * 4), "supported: BOOL"),
    "shape negative": (raw_safetensors({"a": entry(0, 4, shape=[-1])}, b"\0" * 4), "integers >= 0"),
    "shape of floats": (raw_safetensors({"a": entry(0, 4, shape=[1.0])}, b"\0" * 4), "integers >= 0"),
    "shape of bools": (raw_safetensors({"a": entry(0, 4, shape=[True])}, b"\0" * 4), "integers >= 0"),
    "shape no list": (raw_safetensors({"a": entry(0, 4, shape="1")}, b"\0" * 4), "integers >= 0"),
    "rank": (raw_safetensors({"a": entry(0, 4, shape=[1] * 65)}, b"\0" * 4), "at most 16"),
    "product wraps to 0": (raw_safetensors({"a": entry(0, 0, shape=[2**32, 2**32])}), "too large"),
    "product with a 0": (raw_safetensors({"a": entry(0, 0, shape=[0, 2**62, 2**62])}), "too large"),
    "size differs": (raw_safetensors({"a": entry(0, 4, shape=[2])}, b"\0" * 4), "needs another size than the 4"),
    "offsets backward": (raw_safetensors({"a": entry(4, 0, shape=[])}, b"\0" * 4), r"must be \[begin, end\]"),
    "offsets negative": (raw_safetensors({"a": entry(-4, 0, shape=[1])}, b"\0" * 4), r"must be \[begin, end\]"),
    "three offsets": (raw_safetensors({"a": {**entry(0, 4), "data_offsets": [0, 4, 4]}}, b"\0" * 4), "must be"),
    "out of range": (raw_safetensors({"a": entry(0, 8)}, b"\0" * 4), "cut short"),
    "overlap": (raw_safetensors({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12), "'b'.*overlaps"),
    "same bytes": (raw_safetensors({"a": entry(0, 4), "b": entry(0, 4)}, b"\0" * 4), "'b'.*overlaps"),
    "gap": (raw_safetensors({"a": entry(0, 4), "b": entry(8, 12)}, b"\0" * 12), "'b'.*leaves a gap"),
    "begins late": (raw_safetensors({"a": entry(4, 8)}, b"\0" * 8), "'a'.*leaves a gap"),
    "bytes after": (raw_safetensors({"a": entry(0, 4)}, b"\0" * 5), "1 bytes follow the last tensor"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_header(tmp_path: Path, name: str):
    data, message = HEADERS[name]
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder_of(tmp_path, data))


def test_the_least_files_are_fine(tmp_path: Path):
    assert open_checkpoint(folder_of(tmp_path, raw_safetensors({}))).tensors == {}
    padded = raw_safetensors(b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}   ', b"\0\0\x80\x3f")
    assert open_checkpoint(folder_of(tmp_path, padded)).read("a", np.float32) == 1


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4), cut=st.integers(0, 40))
def test_damaged_bytes_give_a_checkpoint_error_or_the_right_shapes(tmp_path: Path, edits: list[Any], cut: int):
    data = bytearray((fixtures() / "bert-sentence" / "model.safetensors").read_bytes()[:4000])
    length = int.from_bytes(data[:8], "little")
    data = data[: 8 + min(length, 3000)]
    for at, value in edits:
        data[at % len(data)] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(data[: len(data) - cut]))
    with pytest.raises(CheckpointError):  # its data is always missing
        SafetensorsFile(path)


def test_missing_files_say_what_to_do(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        open_checkpoint("nul\0byte")
    with pytest.raises(CheckpointError, match=r"has no config.json.*Supported: "):
        open_checkpoint(tmp_path)
    (tmp_path / "model.Q4_1.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"It holds 'model.Q4_1.gguf'"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"It holds model-00001-of-00002.safetensors: is the index missing"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"It holds pytorch_model.bin, a format that is not yet supported.*save_pretrained"
    ):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="give its folder"):
        open_checkpoint(tmp_path / "config.json")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 1}', "\ufeff{}"])
def test_damaged_config(tmp_path: Path, text: str):
    write_folder(tmp_path, {})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(tmp_path)


def sharded(tmp_path: Path, weight_map: Any, **files: bytes) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, data in files.items():
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    return tmp_path


ONE = raw_safetensors({"a": entry(0, 4)}, b"\0" * 4)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ([], "must have a weight_map"),
        ({}, "must have a weight_map"),
        ({"a": 1}, "must have a weight_map"),
        ({"a": "two.safetensors"}, "missing"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "lists tensor 'b' in 'one.safetensors', which doesn't hold"),
        ({"b": "one.safetensors"}, "'a' is stored in 'one.safetensors', but .* doesn't list it"),
        (
            {"a": "one.safetensors", "b": "same.safetensors"},
            "'a' is stored in 'same.safetensors', but .* puts it in 'one",
        ),
        ({"a": "../one.safetensors"}, "must be a plain name"),
        ({"a": "/etc/passwd"}, "must be a plain name"),
        ({"a": "sub\\one.safetensors"}, "must be a plain name"),
        ({"a": ".."}, "must be a plain name"),
        ({"a": ""}, "must be a plain name"),
        ({"a": "one\0.safetensors"}, "must be a plain name"),
        ({"a": "folder"}, "not a regular file"),
    ],
)
def test_index_and_shards_must_agree(tmp_path: Path, weight_map: Any, message: str):
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sharded(tmp_path, weight_map, one=ONE, same=ONE))


def test_links_out_of_the_folder_are_refused(tmp_path: Path):
    inside, outside = tmp_path / "in", tmp_path / "out.safetensors"
    inside.mkdir()
    outside.write_bytes(ONE)
    for name in ("model.safetensors", "shard.safetensors"):
        (inside / name).symlink_to(outside)
    (inside / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        open_checkpoint(inside)
    (inside / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        open_checkpoint(sharded(inside, {"a": "shard.safetensors"}))
    (inside / "shard.safetensors").unlink()
    (inside / "shard.safetensors").symlink_to(inside / "shard.safetensors")
    with pytest.raises(CheckpointError, match="missing or can't be read"):
        open_checkpoint(inside)


def test_links_of_the_hugging_face_cache_are_followed(tmp_path: Path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, data in (("config.json", b"{}"), ("model.safetensors", ONE)):
        (blobs / f"hash-{name}").write_bytes(data)
        (snapshot / name).symlink_to(Path("../../blobs") / f"hash-{name}")
    assert open_checkpoint(snapshot).tensors.keys() == {"a"}
    (snapshot / "model.safetensors").unlink()
    (tmp_path / "elsewhere").write_bytes(ONE)
    (snapshot / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        open_checkpoint(snapshot)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_is_refused_and_does_not_hang(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        SafetensorsFile(tmp_path / "model.safetensors")


def test_no_jax_is_imported():
    code = f"""
import sys
from jaxinfer.checkpoints import open_checkpoint
with open_checkpoint({str(fixtures() / "llama-sharded")!r}) as checkpoint:
    checkpoint.read(next(iter(checkpoint.tensors)), "float32")
assert not {{"jax", "flax"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
