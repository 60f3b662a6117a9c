"""The environment that every test runs in, stricter than a user's. Set before anything imports JAX, and inherited by
xdist's workers and by the processes that tests start.

- 8 virtual CPU devices; NPROC=16 since on fewer threads than devices JAX 0.10's CPU collectives can deadlock.
- Warnings are errors (pyproject.toml), implicit rank promotion raises. Forwards written as a user would write them
  run under JAX's defaults: mark them `@pytest.mark.jax_defaults`.
- JAXINFER_CACHE is a folder of this run. Set JAXINFER_TEST_CACHE to a cache folder to share its checkpoints.
- What one worker compiles the others load: JAX's persistent compilation cache lies in the run's folder.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

_RUN_FOLDER = "JAXINFER_TEST_RUN"  # set by the process that made the folder, and so by the one that removes it


def _prepare() -> Path | None:
    if _RUN_FOLDER in os.environ:
        return None
    folder = Path(tempfile.mkdtemp(prefix="jaxinfer-tests-"))
    cache = folder / "cache"
    cache.mkdir(mode=0o700)
    if shared := os.environ.get("JAXINFER_TEST_CACHE"):
        checkpoints = Path(shared).absolute() / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        (cache / "checkpoints").symlink_to(checkpoints, target_is_directory=True)
    os.environ |= {
        _RUN_FOLDER: str(folder),
        "JAXINFER_CACHE": str(cache),
        "NPROC": "16",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip(),
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        # Help pages and tables are the same whoever looks at them.
        "COLUMNS": "100",
        "NO_COLOR": "1",
    }
    return folder


_made = _prepare()


def pytest_unconfigure() -> None:
    if _made is not None:
        shutil.rmtree(_made, ignore_errors=True)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "jax_defaults: runs under JAX's default promotion rules, as users' forwards do")


@pytest.fixture(autouse=True)
def _jax_defaults(request: pytest.FixtureRequest):
    if request.node.get_closest_marker("jax_defaults") is None:
        yield
        return
    import jax

    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the clone that these tests lie in."""
    return Path(__file__).resolve().parent.parent
