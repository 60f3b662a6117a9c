"""Tokenizers from GGUF metadata and Hugging Face folders, against plain reference algorithms written out here."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from jaxinfer.errors import CheckpointError, RequestError
from jaxinfer.text.detokenizer import Detokenizer
from jaxinfer.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
WORDS = ["the", "hello", "world", " the", " 12", "12", "123", "é", "\n\n", "  ", "ing", "don", "'t"]
TEXTS = ["", " ", "hello  world", "I don't\n\n\tknow", "12345 a1b22c333", "éé 日本語", "x\r\n y ", "½²Ⅷ٣", "!!!..."]
TEXTS += ["🙂 \U0001f468\u200d\U0001f469\u200d\U0001f467"]


def spelled(text: str) -> str:
    """A text's bytes in GPT-2's alphabet, as `tokenizers` spells them."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]


def byte_level(pre: str | None = "gpt-2", **more: Any) -> dict[str, Any]:
    """A vocabulary of all bytes and what it takes to merge WORDS."""
    tokens, merges = sorted(ALPHABET), []
    for word in map(spelled, WORDS):
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
    special = ["<s>", "</s>", "<|turn|>"]
    kinds = [NORMAL] * len(tokens) + [CONTROL] * len(special) + [USER_DEFINED]
    tokens += [*special, "<think>"]
    metadata = {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": np.array(kinds, np.int32),
        "merges": merges,
        "bos_token_id": tokens.index("<s>"),
        "eos_token_id": tokens.index("</s>"),
    }
    metadata |= {} if pre is None else {"pre": pre}
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | more).items()}


def pieces(tokenizer: Tokenizer, text: str, **options: Any) -> list[str]:
    return [tokenizer.backend.id_to_token(number) for number in tokenizer.encode(text, **options)]


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    """What a byte-level tokenizer cuts a text into before merging."""
    cut = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in cut]


# --- byte-level BPE ---------------------------------------------------------------------------------------------------


def reference_bpe(word: str, merges: list[str]) -> list[str]:
    """Sennrich et al.: over and over, the earliest merge that applies, leftmost first."""
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    symbols = list(word)
    while pairs := [(ranks[p], i) for i, p in enumerate(itertools.pairwise(symbols)) if p in ranks]:
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return symbols


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "default"])
@settings(deadline=None, max_examples=60)
@given(text=st.one_of(st.text(max_size=40), st.lists(st.sampled_from([*WORDS, *TEXTS]), max_size=8).map("".join)))
def test_byte_level_is_bpe_over_words(pre: str, text: str):
    metadata = byte_level(pre)
    tokenizer = Tokenizer.from_gguf(metadata)
    if pre == "qwen2":
        text = tokenizer.backend.normalizer.normalize_str(text)
    expected = []
    for word in words(tokenizer, text) if text else []:
        expected += reference_bpe(spelled(word), metadata["tokenizer.ggml.merges"])
    assert pieces(tokenizer, text) == expected
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "I'm 12345  a\n\n b!", ["I", "'m", " 12345", " ", " a", "\n\n", " b", "!"]),
        ("smollm", "I'm 12345  a", ["I", "'m", " ", "1", "2", "3", "4", "5", " ", " a"]),
        ("smollm", "x½²Ⅷ٣y", ["x", "½", "²", "Ⅷ", "٣", "y"]),
        ("llama-bpe", "I'M 12345  a\n\n b!", ["I", "'M", " ", "123", "45", " ", " a", "\n\n", " b", "!"]),
        ("llama-bpe", "(a.b)\n", ["(a", ".b", ")\n"]),
        ("qwen2", "I'M 12345  a\n\n b!", ["I", "'M", " ", "1", "2", "3", "4", "5", " ", " a", "\n\n", " b", "!"]),
        ("default", "a=b 12345", ["a", "=", "b", " ", "123", "45"]),
    ],
)
def test_words_of_each_pre_tokenizer(pre: str, text: str, expected: list[str]):
    assert words(Tokenizer.from_gguf(byte_level(pre)), text) == expected


def test_qwen2_composes_characters():
    assert Tokenizer.from_gguf(byte_level("qwen2")).encode("e\u0301") == Tokenizer.from_gguf(byte_level()).encode("é")
    assert pieces(Tokenizer.from_gguf(byte_level("gpt-2")), "e\u0301") == list(spelled("e\u0301"))


def test_llama3_takes_whole_words_that_are_tokens():
    metadata = byte_level("llama-bpe")
    metadata["tokenizer.ggml.tokens"][-1] = "xyzzy"  # no merges lead to it
    metadata["tokenizer.ggml.token_type"][-1] = NORMAL
    assert pieces(Tokenizer.from_gguf(metadata), "xyzzy", add_special=False) == ["xyzzy"]
    metadata["tokenizer.ggml.pre"] = "qwen2"
    assert pieces(Tokenizer.from_gguf(metadata), "xyzzy") == list("xyzzy")


def test_special_tokens_in_text_and_around_it():
    tokenizer = Tokenizer.from_gguf(byte_level("gpt-2", add_bos_token=True, add_eos_token=True))
    assert pieces(tokenizer, "the<|turn|>the <think>") == ["<s>", "the", "<|turn|>", "the", "Ġ", "<think>", "</s>"]
    assert pieces(tokenizer, "the", add_special=False) == ["the"]
    ids = tokenizer.encode("the<|turn|>the<think>")
    assert tokenizer.decode(ids) == "thethe<think>"  # user-defined tokens are text, control tokens are not
    assert tokenizer.decode(ids, skip_special=False) == "<s>the<|turn|>the<think></s>"
    by_name = tokenizer.backend.token_to_id
    assert tokenizer.special_ids == {by_name("<s>"), by_name("</s>"), by_name("<|turn|>")}
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (by_name("<s>"), {by_name("</s>")})
    assert tokenizer.vocab_size == by_name("<think>") + 1
    assert tokenizer.named_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_bos_is_added_where_the_family_does_or_the_file_says():
    def first(**arguments: Any) -> str:
        return pieces(Tokenizer.from_gguf(byte_level(**arguments)), "the")[0]

    assert first(pre="llama-bpe") == "<s>" and first(pre="gpt-2") == "the" and first(pre=None) == "the"
    assert first(pre="llama-bpe", add_bos_token=False) == "the" and first(pre="gpt-2", add_bos_token=True) == "<s>"


def test_the_end_of_a_turn_ends_a_generation():
    metadata = byte_level("gpt-2")
    turn = metadata["tokenizer.ggml.tokens"].index("<|turn|>")
    metadata["tokenizer.ggml.eot_token_id"] = turn
    assert Tokenizer.from_gguf(metadata).eos_ids == {turn, metadata["tokenizer.ggml.eos_token_id"]}


# --- SentencePiece ----------------------------------------------------------------------------------------------------

PIECES = ["▁", "h", "e", "l", "o", "w", "r", "d", "a", "b", "▁h", "el", "lo", "▁hel", "▁hello", "▁w", "or", "ld"]
PIECES += ["▁wor", "▁world", "aa", "ab", "▁▁", "abab", "é"]


def sentencepiece(**more: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(PIECES)]
    scores = [0.0] * 259 + [-float(n) for n in range(len(PIECES))]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "token_type": np.array(kinds, np.int32),
        "scores": np.array(scores, np.float32),
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | more).items()}


def reference_sentencepiece(text: str, prefix: bool = True) -> list[str]:
    """Kudo & Richardson's BPE: over and over, the neighbours whose union scores best, leftmost first."""
    symbols = list((" " + text if prefix and text else text).replace(" ", "▁"))
    while pairs := [
        (PIECES.index(a + b), i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in PIECES
    ]:
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return [
        piece
        for symbol in symbols
        for piece in ([symbol] if symbol in PIECES else [f"<0x{byte:02X}>" for byte in symbol.encode()])
    ]


@pytest.mark.parametrize("prefix", [True, False])
@settings(deadline=None, max_examples=100)
@given(text=st.one_of(st.text("helowrdab é🙂", max_size=30), st.text(max_size=12)))
def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(prefix: bool, text: str):
    tokenizer = Tokenizer.from_gguf(sentencepiece(add_space_prefix=prefix))
    expected = reference_sentencepiece(text, prefix)
    assert pieces(tokenizer, text, add_special=False) == expected
    assert pieces(tokenizer, text) == ["<s>", *expected]
    assert tokenizer.decode(tokenizer.encode(text)).replace("▁", " ") == text.replace("▁", " ")


def test_sentencepiece_by_hand():
    tokenizer = Tokenizer.from_gguf(sentencepiece())
    assert pieces(tokenizer, "hello world") == ["<s>", "▁hello", "▁world"]
    assert pieces(tokenizer, "é🙂") == ["<s>", "▁", "é", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]
    assert pieces(tokenizer, "</s>hello") == ["<s>", "</s>", "▁hello"]  # each stretch of text has its own prefix
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})


# --- WordPiece --------------------------------------------------------------------------------------------------------


def wordpiece(**more: Any) -> dict[str, Any]:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁play", "ing", "▁the", "▁é", "▁e", "▁!", "▁日", "s"]
    metadata = {
        "model": "bert",
        "tokens": tokens,
        "token_type": np.array([CONTROL] * 5 + [NORMAL] * 8, np.int32),
        "unknown_token_id": 1,
        "cls_token_id": 2,
        "seperator_token_id": 3,
        "padding_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | more).items()}


def test_wordpiece():
    tokenizer = Tokenizer.from_gguf(wordpiece())
    expected = ["[CLS]", "the", "play", "##ing", "##s", "!", "e", "日", "[UNK]", "[SEP]"]
    assert pieces(tokenizer, "The PLAYINGS! é日 zzz") == expected
    assert tokenizer.decode(tokenizer.encode("the playing")) == "the playing"
    assert tokenizer.pad_id == 0
    cased = Tokenizer.from_gguf(wordpiece(**{"normalizer.lowercase": False}))
    assert pieces(cased, "The é") == ["[CLS]", "[UNK]", "é", "[SEP]"]


# --- metadata that don't fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "model"),
        ({"tokenizer.ggml.model": "t5", "tokenizer.ggml.tokens": []}, "'t5' is not supported; 'gpt2', 'llama', 'bert'"),
        (byte_level("tekken-9"), "'tekken-9' is not supported; .*smollm"),
        (byte_level(token_type=np.array([1, 1], np.int32)), "2 token types"),
        (byte_level(tokens=["a", "a"], token_type=np.array([1, 1])), "'a' is there twice"),
        (byte_level(tokens="abc"), "must be list"),
        (byte_level(merges=["ab"]), "a merge is two tokens"),
        (byte_level(merges=["a zzzz"]), "don't make a 'gpt2' tokenizer"),
        (byte_level(bos_token_id=10**6), "an id below"),
        (byte_level(eos_token_id=-1), "an id below"),
        (byte_level(add_bos_token=1), "must be bool"),
        (sentencepiece(scores=np.zeros(3)), "3 scores"),
        (sentencepiece(scores=None), "scores"),
        (sentencepiece(tokens=["a" * 1000], token_type=np.array([1]), scores=np.zeros(1)), "at most 512 characters"),
    ],
)
def test_metadata_that_dont_fit_are_refused(metadata: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_gguf(metadata)


# --- Hugging Face folders ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2, "<s>": 3, "</s>": 4, "<pad>": 5}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    backend.enable_padding(length=16, pad_id=5, pad_token="<pad>")
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ bos_token }}in config"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<pad>"}, "eos_token": "b"}))
    return tmp_path


def test_from_folder(folder: Path):
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("a b a b a b") == [1, 2, 1, 2, 1, 2]  # neither cut to 4 nor padded to 16
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id, tokenizer.vocab_size) == (3, {4}, 5, 6)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]) == "<s>in config"


def test_from_folder_files_stand_above_one_another(folder: Path):
    (folder / "config.json").write_text('{"eos_token_id": 1}')
    assert Tokenizer.from_folder(folder).eos_ids == {1}
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    assert Tokenizer.from_folder(folder).eos_ids == {2, 4}
    (folder / "chat_template.jinja").write_text("in a file")
    assert Tokenizer.from_folder(folder).chat_template == "in a file"


@pytest.mark.parametrize(
    "template", [[{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}], "x"]
)
def test_from_folder_named_templates(folder: Path, template: Any):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert Tokenizer.from_folder(folder).chat_template == "x"


def test_from_folder_adds_what_the_config_states(folder: Path):
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_folder(folder).encode("a") == [3, 1, 4]
    assert Tokenizer.from_folder(folder).encode_pair("a", "b") == ([3, 1, 4, 3, 2, 4], [0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", None, "missing"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer.json", "\x00", "not a tokenizer"),
        ("tokenizer_config.json", "[1]", "JSON object"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[" * 100_000, "not valid JSON"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id"),
        ("tokenizer_config.json", '{"add_bos_token": true, "bos_token": "zzz"}', "not in the vocabulary"),
    ],
)
def test_from_folder_refuses(folder: Path, name: str, text: str | None, message: str):
    (folder / name).unlink(missing_ok=True)
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_folder(folder)


# --- common to all ----------------------------------------------------------------------------------------------------


def test_batches_are_cut_inside_their_special_tokens():
    tokenizer = Tokenizer.from_gguf(wordpiece())
    texts = ["the playing the", "the", ""]
    whole = tokenizer.encode_batch(texts)
    assert whole == [tokenizer.encode(text) for text in texts] == [[2, 7, 5, 6, 7, 3], [2, 7, 3], [2, 3]]
    assert tokenizer.encode_batch(texts, max_length=4) == [[2, 7, 5, 3], [2, 7, 3], [2, 3]]
    assert tokenizer.encode_batch(texts, max_length=2) == [[2, 3]] * 3
    assert tokenizer.encode(texts[0]) == whole[0]  # the cut is not a setting that stays
    with pytest.raises(RequestError, match="max_length 1 leaves no room for 2"):
        tokenizer.encode_batch(texts, max_length=1)


def test_bad_requests():
    tokenizer = Tokenizer.from_gguf(byte_level())
    for text, message in [(3, "must be a str"), ("a\ud800", "valid Unicode: .* position 1")]:
        with pytest.raises(RequestError, match=message):
            tokenizer.encode(text)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match=message):
            tokenizer.encode_batch([text])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="token ids"):
        tokenizer.decode([-1])
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": ""}])
    assert tokenizer.decode([]) == "" and tokenizer.decode([10**6]) == ""


# --- real ones --------------------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_smollm2_ids():
    """Ids as llama.cpp's tokenizer gives them for this file."""
    from jaxinfer.checkpoints import hub
    from jaxinfer.checkpoints.gguf import GGUFCheckpoint

    tokenizer = GGUFCheckpoint(hub.fetch("smollm2-135m")).load_tokenizer()
    assert tokenizer is not None and tokenizer.eos_ids == {2} and tokenizer.vocab_size == 49152
    expected = json.loads((Path(__file__).parent / "data" / "smollm2_ids.json").read_text())
    assert len(expected) > 100
    for text, ids in expected:
        assert tokenizer.encode(text) == ids, text
        detokenizer = Detokenizer(tokenizer)
        assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == tokenizer.decode(ids)


@pytest.mark.heavy
def test_wordpiece_from_gguf_equals_tokenizer_json():
    from jaxinfer.checkpoints import hub

    folder = hub.fetch("all-minilm-l6-v2")
    reference = Tokenizer.from_folder(folder)
    vocabulary = reference.backend.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = [re.fullmatch(r"\[[A-Z]+\]", token) is not None for token in tokens]
    phantom = [t if s else t[2:] if t.startswith("##") else f"▁{t}" for t, s in zip(tokens, special, strict=True)]
    kinds = np.where(special, CONTROL, NORMAL)
    ours_ids = {"tokenizer.ggml.cls_token_id": 101, "tokenizer.ggml.seperator_token_id": 102}
    metadata = wordpiece(tokens=phantom, token_type=kinds, unknown_token_id=100) | ours_ids
    ours = Tokenizer.from_gguf(metadata)
    for text in [*TEXTS, "Unbelievable Ärger: naïve café's 中文 [MASK] tokenization?"]:
        assert ours.encode(text) == reference.encode(text)
