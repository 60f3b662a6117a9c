"""Encoder: texts to vectors as sentence-transformers gives them, whatever they are batched with."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoint_helpers import fixtures
from flax import nnx

import jaxinfer as ji
from jaxinfer import _jax
from jaxinfer.checkpoints.sentence import SentenceConfig, read_sentence_config
from jaxinfer.encoder import Encoder, pool
from jaxinfer.errors import CheckpointError, RequestError

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return ji.load(fixtures() / "bert-sentence")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(fixtures() / "bert-sentence", tmp_path / "checkpoint"))


forward = nnx.jit(lambda module, *inputs: module(*inputs))


def variant(encoder: Encoder, **changes: Any) -> Encoder:
    """The same weights under another SentenceConfig."""
    return Encoder(encoder._module, encoder.config, encoder.tokenizer, SentenceConfig(**changes))


def test_vectors_are_the_reference_s(encoder: Encoder):
    with np.load(fixtures() / "bert-sentence" / "reference.npz") as file:
        texts, expected = [str(text) for text in file["texts"]], file["vectors"]
    vectors = encoder.embed(texts)
    assert vectors.shape == (4, 32) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_neither_order_nor_company_nor_bucket_changes_a_vector(encoder: Encoder):
    words = ["the", "river", "turns", "a", "wheel", "in", "winter"]
    texts = [" ".join(words[:count]) for count in (3, 0, 1, 7, 2, 6, 4, 1, 5)]
    assert {len(encoder.tokenizer.encode(text)) > 16 for text in texts} == {True, False}  # two buckets
    alone = np.concatenate([encoder.embed([text]) for text in texts])
    assert len(np.unique(alone.round(4), axis=0)) == 8  # two texts are equal, the others differ
    for batch_size in (1, 2, 33):  # the buckets 1, 8, and one of its own
        vectors = encoder.embed(texts * 4, batch_size)
        np.testing.assert_allclose(vectors, np.tile(alone, (4, 1)), rtol=0, atol=2e-6)


def test_normalize_argument(encoder: Encoder):
    texts = ["the river", "a song"]
    plain = encoder.embed(texts, normalize=False)
    norms = np.linalg.norm(plain, axis=1, keepdims=True)
    assert np.abs(norms - 1).min() > 0.1
    np.testing.assert_allclose(encoder.embed(texts, normalize=True), plain / norms, atol=1e-6)
    np.testing.assert_array_equal(encoder.embed(texts), encoder.embed(texts, normalize=True))
    np.testing.assert_array_equal(variant(encoder, max_length=20).embed(texts), plain)


def test_pooling_by_hand():
    hidden = np.array([[[1.0, -5.0], [3.0, -7.0], [100.0, 100.0]], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]], np.float32)
    mask = np.array([[1, 1, 0], [1, 1, 1]], np.int32)
    want = {"mean": [[2, -6], [3, 4]], "max": [[3, -5], [5, 6]], "cls": [[1, -5], [1, 2]]}
    for mode, vectors in want.items():
        np.testing.assert_array_equal(pool(jax.numpy.asarray(hidden), jax.numpy.asarray(mask), mode), vectors)
    nothing = pool(jax.numpy.asarray(hidden), jax.numpy.zeros((2, 3), jax.numpy.int32), "mean")
    np.testing.assert_array_equal(nothing, np.zeros((2, 2)))


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_pooling_is_inside_the_program(encoder: Encoder, pooling: str):
    tokens = np.array([[2, 9, 17, 3]], np.int32)
    mask = np.ones_like(tokens)
    hidden = np.asarray(forward(encoder._module, tokens, mask))[0]
    want = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.max(0)}[pooling]
    program = variant(encoder, pooling=pooling)
    np.testing.assert_allclose(program(tokens, mask)[0], want, atol=2e-6)
    assert program.program.output_axes == ("batch", 32)


def test_called_on_tokens(encoder: Encoder):
    text = "the river"
    ids = encoder.tokenizer.encode(text)
    vector = encoder(np.array([ids]), np.ones((1, len(ids)), int))
    assert isinstance(vector, jax.Array)
    np.testing.assert_allclose(vector, encoder.embed([text]), atol=2e-6)


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        ([[1, 2]], [[1]], "one shape"),
        ([1, 2], [1, 1], "one shape"),
        ([[1.0]], [[1]], "must be integers"),
        ([[]], [[]], "integers"),
        ([[128]], [[1]], r"must be in \[0, 128\), got 128 to 128"),
        ([[-1, 5]], [[1, 1]], r"must be in \[0, 128\), got -1 to 5"),
        ([[1] * 21], [[1] * 21], "21 tokens; this model takes at most 20"),
    ],
)
def test_bad_calls(encoder: Encoder, tokens: Any, mask: Any, message: str):
    with pytest.raises(RequestError, match=message):
        encoder(np.array(tokens), np.array(mask))


def test_texts_at_the_limits(encoder: Encoder):
    assert encoder.embed([]).shape == (0, 32)
    assert np.isfinite(encoder.embed([""])).all()  # [CLS] [SEP]
    with pytest.raises(RequestError, match="got one str"):
        encoder.embed("the river")
    with pytest.raises(RequestError, match="batch_size must be at least 1"):
        encoder.embed(["a"], batch_size=0)
    with pytest.raises(RequestError):
        encoder.embed(["a", 3])  # pyright: ignore[reportArgumentType]


def test_longer_texts_are_cut_only_where_the_checkpoint_says_so(encoder: Encoder):
    long = "the river runs past the old mill . " * 4
    ids = encoder.tokenizer.encode(long)
    assert len(ids) > 24
    cut = np.array([[*ids[:19], ids[-1]]])  # 20 with [CLS] and [SEP]
    np.testing.assert_allclose(encoder.embed([long]), encoder(cut, np.ones_like(cut)), atol=2e-6)
    with pytest.raises(RequestError, match=rf"text 1 has {len(ids)} tokens; this model takes at most 24"):
        variant(encoder).embed(["a", long])


def test_max_len(encoder: Encoder, folder: Path):
    assert ji.load(folder, max_len=8).max_length == 8
    with pytest.raises(RequestError, match="max_len must be from 1 to the 24 positions"):
        ji.load(folder, max_len=25)


def test_no_compile_once_the_buckets_are_there(encoder: Encoder):
    texts = ["the", "the river", "who wrote the song about rain ?"]
    for count in (1, 2, 3):  # a bucket each
        encoder.embed(texts[:count])
    report, compiles = encoder.compile_report(), _jax.compiles()
    assert report["compiled"] + report["loaded"] >= 2
    for count in (1, 2, 3, 3):
        encoder.embed(texts[:count])
    assert _jax.compiles() == compiles
    assert encoder.compile_report() == report


def test_half_precision(encoder: Encoder):
    half = ji.load(fixtures() / "bert-sentence", dtype="bfloat16")
    vectors = half.embed(["the river", "who wrote the song"])
    assert vectors.dtype == np.float32
    assert (np.sum(vectors * encoder.embed(["the river", "who wrote the song"]), axis=1) > 0.99).all()


def test_sentence_files(folder: Path):
    assert read_sentence_config(folder) == SentenceConfig("mean", True, 20, False)
    (folder / "sentence_bert_config.json").unlink()
    assert read_sentence_config(folder).max_length is None
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode": "max", "embedding_dimension": 32}))  # the newer spelling
    assert read_sentence_config(folder).pooling == "max"
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    assert read_sentence_config(folder).pooling == "cls"
    (folder / "modules.json").unlink()
    assert read_sentence_config(folder) == SentenceConfig("mean", False, None, False)


def test_lower_case(encoder: Encoder, folder: Path):
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20, "do_lower_case": True}))
    assert read_sentence_config(folder).lower_case
    assert not encoder.sentence.lower_case


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode_lasttoken": True}, "pooling_mode_lasttoken is not supported"),
        (
            "1_Pooling/config.json",
            {"pooling_mode": "lasttoken"},
            "'lasttoken' is not supported; supported: mean, cls, max",
        ),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "not supported"),
        ("1_Pooling/config.json", {}, "pooling of no mode"),
        ("modules.json", [{"type": "a.Transformer", "path": ""}], "asks for Transformer; supported"),
        ("modules.json", [{"type": "a.Pooling", "path": "../other"}], "must be a plain name"),
        ("modules.json", [{"type": "a.Pooling", "path": "absent"}], "missing"),
        ("modules.json", [{"type": "Dense"}], "needs a type and a path"),
        ("modules.json", {}, "must hold a JSON list"),
        ("sentence_bert_config.json", {"max_seq_length": 0}, "max_seq_length must be an integer >= 1"),
        ("sentence_bert_config.json", {"max_seq_length": "9"}, "max_seq_length must be an integer >= 1"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "puts the prompt 'query'"),
    ],
)
def test_refused_sentence_files(folder: Path, file: str, content: Any, message: str):
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        read_sentence_config(folder)


@pytest.mark.heavy
def test_minilm_equals_transformers():
    with np.load(DATA / "minilm_reference.npz") as file:
        texts, expected, lengths = [str(text) for text in file["texts"]], file["vectors"], file["lengths"]
    assert len(texts) == 100 and lengths.min() == 2 and lengths.max() > 256
    encoder = ji.load("all-minilm-l6-v2", dtype="float32", check=True)
    with jax.default_matmul_precision("highest"):
        vectors = encoder.embed(texts)
        cosines = np.sum(vectors.astype(np.float64) * expected, axis=1)
        cosines /= np.linalg.norm(vectors.astype(np.float64), axis=1) * np.linalg.norm(
            expected.astype(np.float64), axis=1
        )
        print(f"least cosine {cosines.min():.9f}, most difference {np.abs(vectors - expected).max():.1e}")
        assert cosines.min() >= 0.99999
        alone = np.concatenate([encoder.embed([text]) for text in texts[::9]])
        assert np.abs(vectors[::9] - alone).max() < 1e-5
