"""What is packaged is what is in the tree, and what is public is what is meant to be."""

import ast
import builtins
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import jaxinfer.errors

SOURCES = {"jaxinfer": "jaxinfer", "models": "jaxinfer/models", "sharding": "jaxinfer/sharding"}  # folder: in a wheel


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60)


def packaged_files(root: Path) -> dict[str, Path]:
    """Every file of the tree that a wheel should hold: its path in the wheel -> in the tree."""
    found = {}
    for folder, prefix in SOURCES.items():
        for base, folders, files in os.walk(root / folder):  # doesn't follow links: jaxinfer/models is one
            folders[:] = [name for name in folders if name != "__pycache__"]
            for name in files:
                if not name.endswith(".pyc"):
                    path = Path(base) / name
                    found[f"{prefix}/{path.relative_to(root / folder).as_posix()}"] = path
    return found


def test_the_package_list_names_every_package_of_the_tree(repository):
    pyproject = tomllib.loads((repository / "pyproject.toml").read_text())
    inits = [name for name in packaged_files(repository) if name.endswith("/__init__.py")]
    in_tree = sorted(name.removesuffix("/__init__.py").replace("/", ".") for name in inits)
    assert pyproject["tool"]["setuptools"]["packages"] == in_tree


def test_no_module_lies_in_a_folder_that_is_no_package(repository):
    files = packaged_files(repository)
    homeless = [f for f in files if f.endswith(".py") and f"{f.rpartition('/')[0]}/__init__.py" not in files]
    assert homeless == []


@pytest.mark.parametrize("name", ["models", "sharding"])
def test_bare_names_are_refused_and_real_ones_work(repository, name):
    bare = python(f"import {name}", repository)
    assert bare.returncode == 1
    assert f"ImportError: this package is jaxinfer.{name}" in bare.stderr
    assert python(f"import jaxinfer.{name}", repository).returncode == 0


def build_wheel(repository: Path, folder: Path) -> Path:
    """Builds in a copy: setuptools leaves a build/ in the tree, whose stale files land in the next wheel."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        shutil.copytree(repository / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(source)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.heavy
def test_the_wheel_holds_the_tree(repository, tmp_path):
    """.ci/run builds the wheel by way of an sdist and names it in JAXINFER_WHEEL."""
    wheel = Path(os.environ["JAXINFER_WHEEL"]) if "JAXINFER_WHEEL" in os.environ else build_wheel(repository, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        packed = {n: archive.read(n) for n in archive.namelist() if ".dist-info/" not in n}
        info = {n.partition(".dist-info/")[2]: archive.read(n) for n in archive.namelist() if ".dist-info/" in n}
    tree = {name: path.read_bytes() for name, path in packaged_files(repository).items()}
    assert sorted(packed) == sorted(tree)
    assert [name for name in tree if packed[name] != tree[name]] == []
    assert "jaxinfer/py.typed" in packed
    assert info["licenses/LICENSE"] == (repository / "LICENSE").read_bytes()
    assert b"jaxinfer = jaxinfer.cli:main" in info["entry_points.txt"]


def test_the_license_is_apache_2_unmodified(repository):
    digest = hashlib.sha256((repository / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def test_import_is_light(repository):
    """`import jaxinfer` and the command's own imports bring neither Flax nor JAX."""
    code = "import sys, jaxinfer, jaxinfer.cli; print(sorted({'jax', 'jaxlib', 'flax', 'orbax'} & set(sys.modules)))"
    result = python(code, repository)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_public_names_are_importable_and_complete():
    import jaxinfer as ji

    assert ji.__all__ == sorted(ji.__all__)
    assert [name for name in ji.__all__ if not hasattr(ji, name)] == []
    assert set(ji.__all__) <= set(dir(ji))
    assert set(jaxinfer.errors.__all__) <= set(ji.__all__)
    with pytest.raises(AttributeError):
        ji.no_such_name  # noqa: B018


def test_the_error_tree_is_the_one_drawn_in_its_docstring():
    errors = jaxinfer.errors
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert classes == set(errors.__all__)
    assert all(issubclass(getattr(errors, name), errors.JaxInferError) for name in classes)
    drawn = re.findall(r"(\w+Error)  .*?(?:\(also a (\w+)\))?\n", errors.__doc__ or "")
    assert {name for name, _ in drawn} == classes - {"JaxInferError"}
    for name, builtin in drawn:
        assert getattr(errors, name).__bases__[1:] == ((getattr(builtins, builtin),) if builtin else ())


def test_readme_python_blocks_are_valid_and_use_public_names(repository):
    import jaxinfer as ji

    blocks = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), re.S)
    assert len(blocks) == 6
    for block in blocks:
        used = {
            node.attr
            for node in ast.walk(ast.parse(block))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ji"
        }
        assert used
        assert used <= set(ji.__all__)


def test_readme_shell_blocks_are_one_posix_line_each(repository):
    blocks = re.findall(r"```sh\n(.*?)```", (repository / "README.md").read_text(), re.S)
    assert len(blocks) == 2
    for block in blocks:
        assert block.count("\n") == 1
        assert subprocess.run(["sh", "-n", "-c", block], check=False).returncode == 0


def test_readme_lines_refuse_an_old_python(repository, tmp_path):
    """With a Python that says it is 3.9, both lines end with a message and make nothing."""
    old = tmp_path / "old-python"
    old.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c \"import sys; sys.version_info = (3, 9, 2); sys.version = '3.9.2 (x)'; "
        'exec(sys.argv[2])" "$@"\n'
    )
    old.chmod(0o755)
    for block in re.findall(r"```sh\n(.*?)```", (repository / "README.md").read_text(), re.S):
        environment = os.environ | {"PY": str(old)}
        result = subprocess.run(["sh", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 1
        assert result.stderr.startswith("jaxinfer needs Python 3.11 or newer, this is 3.9.2: set PY")
        assert not (tmp_path / ".venv").exists()


@pytest.mark.jax_defaults
def test_readme_model_of_ones_own_generates_what_its_forward_says(repository, tmp_path, monkeypatch, capsys):
    """The blocks after the first, one after another, as a reader would run them."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    _, *blocks = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    shown = capsys.readouterr().out
    assert "256 bytes a token" in shown and "ahead, at compile" in shown  # K and V of 32 floats each
    x = np.ones((5, 32), np.float32)
    np.testing.assert_allclose(names["executable"](x), np.maximum(x @ names["params"]["qkv"], 0), rtol=1e-5, atol=1e-6)
    tokens, forward = [1, 2, 3], jax.jit(names["forward"])
    for _ in range(8):
        logits = forward(names["params"], jnp.array([tokens + [0] * (11 - len(tokens))]))
        tokens.append(int(logits[0, len(tokens) - 1].argmax()))
    assert names["lm"].generate([1, 2, 3], max_tokens=8).tokens == tuple(tokens[3:])
