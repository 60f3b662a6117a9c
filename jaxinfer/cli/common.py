"""What the commands share: options, errors, progress, and output for people and for machines."""

import contextlib
import itertools
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console

from jaxinfer import paths
from jaxinfer.checkpoints import hub
from jaxinfer.errors import JaxInferError, RequestError

Progress = Callable[[int, int], None]  # (done, total)
DTYPES = ("float32", "bfloat16", "float16")

err = Console(stderr=True, highlight=False, markup=False, emoji=False)
out = Console(highlight=False, markup=False, emoji=False)


# Errors


class Group(typer.core.TyperGroup):
    """Turns what a user can cause into one line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            err.print("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:  # `jaxinfer inspect ... | head`: typer ends such a run quietly
            raise
        except (JaxInferError, OSError) as error:
            if (ctx.obj or {}).get("debug"):
                traceback.print_exc()
            err.print(f"error: {_one_line(error)}", soft_wrap=True)
            raise typer.Exit(2) from error


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and not isinstance(error, JaxInferError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    return printable(" ".join(text.split()))


def _remember_debug(ctx: typer.Context, value: bool) -> bool:
    if value:
        ctx.find_root().obj = {"debug": True}
    return value


# Options that several commands take

Model = Annotated[str, typer.Argument(help="A known name, a Hugging Face folder, or a .gguf file.")]
Debug = Annotated[bool, typer.Option("--debug", callback=_remember_debug, help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else, on stdout.")]

MaxTokens = Annotated[int, typer.Option(help="New tokens at most.", rich_help_panel="Sampling")]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token.", rich_help_panel="Sampling")]
TopK = Annotated[int, typer.Option(help="Sample among the K most likely; 0 for all.", rich_help_panel="Sampling")]
TopP = Annotated[float, typer.Option(help="Sample among the likeliest that sum to P.", rich_help_panel="Sampling")]
MinP = Annotated[
    float, typer.Option(help="Drop tokens less likely than this share of the best.", rich_help_panel="Sampling")
]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.", rich_help_panel="Sampling")]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End before this text; may be repeated.", rich_help_panel="Sampling"),
]

Dtype = Annotated[
    str | None,
    typer.Option(help=f"{', '.join(DTYPES)}; by device if not given.", rich_help_panel="Loading"),
]
MaxLen = Annotated[
    int | None,
    typer.Option(help="Prompt and answer, in tokens; the checkpoint's own if not given.", rich_help_panel="Loading"),
]
Check = Annotated[bool, typer.Option("--check", help="Refuse weights that hold NaN.", rich_help_panel="Loading")]


# Models


def fetch(name_or_path: str) -> Path:
    """The checkpoint's local path; a known name is downloaded on first use, with a bar."""
    with bar(f"downloading {name_or_path}") as progress:
        return hub.resolve(name_or_path, progress)


def check_options(options: dict[str, Any], **more: Any) -> None:
    """Refuses what `generate` would refuse, before a checkpoint is fetched and loaded."""
    prepare_jax()
    from jaxinfer.runtime.options import GenerationOptions

    GenerationOptions(**options, **more).checked()


def load(name_or_path: str, kind: str, dtype: str | None = None, **options: Any) -> Any:
    """Loads a checkpoint of the wanted kind, "LanguageModel" or "Encoder"."""
    if dtype not in (None, *DTYPES):
        raise RequestError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    path = fetch(name_or_path)
    prepare_jax()
    import jaxinfer as ji

    with status("importing JAX"):
        ji.load  # noqa: B018  (names are imported when they are first used)
    with bar(f"loading {name_or_path}") as progress:
        model = ji.load(path, dtype=dtype, progress=progress, **options)
    if type(model).__name__ != kind:
        use = {"LanguageModel": "jaxinfer generate or chat", "Encoder": "jaxinfer embed"}[type(model).__name__]
        raise RequestError(f"{name_or_path} is a {type(model).__name__}, this command needs a {kind}: use {use}")
    return model


def prepare_jax() -> None:
    """Settings that JAX reads when it is first imported; what the user has set stays."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(paths.cache_dir() / "xla"))
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # With fewer threads than virtual devices, collectives can wait for each other forever (JAX 0.10).
        os.environ.setdefault("NPROC", "16")


@contextlib.contextmanager
def bar(title: str, size: bool = True) -> Iterator[Progress | None]:
    """A progress bar on stderr, in bytes unless `size` is false; None where stderr is not a terminal.

    Nothing is drawn before the first report, so that what is already there passes silently.
    """
    if not err.is_terminal:
        yield None
        return
    from rich import progress as rp

    amount = rp.DownloadColumn() if size else rp.MofNCompleteColumn()
    columns = [rp.TextColumn("{task.description}", markup=False), rp.BarColumn(), amount, rp.TimeRemainingColumn()]
    display = rp.Progress(*columns, console=err, transient=True)
    task = display.add_task(title, total=None)

    def report(done: int, total: int) -> None:
        if not display.live.is_started:
            display.start()
        display.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        display.stop()


def status(title: str) -> contextlib.AbstractContextManager[Any]:
    """A spinner on stderr, where that is a terminal."""
    return err.status(title) if err.is_terminal else contextlib.nullcontext()


def awaited(pieces: Iterable[Any], title: str = "reading") -> Iterator[Any]:
    """`pieces`, with a spinner until the first one: before it comes the prompt, and on a first run compilation."""
    iterator = iter(pieces)
    with status(title):
        first = list(itertools.islice(iterator, 1))
    yield from first
    yield from iterator


# Input and output


def texts(arguments: list[str] | None, file: Path | None, lines: bool) -> list[str]:
    """The texts to work on: the arguments, else `file` ("-": stdin), else stdin where it is not a terminal.

    From a file or stdin comes one text, less its final newline, or with `lines` one a line: row i is line i.
    """
    if arguments and file:
        raise RequestError("texts were given both as arguments and by --file: give one of them")
    if arguments:
        return arguments
    if file is None and sys.stdin.isatty():
        raise RequestError("no text was given: give it as an argument, by --file, or through a pipe")
    try:
        text = sys.stdin.read() if file is None or str(file) == "-" else file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{file or 'stdin'} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not lines:
        return [text.removesuffix("\n").removesuffix("\r")]
    found = text.split("\n")  # not splitlines(): U+2028, form feeds and the like don't end a line
    if found[-1] == "":
        found.pop()
    if not found:
        raise RequestError(f"{file or 'stdin'} holds no line")
    return [line.removesuffix("\r") for line in found]


def say(text: str, end: str = "\n") -> None:
    """Writes text that a model or a file made to stdout, at once; to a terminal without its control characters."""
    sys.stdout.write((printable(text) if sys.stdout.isatty() else text) + end)
    sys.stdout.flush()


def say_json(value: Any) -> None:
    """Writes one JSON document to stdout; numbers that JSON can't hold become null."""
    print(json.dumps(_finite(value), ensure_ascii=False, indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_CONTROL = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}


def printable(text: str) -> str:
    """`text` with control characters spelled out: a terminal acts on them, and checkpoints are hostile input."""
    return text.translate(_CONTROL)


def size(count: float, unit: str = "B") -> str:
    """A byte or parameter count for people: 98.4 MB, 134.5 M."""
    for prefix in ("", "k", "M", "G"):
        if count < 999.95 or prefix == "G":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if prefix == "" else f"{count:.1f} {prefix}{unit}".rstrip()
