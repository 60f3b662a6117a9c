"""`jaxinfer generate`: text from a language model."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxinfer.cli import common
from jaxinfer.errors import RequestError


def generate(
    model: common.Model,
    prompts: Annotated[list[str] | None, typer.Argument(help="Text to continue. Default: stdin.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file; - is stdin.")] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Each line of the file or of stdin is a prompt.")] = False,
    ids: Annotated[bool, typer.Option("--ids", help="Prompts are token ids, such as '1 42 7'.")] = False,
    n: Annotated[int, typer.Option("--n", help="Completions of each prompt.")] = 1,
    logprobs: Annotated[int, typer.Option(help="With --json: log-probabilities of the K most likely.")] = 0,
    json: common.Json = False,
    max_tokens: common.MaxTokens = 64,
    temperature: common.Temperature = 0.0,
    top_k: common.TopK = 0,
    top_p: common.TopP = 1.0,
    min_p: common.MinP = 0.0,
    seed: common.Seed = None,
    stop: common.Stop = None,
    dtype: common.Dtype = None,
    max_len: common.MaxLen = None,
    check: common.Check = False,
    debug: common.Debug = False,
) -> None:
    """Continue prompts.

    One prompt streams as it is made; several are generated together, as one batch.
    """
    if logprobs and not json:
        raise RequestError("--logprobs are shown with --json only: add --json")
    texts = common.texts(prompts, file, lines)
    inputs: list[Any] = [_token_ids(text) for text in texts] if ids else list(texts)
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
    common.check_options(options, n=n, logprobs=logprobs)
    lm = common.load(model, "LanguageModel", dtype=dtype, max_len=max_len, check=check)
    if len(inputs) == n == 1 and not json:
        _stream(lm, inputs[0], options)
        return
    with common.status(f"generating {len(inputs) * n} completions"):
        completions = lm.generate(inputs, n=n, logprobs=logprobs, **options)
    if json:
        common.say_json({"model": model, "completions": [_record(i // n, i % n, c) for i, c in enumerate(completions)]})
        return
    for i, completion in enumerate(completions):
        sample = f", sample {i % n + 1}" if n > 1 else ""
        common.out.rule(f"prompt {i // n + 1}{sample}", align="left", style="dim")
        common.say(_text(completion))


def _stream(lm: Any, prompt: str | list[int], options: dict[str, Any]) -> None:
    deltas = lm.stream(prompt, **options)  # says at once what is wrong with the request
    started, count = time.perf_counter(), 0
    try:
        for delta in common.awaited(deltas):
            common.say(_text(delta, end=" "), end="")
            count += len(delta.tokens)
    finally:
        common.say("")
    if common.err.is_terminal:
        seconds = time.perf_counter() - started
        common.err.print(f"{count} tokens in {seconds:.1f} s", style="dim")


def _text(piece: Any, end: str = "") -> str:
    """What to show of a Completion or Delta; of a model without a tokenizer, its token ids."""
    if piece.text is not None:
        return piece.text
    return " ".join(map(str, piece.tokens)) + (end if piece.tokens else "")


def _token_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise RequestError(f"with --ids a prompt is token ids such as '1 42 7', got {text[:60]!r}") from None


def _record(prompt: int, sample: int, completion: Any) -> dict[str, Any]:
    return {"prompt": prompt, "sample": sample} | dataclasses.asdict(completion)
