"""One generated sequence as its reader sees it: text without half characters, stop strings, log probabilities."""

from collections.abc import Sequence

from jaxinfer.errors import RequestError
from jaxinfer.results import Completion, FinishReason, TokenLogprob, Usage
from jaxinfer.runtime.generation import Generated
from jaxinfer.runtime.options import GenerationOptions
from jaxinfer.text.detokenizer import Detokenizer, StopStrings
from jaxinfer.text.tokenizer import Tokenizer


class Transcript:
    """One sequence and its text so far."""

    def __init__(self, sequence: Generated, tokenizer: Tokenizer | None, options: GenerationOptions):
        self.sequence, self.options = sequence, options
        self.text = ""
        self.reason: FinishReason = "length"
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._stops = StopStrings(options.stop_strings)
        if tokenizer is None and options.stop_strings:
            raise RequestError("stop strings need a tokenizer; give stop token ids")

    def advance(self, tokens: Sequence[int]) -> bool:
        """Takes new tokens of the sequence in; True once a stop string was met, tokens after it being dropped."""
        for i, token in enumerate(tokens):
            if token in self.sequence.stop_ids:
                self.reason = "stop"
            elif self._detokenizer is not None and self._show(self._detokenizer.push(token)):
                surplus = len(tokens) - i - 1
                if surplus:
                    del self.sequence.tokens[-surplus:], self.sequence.logprobs[-surplus:]
                return True
        if self.sequence.ended and self._detokenizer is not None and not self._show(self._detokenizer.flush()):
            self.text += self._stops.flush()
        return False

    def _show(self, text: str) -> bool:
        shown, stopped = self._stops.push(text)
        self.text += shown
        if stopped:
            self.reason = "stop"
        return stopped

    def logprobs(self, start: int = 0) -> tuple[TokenLogprob, ...] | None:
        """Of the tokens from `start` on, as asked."""
        if not self.options.logprobs:
            return None
        n, sequence = self.options.logprobs, self.sequence
        rows = zip(sequence.tokens[start:], sequence.logprobs[start:], strict=True)
        return tuple(
            TokenLogprob(token, float(own), tuple(zip(ids[:n].tolist(), values[:n].tolist(), strict=True)))
            for token, (own, values, ids) in rows
        )

    def completion(self) -> Completion:
        """The finished result."""
        sequence = self.sequence
        return Completion(
            text=None if self._detokenizer is None else self.text,
            tokens=tuple(sequence.tokens),
            finish_reason=self.reason,
            usage=Usage(len(sequence.prompt), len(sequence.tokens)),
            seed=sequence.seed if sequence.options.temperature > 0 else None,
            logprobs=self.logprobs(),
        )
