"""Where jaxinfer keeps what it can make or fetch again: checkpoints, compiled programs, the chat's line history."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxinfer.errors import JaxInferError

__all__ = ["cache_dir", "cache_path", "locked"]


def cache_path() -> Path:
    """The cache folder's path; nothing is created.

    `$JAXINFER_CACHE` if set, else `jaxinfer` under the platform's cache folder: `$XDG_CACHE_HOME` or `~/.cache`,
    `~/Library/Caches` on macOS, `%LOCALAPPDATA%` on Windows.
    """
    if chosen := os.environ.get("JAXINFER_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        # The XDG specification: a relative path in the variable is to be ignored.
        chosen = os.environ.get("XDG_CACHE_HOME", "")
        base = Path(chosen) if Path(chosen).is_absolute() else Path.home() / ".cache"
    return base / "jaxinfer"


def cache_dir() -> Path:
    """The cache folder, created with mode 0700 if it is missing: what lies in it is loaded and run.

    Raises:
        JaxInferError: the folder can't be created or isn't a folder.
    """
    path = cache_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise JaxInferError(
            f"the cache folder {path} can't be created: {error.strerror}; set JAXINFER_CACHE to a folder you can write"
        ) from error
    return path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on the file `path` (made if missing) against other processes; waits for its turn.

    The kernel drops the lock with the process, however it ends, so a lock never outlives its owner. Without `fcntl`
    (Windows) there is no lock: callers must stay correct, though they may do the same work twice.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
