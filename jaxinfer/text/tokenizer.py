"""Text to token ids and back, by the tokenizer that a checkpoint brings along."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers.processors import TemplateProcessing

from jaxinfer.errors import CheckpointError, RequestError
from jaxinfer.text.template import ChatTemplate

__all__ = ["Tokenizer", "special_tokens_processor"]

MAX_JSON = 1 << 28  # bytes; the largest tokenizer.json known to us takes 33 MB
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A `tokenizers.Tokenizer` with what generation needs to know about it.

    Attributes:
        backend: the `tokenizers.Tokenizer`, with truncation and padding off.
        vocab_size: one more than the largest id. A model may have more rows than that.
        bos_id, pad_id: None where the checkpoint names none.
        eos_ids: the ids that end a generation.
        special_ids: ids that `decode` leaves out by default, such as those of `<|im_end|>`.
        chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        pad_id: int | None = None,
        chat_template: str | None = None,
        named_tokens: Mapping[str, str] | None = None,
    ):
        """named_tokens: those that a chat template may refer to by name ({"bos_token": "<s>"})"""
        # A tokenizer.json may ask for padding to a fixed length; batches are padded where their buckets are known.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.bos_id, self.eos_ids, self.pad_id = bos_id, frozenset(eos_ids), pad_id
        self.chat_template = chat_template
        self.named_tokens = dict(named_tokens or {})
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of a text; `add_special` adds what the checkpoint asks for around it (a BOS, [CLS] and [SEP]).

        Special tokens spelled out in the text become their ids.

        Raises:
            RequestError: not a str, or one with lone surrogates.
        """
        return self.backend.encode(_checked(text), add_special_tokens=add_special).ids

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """(token ids, type ids) of two texts as one sequence, special tokens included."""
        encoding = self.backend.encode(_checked(first), _checked(second))
        return encoding.ids, encoding.type_ids

    def encode_batch(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Token ids of each text, special tokens included, in parallel.

        Args:
            max_length: longer sequences lose their last tokens, but not the special ones around the text.
        """
        encodings = self.backend.encode_batch([_checked(text) for text in texts], add_special_tokens=False)
        # The backend's own truncation is a setting shared by threads, hence by hand.
        if max_length is not None:
            special = self.backend.num_special_tokens_to_add(False)
            if max_length < special:
                raise RequestError(f"max_length {max_length} leaves no room for {special} special tokens")
            for encoding in encodings:
                encoding.truncate(max_length - special)
        return [self.backend.post_process(encoding).ids for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of token ids. Bytes that aren't UTF-8 become U+FFFD; ids without a token are passed over.

        What some configs ask for on top (`clean_up_tokenization_spaces`: no space before punctuation) is not done: it
        edits text that was there, and no stream could give the same.
        """
        ids = list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < 1 << 32:
            raise RequestError(f"token ids must lie in 0..{self.vocab_size - 1}, got {min(ids)} to {max(ids)}")
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt of a conversation, by the checkpoint's own template; encode it with `add_special=False`.

        Args:
            messages: each with a "role" and usually a "content".
            add_generation_prompt: end where the assistant is to speak.
            variables: passed on to the template (`tools`, `enable_thinking`, ...).

        Raises:
            RequestError: no template, malformed messages, or messages that the template refuses.
            CheckpointError: a template that is broken, or does what the sandbox doesn't allow.
        """
        if self._template is None:
            raise RequestError("this checkpoint has no chat template: give a prompt as text instead of messages")
        if not all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in messages):
            example = '{"role": "user", "content": "Hi"}'
            raise RequestError(f"messages must be a list of dicts such as {example}, got {messages!s:.200}")
        given = {"messages": [dict(m) for m in messages], "add_generation_prompt": add_generation_prompt}
        return self._template.render({"tools": None, "documents": None} | self.named_tokens | variables | given)

    @cached_property
    def _template(self) -> ChatTemplate | None:
        return None if self.chat_template is None else ChatTemplate(self.chat_template)

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """From a Hugging Face folder: tokenizer.json, and what is there of tokenizer_config.json,
        special_tokens_map.json, generation_config.json, config.json and chat_template.jinja.

        Raises:
            CheckpointError: no tokenizer.json, or a file that is not what it should be.
        """
        folder = Path(path)
        backend = _load_backend(folder / "tokenizer.json")
        config = _load_json(folder / "tokenizer_config.json")
        named = {name: _content(config.get(name)) for name in TOKEN_NAMES}
        for name, value in _load_json(folder / "special_tokens_map.json").items():
            named[name] = named.get(name) or _content(value)
        tokens = {name: token for name, token in named.items() if token is not None}
        found = {name: backend.token_to_id(token) for name, token in tokens.items()}
        ids = {name: number for name, number in found.items() if number is not None}
        if "add_bos_token" in config or "add_eos_token" in config:  # stated, it stands above tokenizer.json
            bos = tokens.get("bos_token") if config.get("add_bos_token") else None
            eos = tokens.get("eos_token") if config.get("add_eos_token") else None
            backend.post_processor = special_tokens_processor(backend, bos, eos)
        eos_ids = _eos_ids(folder)
        if eos_ids is None:
            eos_ids = [ids["eos_token"]] if "eos_token" in ids else []
        return cls(
            backend,
            bos_id=ids.get("bos_token"),
            eos_ids=eos_ids,
            pad_id=ids.get("pad_token"),
            chat_template=_load_template(folder, config),
            named_tokens=tokens,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """From the `tokenizer.*` metadata of a GGUF file: byte-level BPE, SentencePiece or WordPiece.

        Raises:
            CheckpointError: another kind of tokenizer, or metadata that don't fit together.
        """
        from jaxinfer.text.gguf_tokenizer import build

        return cls(**build(metadata))


def special_tokens_processor(backend: tokenizers.Tokenizer, first: str | None, last: str | None) -> TemplateProcessing:
    """Puts the token `first` before each text and `last` after it, where not None."""
    # Aliases, since a template's own syntax gives spaces, colons and $ a meaning that tokens may clash with.
    around = {"FIRST": first, "LAST": last}
    special = []
    for alias, token in around.items():
        if token is not None:
            number = backend.token_to_id(token)
            if number is None:
                raise CheckpointError(f"the special token {token!r} is not in the vocabulary")
            special.append({"id": alias, "ids": [number], "tokens": [token]})
    before, after = ["FIRST"] * (first is not None), ["LAST"] * (last is not None)
    single = [*before, "$A", *after]
    pair = [*single, *(f"{alias}:1" for alias in before), "$B:1", *(f"{alias}:1" for alias in after)]
    return TemplateProcessing(single=single, pair=pair, special_tokens=special)


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise RequestError(f"text must be a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"text must be valid Unicode: {error.reason} at position {error.start}") from None
    return text


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    text = _load_text(path)
    if text is None:
        raise CheckpointError(
            f"{path}: missing. Only tokenizers in the tokenizer.json format are read from a folder; "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it."
        )
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path}: not a tokenizer that this version of `tokenizers` reads: {error}") from None


def _load_text(path: Path) -> str | None:
    """The text of a file, None where there is none."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise CheckpointError(f"{path}: at most {MAX_JSON} bytes are read, got {path.stat().st_size}")
        return path.read_text("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: can't be read as UTF-8 text: {error}") from None


def _load_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file."""
    text = _load_text(path)
    try:
        value = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def _content(token: Any) -> str | None:
    """A token's text, spelled plainly or as {"content": ...}; None for anything else."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _eos_ids(folder: Path) -> list[int] | None:
    """What ends a generation, where a config states it. generation_config.json stands above config.json."""
    for name in ("generation_config.json", "config.json"):
        value = _load_json(folder / name).get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(number) is int and number >= 0 for number in ids):
                raise CheckpointError(f"{folder / name}: eos_token_id must be an id or a list of them, got {value!r}")
            return ids
    return None


def _load_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    source = _load_text(folder / "chat_template.jinja")
    if source is None:
        source = config.get("chat_template")
    if isinstance(source, list):  # named templates
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None
