"""The batch proof: which forwards keep rows apart, which don't, and what users are told."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from forwards import ZOO, trace
from jax import lax

import jaxinfer as ji

pytestmark = pytest.mark.jax_defaults

W = jnp.asarray(np.random.default_rng(0).standard_normal((12, 12)), jnp.float32)
TABLE = jnp.asarray(np.random.default_rng(1).standard_normal((40, 12)), jnp.float32)


def proved(forward, *dims, params=None, dtype="float32"):
    return ji.trace(forward, W if params is None else params, *(ji.spec(d, dtype) for d in dims or ("batch 12",)))


@pytest.mark.parametrize("row", [row for row in ZOO if "batch" in row.axes.split()], ids=lambda row: row.name)
def test_the_zoo(row):
    """Forwards as their papers' authors write them; what is true of each was found by brute force (test_forwards)."""
    program = trace(row.name)
    assert ("batch" in program.independent_axes) == row.independent, program.why("batch")


# Forwards that keep rows apart, each by another way in which the batch travels.
APART = {
    "merged and back": lambda w, x: (x.reshape(-1, 4, 3).reshape(-1, 3) @ w[:3]).reshape(x.shape[0], -1),
    "time before batch": lambda w, x: (
        jnp.swapaxes(jnp.swapaxes(x.reshape(-1, 4, 3), 0, 1).reshape(-1, 3), 0, 1).reshape(3, 4, -1).transpose(2, 1, 0)
    ),
    "size 1 dims": lambda w, x: (x[:, None, :, None] * w[None, :, :, None]).sum(2)[..., 0],
    "batch as the last dim": lambda w, x: (w @ x.T).T,
    "positions after the merge": lambda w, x: (
        x.reshape(-1, 4, 3).reshape(-1, 3) + jnp.broadcast_to(w[:4, :3], (x.shape[0], 4, 3)).reshape(-1, 3)
    ).reshape(x.shape),
    "heads": lambda w, x: jnp.einsum("bhd,bgd->bhg", (x @ w).reshape(-1, 4, 3), x.reshape(-1, 4, 3)),
    "vmap": lambda w, x: jax.vmap(lambda row: jnp.sort(w @ row))(x),
    "map over the batch": lambda w, x: lax.map(lambda row: jnp.cumsum(w @ row), x),
    "scan over layers": lambda w, x: lax.scan(lambda h, one: (jnp.tanh(h * one), h.sum(1)), x, w)[0],
    "stacked by the scan": lambda w, x: lax.scan(lambda h, one: (jnp.tanh(h * one), h.sum(1)), x, w)[1].T,
    "carry of zeros": lambda w, x: lax.scan(
        lambda h, row: (h + row[:, None] * w[0], None), jnp.zeros((x.shape[0], 12)), x.T
    )[0],
    "while": lambda w, x: lax.while_loop(lambda c: c[0] < w[0, 0], lambda c: (c[0] + 1, c[1] * 2), (0.0, x))[1],
    "vmapped while": lambda w, x: jax.vmap(
        lambda row: lax.while_loop(lambda v: v.sum() < 9, lambda v: jnp.abs(v) * 1.1 + 0.1, row)
    )(x),
    "rows frozen by hand": lambda w, x: lax.while_loop(
        lambda v: (v.sum(1) < 9).any(), lambda v: jnp.where((v.sum(1) < 9)[:, None], jnp.abs(v) + 0.1, v), x
    ),
    "cond": lambda w, x: lax.cond(w[0, 0] > 0, lambda v: v * 2, lambda v: jnp.zeros_like(v), x),
    "vmapped cond": lambda w, x: jax.vmap(lambda r: lax.cond(r[0] > 0, lambda v: v @ w, lambda v: v, r))(x),
    "own place in a row": lambda w, x: x[jnp.arange(x.shape[0]), jnp.argmax(x, 1)],
    "own place, two dims": lambda w, x: x.reshape(-1, 4, 3)[
        jnp.arange(x.shape[0])[:, None], jnp.argsort(x, 1)[:, :2] % 4
    ],
    "written in its row": lambda w, x: x.at[jnp.arange(x.shape[0]), jnp.argmax(x, 1)].set(0.0),
    "take along": lambda w, x: jnp.take_along_axis(x, jnp.argsort(x, 1), 1),
    "guidance": lambda w, x: jnp.subtract(*jnp.split(jnp.concatenate([x, x * 0]) @ w, 2)),
    "solve": lambda w, x: jnp.linalg.solve(w + 9 * jnp.eye(12), x.T).T,
    "solve each": lambda w, x: jnp.linalg.solve(x[:, :, None] * w + 9 * jnp.eye(12), x[..., None])[..., 0],
    "gradient of the input": lambda w, x: jax.grad(lambda v: jnp.sum(jnp.tanh(v @ w)))(x),
    "fft": lambda w, x: jnp.abs(jnp.fft.rfft(x)),
    "convolution": lambda w, x: lax.conv_general_dilated(x[:, None], w[:, None, :3], (2,), "SAME"),
    "a kernel of each row's own": lambda w, x: jax.vmap(
        lambda r, k: lax.conv_general_dilated(r.reshape(1, 3, 4), k.reshape(2, 3, 2), (1,), "SAME")
    )(x, x @ w),
    "dead statistics": lambda w, x: (x - x.mean(0), x * 2)[1],
    "one row's random key": lambda w, x: jax.vmap(
        lambda r: jax.random.uniform(jax.random.fold_in(jax.random.key(0), r[0].astype(int)), (3,))
    )(x),
    "prefix tree": lambda w, x: lax.associative_scan(jnp.multiply, x, axis=1),
    "shared result": lambda w, x: (x, w.sum()),
    "same for all rows": lambda w, x: (x, jnp.ones((x.shape[0], 3))),
}


@pytest.mark.parametrize("name", APART)
def test_rows_kept_apart(name):
    program = proved(APART[name])
    assert program.independent_axes == {"batch"}, program.why("batch")


# Forwards that mix rows, and words that the refusal must say.
MIXING = {
    "mean": (lambda w, x: x - x.mean(0), "averages over 'batch'.*model.eval()"),
    "softmax": (lambda w, x: jax.nn.softmax(x, axis=0), r"softmax over 'batch' \(dim 0\)"),
    "max": (lambda w, x: x - x.max(0), "maximum over 'batch'"),
    "number of rows": (
        lambda w, x: x / x.shape[0],
        "how many rows of 'batch' there are: the constant 1[137].0 here is",
    ),
    "count of ones": (lambda w, x: x / jnp.ones(x.shape[0]).sum(), "counts the rows of 'batch'"),
    "branch on the size": (lambda w, x: x if x.shape[0] < 12 else x * 2, "another way for another number of rows"),
    "place": (lambda w, x: x + jnp.arange(x.shape[0])[:, None], "numbers the rows of 'batch'"),
    "constant place": (lambda w, x: x + np.arange(x.shape[0])[:, None], "differs from row to row of 'batch'"),
    "own place off by one": (lambda w, x: x[jnp.arange(x.shape[0]) - 1], "numbers the rows"),
    "sort": (lambda w, x: jnp.sort(x, 0), "sorts the rows of 'batch'"),
    "flip": (lambda w, x: x[::-1], "reverses the order of the rows"),
    "roll": (lambda w, x: jnp.roll(x, 1, 0), "takes some rows of 'batch' by their place"),
    "cumsum": (lambda w, x: jnp.cumsum(x, 0), "cumulative operation over 'batch'"),
    "pairs": (lambda w, x: x @ x.T @ x, "different rows of 'batch'"),
    "contraction": (lambda w, x: x @ (x.T @ x), "multiplies and sums over 'batch'"),
    "gather": (lambda w, x: x[jnp.argmax(x, 1)], "indexes the rows of 'batch'"),
    "scatter": (lambda w, x: x.at[jnp.argmax(x, 1) % 2].add(1.0), "writes where an index"),
    "first row": (lambda w, x: x - x[0], "some rows of 'batch' by their place"),
    "regrouped": (lambda w, x: x.reshape(-1)[::-1].reshape(x.shape), "reverses"),
    "torn apart": (lambda w, x: x.reshape(3, -1).sum(1) + x[:, :1], "regroups 'batch'"),
    "random bits": (
        lambda w, x: x + jax.random.normal(jax.random.key(0), x.shape),
        "draws random bits for all rows of 'batch' at once",
    ),
    "carried": (lambda w, x: lax.scan(lambda h, r: (h + r, h), x[0] * 0, x)[1], "."),
    "counter": (lambda w, x: lax.scan(lambda i, r: (i + 1, r * i), 0, x)[1], "carries a value from row to row"),
    "until all are done": (lambda w, x: lax.while_loop(lambda v: v.sum() < 9, lambda v: v + 1, x), "loops until"),
    "branch on all": (lambda w, x: lax.cond(x.sum() > 0, lambda v: v, lambda v: v * 2, x), "sums or averages"),
    "callback": (
        lambda w, x: jax.pure_callback(lambda a: np.asarray(a), x, x, vmap_method="sequential"),
        "a call of code that JAX doesn't see into",
    ),
    "window": (
        lambda w, x: lax.reduce_window(x, 0.0, lax.add, (3, 1), (1, 1), "SAME"),
        "slides a window across the rows of 'batch'",
    ),
    "across a merge": (
        lambda w, x: jnp.cumsum(x.reshape(-1, 4, 3).reshape(-1, 3), 0).reshape(x.shape),
        "cumulative operation over 'batch'",
    ),
    "uneven guidance": (lambda w, x: jnp.concatenate([x, x * 2])[1 : x.shape[0] + 1], "some rows of 'batch'"),
    "frozen wrongly": (
        lambda w, x: lax.while_loop(
            lambda v: (v.sum(1) < 9).any(), lambda v: jnp.where((v.sum(1) < 8)[:, None], v + 1, v), x
        ),
        "loops until",
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_rows_mixed(name):
    forward, words = MIXING[name]
    program = proved(forward)
    why = program.why("batch")
    assert program.independent_axes == frozenset(), why
    import re

    assert re.search(words, why), why
    assert "test_proof.py:" in why, why  # the user's own line
    assert "exact sizes" in why


class Norm(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(12, 5, rngs=rngs), nnx.BatchNorm(5, rngs=rngs)

    def __call__(self, x):
        return jax.nn.relu(self.norm(self.dense(x)))


def test_nnx_batchnorm():
    model = Norm(nnx.Rngs(0))
    model.eval()
    assert ji.trace(model, ji.spec("batch 12")).independent_axes == {"batch"}


def test_linen_batchnorm_in_training_mode_names_the_users_line():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))

    net = Net()
    variables = net.init(jax.random.key(0), jnp.ones((2, 12)), train=False)
    assert ji.trace(net, variables, ji.spec("batch 12"), train=False).independent_axes == {"batch"}
    program = ji.trace(
        lambda v, x: net.apply(v, x, train=True, mutable=["batch_stats"])[0], variables, ji.spec("batch 12")
    )
    assert "BatchNorm in training mode? Call model.eval()" in program.why("batch")
    assert "test_proof.py:" in program.why("batch")


def test_the_proof_as_it_is_told():
    def forward(params, tokens, scale):
        return params[tokens].mean(1) * scale

    program = ji.trace(forward, TABLE, ji.spec("batch time", "int32"), ji.spec("12"))
    assert program.independent_axes == {"batch"}
    told = program.why("batch")
    assert told.startswith("batch: rows don't mix. Row i of every output depends on row i of the inputs alone")
    assert "Shared by all rows: the parameters and the inputs float32[12]" in told
    assert "output 0: 'batch' is dim 0" in told
    assert 'masked=("time",)' in program.why("time")
    assert "sums or averages over 'time'" in program.why("time")


def test_both_axes_of_an_elementwise_forward():
    program = ji.trace(lambda p, x: jnp.tanh(x @ p), W, ji.spec("batch time 12"))
    assert program.independent_axes == {"batch", "time"}


def test_merged_output():
    program = ji.trace(lambda p, x: x.reshape(-1, 3), (), ji.spec("batch time 6"))
    assert "merged into dim 0 (1 x batch x " in program.why("batch")


def test_an_axis_that_is_not_there():
    with pytest.raises(ji.TraceError, match="no named dim 'rows'"):
        proved(lambda w, x: x).why("rows")


def test_a_coincidence_of_sizes_is_no_identity():
    """A constant dim that the analysis's number of rows happens to divide is not taken for rows."""
    prime = proved(lambda w, x: x).analysis_sizes["batch"]
    program = proved(lambda w, x: x @ w @ jnp.ones((12, 2 * prime)) * jnp.linspace(0, 1, 2 * prime))
    assert program.analysis_sizes["batch"] == prime
    assert program.independent_axes == {"batch"}, program.why("batch")
