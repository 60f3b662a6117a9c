"""What generation returns."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of one emitted token under the model's own distribution, and the likeliest tokens there."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token, log probability), likeliest first


@dataclass(frozen=True)
class Usage:
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Completion:
    """A finished generation."""

    text: str | None  # None without a tokenizer; ends before a stop string or stop token
    tokens: tuple[int, ...]  # all that were emitted, a stop token too
    finish_reason: FinishReason
    usage: Usage
    seed: int | None  # what drew the samples; None where nothing was drawn
    logprobs: tuple[TokenLogprob, ...] | None = None

    def __str__(self) -> str:
        return " ".join(map(str, self.tokens)) if self.text is None else self.text


@dataclass(frozen=True)
class Delta:
    """A piece of a stream: the text that is certain now, and the tokens it came from."""

    text: str | None
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None  # set in the last one


@dataclass(frozen=True)
class Score:
    """Log-likelihood of a given text, token by token."""

    tokens: tuple[int, ...]
    logprobs: np.ndarray = field(repr=False)  # float32 [len(tokens) - 1]: of tokens[1:], each given all before it

    @property
    def total(self) -> float:
        """Log-likelihood of tokens[1:] given tokens[0]."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return float(np.exp(-self.logprobs.mean(dtype=np.float64)))
