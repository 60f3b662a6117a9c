"""The GGUF reader against files that the `gguf` package writes, and against hostile ones."""

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from jaxinfer.checkpoints.gguf import GGUFCheckpoint
from jaxinfer.checkpoints.gguf_config import read_config
from jaxinfer.checkpoints.gguf_quants import QUANTIZED, TYPES
from jaxinfer.errors import CheckpointError

HEADS, HEAD_DIM, HIDDEN, VOCAB = 4, 8, 32, 40


def write(path: Path, edit: Callable[[GGUFWriter], Any] = lambda writer: None, arch: str = "llama") -> Path:
    """A tiny Llama, one tensor of each type in it."""
    writer = GGUFWriter(path, arch)
    if arch == "llama":
        writer.add_block_count(2)
        writer.add_context_length(128)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(64)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(5e5)
    rng = np.random.default_rng(0)
    writer.add_tensor("token_embd.weight", rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32))
    writer.add_tensor("half", rng.normal(size=(3, 5)).astype(np.float16))
    for name in ("BF16", *QUANTIZED):
        raw = rng.integers(0, 128, (3, 256 // TYPES[GGMLQuantizationType[name]].block * nbytes(name)), np.uint8)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=GGMLQuantizationType[name])
    edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def nbytes(name: str) -> int:
    return TYPES[GGMLQuantizationType[name]].nbytes


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.gguf")


# --- files as they should be -----------------------------------------------------------------------------


def test_tensors_equal_the_reference_reader(tiny: Path):
    reader = GGUFReader(tiny)
    with GGUFCheckpoint(tiny) as checkpoint:
        assert [*checkpoint.tensors] == [tensor.name for tensor in reader.tensors]
        for tensor in reader.tensors:
            info = checkpoint.tensors[tensor.name]
            assert (info.dtype, info.nbytes, info.offset) == (
                tensor.tensor_type.name,
                tensor.n_bytes,
                tensor.data_offset,
            )
            assert info.shape == tuple(map(int, tensor.shape))[::-1]
            with np.errstate(all="ignore"):
                expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            ours = checkpoint.read(tensor.name, np.float32)
            assert ours.shape == info.shape and ours.dtype == np.float32
            np.testing.assert_array_equal(ours, expected.reshape(info.shape))


def test_metadata_of_every_type(tmp_path: Path):
    def edit(writer: GGUFWriter) -> None:
        for bits in (8, 16, 32, 64):
            getattr(writer, f"add_uint{bits}")(f"u{bits}", 2**bits - 1)
            getattr(writer, f"add_int{bits}")(f"i{bits}", -(2 ** (bits - 1)))
        writer.add_float32("f32", 0.5)
        writer.add_float64("f64", 0.1)
        writer.add_bool("yes", True)
        writer.add_string("text", "é🙂")
        writer.add_array("strings", ["", "a", "字"])
        writer.add_array("ints", [1, -2, 3])
        writer.add_array("flags", [True, False])

    metadata = GGUFCheckpoint(write(tmp_path / "m.gguf", edit)).metadata
    assert metadata["u64"] == 2**64 - 1 and metadata["i64"] == -(2**63) and metadata["u8"] == 255
    assert metadata["f32"] == 0.5 and metadata["f64"] == 0.1 and metadata["yes"] is True
    assert metadata["text"] == "é🙂" and metadata["strings"] == ["", "a", "字"]
    assert metadata["ints"].tolist() == [1, -2, 3] and metadata["flags"].tolist() == [True, False]


def test_the_stored_dtype_is_a_read_only_view_that_outlives_the_checkpoint(tiny: Path):
    checkpoint = GGUFCheckpoint(tiny)
    embedding = checkpoint.read("token_embd.weight", np.float32)
    assert not embedding.flags.writeable and not embedding.flags.owndata
    before = embedding.copy()
    checkpoint.close()
    np.testing.assert_array_equal(embedding, before)
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.read("half", np.float32)


def test_reads_into_bfloat16(tiny: Path):
    checkpoint = GGUFCheckpoint(tiny)
    wide, narrow = (checkpoint.read("Q4_1.weight", dtype) for dtype in (np.float32, ml_dtypes.bfloat16))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(narrow.astype("f4"), wide.astype(ml_dtypes.bfloat16).astype("f4"))


def test_alignment_of_the_file_is_followed(tmp_path: Path):
    path = write(tmp_path / "a.gguf", lambda writer: writer.add_custom_alignment(256))
    checkpoint = GGUFCheckpoint(path)
    assert all(info.offset % 256 == 0 for info in checkpoint.tensors.values())
    reader = GGUFReader(path)
    np.testing.assert_array_equal(checkpoint.read("half", np.float16), reader.tensors[1].data)


# --- config ----------------------------------------------------------------------------------------------


def test_config_of_llama(tiny: Path):
    checkpoint = GGUFCheckpoint(tiny)
    assert (checkpoint.format, checkpoint.naming) == ("gguf", "gguf")
    assert checkpoint.config == {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "rope_theta": 5e5,
        "rope_scaling": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def test_config_says_what_the_metadata_says(tmp_path: Path):
    def edit(writer: GGUFWriter) -> None:
        writer.add_tensor("output.weight", np.zeros((VOCAB, HIDDEN), np.float32))
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
        writer.add_key_length(16)
        writer.add_value_length(16)
        writer.add_eos_token_id(7)
        writer.add_sliding_window(64)

    config = GGUFCheckpoint(write(tmp_path / "c.gguf", edit)).config
    assert config["tie_word_embeddings"] is False and config["head_dim"] == 16 and config["eos_token_id"] == 7
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert config["llama.attention.sliding_window"] == 64  # no translation: left for the strict reader to refuse


def llama3_factors(factor: float, theta: float = 5e5, head_dim: int = HEAD_DIM) -> np.ndarray:
    """As llama.cpp's converter makes them, one frequency after another (Llama 3.1: 8192, low 1, high 4)."""
    factors = []
    for exponent in np.arange(0, head_dim, 2) / head_dim:
        wavelength = 2 * np.pi * theta**exponent
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("head_dim", [8, 128])
def test_llama3_rope_factors_become_config(tmp_path: Path, factor: float, head_dim: int):
    def edit(writer: GGUFWriter) -> None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_tensor("rope_freqs.weight", llama3_factors(factor, head_dim=head_dim))

    checkpoint = GGUFCheckpoint(write(tmp_path / "r.gguf", edit))
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert checkpoint.config["rope_scaling"] == scaling | {"original_max_position_embeddings": 8192}
    assert "rope_freqs.weight" not in checkpoint.tensors


def test_other_rope_factors_are_refused(tmp_path: Path):
    factors = llama3_factors(8.0) * np.array([1, 1.5, 1, 1], np.float32)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        GGUFCheckpoint(write(tmp_path / "r.gguf", lambda writer: writer.add_tensor("rope_freqs.weight", factors)))


@pytest.mark.parametrize("arch", ["qwen2", "bert", "gemma3"])
def test_other_architectures_are_named(tmp_path: Path, arch: str):
    config = GGUFCheckpoint(write(tmp_path / "o.gguf", arch=arch)).config
    assert config == {"model_type": f"{arch} (GGUF)"}


def test_what_llama_metadata_can_say_beyond_llama(tmp_path: Path):
    def config(edit: Callable[[GGUFWriter], Any]) -> dict[str, Any]:
        return GGUFCheckpoint(write(tmp_path / "x.gguf", edit)).config

    assert config(lambda writer: writer.add_expert_count(8)) == {"model_type": "mixtral (GGUF)"}
    yarn = config(lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN))
    assert yarn["rope_scaling"]["rope_type"] == "yarn"
    assert config(lambda writer: writer.add_array("llama.rope.sections", [1, 2]))["llama.rope.sections"].tolist() == [
        1,
        2,
    ]
    with pytest.raises(CheckpointError, match=r"llama\.rope\.dimension_count"):
        config(lambda writer: writer.add_rope_dimension_count(4))
    with pytest.raises(CheckpointError, match="one of 3 parts"):
        config(lambda writer: writer.add_uint16("split.count", 3))


def test_a_count_for_each_layer(tiny: Path):
    checkpoint = GGUFCheckpoint(tiny)
    key = "llama.attention.head_count_kv"
    same, different = ({**checkpoint.metadata, key: np.array(groups, np.uint32)} for groups in ([2, 2], [2, 1]))
    assert read_config(same, checkpoint.tensors, None) == checkpoint.config
    with pytest.raises(CheckpointError, match="head_count_kv"):
        read_config(different, checkpoint.tensors, None)


# --- hostile files ---------------------------------------------------------------------------------------


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str = "t", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARCH = pair("general.architecture", 8, string("test"))


def raw_file(
    pairs: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    *,
    head: bytes = b"GGUF" + struct.pack("<I", 3),
    counts: tuple[int, int] | None = None,
    data: int = 4096,
) -> bytes:
    pairs, tensors = [ARCH] if pairs is None else pairs, tensors or []
    n_tensors, n_pairs = counts or (len(tensors), len(pairs))
    body = head + struct.pack("<QQ", n_tensors, n_pairs) + b"".join(pairs) + b"".join(tensors)
    return body + bytes(-len(body) % 32) + bytes(data)


HUGE = 2**61
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "magic"),
    "magic only": (b"GGUF", "a number"),
    "another magic": (b"GGML" + bytes(100), "begins with"),
    "version 1": (raw_file(head=b"GGUF" + struct.pack("<I", 1)), "version 1 is not supported"),
    "big endian": (raw_file(head=b"GGUF" + struct.pack(">I", 3)), "big-endian"),
    "2^61 pairs": (raw_file(counts=(0, HUGE)), "room for at most"),
    "2^61 tensors": (raw_file(counts=(HUGE, 1)), "room for at most"),
    "more pairs than there are": (raw_file(counts=(0, 9)), "."),
    "key of 2^61 bytes": (raw_file([struct.pack("<Q", HUGE)]), "at most 65535 bytes"),
    "empty key": (raw_file([pair("", 0, b"\0")]), "not empty"),
    "duplicate key": (raw_file([ARCH, ARCH]), "unique"),
    "key that isn't UTF-8": (raw_file([string(b"\xff") + bytes(8)]), "UTF-8"),
    "unknown value type": (raw_file([pair("k", 13, bytes(8))]), "value type from 0 to 12"),
    "bool of 2": (raw_file([pair("k", 7, b"\2")]), "bool"),
    "string of 2^61 bytes": (raw_file([pair("k", 8, struct.pack("<Q", HUGE))]), "inside the file"),
    "string past the end": (raw_file([pair("k", 8, struct.pack("<Q", 5000))]), "inside the file"),
    "array of 2^61 bytes": (raw_file([pair("k", 9, struct.pack("<IQ", 0, HUGE))]), "room for at most"),
    "array of 2^61 doubles": (raw_file([pair("k", 9, struct.pack("<IQ", 12, HUGE))]), "room for at most"),
    "array of 2^61 strings": (raw_file([pair("k", 9, struct.pack("<IQ", 8, HUGE))]), "room for at most"),
    "array of strings past the end": (raw_file([pair("k", 9, struct.pack("<IQQ", 8, 1, HUGE))]), "inside the file"),
    "array of bad UTF-8": (raw_file([pair("k", 9, struct.pack("<IQ", 8, 1) + string(b"\xc3"))]), "UTF-8"),
    "array of arrays": (raw_file([pair("k", 9, struct.pack("<IQ", 9, 1) + bytes(12))]), "array of scalars or strings"),
    "five dims": (raw_file(tensors=[tensor(dims=(1,) * 5)]), "at most 4 dims"),
    "2^32 dims": (raw_file(tensors=[string("t") + struct.pack("<I", 2**32 - 1)]), "at most 4 dims"),
    "dim of 0": (raw_file(tensors=[tensor(dims=(4, 0))]), "at least 1"),
    "sizes that overflow": (raw_file(tensors=[tensor(dims=(2**33, 2**33))]), "ends inside the file"),
    "tensor past the end": (raw_file(tensors=[tensor(dims=(1025,))]), "ends inside the file"),
    "offset past the end": (raw_file(tensors=[tensor(offset=1 << 40)]), "ends inside the file"),
    "offset of 2^64": (raw_file(tensors=[tensor(offset=2**64 - 32)]), "ends inside the file"),
    "offset out of line": (raw_file(tensors=[tensor(offset=4)]), "multiple of 32"),
    "overlapping tensors": (raw_file(tensors=[tensor("a", (64,)), tensor("b", offset=32)]), "begins after"),
    "duplicate tensor": (raw_file(tensors=[tensor(), tensor(offset=32)]), "unique"),
    "unknown tensor type": (raw_file(tensors=[tensor(kind=1000)]), "known type"),
    "removed tensor type": (raw_file(tensors=[tensor(kind=4)]), "known type"),
    "row of half a block": (raw_file(tensors=[tensor(dims=(48,), kind=2)]), "multiples of 32"),
    "name of 2^61 bytes": (raw_file(tensors=[struct.pack("<Q", HUGE)]), "at most 64 bytes"),
    "alignment of 0": (raw_file([ARCH, pair("general.alignment", 4, struct.pack("<I", 0))]), "power of two"),
    "alignment of 24": (raw_file([ARCH, pair("general.alignment", 4, struct.pack("<I", 24))]), "power of two"),
    "alignment of 2^31": (raw_file([ARCH, pair("general.alignment", 4, struct.pack("<I", 1 << 31))]), "power of two"),
    "alignment as text": (raw_file([ARCH, pair("general.alignment", 8, string("32"))]), "power of two"),
    "no architecture": (raw_file([]), "general.architecture"),
    "architecture as number": (raw_file([pair("general.architecture", 0, b"\0")]), "general.architecture"),
    "llama without sizes": (raw_file([pair("general.architecture", 8, string("llama"))]), "attention.head_count"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_at_once(tmp_path: Path, case: str):
    data, message = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=message) as caught:
        GGUFCheckpoint(path)
    assert time.monotonic() - start < 1
    assert str(path) in str(caught.value)


def test_a_valid_raw_file_is_read(tmp_path: Path):
    """The hostile files above differ from a good one by what they are named after alone."""
    path = tmp_path / "good.gguf"
    path.write_bytes(raw_file(tensors=[tensor("a", (4, 2)), tensor("b", (), offset=32)]))
    checkpoint = GGUFCheckpoint(path)
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {"a": (2, 4), "b": ()}
    path.write_bytes(raw_file(head=b"GGUF" + struct.pack("<I", 2)))
    assert GGUFCheckpoint(path).tensors == {}


def test_cut_anywhere_is_refused(tiny: Path, tmp_path: Path):
    data = tiny.read_bytes()
    end = max(info.offset + info.nbytes for info in GGUFCheckpoint(tiny).tensors.values())
    cut = tmp_path / "cut.gguf"
    for length in [*range(200), *range(200, end, 61), end - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            GGUFCheckpoint(cut)


def test_flipped_bytes_never_raise_anything_else(tiny: Path, tmp_path: Path):
    data = np.frombuffer(tiny.read_bytes(), np.uint8)
    header = min(info.offset for info in GGUFCheckpoint(tiny).tensors.values())
    rng, path, refused = np.random.default_rng(1), tmp_path / "flipped.gguf", 0
    for _ in range(400):
        damaged = data.copy()
        damaged[rng.integers(0, header, rng.integers(1, 4))] = rng.integers(0, 256)
        path.write_bytes(damaged.tobytes())
        try:
            checkpoint = GGUFCheckpoint(path)
            for name in checkpoint.tensors:
                checkpoint.read(name, np.float32)
        except CheckpointError:
            refused += 1
    assert 100 < refused < 400


def test_unsupported_types_open_but_dont_read(tmp_path: Path):
    path = tmp_path / "iq.gguf"
    path.write_bytes(raw_file(tensors=[tensor("blk.0.w", (256, 2), kind=23)]))
    checkpoint = GGUFCheckpoint(path)
    assert checkpoint.tensors["blk.0.w"].dtype == "IQ4_XS"
    with pytest.raises(CheckpointError, match=r"blk\.0\.w.*IQ4_XS.*Q4_K.*Q6_K"):
        checkpoint.read("blk.0.w", np.float32)


def test_reads_that_cant_be(tiny: Path, tmp_path: Path):
    checkpoint = GGUFCheckpoint(tiny)
    with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
        checkpoint.read("nothing", np.float32)
    with pytest.raises(CheckpointError, match="int32"):
        checkpoint.read("half", np.int32)
    with pytest.raises(CheckpointError, match="can't be opened"):
        GGUFCheckpoint(tmp_path / "missing.gguf")
    with pytest.raises(CheckpointError, match="can't be opened"):
        GGUFCheckpoint(tmp_path)
    with tiny.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match="100 now"):
        checkpoint.read("half", np.float32)


# --- a real one ------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_smollm2_equals_the_reference():
    from jaxinfer.checkpoints import hub

    path = hub.fetch("smollm2-135m")
    reader, seconds = GGUFReader(path), 0.0
    with GGUFCheckpoint(path) as checkpoint:
        assert checkpoint.config["num_hidden_layers"] == 30 and checkpoint.config["vocab_size"] == 49152
        assert len(checkpoint.tensors) == len(reader.tensors) == 272
        for stored in reader.tensors:
            start = time.process_time()
            ours = checkpoint.read(stored.name, np.float32)
            seconds += time.process_time() - start
            rows = slice(None) if ours.ndim == 1 else slice(0, 512)
            expected = gguf.quants.dequantize(np.asarray(stored.data[rows]), stored.tensor_type)
            np.testing.assert_array_equal(ours[rows], expected)
    assert seconds < 2, f"dequantising 134.5M weights took {seconds:.2f} s of processor time"
