"""`jaxinfer demo`: a real checkpoint to text, in one command."""

import time
from dataclasses import dataclass
from typing import Annotated, Any

import typer

import jaxinfer.cli as cli
from jaxinfer.cli import common

MODEL = "smollm2-135m"
QUESTION = "What is gravity?"


def demo(
    question: Annotated[str, typer.Argument(help="What to ask.")] = QUESTION,
    max_tokens: common.MaxTokens = 64,
    json: common.Json = False,
    debug: common.Debug = False,
) -> None:
    """Ask SmolLM2-135M a question: stream the answer, and tell how fast that was.

    The first run downloads 93 MB and compiles; later runs take both from the cache.
    """
    lm = common.load(MODEL, "LanguageModel")
    if not json:
        common.say(f"> {question}\n")
    answer = _ask(lm, question, max_tokens, quiet=json)
    report = lm.compile_report()
    figures = {
        "time_to_first_token_s": answer.first - answer.asked,
        "tokens_per_s": answer.rate,
        "programs_compiled": report["compiled"],
        "programs_loaded": report["loaded"],
        "programs_s": report["seconds"],
        "load_s": answer.asked - cli.STARTED,
        "start_to_first_token_s": answer.first - cli.STARTED,
    }
    if json:
        result = {"model": MODEL, "question": question, "answer": answer.text, "tokens": answer.tokens}
        common.say_json(result | figures)
        return
    newlines = "\n" if answer.text.endswith("\n") else "\n\n"
    common.say(
        f"{newlines}{answer.tokens} tokens at {answer.rate:.1f} tokens/s · "
        f"first token after {figures['time_to_first_token_s']:.2f} s, "
        f"{figures['start_to_first_token_s']:.1f} s from the start of the command · "
        f"programs: {report['compiled']} compiled, {report['loaded']} from the cache, {report['seconds']:.1f} s"
    )


@dataclass(frozen=True)
class _Answer:
    """An answer and its clock, in seconds of `time.perf_counter`."""

    text: str
    tokens: int
    asked: float
    first: float
    rate: float  # tokens per second after the first ones, programs being ready


def _ask(lm: Any, question: str, max_tokens: int, quiet: bool) -> _Answer:
    text, tokens, beginning, ready, first = "", 0, 0, 0.0, 0.0
    asked = last = time.perf_counter()
    deltas = lm.chat([{"role": "user", "content": question}], stream=True, max_tokens=max_tokens)
    for delta in common.awaited(deltas):
        last = time.perf_counter()
        if not tokens and delta.tokens:
            first, beginning, ready = last, len(delta.tokens), lm.compile_report()["seconds"]
        tokens += len(delta.tokens)
        text += delta.text
        if not quiet:
            common.say(delta.text, end="")
    # The decode program is compiled or loaded after the first token: that is a start's cost, not a token's.
    seconds = last - first - (lm.compile_report()["seconds"] - ready)
    rate = (tokens - beginning) / seconds if tokens > beginning else 0.0
    return _Answer(text, tokens, asked, first or last, rate)
