"""`jaxinfer inspect`: what a checkpoint holds, from its headers alone."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from jaxinfer import models
from jaxinfer.checkpoints import Checkpoint, TensorInfo, open_checkpoint
from jaxinfer.cli import common
from jaxinfer.errors import CheckpointError


def inspect(
    model: common.Model,
    all_tensors: Annotated[bool, typer.Option("--all", help="List each tensor; layers are folded otherwise.")] = False,
    json: common.Json = False,
    debug: common.Debug = False,
) -> None:
    """Show what a checkpoint holds, without loading it.

    Architecture, parameters, tensors, dtypes, sizes, tokenizer. Imports no JAX and reads no weights.
    """
    with open_checkpoint(common.fetch(model)) as checkpoint:
        tensors = list(checkpoint.tensors.values())
        summary = {
            "path": str(checkpoint.path),
            "format": checkpoint.format,
            "architecture": checkpoint.config.get("model_type"),
            "supported": checkpoint.config.get("model_type") in models.supported(),
            "parameters": sum(math.prod(t.shape) for t in tensors),
            "bytes": sum(t.nbytes for t in tensors),
            "dtypes": _totals(tensors),
            "tokenizer": _tokenizer(checkpoint),
            "config": dict(checkpoint.config),
        }
    if json:
        rows = [{"name": t.name, "shape": list(t.shape), "dtype": t.dtype, "bytes": t.nbytes} for t in tensors]
        common.say_json(summary | {"tensors": rows})
    else:
        _show(summary, tensors, all_tensors)


def _totals(tensors: Iterable[TensorInfo]) -> dict[str, dict[str, int]]:
    """By stored dtype, the largest first: tensors, parameters, bytes."""
    count, parameters, nbytes = Counter[str](), Counter[str](), Counter[str]()
    for tensor in tensors:
        count[tensor.dtype] += 1
        parameters[tensor.dtype] += math.prod(tensor.shape)
        nbytes[tensor.dtype] += tensor.nbytes
    return {d: {"tensors": count[d], "parameters": parameters[d], "bytes": n} for d, n in nbytes.most_common()}


def _tokenizer(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """None where there is none; one that can't be read must not keep the rest from being seen."""
    try:
        tokenizer = checkpoint.load_tokenizer()
    except CheckpointError as error:
        return {"error": str(error)}
    if tokenizer is None:
        return None
    return {
        "kind": type(tokenizer.backend.model).__name__,
        "vocabulary": tokenizer.vocab_size,
        "chat_template": tokenizer.chat_template is not None,
        "bos_id": tokenizer.bos_id,
        "eos_ids": sorted(tokenizer.eos_ids),
    }


def _show(summary: Mapping[str, Any], tensors: list[TensorInfo], all_tensors: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(summary):
        facts.add_row(Text(name, style="bold"), Text(common.printable(value), overflow="fold"))
    common.out.print(facts)
    common.out.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", overflow="fold")
    if not all_tensors:
        table.add_column("count", justify="right")
    for title in ("shape", "dtype", "size"):
        table.add_column(title, justify="left" if title == "dtype" else "right", no_wrap=True)
    for name, count, tensor in [(t.name, 1, t) for t in tensors] if all_tensors else _folded(tensors):
        shape = " × ".join(map(str, tensor.shape)) or "scalar"
        counted = [] if all_tensors else [str(count)]
        table.add_row(Text(common.printable(name)), *counted, shape, tensor.dtype, common.size(count * tensor.nbytes))
    common.out.print(table)


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    known = "" if summary["supported"] else f" (not supported; supported: {', '.join(models.supported())})"
    dtypes = (
        f"{dtype} {common.size(total['bytes'])} in {total['tensors']}" for dtype, total in summary["dtypes"].items()
    )
    tokenizer = summary["tokenizer"] or {}
    if "error" in tokenizer:
        kind = f"not readable: {tokenizer['error']}"
    else:
        kind = f"{tokenizer['kind']}, {tokenizer['vocabulary']:,} tokens" if tokenizer else "none"
    return [
        ("path", summary["path"]),
        ("format", {"huggingface": "Hugging Face folder", "gguf": "GGUF"}[summary["format"]]),
        ("architecture", f"{summary['architecture']}{known}"),
        ("parameters", f"{summary['parameters']:,}"),
        ("tensors", f"{common.size(summary['bytes'])}: {', '.join(dtypes)}"),
        ("tokenizer", kind),
        ("chat template", "yes" if tokenizer.get("chat_template") else "no"),
    ]


def _folded(tensors: Iterable[TensorInfo]) -> list[tuple[str, int, TensorInfo]]:
    """(name with layer numbers as {i}, how many, one of them); tensors that differ in shape or dtype stay apart."""
    found: dict[tuple[Any, ...], list[TensorInfo]] = {}
    for tensor in tensors:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "{i}", tensor.name)
        found.setdefault((pattern, tensor.shape, tensor.dtype), []).append(tensor)
    return [(key[0] if len(same) > 1 else same[0].name, len(same), same[0]) for key, same in found.items()]
