"""`jaxinfer doctor`: is everything here that jaxinfer needs, and how to get what is missing."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxinfer import paths
from jaxinfer.cli import common

_NEEDED = ("jax", "jaxlib", "flax", "numpy", "tokenizers", "safetensors")


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Don't import JAX: no devices.")] = False,
    json: common.Json = False,
    debug: common.Debug = False,
) -> None:
    """Check the installation: versions, devices, cache, what is missing.

    Exits with 1 if there is a problem that stops jaxinfer from working.
    """
    report: dict[str, Any] = {
        "jaxinfer": _version("jaxinfer"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "packages": {name: _version(name) for name in _NEEDED},
        "devices": None if quick else _devices(),
        "cache": _cache(),
        "extras": _extras(),
    }
    report["problems"] = _problems(report)
    if json:
        common.say_json(report)
    else:
        _show(report)
    if report["problems"]:
        raise typer.Exit(1)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]] | str:
    """JAX's devices, or why there are none: a broken accelerator plugin fails only here."""
    common.prepare_jax()
    try:
        import jax

        return [{"id": d.id, "platform": d.platform, "kind": d.device_kind} for d in jax.devices()]
    except Exception as error:  # whatever a plugin raises is what the user came to read
        return " ".join(f"{type(error).__name__}: {error}".split())


def _cache() -> dict[str, Any]:
    """The cache folder; it is not created by looking."""
    path = paths.cache_path()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return {
        "path": str(path),
        "writable": existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        "bytes": _bytes(path),
        "checkpoints": sorted(f.name for f in path.glob("checkpoints/*") if not f.name.startswith(".")),
    }


def _bytes(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder, onerror=None):
        for name in files:
            try:
                total += (Path(root) / name).lstat().st_size
            except OSError:  # another process cleans up meanwhile
                continue
    return total


def _extras() -> dict[str, dict[str, Any]]:
    """For each extra of our own metadata: the packages that it lacks, and the command that brings them."""
    extras: dict[str, dict[str, Any]] = {}
    for requirement in importlib.metadata.requires("jaxinfer") or ():
        match = re.match(r"([\w.-]+)(\[(\w+)\])?.*;.*extra == ['\"](\w+)['\"]", requirement)
        if match is None:
            continue
        package, plugin, extra = match[1], match[3], match[4]
        # jax[cuda12] is there when its plugin is; jax itself says nothing.
        package = {"cuda12": "jax-cuda12-plugin", "cuda13": "jax-cuda13-plugin", "tpu": "libtpu"}.get(plugin, package)
        record = extras.setdefault(extra, {"missing": [], "install": f"pip install 'jaxinfer[{extra}]'"})
        if _version(package) is None:
            record["missing"].append(package)
    return extras


def _problems(report: dict[str, Any]) -> list[str]:
    problems = [f"{name} is not installed: pip install jaxinfer" for name, v in report["packages"].items() if v is None]
    if not report["cache"]["writable"]:
        problems.append(f"the cache folder {report['cache']['path']} can't be written: set JAXINFER_CACHE")
    devices = report["devices"]
    if isinstance(devices, str):
        problems.append(f"JAX finds no devices: {devices}")
    elif devices and all(d["platform"] == "cpu" for d in devices) and Path("/dev/nvidia0").exists():
        problems.append("an NVIDIA GPU is here but JAX doesn't see it: pip install 'jaxinfer[cuda12]' (or cuda13)")
    return problems


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    cache, devices = report["cache"], report["devices"]
    rows = [("jaxinfer", report["jaxinfer"]), ("python", report["python"]), ("platform", report["platform"])]
    rows += [(name, version or "missing") for name, version in report["packages"].items()]
    if devices is None:
        rows.append(("devices", "not asked (--quick)"))
    elif isinstance(devices, str):
        rows.append(("devices", "none"))
    else:
        kinds = [f"{d['platform']} ({d['kind']})" if d["kind"] != d["platform"] else d["platform"] for d in devices]
        rows.append(("devices", ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))))
    holds = f"{common.size(cache['bytes'])}, {len(cache['checkpoints'])} checkpoints" if cache["bytes"] else "empty"
    rows.append(("cache", f"{cache['path']} ({holds}, {'writable' if cache['writable'] else 'not writable'})"))
    for extra, state in report["extras"].items():
        lacks = f"not installed ({', '.join(state['missing'])}): {state['install']}"
        rows.append((f"[{extra}]", lacks if state["missing"] else "installed"))
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(common.printable(str(value)), overflow="fold"))
    common.out.print(table)
    for problem in report["problems"]:
        common.out.print(f"problem: {problem}", style="red", soft_wrap=True)
    if not report["problems"]:
        common.out.print("no problems found", style="green")
