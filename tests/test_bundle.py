"""Bundles: Executable.save and load, without the user's code, across versions, and against damage and malice."""

import collections
import contextlib
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxinfer as ji
from jaxinfer import bundle_files, bundle_manifest, native
from jaxinfer.bundle_tree import decode, encode

EVENTS: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda event, duration, **keywords: EVENTS.append(event))


def compile_events() -> int:
    """Traces, lowerings and compiles in this process so far."""
    return sum(event.startswith("/jax/core/compile") for event in EVENTS)


def params(seed=0):
    random = np.random.default_rng(seed)
    return {
        "layers": [
            {"w": random.standard_normal((6, 6)).astype(np.float32), "s": {0: np.float32(i + 1)}} for i in range(2)
        ],
        "half": random.standard_normal((6,)).astype(ml_dtypes.bfloat16),
        "table": (np.arange(10, dtype=np.int8), None, np.ones((0, 3), np.float32)),
        "wave": np.complex64(0.5 + 2j),
    }


def forward(params, inputs, scale):
    """Weights-only work (the transposes) is done once at load; there are dicts, lists, tuples and None all over."""
    x = inputs["x"]
    for layer in params["layers"]:
        x = jnp.tanh(x @ (layer["w"].T * layer["s"][0]).T) * scale
    wave = jnp.abs(params["wave"]) * x
    ids = params["table"][0][inputs["ids"]]
    return {"x": x, "pair": (wave + params["half"].astype(jnp.float32)[None], [ids, None]), "sum": jnp.sum(x, -1)}


SPECS = {"x": ji.spec("batch 6"), "ids": ji.spec("batch", "int32")}, ji.spec("")


def request(n, seed=3):
    random = np.random.default_rng(seed)
    x = random.standard_normal((n, 6)).astype(np.float32)
    return {"x": x, "ids": random.integers(0, 10, n).astype(np.int32)}, np.float32(1.5)


def make():
    return ji.compile(ji.trace(forward, params(), *SPECS), buckets={"batch": [2, 4]})


@pytest.fixture(scope="module")
def original():
    return make()


@pytest.fixture(scope="module")
def saved(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "model"
    original.save(path)
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_what_is_loaded_is_what_was_saved(original, saved):
    before = compile_events()
    loaded = ji.Executable.load(saved)
    for n in range(1, 5):
        assert_same(loaded(*request(n)), original(*request(n)))
    assert_same(loaded.with_params(params(7))(*request(3)), original.with_params(params(7))(*request(3)))
    assert compile_events() == before and loaded.compile_count == 0
    assert loaded.report.compiled == 0
    assert [made.origin for made in loaded.why_compiled()] == ["the bundle"] * 2
    assert all(made.cause == "ahead, at load" for made in loaded.why_compiled())
    assert loaded.explain() == original.explain()
    assert loaded.program.independent_axes == original.program.independent_axes == {"batch"}
    assert loaded.program.why("batch") == original.program.why("batch")
    assert "HloModule" in loaded.hlo_text({"batch": 2})
    assert "from the bundle" in str(loaded.program)
    assert len(loaded.params) == len(original.params) and "float32[batch 6]" in str(loaded.program)


def test_bad_inputs_are_refused_as_before(original, saved):
    loaded = ji.Executable.load(saved, ahead=False)
    for inputs in (request(5), request(2)[:1], (request(2)[0], np.zeros(3, np.float32))):
        errors = []
        for executable in (original, loaded):
            with pytest.raises(ji.RequestError) as caught:
                executable(*inputs)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]
    with pytest.raises(ji.RequestError, match="shapes and dtypes"):
        loaded.with_params({**params(), "half": np.ones(6, np.float32)})


FRESH = """
import json, sys
import jax, numpy as np
events = []
jax.monitoring.register_event_duration_secs_listener(lambda event, duration, **keywords: events.append(event))
import jaxinfer as ji
z = np.load(sys.argv[2])
inputs = {"x": z["x"], "ids": z["ids"]}, z["scale"]
params = {"layers": [{"w": z["w0"], "s": {0: np.float32(1)}}, {"w": z["w1"], "s": {0: np.float32(2)}}],
          "half": z["half"].view("bfloat16"), "table": (z["table"], None, np.ones((0, 3), np.float32)),
          "wave": z["wave"][()]}
told = []
for number in (0, 3):
    device = jax.devices()[number]
    executable = ji.Executable.load(sys.argv[1], device=device)
    out = executable(*inputs)
    again = executable.with_params(params)(*inputs)
    np.savez(f"{sys.argv[3]}-{number}.npz", *(np.asarray(leaf) for leaf in jax.tree.leaves((out, again))))
    told.append({"count": executable.compile_count, "why": str(executable.why_compiled()),
                 "tree": str(jax.tree.structure(out)), "on": str(executable.params[0].devices())})
compiles = [event for event in events if event.startswith("/jax/core/compile")]
print(json.dumps([compiles, [name for name in sys.modules if "test_bundle" in name], told]))
"""


def test_a_fresh_process_neither_traces_nor_compiles(original, saved, tmp_path):
    """Without this module, with an empty cache, and on a device other than the one that it was compiled for, too."""
    other = params(7)
    arrays = {**request(3)[0], "scale": request(3)[1], "half": other["half"].view(np.uint16), "wave": other["wave"]}
    arrays |= {"table": other["table"][0], "w0": other["layers"][0]["w"], "w1": other["layers"][1]["w"]}
    np.savez(tmp_path / "in.npz", **arrays)
    environment = {**os.environ, "JAXINFER_CACHE": str(tmp_path / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR")
    command = [sys.executable, "-c", FRESH, *map(str, (saved, tmp_path / "in.npz", tmp_path / "out"))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    compiles, modules, told = json.loads(done.stdout)
    assert compiles == [] and modules == []
    assert list((tmp_path / "cache").glob("executables/*")) == []
    wanted = original(*request(3)), original.with_params(other)(*request(3))
    for number, one in zip((0, 3), told, strict=True):
        assert one["count"] == 0 and one["tree"] == str(jax.tree.structure(wanted[0]))
        assert one["why"].count("the bundle") == 2 and "XLA" not in one["why"]
        assert one["on"] == f"{{CpuDevice(id={number})}}"
        got = np.load(tmp_path / f"out-{number}.npz")
        for name, want in zip(got.files, jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(got[name], np.asarray(want))


def edit(path, change, seal=True):
    """Changes the manifest, and gives it a digest that fits again."""
    body = json.loads((path / "manifest.json").read_text())
    body.pop("digest")
    body = change(body) or body
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    if seal:
        body["digest"] = hashlib.sha256(text).hexdigest()
    (path / "manifest.json").write_text(json.dumps(body))


@pytest.mark.parametrize("key", bundle_manifest.HOST)
def test_made_elsewhere_is_compiled_from_stablehlo_and_says_so(original, copy, caplog, tmp_path, monkeypatch, key):
    if key not in ("jax", "machine"):  # two are enough to run
        edit(copy, lambda body: body["host"].update({key: "other"}))
        with caplog.at_level(logging.WARNING, "jaxinfer"):
            ji.Executable.load(copy, ahead=False)
        assert f"{key} other there" in caplog.text
        return
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    edit(copy, lambda body: body["host"].update({key: "0.0.1"}))
    with caplog.at_level(logging.WARNING, "jaxinfer"):
        loaded = ji.Executable.load(copy, ahead=False)
    assert f"was made elsewhere ({key} 0.0.1 there, " in caplog.text and "StableHLO" in caplog.text
    assert_same(loaded(*request(3)), original(*request(3)))
    (made,) = loaded.why_compiled()
    assert (made.bucket, made.cause, made.origin) == ({"batch": 4}, {"batch": 3}, "XLA, of the bundle's StableHLO")
    assert loaded.report.compiled == 1
    # The second time it comes out of the cache on disk, and other weights work too.
    again = ji.Executable.load(copy, ahead=False)
    assert_same(again.with_params(params(7))(*request(4)), original.with_params(params(7))(*request(4)))
    assert again.why_compiled()[0].origin == "the cache on disk, of the bundle's StableHLO"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-9],
        lambda data: data[:700] + bytes([data[700] ^ 1]) + data[701:],
        lambda data: b"",
        None,
    ],
    ids=["cut short", "a flipped bit", "empty", "missing"],
)
def test_damaged_machine_code_is_compiled_again_and_says_so(original, copy, caplog, damage):
    file = copy / "program-1.xla"
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING, "jaxinfer"):
        loaded = ji.Executable.load(copy)
    assert "the machine code of program-1 in" in caplog.text and str(copy) in caplog.text
    first, second = loaded.why_compiled()
    assert first.origin == "the bundle" and "of the bundle's StableHLO" in second.origin
    assert_same(loaded(*request(4)), original(*request(4)))


def test_machine_code_that_does_not_fit_is_not_run(original, copy, caplog):
    """The right digest of the wrong program: the shapes that it was compiled for are compared first."""
    shutil.copy(copy / "program-0.xla", copy / "program-1.xla")
    edit(copy, lambda body: body["programs"][1].__setitem__(1, body["programs"][0][1]))
    with caplog.at_level(logging.WARNING, "jaxinfer"):
        loaded = ji.Executable.load(copy)
    assert "takes or returns other arrays" in caplog.text
    assert_same(loaded(*request(4)), original(*request(4)))


def test_machine_code_of_strangers_is_never_run(original, saved, monkeypatch):
    monkeypatch.setattr(native, "load", lambda *a: pytest.fail("machine code was loaded"))
    monkeypatch.setattr("jaxinfer.cache.has", lambda key: False)
    loaded = ji.Executable.load(saved, machine_code=False, ahead=False)
    assert_same(loaded(*request(2)), original(*request(2)))


def test_nothing_is_unpickled(saved, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("unpickled")

    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "pickle._Unpickler"):
        monkeypatch.setattr(name, refuse)
    ji.Executable.load(saved)(*request(1))
    ji.Executable.load(saved, machine_code=False, ahead=False)


HOSTILE = {
    "an unknown version": (lambda b: b.update(version=2), "has format version 2; this jaxinfer reads version 1"),
    "another format": (lambda b: b.update(format="zip"), "is no bundle"),
    "a missing key": (lambda b: b.pop("weights") and None, "not one that save"),
    "a program too few": (lambda b: b["programs"].pop() and None, "1 programs for 2 combinations"),
    "a bucket of another size": (lambda b: b["programs"][0][0].update(batch=3), "which is no bucket"),
    "a program twice": (lambda b: b["programs"][0][0].update(batch=4), "a bucket twice"),
    "descending buckets": (lambda b: b["buckets"].update(batch=[4, 2]), "buckets of batch"),
    "a bucket of text": (lambda b: b["buckets"].update(batch=["2", 4]), "where sizes belong"),
    "an unknown dtype": (lambda b: b["weights"][0].__setitem__(0, "object"), "unknown dtype 'object'"),
    "a wrong dtype": (lambda b: b["weights"][0].__setitem__(0, "int64"), "the weight of parameter"),
    "a negative size": (lambda b: b["weights"][0].__setitem__(1, [-1]), "is wanted"),
    "a huge array": (lambda b: b["weights"][0].__setitem__(1, [2**40, 2**40]), "is wanted"),
    "a path for a digest": (lambda b: b["programs"][0].__setitem__(2, "../../etc/passwd"), "for a digest"),
    "a weight of no parameter": (lambda b: b["kept"].__setitem__(0, 999), "a weight of no parameter"),
    "a prelude that isn't": (lambda b: b["made"][0].__setitem__(0, 9), "made of nothing"),
    "padding undecided": (lambda b: b.update(padding=[]), "padding decided"),
    "an unnamed dim": (lambda b: b["inputs"]["tuple"][1].update(leaf=["float32", ["a b"]]), "where a dim belongs"),
    "an endless tree": (lambda b: b.update(params=nested(150)), "nested deeper"),
    "no tree": (lambda b: b.update(params={"set": []}), "no node of a tree"),
    "64 bits": (lambda b: b.update(x64=True), "64-bit types"),
}


def nested(depth):
    return {"list": [nested(depth - 1)]} if depth else None


@pytest.mark.parametrize("case", HOSTILE)
def test_a_manifest_that_lies(copy, case):
    change, message = HOSTILE[case]
    edit(copy, change)
    with pytest.raises(ji.CheckpointError, match=message):
        ji.Executable.load(copy)


def overwrite(name, change):
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))


DAMAGE = {
    "a manifest edited by hand": (lambda p: edit(p, lambda b: b.update(name="x"), seal=False), "digest differs"),
    "a manifest cut short": (overwrite("manifest.json", lambda b: b[:-5]), "not valid JSON"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "can't read .*manifest.json"),
    "no weights": (lambda p: (p / "weights.safetensors").unlink(), "can't open .*weights.safetensors"),
    "weights cut short": (overwrite("weights.safetensors", lambda b: b[:-4]), "cut short"),
    "a flipped weight": (
        overwrite("weights.safetensors", lambda b: b[:-3] + bytes([b[-3] ^ 1]) + b[-2:]),
        "is damaged",
    ),
    "another dtype in the file": (overwrite("weights.safetensors", lambda b: b.replace(b'"F32"', b'"I32"')), "is I32"),
    "a pipe for a manifest": (
        lambda p: ((p / "manifest.json").unlink(), os.mkfifo(p / "manifest.json")),
        "regular file",
    ),
    "no bundle": (lambda p: shutil.rmtree(p), "is no folder"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_bundle(copy, case):
    damage, message = DAMAGE[case]
    damage(copy)
    with pytest.raises(ji.CheckpointError, match=message):
        ji.Executable.load(copy)


@pytest.mark.parametrize("resealed", [False, True])
def test_damaged_stablehlo_is_an_error_only_where_it_is_needed(original, copy, resealed):
    file = copy / "program-0.stablehlo"
    file.write_bytes(b"ML\xefR" + file.read_bytes()[40:])
    if resealed:  # a digest that fits, of what no exporter wrote
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        edit(copy, lambda body: body["programs"][0].__setitem__(2, digest))
    assert_same(ji.Executable.load(copy)(*request(2)), original(*request(2)))
    with pytest.raises(ji.CheckpointError, match="can't be read by JAX" if resealed else "is damaged"):
        ji.Executable.load(copy, machine_code=False)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=5) | st.just("batch") | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_manifest_is_read_or_refused(saved, data):
    body = json.loads((saved / "manifest.json").read_text())
    body.pop("digest")
    at = body
    for _ in range(data.draw(st.integers(0, 4))):  # somewhere inside
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        inner = [k for k in keys if isinstance(at[k], dict | list) and at[k]]
        if not inner:
            break
        at = at[data.draw(st.sampled_from(inner))]
    keys = list(at) if isinstance(at, dict) else list(range(len(at)))
    at[data.draw(st.sampled_from(keys))] = data.draw(JSON)
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    body["digest"] = hashlib.sha256(text).hexdigest()
    with contextlib.suppress(ji.CheckpointError):
        bundle_manifest.parse(json.dumps(body).encode(), "this")


def test_what_is_there_is_kept(original, saved, tmp_path):
    with pytest.raises(ji.CheckpointError, match=r"exists; choose another path, or save\(path, overwrite=True\)"):
        original.save(saved)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ji.CheckpointError, match="is no bundle, so it is not overwritten"):
        original.save(folder, overwrite=True)
    assert (folder / "thesis.tex").exists()


def test_a_write_that_fails_leaves_nothing_or_what_was_there(original, tmp_path, monkeypatch):
    good = tmp_path / "good"
    original.save(good)
    write, calls = bundle_files.write, []

    def failing(path, data):
        calls.append(path)
        if len(calls) == failing.at:
            raise failing.error
        return write(path, data)

    monkeypatch.setattr(bundle_files, "write", failing)
    for failing.error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        for failing.at in (1, 3, 5):
            expected = ji.CheckpointError if isinstance(failing.error, OSError) else KeyboardInterrupt
            for path in (tmp_path / "new", good):
                calls.clear()
                with pytest.raises(expected):
                    original.save(path, overwrite=True)
            assert [p.name for p in tmp_path.iterdir()] == ["good"]
    monkeypatch.undo()
    rename = Path.rename

    def no_second_rename(self, target):  # the old bundle is out of the way, the new one can't take its place
        if self.suffix == ".new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", no_second_rename)
        with pytest.raises(ji.CheckpointError, match="Input/output error"):
            original.save(good, overwrite=True)
    assert_same(ji.Executable.load(good)(*request(2)), original(*request(2)))
    other = original.with_params(params(7))
    other.save(good, overwrite=True)
    assert_same(ji.Executable.load(good)(*request(2)), other(*request(2)))
    assert [p.name for p in tmp_path.iterdir()] == ["good"]


def test_a_killed_save_leaves_no_bundle(tmp_path):
    """Every state of the disk that a crash can leave: files are written before the manifest, the folder moved last."""
    seen = []
    source = ji.compile(ji.trace(lambda p, x: x * p, np.float32(2), ji.spec("batch")), buckets={"batch": [1]})
    real = bundle_files.write

    def watching(path, data):
        for folder in (tmp_path / "b", path.parent):
            with pytest.raises(ji.CheckpointError):
                ji.Executable.load(folder)
        seen.append(path.name)
        return real(path, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle_files, "write", watching)
        source.save(tmp_path / "b")
    assert seen[-1] == "manifest.json" and len(seen) >= 3
    np.testing.assert_array_equal(ji.Executable.load(tmp_path / "b")(np.ones(1, np.float32)), [2])


def test_a_loaded_one_saves_itself(original, saved, copy, tmp_path):
    ji.Executable.load(saved).with_params(params(7)).save(tmp_path / "second")
    (copy / "program-1.xla").write_bytes(b"")
    mended = ji.Executable.load(copy)
    mended.save(tmp_path / "third")
    before = compile_events()
    second, third = (ji.Executable.load(tmp_path / name) for name in ("second", "third"))
    assert_same(second(*request(3)), original.with_params(params(7))(*request(3)))
    assert_same(third(*request(3)), original(*request(3)))
    assert compile_events() == before


def test_programs_from_the_cache_can_be_saved(tmp_path, monkeypatch):
    """XLA:CPU serialises a loaded executable without its code: what is saved must come from the cache's own bytes."""
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "cache"))
    program = ji.trace(lambda p, x: jnp.tanh(x @ p), np.eye(7, dtype=np.float32) * 1.75, ji.spec("batch 7"))
    fresh = lambda: ji.compile(program, buckets={"batch": [3]})  # noqa: E731
    fresh()
    cached = fresh()
    assert cached.report.compiled == 0
    cached.save(tmp_path / "one")
    x = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32)
    np.testing.assert_array_equal(ji.Executable.load(tmp_path / "one")(x), cached(x))
    cached = fresh()
    shutil.rmtree(tmp_path / "cache" / "executables")  # entries go when the cache is full
    cached.save(tmp_path / "two")
    loaded = ji.Executable.load(tmp_path / "two")
    assert loaded.report.compiled == 0
    np.testing.assert_array_equal(loaded(x), cached(x))


def test_what_may_be_padded_is_known(tmp_path):
    program = ji.trace(lambda p, x: jax.nn.softmax(x * p, axis=0), np.float32(3), ji.spec("batch 3"))
    mixing = ji.compile(program, buckets={"batch": [1, 4]})
    mixing.save(tmp_path / "b")
    loaded = ji.Executable.load(tmp_path / "b")
    with pytest.raises(ji.BatchMixingError) as saved_error:
        mixing(np.ones((3, 3), np.float32))
    with pytest.raises(ji.BatchMixingError) as error:
        loaded(np.ones((3, 3), np.float32))
    assert str(error.value) == str(saved_error.value) and "test_bundle.py" in str(error.value)
    assert loaded.program.independent_axes == frozenset()
    np.testing.assert_array_equal(loaded(np.ones((4, 3), np.float32)), mixing(np.ones((4, 3), np.float32)))


Point = collections.namedtuple("Point", "a b")


@pytest.mark.parametrize(
    ("forward", "arguments", "message"),
    [
        (lambda p, x: Point(x, x), ((), ji.spec("batch")), r"outputs' tree is a test_bundle.Point.*\._asdict\(\)"),
        (
            lambda p, x: {"a": [collections.OrderedDict(b=x)]},
            ((), ji.spec("batch")),
            r"outputs' tree\['a'\]\[0\] is a collections.OrderedDict.*Use a dict",
        ),
        (lambda p, x: x * p.a, (Point(np.float32(1), ()), ji.spec("batch")), "parameters' tree is a test_bundle.Point"),
        (lambda p, x: x.a, ((), Point(ji.spec("batch"), None)), r"inputs' tree\[0\] is a test_bundle.Point"),
        (lambda p, x: {1.5: x}, ((), ji.spec("batch")), "has the key 1.5"),
        (
            lambda p, x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="sequential"),
            ((), ji.spec("batch")),
            "calls back into Python",
        ),
    ],
    ids=["namedtuple", "OrderedDict", "params", "inputs", "float key", "callback"],
)
def test_what_cannot_be_saved_says_why(tmp_path, forward, arguments, message):
    executable = ji.compile(ji.trace(forward, *arguments), buckets={"batch": [1]})
    with pytest.raises(ji.CheckpointError, match=message):
        executable.save(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


TREES = st.recursive(
    st.integers(0, 9) | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
        | st.dictionaries(st.integers(-3, 3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(TREES)
@settings(deadline=None)
def test_trees_are_restored_exactly(tree):
    text = json.dumps(encode(tree, lambda leaf: leaf, "it"))
    found = decode(json.loads(text), lambda leaf: leaf, "it")
    assert found == tree and jax.tree.structure(found) == jax.tree.structure(tree)


def test_a_wide_range_of_dtypes(tmp_path):
    names = ["bool", "uint8", "int16", "uint32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2fnuz", "complex64"]
    weights = {name: np.arange(6).reshape(2, 3).astype(name) for name in names}
    program = ji.trace(lambda p, x: [x + p["uint8"].astype("float32").sum(), p], weights, ji.spec("batch"))
    executable = ji.compile(program, buckets={"batch": [2]}, passes=[])
    executable.save(tmp_path / "b")
    assert_same(ji.Executable.load(tmp_path / "b")(np.ones(2, np.float32)), executable(np.ones(2, np.float32)))
