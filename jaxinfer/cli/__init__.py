"""The `jaxinfer` command: thin over the public API, one file a command.

Nothing imports JAX until a command that computes needs it, so that `--help`, `inspect` and `doctor --quick` answer at
once. Exit codes: 0 done, 1 `doctor` found a problem, 2 the user's input can't be served, 130 interrupted.
"""

import io
import sys
import time

STARTED = time.perf_counter()  # before the imports below: `demo` tells how long a start takes, and they are part of it

import typer  # noqa: E402

from jaxinfer.cli import chat, demo, doctor, embed, generate, inspect  # noqa: E402
from jaxinfer.cli.common import Group  # noqa: E402

__all__ = ["STARTED", "app", "main"]

app = typer.Typer(
    name="jaxinfer",
    cls=Group,
    help="Run language models and sentence encoders with JAX, compiled from plain forward passes.",
    epilog="MODEL is a name (smollm2-135m, all-minilm-l6-v2), a Hugging Face folder, or a .gguf file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command()(demo.demo)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(embed.embed)
app.command()(inspect.inspect)
app.command()(doctor.doctor)


def _version(value: bool) -> None:
    if value:
        import importlib.metadata

        print(importlib.metadata.version("jaxinfer"))
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that can't show a character must not end a generation
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app(prog_name="jaxinfer")
