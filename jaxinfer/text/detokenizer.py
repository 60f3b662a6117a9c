"""Text out of a stream of tokens: never half a character, and stop strings cut off before they are seen."""

import codecs
import functools
import json
import re
from collections.abc import Sequence
from typing import Any

from jaxinfer.errors import RequestError
from jaxinfer.text.tokenizer import Tokenizer

__all__ = ["Detokenizer", "StopStrings"]

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Detokenizer:
    """Decodes one sequence token by token.

    What the pushes and the flush return, put together, is exactly `tokenizer.decode(ids)`. The work of a push doesn't
    depend on how much came before.

    Which text is certain depends on the decoder. With byte-level BPE it is every whole character. With byte fallback
    (SentencePiece) a run of byte tokens becomes text only when another token ends it: if any of it is not UTF-8, all of
    it decodes to U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True):
        backend = tokenizer.backend
        self._piece = backend.id_to_token
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        state = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
        self._pieces = _ByteLevel() if state.get("type") == "ByteLevel" else _Windowed(backend, _kinds(state))

    def push(self, token_id: int) -> str:
        """The text that is certain now that `token_id` is known; often "" ."""
        if token_id in self._skipped:
            return ""
        piece = self._piece(token_id)
        return "" if piece is None else self._pieces.push(token_id, piece)

    def flush(self) -> str:
        """What was held back, as it decodes when nothing follows. Ends the sequence."""
        return self._pieces.flush()


class _ByteLevel:
    """Each token is bytes; both Python's decoder and the library's replace bad UTF-8 by maximal subparts."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int, piece: str) -> str:
        return self._decoder.decode(_piece_bytes(piece))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Windowed:
    """Any other decoder: decodes what is uncertain behind one token of context, and cuts the context's text off.

    One token is enough since decoders treat the first token apart (no leading space) and all others alike.
    """

    def __init__(self, backend: Any, kinds: set[str]):
        self._decode = functools.partial(backend.decode, skip_special_tokens=False)
        self._byte_fallback = "ByteFallback" in kinds
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if "ByteLevel" in kinds else None
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, token_id: int, piece: str) -> str:
        self._pending.append(token_id)
        if self._byte_fallback and BYTE_TOKEN.fullmatch(piece):
            return ""
        if self._utf8 is not None:
            self._utf8.decode(_piece_bytes(piece))
            if self._utf8.getstate()[0]:
                return ""
        text = self.flush()
        self._context = [token_id]
        self._context_text = self._decode(self._context)
        return text

    def flush(self) -> str:
        text = self._decode(self._context + self._pending)[len(self._context_text) :]
        self._pending = []
        return text


class StopStrings:
    """Passes text on until one of `stops` appears in it, however the text is cut into pieces.

    Of several, the one that is complete first counts (then the longest). Text that may yet turn out to begin a stop is
    held back, at most as much as the longest stop.
    """

    def __init__(self, stops: Sequence[str]):
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise RequestError(f"stop strings are a list of non-empty str, got {stops!r:.200}")
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text safe to emit, whether a stop was hit). After a hit, nothing is emitted any more."""
        if self.hit:
            return "", True
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)[1]], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))


def _kinds(state: dict[str, Any]) -> set[str]:
    """The types of a decoder, those of a sequence included."""
    kinds = {state["type"]} if "type" in state else set()
    return kinds.union(*(_kinds(inner) for inner in state.get("decoders", [])))


@functools.cache
def _byte_of() -> dict[str, int]:
    """GPT-2's printable spelling of bytes: visible Latin-1 stands for itself, the rest follows from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelled = {chr(byte): byte for byte in visible}
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return spelled | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


def _piece_bytes(piece: str) -> bytes:
    try:
        return bytes(map(_byte_of().__getitem__, piece))
    except KeyError:  # an added token that isn't spelled in bytes stands for itself
        return piece.encode()
