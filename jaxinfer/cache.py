"""Compiled executables on disk, so that a second start neither traces nor compiles.

An entry is named by everything that its machine code depends on: the program's fingerprint, the bucket, the plan,
jaxinfer's own code, the JAX and XLA versions and flags, and the device. Entries are native code: the folder is the
user's own (mode 0700) and is trusted exactly as JAX's own compilation cache is.
"""

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax

from jaxinfer import native
from jaxinfer.paths import cache_dir

_LIMIT = 4 << 30  # bytes; the entries unused for longest go first
_MAGIC = b"jaxinfer-executable-2\n"


@cache
def _code() -> str:
    """Digest of jaxinfer's own sources: another version of a pass makes another program."""
    digest = hashlib.sha256()
    import jaxinfer.models
    import jaxinfer.sharding

    for package in (jaxinfer, jaxinfer.models, jaxinfer.sharding):
        root = Path(str(package.__file__)).parent
        for file in sorted(root.rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()


@cache
def machine() -> str:
    """Digest of the processor's features: machine code for one CPU may not run on another."""
    info = Path("/proc/cpuinfo")
    features = platform.processor() + platform.machine()
    if info.exists():
        lines = info.read_text(errors="replace").splitlines()
        features += next((line for line in lines if line.startswith(("flags", "Features"))), "")
        features += next((line for line in lines if line.startswith("model name")), "")
    return hashlib.sha256(f"{features} {os.cpu_count()}".encode()).hexdigest()


def key_of(program: str, bucket: Mapping[str, Any], device: Any, plan: str = "single") -> str:
    """The name of an entry: 64 hex digits."""
    parts = {
        "program": program,
        "bucket": dict(bucket),
        "plan": plan,
        "code": _code(),
        "jax": jax.__version__,
        "backend": device.client.platform_version,
        "device": device.device_kind,
        "device_id": device.id,
        "machine": machine() if device.platform == "cpu" else "",
        "flags": os.environ.get("XLA_FLAGS", ""),
        "options": [str(getattr(jax.config, f"jax_{o}")) for o in ("default_matmul_precision", "enable_x64")],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _path(key: str) -> Path:
    return cache_dir() / "executables" / key


def has(key: str) -> bool:
    """Whether there is an entry, good or damaged."""
    return _path(key).exists()


def load(key: str, n_in: int, n_out: int, device: Any) -> Any:
    """The compiled flat function of an entry, or None where there is none that loads; a damaged one is removed."""
    path = _path(key)
    payload = read(key)
    if payload is None:
        return None
    try:
        inputs, outputs = native.signature(payload)
        if (len(inputs), len(outputs)) != (n_in, n_out):
            raise ValueError("an entry of another program")
        loaded = native.load(payload, device)
    except ValueError:  # written by a build that only looks the same
        path.unlink(missing_ok=True)
        return None
    path.touch()  # most recently used
    return loaded


def read(key: str) -> bytes | None:
    """What `native.load` takes, or None where there is no entry; a damaged one is removed."""
    path = _path(key)
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, payload = data[len(_MAGIC) : len(_MAGIC) + 32], data[len(_MAGIC) + 32 :]
    if not data.startswith(_MAGIC) or hashlib.sha256(payload).digest() != digest:
        path.unlink(missing_ok=True)
        return None
    return payload


def store(key: str, compiled: Any) -> None:
    """Writes an entry; a backend that can't serialise costs the entry, not the run."""
    try:
        payload = native.pack(compiled)
    except ValueError:
        return
    _write(_path(key), _MAGIC + hashlib.sha256(payload).digest() + payload)


def load_note(key: str) -> Any:
    """A small JSON value stored under a key, or None."""
    try:
        return json.loads(_path(key).with_suffix(".json").read_text())
    except (OSError, ValueError):
        return None


def store_note(key: str, value: Any) -> None:
    """Writes a small JSON value under a key."""
    _write(_path(key).with_suffix(".json"), json.dumps(value).encode())


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all; a full or read-only disk costs the entry, not the run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            try:
                file.write(data)
                file.close()
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
        _prune(path.parent)
    except OSError:
        return


def _prune(folder: Path) -> None:
    entries = sorted(((p.stat().st_mtime, p.stat().st_size, p) for p in folder.iterdir() if p.is_file()), reverse=True)
    total = 0
    for _, size, path in entries:
        total += size
        if total > _LIMIT:
            path.unlink(missing_ok=True)
