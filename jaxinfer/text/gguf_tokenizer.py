"""Tokenizers out of GGUF metadata, which has vocabulary, merges and scores, but names the rest of the algorithm only.

Checked against llama.cpp and transformers on hard text. Known to differ from llama.cpp: SentencePiece merges of equal
score that overlap are taken in a fixed order of merges, not from left to right (as in `tokenizers` generally).
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from jaxinfer.errors import CheckpointError
from jaxinfer.text.tokenizer import special_tokens_processor

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # SentencePiece's mark for a space
MAX_PIECE = 512  # characters of a SentencePiece token; the longest known to us has 48

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Llama 3 takes up to three digits at a time, Qwen 2 one.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


class Pre(NamedTuple):
    """How a byte-level BPE cuts text before merging."""

    splits: tuple[str, ...]  # regexes, applied one after another to what the last one cut
    whole_words: bool = False  # a word that is itself a token is taken as it is, merges or not
    add_bos: bool = False  # unless the metadata says
    nfc: bool = False


PRE_TOKENIZERS: dict[str, Pre] = {
    "default": Pre((r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]")),  # llama.cpp's, by fiat
    "gpt-2": Pre((GPT2_SPLIT,)),
    "smollm": Pre((r"\p{N}", GPT2_SPLIT)),
    "starcoder": Pre((r"\p{N}", GPT2_SPLIT)),
    "llama-bpe": Pre((LLAMA3_SPLIT,), whole_words=True, add_bos=True),
    "llama3": Pre((LLAMA3_SPLIT,), whole_words=True, add_bos=True),
    "llama-v3": Pre((LLAMA3_SPLIT,), whole_words=True, add_bos=True),
    "qwen2": Pre((QWEN2_SPLIT,), nfc=True),
    "deepseek-r1-qwen": Pre((QWEN2_SPLIT,), nfc=True),
}


class _Vocabulary:
    """The `tokenizer.ggml.*` metadata, checked for type and size."""

    def __init__(self, metadata: Mapping[str, Any]):
        self._metadata = metadata
        self.model = self.get("model", str)
        self.tokens: list[str] = self.get("tokens", list)
        kinds = self.get("token_type", np.ndarray, np.ones(len(self.tokens), np.int32))
        if len(kinds) != len(self.tokens):
            raise CheckpointError(f"metadata has {len(self.tokens)} tokens, but {len(kinds)} token types")
        self.kinds: list[int] = kinds.tolist()
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(token for number, token in enumerate(self.tokens) if self.ids[token] != number)
            raise CheckpointError(f"tokens of a vocabulary are unique; {twice!r} is there twice")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, kind):
            raise CheckpointError(f"metadata `tokenizer.ggml.{key}` must be {kind.__name__}, got {value!r:.80}")
        return value

    def token_id(self, name: str, default: int | None = None) -> int | None:
        number = self._metadata.get(f"tokenizer.ggml.{name}_token_id")
        if number is None:
            return default if default is not None and default < len(self.tokens) else None
        if type(number) is not int or not 0 <= number < len(self.tokens):
            rule = f"an id below {len(self.tokens)}"
            raise CheckpointError(f"metadata `tokenizer.ggml.{name}_token_id` must be {rule}, got {number!r}")
        return number

    def token(self, number: int | None) -> str | None:
        return None if number is None else self.tokens[number]

    def of_kind(self, *kinds: int) -> Iterable[str]:
        return (token for token, kind in zip(self.tokens, self.kinds, strict=True) if kind in kinds)


def build(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `jaxinfer.text.tokenizer.Tokenizer` for GGUF metadata.

    Raises:
        CheckpointError: a kind of tokenizer that is not supported, or metadata that don't fit together.
    """
    vocabulary = _Vocabulary(metadata)
    builder = BUILDERS.get(vocabulary.model)
    if builder is None:
        supported = ", ".join(repr(name) for name in BUILDERS)
        raise CheckpointError(f"tokenizer model {vocabulary.model!r} is not supported; {supported} are")
    try:
        backend, first, last = builder(vocabulary)
        # In `tokenizers`, what is neither special nor added is cut into pieces wherever a text spells it out.
        special = [AddedToken(t, special=True, normalized=False) for t in vocabulary.of_kind(CONTROL, UNKNOWN)]
        backend.add_special_tokens(special)
        backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in vocabulary.of_kind(USER_DEFINED)])
        backend.post_processor = special_tokens_processor(backend, first, last)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"metadata don't make a {vocabulary.model!r} tokenizer: {error}") from None
    return _attributes(vocabulary, backend, metadata.get("tokenizer.chat_template"))


def _attributes(vocabulary: _Vocabulary, backend: Tokenizer, template: Any) -> dict[str, Any]:
    llama = vocabulary.model == "llama"
    bos, eos = vocabulary.token_id("bos", 1 if llama else None), vocabulary.token_id("eos", 2 if llama else None)
    # The end of a turn (or of a message to a tool) ends a generation as the end of text does.
    ends = {eos, vocabulary.token_id("eot"), vocabulary.token_id("eom")} - {None}
    others = {"unk": "unknown", "pad": "padding", "sep": "seperator", "cls": "cls", "mask": "mask"}
    named = {"bos_token": bos, "eos_token": eos}
    named |= {f"{short}_token": vocabulary.token_id(name) for short, name in others.items()}
    return {
        "backend": backend,
        "bos_id": bos,
        "eos_ids": ends,
        "pad_id": vocabulary.token_id("padding"),
        "chat_template": template if isinstance(template, str) else None,
        "named_tokens": {name: vocabulary.tokens[number] for name, number in named.items() if number is not None},
    }


def _byte_level(vocabulary: _Vocabulary) -> tuple[Tokenizer, str | None, str | None]:
    """BPE over bytes, each spelled as a printable character (GPT-2)."""
    name = vocabulary.get("pre", str, "default")
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        supported = ", ".join(PRE_TOKENIZERS)
        raise CheckpointError(f"pre-tokenizer {name!r} is not supported; {supported} are")
    merges = [_halves(merge) for merge in vocabulary.get("merges", list)]
    backend = Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=pre.whole_words))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(split), "isolated") for split in pre.splits]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    backend.decoder = decoders.ByteLevel()
    first = vocabulary.token_id("bos") if vocabulary.get("add_bos_token", bool, pre.add_bos) else None
    last = vocabulary.token_id("eos") if vocabulary.get("add_eos_token", bool, False) else None
    return backend, vocabulary.token(first), vocabulary.token(last)


def _halves(merge: str) -> tuple[str, str]:
    at = merge.find(" ", 1)
    if at < 0:
        raise CheckpointError(f"a merge is two tokens with a space in between, got {merge!r:.80}")
    return merge[:at], merge[at + 1 :]


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[Tokenizer, str | None, str | None]:
    """BPE over characters in order of scores, with bytes for characters that the vocabulary lacks (Llama 2)."""
    scores = vocabulary.get("scores", np.ndarray)
    if len(scores) != len(vocabulary.tokens):
        raise CheckpointError(f"metadata has {len(vocabulary.tokens)} tokens, but {len(scores)} scores")
    unknown = vocabulary.token(vocabulary.token_id("unknown", 0))
    merges = _merges(vocabulary, scores.tolist())
    backend = Tokenizer(models.BPE(vocabulary.ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = vocabulary.get("add_space_prefix", bool, True)
    # A normaliser runs on each stretch between special tokens, so each gets its prefix, as in llama.cpp.
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    chain = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*chain, decoders.Strip(" ", 1, 0)] if prefix else chain)
    first = vocabulary.token_id("bos", 1) if vocabulary.get("add_bos_token", bool, True) else None
    last = vocabulary.token_id("eos", 2) if vocabulary.get("add_eos_token", bool, False) else None
    return backend, vocabulary.token(first), vocabulary.token(last)


def _merges(vocabulary: _Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best score first: what SentencePiece does without listing it."""
    mergeable = set(vocabulary.of_kind(NORMAL))
    ranked = []
    for number, token in enumerate(vocabulary.tokens):
        if token not in mergeable:
            continue
        if len(token) > MAX_PIECE:
            raise CheckpointError(f"a SentencePiece token has at most {MAX_PIECE} characters, got {len(token)}")
        for cut in range(1, len(token)):
            if token[:cut] in mergeable and token[cut:] in mergeable:
                ranked.append((-scores[number], number, cut))
    tokens = vocabulary.tokens
    return [(tokens[number][:cut], tokens[number][cut:]) for _, number, cut in sorted(ranked)]


def _wordpiece(vocabulary: _Vocabulary) -> tuple[Tokenizer, str | None, str | None]:
    """BERT's. GGUF spells words with a leading mark and continuations without; BERT the other way round, with ##."""
    ids = {}
    for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True)):
        special = kind in (CONTROL, UNKNOWN, USER_DEFINED)
        spelled = token if special else token[1:] if token.startswith(SPACE) else f"##{token}"
        if ids.setdefault(spelled, number) != number:
            raise CheckpointError(f"tokens of a vocabulary are unique; {spelled!r} is there twice")
    unknown = vocabulary.token(vocabulary.token_id("unknown", 100))
    backend = Tokenizer(models.WordPiece(ids, unk_token=unknown or "[UNK]"))
    lower = vocabulary.get("normalizer.lowercase", bool, True)
    accents = vocabulary.get("normalizer.strip_accents", bool, lower)
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=accents)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    first = vocabulary.token_id("cls", vocabulary.token_id("bos", 101))
    last = vocabulary.token_id("seperator", 102)  # spelled so in GGUF
    first = first if vocabulary.get("add_bos_token", bool, True) else None
    last = last if vocabulary.get("add_sep_token", bool, True) else None
    return backend, vocabulary.token(first), vocabulary.token(last)


BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece, "bert": _wordpiece}
