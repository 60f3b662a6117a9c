"""`jaxinfer embed`: vectors from a sentence encoder."""

import os
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from jaxinfer.cli import common
from jaxinfer.errors import RequestError


def embed(
    model: common.Model,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to embed. Default: the lines of stdin.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read texts from a file; - is stdin.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write a float32 row a text to this .npy.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts run together.")] = 32,
    json: common.Json = False,
    dtype: common.Dtype = None,
    check: common.Check = False,
    debug: common.Debug = False,
) -> None:
    """Turn texts into vectors, one a line of the file or of stdin.

    Without --out or --json, shows how close each text is to the first.
    """
    if out is not None and not out.absolute().parent.is_dir():
        raise RequestError(f"--out {out}: there is no folder {out.absolute().parent}")
    rows = common.texts(texts, file, lines=True)
    encoder = common.load(model, "Encoder", dtype=dtype, check=check)
    vectors = encoder.embed(rows, batch_size=batch_size, progress=common.err.is_terminal)
    if out is not None:
        _save(out, vectors)
        common.err.print(f"{out}: float32 {list(vectors.shape)}")
    if json:
        # float32 as its shortest decimal that reads back the same, not as the 17 digits of its float64
        exact = [[float(str(value)) for value in row] for row in vectors]
        common.say_json({"model": model, "dimensions": vectors.shape[1], "embeddings": exact})
    elif out is None:
        _show(rows, vectors)


def _save(path: Path, vectors: np.ndarray) -> None:
    """Writes the .npy file beside its place and moves it there: a file that exists is whole."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.absolute().parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.save(file, vectors)
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)  # mkstemp makes it 0600; a result is a file like any other
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _show(rows: list[str], vectors: np.ndarray) -> None:
    from rich.table import Table
    from rich.text import Text

    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("cosine to the first", justify="right")
    table.add_column(f"vector [{vectors.shape[1]}]", no_wrap=True)
    table.add_column("text", no_wrap=True, overflow="ellipsis")
    for row, vector, cosine in zip(rows, vectors, unit @ unit[0], strict=True):
        numbers = " ".join(f"{value:+.3f}" for value in vector[:4])
        table.add_row(f"{cosine:.4f}", f"{numbers} …", Text(common.printable(row)))
    common.out.print(table)
