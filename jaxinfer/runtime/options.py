"""What a caller may ask of a generation, checked before anything runs."""

import numbers
from collections.abc import Iterable
from dataclasses import dataclass, replace

from jaxinfer.errors import RequestError
from jaxinfer.runtime.programs import TOP_LOGPROBS
from jaxinfer.runtime.sampling import SamplingOptions


@dataclass(frozen=True)
class GenerationOptions:
    """The options of `LanguageModel.generate`, which documents them."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: str | int | Iterable[str | int] = ()
    logprobs: int = 0
    ignore_eos: bool = False

    def checked(self) -> "GenerationOptions":
        """The same with `stop` as a tuple.

        Raises:
            RequestError: an option of the wrong kind or out of its range.
        """
        _at_least(1, "max_tokens", self.max_tokens)
        _at_least(1, "n", self.n)
        _at_least(0, "logprobs", self.logprobs)
        if self.logprobs > TOP_LOGPROBS:
            raise RequestError(f"logprobs may be at most {TOP_LOGPROBS}, got {self.logprobs}")
        stop = (self.stop,) if isinstance(self.stop, str | int) else tuple(self.stop)
        for entry in stop:
            if not isinstance(entry, str | int) or entry == "" or isinstance(entry, bool):
                raise RequestError(f"stop takes non-empty strings and token ids, got {entry!r}")
        self.sampling()
        return replace(self, stop=stop)

    def sampling(self) -> SamplingOptions:
        """The part that the compiled step reads."""
        return SamplingOptions(self.temperature, self.top_k, self.top_p, self.min_p, self.seed)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings in a checked `stop`."""
        assert isinstance(self.stop, tuple)
        return tuple(s for s in self.stop if isinstance(s, str))

    @property
    def stop_ids(self) -> frozenset[int]:
        """The token ids in a checked `stop`."""
        assert isinstance(self.stop, tuple)
        return frozenset(s for s in self.stop if isinstance(s, int))


def _at_least(least: int, name: str, value: object) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:  # pyright: ignore[reportOperatorIssue]
        raise RequestError(f"{name} must be an integer of at least {least}, got {value!r}")
