"""LanguageModel: a causal forward pass, its parameters and a tokenizer, with everything generation needs derived."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, overload

import jax
import numpy as np

from jaxinfer.aot import CompileReport
from jaxinfer.errors import RequestError, TraceError
from jaxinfer.program import Program
from jaxinfer.results import Completion, Delta, Score, TokenLogprob, Usage
from jaxinfer.runtime.generation import Generated, Group
from jaxinfer.runtime.inputs import Sizes, checked, checked_specs
from jaxinfer.runtime.options import GenerationOptions
from jaxinfer.runtime.programs import SLOTS, STEPS, Programs
from jaxinfer.runtime.rows import logits_of, scores_of
from jaxinfer.runtime.transcript import Transcript
from jaxinfer.specs import Spec, spec
from jaxinfer.text.tokenizer import Tokenizer
from jaxinfer.tracing import trace, trace_named

__all__ = ["Completion", "Delta", "LanguageModel", "Score", "TokenLogprob", "Usage"]

Prompt = str | Sequence[int]


class LanguageModel:
    """A causal language model, from its forward pass alone.

    Args:
        forward: function(params, tokens) -> logits, or a Flax linen or NNX module, as `ji.trace` takes them.
            tokens: Int[Array, "batch time"], logits: Float[Array, "batch time vocab"]; see `axes`.
        params: parameters, or linen variables; None for an NNX module, whose state they are.
        max_len: the most tokens of a sequence, prompt and answer together.
        tokenizer: jaxinfer.text.tokenizer.Tokenizer; without one, prompts and results are token ids.
        eos_id: token or tokens that end an answer; the tokenizer's own by default.
        inputs: what a request has beside its tokens, once and as a whole: {"source": ji.spec("batch source", "int32")}
            for an encoder's text, image or audio. The forward takes them by name: forward(params, tokens, source=...).
        axes: "batch time", or "time" for a forward over a single sequence.
        assume_causal: accept a missing proof of causality (never a leak that was found).

    Raises:
        TraceError: the forward can't be traced, or returns something else than logits.
        NotCausalError: a later token can reach an earlier output; raised when the first program is compiled.
    """

    def __init__(
        self,
        forward: Any,
        params: Any = None,
        *,
        max_len: int = 512,
        tokenizer: Tokenizer | None = None,
        eos_id: int | Sequence[int] | None = None,
        inputs: Mapping[str, Spec] | None = None,
        axes: str = "batch time",
        assume_causal: bool = False,
        device: Any = None,
    ):
        if axes not in ("batch time", "time"):
            raise TraceError(f"axes must be 'batch time' or 'time', got {axes!r}")
        if isinstance(forward, Program):
            program = forward
        else:
            arguments = (*(() if params is None else (params,)), spec(axes, "int32"))
            named = checked_specs(inputs or {})
            program = trace_named(forward, arguments, named) if named else trace(forward, *arguments)
        self._set_up(program, max_len, tokenizer, eos_id, assume_causal, device, config=None)

    @classmethod
    def from_program(
        cls,
        program: Program,
        *,
        max_len: int,
        tokenizer: Tokenizer | None,
        config: Any,
        device: Any = None,
    ) -> "LanguageModel":
        """A model from a Program over tokens that is not traced yet; what `ji.load` uses."""
        model = cls.__new__(cls)
        model._set_up(program, max_len, tokenizer, None, False, device, config)
        return model

    def _set_up(
        self,
        program: Program,
        max_len: int,
        tokenizer: Tokenizer | None,
        eos_id: int | Sequence[int] | None,
        assume_causal: bool,
        device: Any,
        config: Any,
    ) -> None:
        if max_len < 2:
            raise RequestError(f"max_len must be at least 2 (a prompt token and a new one), got {max_len}")
        self.program, self.config, self.tokenizer, self.max_len = program, config, tokenizer, max_len
        device = device or jax.local_devices()[0]
        self._device, self._assume_causal, self._report = device, assume_causal, CompileReport()
        self._params = [jax.device_put(leaf, device) for leaf in jax.tree.leaves(program.params)]
        self._inputs: Mapping[str, Spec] = program.inputs[1] if len(program.inputs) > 1 else {}
        self._programs_of: dict[Sizes, Programs] = {}
        given = () if eos_id is None else (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
        self.eos_ids = frozenset(given) or (tokenizer.eos_ids if tokenizer is not None else frozenset())

    def _programs(self, sizes: Sizes = ()) -> Programs:
        """The programs for requests whose inputs have these sizes."""
        if sizes not in self._programs_of:
            given = (self.max_len, self._device, self._assume_causal, dict(sizes), self._report)
            self._programs_of[sizes] = Programs(self.program, self._params, *given)
        return self._programs_of[sizes]

    @property
    def vocab_size(self) -> int | None:
        """Tokens that the model knows, where its config or tokenizer says."""
        size = getattr(self.config, "vocab_size", None)
        return size if size is not None or self.tokenizer is None else self.tokenizer.vocab_size

    def compile_report(self) -> dict[str, Any]:
        """Programs made ready since load: compiled by XLA, loaded from the cache on disk, and the seconds it took."""
        report = self._report
        return {"compiled": report.compiled, "loaded": report.loaded, "seconds": report.seconds}

    def explain(self) -> str:
        """What was derived: the state kept of each token, and what that assumes."""
        named = [d for leaf in self._inputs.values() for d in leaf.names if d != "batch"]
        return self._programs(tuple(sorted((d, self.program.analysis_sizes[d]) for d in set(named)))).step.explain()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        n: int = 1,
        stop: str | int | Iterable[str | int] = (),
        logprobs: int = 0,
        ignore_eos: bool = False,
        inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> Any:
        """Continues prompts.

        Args:
            prompts: a text, token ids, or a list of either.
            max_tokens: new tokens at most; an answer also ends where the context (`max_len`) does.
            temperature: 0 takes the likeliest token; top_k, top_p, min_p: see SamplingOptions.
            seed: sample i of a prompt depends on (seed, i, position) alone. None draws one; Completion.seed tells it.
            n: samples a prompt.
            stop: strings and token ids that end an answer; not part of its text.
            logprobs: report each token's log probability and this many of the likeliest tokens; 0 reports none.
            ignore_eos: go on after the model's own end token.
            inputs: {name: array without a batch dim} for a model with `inputs`; a list of them for a list of prompts.
                Requests whose arrays have the same sizes share a batch; each combination of sizes compiles its own.

        Returns:
            A Completion for a single prompt with n = 1, else a list of them: a prompt's samples stand together.

        Raises:
            RequestError: an empty or too long prompt, a token id out of range, or an option out of its range.
        """
        options = GenerationOptions(
            max_tokens, temperature, top_k, top_p, min_p, seed, n, stop, logprobs, ignore_eos
        ).checked()
        single = isinstance(prompts, str) or _is_ids(prompts)
        listed: Sequence[Any] = [prompts] if single else list(prompts)
        requests = self._requests(inputs, len(listed), single)
        pairs = zip(listed, requests, strict=True)
        runs = [run for prompt, given in pairs for run in self._runs(prompt, options, given)]
        for sizes in dict.fromkeys(run.sequence.sizes for run in runs):
            alike = [run for run in runs if run.sequence.sizes == sizes]
            for start in range(0, len(alike), SLOTS[-1]):
                self._drive(alike[start : start + SLOTS[-1]], options, STEPS)
        completions = [run.completion() for run in runs]
        return completions[0] if single and n == 1 else completions

    def _drive(self, runs: list[Transcript], options: GenerationOptions, steps: int) -> None:
        programs = self._programs(runs[0].sequence.sizes)
        group = Group(programs, [run.sequence for run in runs], options.logprobs > 0)
        for fresh in group.run(steps):
            for i, (run, tokens) in enumerate(zip(runs, fresh, strict=True)):
                if tokens and run.advance(tokens):
                    group.end(i)

    def stream(self, prompt: Prompt, *, inputs: Mapping[str, Any] | None = None, **options: Any) -> Iterator[Delta]:
        """Like `generate` for one prompt and n = 1, piece by piece; the last Delta has the finish_reason."""
        checked = GenerationOptions(**options).checked()
        if checked.n != 1:
            raise RequestError(f"stream follows one sample, got n={checked.n}; use generate, or call stream n times")
        (run,) = self._runs(prompt, checked, *self._requests(inputs, 1, True))
        return self._stream(run, checked)

    def _stream(self, run: Transcript, options: GenerationOptions) -> Iterator[Delta]:
        group = Group(self._programs(run.sequence.sizes), [run.sequence], options.logprobs > 0)
        for (tokens,) in group.run(steps=1):
            before = len(run.text)
            if run.advance(tokens):
                group.end(0)
            shown = run.text[before:] if self.tokenizer is not None else None
            yield Delta(shown, tuple(tokens), run.logprobs(-len(tokens)), run.reason if run.sequence.ended else None)

    @overload
    def chat(
        self, messages: Sequence[Mapping[str, str]], *, stream: Literal[True], **options: Any
    ) -> Iterator[Delta]: ...
    @overload
    def chat(
        self, messages: Sequence[Mapping[str, str]], *, stream: Literal[False] = False, **options: Any
    ) -> Completion: ...
    def chat(self, messages: Sequence[Mapping[str, str]], *, stream: bool = False, **options: Any) -> Any:
        """Answers a conversation, e.g. [{"role": "user", "content": "Hi"}], through the checkpoint's chat template."""
        if self.tokenizer is None:
            raise RequestError(
                "chat needs a tokenizer with a chat template; this model has none. Use generate with token ids"
            )
        text = self.tokenizer.apply_chat_template([dict(m) for m in messages], add_generation_prompt=True)
        prompt = self.tokenizer.encode(text, add_special=False)
        return self.stream(prompt, **options) if stream else self.generate(prompt, **options)

    def score(self, texts: Prompt | Sequence[Prompt], *, inputs: Any = None) -> Any:
        """Log-likelihood of each token of given texts: a Score, or a list of them. `inputs` as in `generate`."""
        single = isinstance(texts, str) or _is_ids(texts)
        listed: Sequence[Any] = [texts] if single else list(texts)
        ids = [self._ids(text, room=0, least=2) for text in listed]
        requests = self._requests(inputs, len(listed), single)
        scores: list[Any] = [None] * len(ids)
        for sizes in dict.fromkeys(sizes for _, sizes in requests):
            alike = [i for i, request in enumerate(requests) if request[1] == sizes]
            found = scores_of(self._programs(sizes), [ids[i] for i in alike], [requests[i][0] for i in alike])
            for i, score in zip(alike, found, strict=True):
                scores[i] = score
        return scores[0] if single else scores

    def __call__(self, tokens: Any, **inputs: Any) -> np.ndarray:
        """The forward on a batch, by the derived step: int [batch, time] -> float logits [batch, time, vocab].

        A model with `inputs` takes them by name, each with the batch as its first dim.
        """
        batch = np.asarray(tokens)
        if batch.ndim != 2 or batch.dtype.kind not in "iu":
            raise RequestError(f"tokens should be integers [batch, time], got {batch.dtype}{list(batch.shape)}")
        rows = [{name: np.asarray(array)[i] for name, array in inputs.items()} for i in range(len(batch))]
        requests = [checked(self._inputs, row) for row in rows]
        ids = [self._ids(row.tolist(), room=0) for row in batch]
        return logits_of(self._programs(requests[0][1]), ids, [request for request, _ in requests])

    def _requests(self, inputs: Any, count: int, single: bool) -> list[tuple[dict[str, np.ndarray], Sizes]]:
        """The checked inputs of each prompt, and their sizes."""
        if single or inputs is None:
            return [checked(self._inputs, inputs)] * count
        if isinstance(inputs, Mapping) or not isinstance(inputs, Sequence) or len(inputs) != count:
            got = f"{len(inputs)} of them" if isinstance(inputs, list | tuple) else type(inputs).__name__
            raise RequestError(f"give a list with the inputs of each of {count} prompts, got {got}")
        return [checked(self._inputs, given) for given in inputs]

    def _runs(
        self, prompt: Prompt, options: GenerationOptions, request: tuple[dict[str, np.ndarray], Sizes]
    ) -> list[Transcript]:
        ids = self._ids(prompt)
        sampling = options.sampling().seeded()
        limit = min(options.max_tokens, self.max_len - len(ids))
        stops = options.stop_ids | (frozenset() if options.ignore_eos else self.eos_ids)
        seed = sampling.seed or 0
        sequences = [Generated(ids, sampling, seed, i, limit, stops, *request) for i in range(options.n)]
        return [Transcript(sequence, self.tokenizer, options) for sequence in sequences]

    def _ids(self, prompt: Prompt, room: int = 1, least: int = 1) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("this model has no tokenizer: give token ids instead of text")
            ids = self.tokenizer.encode(prompt)
        else:
            ids = [int(i) for i in prompt]
        if len(ids) < least:
            raise RequestError(
                f"a prompt needs at least {least} token{'s' * (least > 1)}, got {len(ids)}: {prompt!r:.60}"
            )
        if len(ids) + room > self.max_len:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, but the context holds {self.max_len}"
                f"{f' with {room} to be generated' if room else ''}. Shorten it or load with a larger max_len"
            )
        size = self.vocab_size
        bad = next((i for i in ids if i < 0 or (size is not None and i >= size)), None)
        if bad is not None:
            raise RequestError(f"token id {bad} is out of range: the vocabulary has {size or 'only non-negative'} ids")
        return ids


def _is_ids(prompts: Any) -> bool:
    return len(prompts) > 0 and all(isinstance(p, int | np.integer) for p in prompts)
