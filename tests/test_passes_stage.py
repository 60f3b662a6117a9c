"""What is made at load, what stays in the call, and the one list of weights that all buckets share."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from passes_helpers import Outcome, random_like

import jaxinfer as ji
from jaxinfer.errors import TraceError
from jaxinfer.graph import evaluate, flatten
from jaxinfer.passes import chosen, stage
from jaxinfer.passes.prepared import Prepared
from jaxinfer.passes.rewriting import verify

pytestmark = pytest.mark.jax_defaults
N = 256  # [N, N] float32 is over the size up to which anything is kept


def zeros(*shapes, dtype=jnp.float32):
    return [jnp.zeros(s, dtype) for s in shapes]


def staged_shapes(outcome):
    return sorted(f"{n.dtype}{list(n.shape)}" for n in outcome.prelude.outputs)


def program(forward, params, *inputs):
    return ji.trace(forward, params, *(inputs or (ji.spec(f"batch {N}"),)))


def rope(p, x):
    angles = jnp.arange(N)[:, None] * 10_000 ** (-jnp.arange(0, N, 2) / N)
    return x @ jnp.cos(angles) + x @ jnp.sin(angles)


STAGED = {
    # forward, params, what is staged, which params stay
    "cast": (
        lambda p, x: x.astype(jnp.bfloat16) @ p[0].astype(jnp.bfloat16),
        zeros((N, N)),
        ["bfloat16[256, 256]"],
        (),
    ),
    "transposed": (lambda p, x: x * p[0].T[:1], zeros((N, N)), ["float32[1, 256]"], ()),
    "transposed whole": (lambda p, x: p[0].T[None] * x[:, None], zeros((N, N)), ["float32[256, 256]"], ()),
    "scaled": (lambda p, x: x @ (p[0] * 0.5 + 1), zeros((N, N)), ["float32[256, 256]"], ()),
    "low rank update": (
        lambda p, x: x @ (p[0] + p[1] @ p[2]),
        zeros((N, N), (N, 2), (2, N)),
        ["float32[256, 256]"],
        (),
    ),
    "normalised": (
        lambda p, x: x @ (p[0] / jnp.linalg.norm(p[0], axis=0)),
        zeros((N, N)),
        ["float32[256, 256]"],
        (),
    ),
    "split": (lambda p, x: [x @ w for w in jnp.split(p[0], 2, 1)], zeros((N, 2 * N)), ["float32[256, 256]"] * 2, ()),
    "joined": (lambda p, x: x @ jnp.concatenate(p, 1), zeros((N, N), (N, N)), ["float32[256, 512]"], ()),
    "a table of positions": (rope, [], ["float32[256, 128]"] * 2, ()),
    "embedding read twice": (
        lambda p, x: (p[0] * 2)[x.astype(jnp.int32)[:, :1]] + p[0].sum(),
        zeros((N, N)),
        ["float32[256, 256]", "float32[]"],
        (),
    ),
    "an output": (lambda p, x: (x, p[0] * 2), zeros((N, N)), ["float32[256, 256]"], ()),
    # what would grow memory
    "factors": (lambda p, x: x @ (p[0] @ p[1]), zeros((N, 2), (2, N)), [], (0, 1)),
    "tied embedding": (lambda p, x: p[0][x.astype(jnp.int32)[:, 0]] @ p[0].T.copy(), zeros((N, N)), [], (0,)),
    "two casts": (
        lambda p, x: x @ p[0].astype(jnp.bfloat16).astype(jnp.float32) + x @ (p[0] * 2),
        zeros((N, N)),
        [],
        (0,),
    ),
    "a mask": (lambda p, x: jnp.where(jnp.tril(jnp.ones((N, N), bool)), x[:, None], p[0]), zeros((N, N)), [], (0,)),
    "a broadcast": (lambda p, x: x[:, None] + jnp.broadcast_to(p[0], (300, N)), zeros((N,)), [], (0,)),
    "a wider dtype": (lambda p, x: x @ p[0].astype(jnp.float32), zeros((N, N), dtype=jnp.bfloat16), [], (0,)),
    "a large table": (lambda p, x: x @ jnp.cos(jnp.arange(N * 2048.0)).reshape(N, 2048), [], [], ()),
    "by the input": (lambda p, x: x @ (p[0] * x.sum()), zeros((N, N)), [], (0,)),
}


@pytest.mark.parametrize("name", STAGED)
def test_the_rule(name: str):
    forward, params, values, kept = STAGED[name]
    outcome = Outcome(program(forward, params), ["simplify"])
    assert staged_shapes(outcome) == values
    assert outcome.staged.kept == kept
    tolerance = 2e-2 if "bfloat16[256, 256]" in values else 1e-6
    assert outcome.error < tolerance


def test_a_smaller_limit_on_tables():
    table = program(lambda p, x: x @ jnp.cos(jnp.arange(N * N * 1.0)).reshape(N, N), [])
    assert staged_shapes(Outcome(table)) == ["float32[65536]"]
    assert staged_shapes(Outcome(table, table_bytes=1000)) == []


def test_the_split_is_told():
    outcome = Outcome(program(*STAGED["embedding read twice"][:2]))
    first, *rest = outcome.staged.notes
    assert "2 values" in first.what
    assert "1 weights (262,144 bytes) dropped" in first.what
    assert all(note.where.startswith("test_passes_stage.py") for note in rest)
    refused = Outcome(program(*STAGED["factors"][:2])).staged.notes
    assert any("stays in the call: kept, it would take 262,144 bytes more" in n.what for n in refused)


def test_captured_weights_are_weights_too():
    w = np.random.default_rng(0).standard_normal((N, N)).astype(np.float32)
    outcome = Outcome(program(lambda p, x: x @ (jnp.asarray(w).T * 2.0), []))
    assert outcome.error < 1e-6
    assert not any(n.constant and n.shape == (N, N) for e in outcome.main.equations for n in e.inputs)
    assert staged_shapes(outcome) == ["float32[256, 256]"]


def positions(p, x):
    """Learned positions, cut to the length: differs between buckets, so it is neither staged nor lost."""
    time = x.shape[1]
    return (x + p["table"][:time]) @ (p["w"] * 2) + jnp.tanh(p["table"][:time].sum(0))


POSITIONS = {"table": jnp.ones((64, 300)), "w": jnp.ones((300, 300))}


def test_buckets_share_what_does_not_depend_on_their_sizes():
    traced = ji.trace(positions, random_like(POSITIONS), ji.spec("batch time 300"))
    prepared = Prepared(traced)
    assert [n.shape for n in prepared.staged.prelude.outputs] == [(300, 300)]
    assert len(prepared.staged.kept) == 1
    executable = ji.compile(traced, buckets={"batch": [1, 2], "time": [1, 8, 64]})
    for batch, time in [(1, 1), (2, 8), (1, 64), (2, 64)]:
        x = np.random.default_rng(0).standard_normal((batch, time, 300)).astype(np.float32)
        want = np.asarray(positions(traced.params, x))
        np.testing.assert_allclose(executable(x), want, atol=1e-5 * np.abs(want).max())
        graph = verify(prepared.main({"batch": batch, "time": time}))
        assert [n.shape for n in graph.inputs[:-1]] == [(64, 300), (300, 300)]
        assert sum(e.name == "dot_general" for e in graph.equations) == 1


def branches(p, x):
    return x @ (p["long"] if x.shape[1] > 20 else p["short"] * 2) + p["short"][0]


BRANCHES = {"long": jnp.ones((N, N)), "short": jnp.ones((N, N))}


def test_a_forward_that_branches_on_its_shapes():
    traced = ji.trace(branches, random_like(BRANCHES), ji.spec(f"batch time {N}"))
    with pytest.raises(TraceError, match=r"reads weights \(\['long'\]\).*branches on its shapes.*passes=\[\]"):
        Prepared(traced).main({"batch": 1, "time": 32})
    executable = ji.compile(traced, buckets={"batch": [1], "time": [8, 32]})
    for time in (8, 32):
        x = np.random.default_rng(time).standard_normal((1, time, N)).astype(np.float32)
        want = np.asarray(branches(traced.params, x))
        np.testing.assert_allclose(executable(x), want, atol=1e-5 * np.abs(want).max())


def test_dropped_weights_are_freed():
    params = random_like({"w": jnp.ones((N, N)), "b": jnp.ones((N,))})
    seen = weakref.ref(params["w"])
    executable = ji.compile(
        ji.trace(lambda p, x: x @ (p["w"] * 2) + p["b"], params, ji.spec(f"batch {N}")), buckets={"batch": [1]}
    )
    want = np.ones((1, N), np.float32) @ (np.asarray(params["w"]) * 2) + np.asarray(params["b"])
    del params
    gc.collect()
    assert seen() is None
    np.testing.assert_allclose(executable(np.ones((1, N), np.float32)), want, rtol=1e-5)


def test_for_a_graph_of_ones_own():
    """What a decoding step is split with: no Program, the weights first."""
    forward = lambda w, b, x, y: (x @ (w * 2) + b, y + 1)  # noqa: E731
    graph = flatten(jax.make_jaxpr(forward)(*zeros((N, N), (N,), (3, N), ())))
    numbers = [n.number for n in graph.equations]
    split = stage(graph, 2)
    assert [n.number for n in graph.equations] == numbers
    assert verify(graph) is graph  # unchanged
    assert split.kept == (1,)
    w, b, x, y = (
        jnp.asarray(np.random.default_rng(i).standard_normal(n.shape), n.dtype) for i, n in enumerate(graph.inputs)
    )
    got = evaluate(split.main, [b, *evaluate(split.prelude, [w, b]), x, y])
    for mine, theirs in zip(got, forward(w, b, x, y), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_equal_values_of_two_traces_have_equal_keys():
    def split(time, factor=2.0):
        forward = lambda w, x: (x @ (w * factor)) @ jnp.linspace(0.0, 1.0, N)[None, :].T  # noqa: E731
        return stage(flatten(jax.make_jaxpr(forward)(*zeros((N, N), (time, N)))), 1)

    assert split(3).keys == split(4).keys
    assert set(split(3).keys) & set(split(3, 3.0).keys) != set(split(3).keys)
    assert len(stage(flatten(jax.make_jaxpr(lambda w, x: x @ (w * 2))(*zeros((N, N), (3, N)))), 1, only=()).keys) == 0


def test_names_of_passes():
    assert chosen(["fold", "simplify"]) == ("simplify", "fold")
    assert chosen([]) == ()
    assert "fold" in chosen(None)
    with pytest.raises(TraceError, match="no pass is called 'folding'; there are simplify, fold"):
        chosen(["folding"])
    with pytest.raises(TraceError, match="no pass is called"):
        ji.compile(ji.trace(lambda p, x: x, [], ji.spec("batch")), buckets={"batch": [1]}, passes="all")
