"""`jaxinfer chat`: a conversation at the terminal."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from jaxinfer import paths
from jaxinfer.cli import common
from jaxinfer.errors import RequestError

_HELP = "/reset forgets the conversation, /exit (or Ctrl-D) ends it, Ctrl-C stops an answer."


def chat(
    model: common.Model = "smollm2-135m",
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_tokens: common.MaxTokens = 256,
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
    """Talk with a language model.

    At each turn the model reads the whole conversation. /reset forgets it, /exit ends it.

    Lines from a pipe are taken as the turns of one conversation.
    """
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
    common.check_options(options)
    lm = common.load(model, "LanguageModel", dtype=dtype, max_len=max_len, check=check)
    interactive = sys.stdin.isatty()
    if interactive:
        common.err.print(f"{model}. {_HELP}", style="dim")
    with _line_history() if interactive else contextlib.nullcontext():
        _converse(lm, system, options, interactive)


def _converse(lm: Any, system: str | None, options: dict[str, Any], interactive: bool) -> None:
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    for line in _turns(interactive):
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            messages = list(start)
            common.err.print("forgotten", style="dim")
        elif line.startswith("/"):
            common.err.print(_HELP, style="dim")
        elif line:
            messages = _answer(lm, [*messages, {"role": "user", "content": line}], options, interactive)


def _turns(interactive: bool) -> Iterator[str]:
    """The user's lines, until the end of the input."""
    while True:
        try:
            yield input("\n> " if interactive else "").strip()
        except EOFError:
            if interactive:
                common.say("")
            return
        except KeyboardInterrupt:
            common.say("")
            raise


def _answer(
    lm: Any, messages: list[dict[str, str]], options: dict[str, Any], interactive: bool
) -> list[dict[str, str]]:
    """Streams the answer to the last message; the conversation after it.

    At a terminal a turn that can't be served (too long a conversation, for one) is said and taken back, and Ctrl-C
    keeps the answer as far as it came.
    """
    answer = ""
    try:
        for delta in common.awaited(lm.chat(messages, stream=True, **options)):
            answer += delta.text
            common.say(delta.text, end="")
    except RequestError as error:
        if not interactive:
            raise
        common.err.print(f"error: {common.printable(str(error))} (/reset forgets the conversation)", soft_wrap=True)
        return messages[:-1]
    except KeyboardInterrupt:
        if not interactive:
            raise
    common.say("")
    return [*messages, {"role": "assistant", "content": answer}]


@contextlib.contextmanager
def _line_history() -> Iterator[None]:
    """Line editing with the lines of earlier conversations on the up arrow, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    file = paths.cache_dir() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(file)
            file.chmod(0o600)
