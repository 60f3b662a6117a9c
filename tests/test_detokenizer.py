"""Streaming text: exactly what decoding everything at once gives, and stop strings wherever the text is cut."""

import itertools
import statistics
import time
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from jaxinfer.errors import RequestError
from jaxinfer.text.detokenizer import Detokenizer, StopStrings
from jaxinfer.text.tokenizer import Tokenizer

HARD = "né\u0301 🙂👨\u200d👩\u200d👧\u200d👦 日本語 \u3000 🇩🇪  \n"


def gguf(model: str, tokens: list[str], kinds: list[int], **more: Any) -> Tokenizer:
    metadata = {"model": model, "tokens": tokens, "token_type": np.array(kinds, np.int32), **more}
    return Tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})


def byte_level() -> Tokenizer:
    """All bytes, and merges that cut emojis and CJK in the middle."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [f"{a} {b}" for a, b in ["ðŁ", "âĢ", "æĹ", "Ģį", "Ġh"]]  # halves of characters, and of two at once
    tokens = [*alphabet, *(pair.replace(" ", "") for pair in pairs), "<|end|>", "a b", "é日"]
    kinds = [1] * (len(tokens) - 3) + [3, 4, 4]
    return gguf("gpt2", tokens, kinds, merges=pairs, pre="gpt-2")


def sentencepiece(prefix: bool = True) -> Tokenizer:
    words = ["▁", "a", "b", "▁a", "▁b", "▁▁", "é", "日", "<", "ab"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(words)]
    scores = np.arange(0, -len(tokens), -1).astype(np.float32)
    return gguf("llama", tokens, kinds, scores=scores, add_space_prefix=prefix)


def wordpiece() -> Tokenizer:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁a", "b", "▁.", "▁é", "▁'", "s", "▁do", "▁not"]
    return gguf("bert", tokens, [3] * 4 + [1] * 8, unknown_token_id=1, cls_token_id=2, seperator_token_id=3)


def metaspace() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({"▁a": 0, "b": 1, "▁": 2, "c▁d": 3}, unk_token="b"))
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend)


def nothing() -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "🙂": 2}, unk_token="b")))


def byte_level_in_a_sequence() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.backend.decoder = decoders.Sequence([decoders.ByteLevel()])
    return tokenizer


MAKERS = [
    byte_level,
    sentencepiece,
    lambda: sentencepiece(False),
    wordpiece,
    metaspace,
    nothing,
    byte_level_in_a_sequence,
]
TOKENIZERS = [maker() for maker in MAKERS]
NAMES = ["byte-level", "sentencepiece", "no prefix", "wordpiece", "metaspace", "no decoder", "sequence"]


def stream(tokenizer: Tokenizer, ids: list[int], **options: Any) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **options)
    return [*(detokenizer.push(number) for number in ids), detokenizer.flush()]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=NAMES)
@pytest.mark.parametrize("skip_special", [True, False])
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_the_stream_is_the_text(tokenizer: Tokenizer, skip_special: bool, data: st.DataObject):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=24))
    out = stream(tokenizer, ids, skip_special=skip_special)
    assert "".join(out) == tokenizer.decode(ids, skip_special=skip_special)


@pytest.mark.parametrize("tokenizer", [TOKENIZERS[0], TOKENIZERS[1], TOKENIZERS[2], TOKENIZERS[6]])
@settings(deadline=None, max_examples=100)
@given(text=st.one_of(st.text(max_size=12), st.lists(st.sampled_from(HARD), max_size=12).map("".join)))
def test_text_streams_without_half_characters(tokenizer: Tokenizer, text: str):
    text = text.replace("\ufffd", "").replace("▁", "")
    ids = tokenizer.encode(text, add_special=False)
    out = stream(tokenizer, ids)
    assert not any("\ufffd" in piece for piece in out)
    assert "".join(out) == text
    assert TOKENIZERS[0] is not tokenizer or out[-1] == ""  # nothing is held back past its last byte


def test_byte_level_by_hand():
    tokenizer = TOKENIZERS[0]
    ids = tokenizer.encode("h🙂日!")
    spelled = [tokenizer.backend.id_to_token(number) for number in ids]
    assert spelled == ["h", "ðŁ", "Ļ", "Ĥ", "æĹ", "¥", "!"]
    assert stream(tokenizer, ids)[:6] == ["h", "", "", "🙂", "", "日"]
    assert stream(tokenizer, ids[:3]) == ["h", "", "", "\ufffd"]  # cut inside: said at the end
    assert stream(tokenizer, [ids[1], ids[0]]) == ["", "\ufffdh", ""]  # or as soon as it can't become anything


def test_byte_fallback_by_hand():
    tokenizer = TOKENIZERS[1]
    ids = tokenizer.encode("a🙂b", add_special=False)
    spelled = [tokenizer.backend.id_to_token(number) for number in ids]
    assert spelled == ["▁a", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "b"]
    assert stream(tokenizer, ids) == ["a", "", "", "", "", "🙂b", ""]
    # The library takes a run of byte tokens as a whole: one bad byte spoils the good ones before it.
    bad = [*ids[:5], 3 + 0xFF, ids[5]]
    assert "".join(stream(tokenizer, bad)) == tokenizer.decode(bad) == "a" + "\ufffd" * 5 + "b"


def test_special_tokens_are_silent_but_for_those_asked_for():
    tokenizer = TOKENIZERS[0]
    end = tokenizer.backend.token_to_id("<|end|>")
    ids = tokenizer.encode("🙂")
    assert stream(tokenizer, [ids[0], end, *ids[1:]])[-2] == "🙂"
    assert stream(tokenizer, [end], skip_special=False) == ["<|end|>", ""]


@pytest.mark.parametrize("tokenizer", TOKENIZERS[:3], ids=NAMES[:3])
def test_the_cost_of_a_push_doesnt_grow(tokenizer: Tokenizer):
    ids = itertools.cycle(tokenizer.encode(f"a b {HARD}", add_special=False))
    detokenizer = Detokenizer(tokenizer)

    def seconds(pushes: int) -> float:
        start = time.perf_counter()
        for _ in range(pushes):
            detokenizer.push(next(ids))
        return time.perf_counter() - start

    seconds(200)
    early = statistics.median(seconds(50) for _ in range(9))
    seconds(20_000)
    late = statistics.median(seconds(50) for _ in range(9))
    assert late < 5 * early


# --- stop strings -----------------------------------------------------------------------------------------------------


def reference_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """By the definition: the first end at which any stop is complete, and of those that end there, the longest."""
    for end in range(len(text) + 1):
        if complete := [stop for stop in stops if stop and text[:end].endswith(stop)]:
            return text[: end - max(map(len, complete))], True
    return text, False


@settings(deadline=None, max_examples=300)
@given(
    text=st.text("ab🙂", max_size=24),
    stops=st.lists(st.text("ab🙂", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 24), max_size=10),
)
def test_stops_are_found_however_the_text_is_cut(text: str, stops: list[str], cuts: list[int]):
    expected, hit = reference_stop(text, stops)
    scanner, emitted = StopStrings(stops), ""
    for start, end in itertools.pairwise(sorted({0, len(text), *cuts})):
        piece, found = scanner.push(text[start:end])
        emitted += piece
        assert expected.startswith(emitted)  # nothing came out that had to be taken back
        assert found == scanner.hit
    emitted += scanner.flush()
    assert (emitted, scanner.hit) == (expected, hit)


def test_stop_strings_by_hand():
    scanner = StopStrings(["\n\nUser:", "###"])
    assert scanner.push("Hi\n") == ("Hi", False)  # may begin a stop
    assert scanner.push("there #") == ("\nthere ", False)
    assert scanner.push("1\n\nUs") == ("#1", False)
    assert scanner.push("er: more ###") == ("", True)
    assert scanner.push("after") == ("", True) and scanner.flush() == ""
    assert StopStrings([]).push("all") == ("all", False)
    scanner = StopStrings(["##"])
    assert (scanner.push("a#"), scanner.flush()) == (("a", False), "#")


@pytest.mark.parametrize("stops", ["\n", [""], [3], ["a", ""]])
def test_bad_stop_strings(stops: Any):
    with pytest.raises(RequestError, match="non-empty"):
        StopStrings(stops)
