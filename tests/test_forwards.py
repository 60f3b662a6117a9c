"""What the table of forwards says is so, by brute force on the plain forwards: what later inputs and other rows reach.

This is the ground truth that the proofs and the derived decoding are tested against elsewhere.
"""

from functools import cache

import jax
import numpy as np
import pytest
from forwards import BY_NAME, ZOO, draw, trace

pytestmark = pytest.mark.jax_defaults

T = 24
SIZES = {"batch": 3, "time": T, "source": 9, "edges": 20}
WITH_TIME = [row.name for row in ZOO if "time" in row.axes.split()]
WITH_BATCH = [row.name for row in ZOO if "batch" in row.axes.split()]


@cache
def compiled(name: str):
    """The plain forward, jitted; XLA needn't optimise what runs some dozen times at tiny sizes."""
    program = trace(name)
    run = jax.jit(program.function, compiler_options={"xla_backend_optimization_level": 0})
    return lambda *inputs: np.asarray(jax.tree.leaves(run(program.params, *inputs))[0])


def changed(a: np.ndarray, b: np.ndarray, dim: int) -> np.ndarray:
    """Which indices of `dim` differ, beyond what FFTs round."""
    others = tuple(d for d in range(a.ndim) if d != dim)
    return np.abs(a - b).max(axis=others) > 2e-5 * max(1.0, np.abs(a).max())


@pytest.mark.parametrize("name", WITH_TIME)
def test_what_later_tokens_reach(name: str):
    """At every position all that comes after it is drawn anew; the outputs up to it stay if the forward is
    causal.

    Of one sequence alone where rows mix, as decoding sees it. The outputs at the changed positions change, or this
    tries nothing.
    """
    row, random = BY_NAME[name], np.random.default_rng(2)
    time = row.axes.split().index("time")
    sizes = SIZES if row.independent else SIZES | {"batch": 1}  # the first are compiled once for all tests
    run, inputs = compiled(name), draw(name, sizes, random)
    before = run(*inputs)
    assert before.shape[time] == T and np.isfinite(before).all()
    leaked, answered = 0, 0
    for position in range(T - 1):
        tail = (slice(None),) * time + (slice(position + 1, None),)
        changed_inputs = list(inputs)
        changed_inputs[0] = inputs[0].copy()
        changed_inputs[0][tail] = draw(name, sizes, random)[0][tail]
        differs = changed(before, run(*changed_inputs), time)
        leaked += bool(differs[: position + 1].any())
        answered += bool(differs[position + 1 :].any())
    assert answered >= T - 3  # at the very end a draw may repeat the token
    assert (leaked == 0) == row.causal, f"{leaked} of {T - 1} positions see what comes later"


@pytest.mark.parametrize("name", WITH_BATCH)
def test_what_other_rows_reach(name: str):
    """Each row in turn is drawn anew; the others' outputs stay if the rows are independent."""
    row, random = BY_NAME[name], np.random.default_rng(3)
    run, inputs = compiled(name), draw(name, SIZES, random)
    before = run(*inputs)
    assert before.shape[0] == SIZES["batch"] and np.isfinite(before).all()
    mixed = False
    for i in range(SIZES["batch"]):
        other = draw(name, SIZES, random)
        for given, kept, (axes, _) in zip(other, inputs, row.inputs, strict=True):
            assert axes.split()[0] == "batch"
            given[np.arange(SIZES["batch"]) != i] = kept[np.arange(SIZES["batch"]) != i]
        differs = changed(before, run(*other), 0)
        assert differs[i]
        mixed |= bool(np.delete(differs, i).any())
    assert mixed != row.independent


@pytest.mark.parametrize("name", [row.name for row in ZOO])
def test_outputs_are_of_ordinary_size(name: str):
    """Outputs of the order of 1 and different from place to place: every tolerance in these tests assumes it."""
    output = compiled(name)(*draw(name, SIZES, np.random.default_rng(4)))
    assert 0.02 < output.std() < 6 and np.abs(output).max() < 60


def test_every_module_is_in_the_table(repository):
    modules = {path.stem for path in (repository / "tests" / "forwards").glob("*.py")} - {"__init__", "weights"}
    assert modules == set(BY_NAME) and len(BY_NAME) == len(ZOO)


def test_the_source_reaches_every_output():
    """Cross-attention reads all of the source, and none of its padding (token 0)."""
    random = np.random.default_rng(5)
    run, (tokens, source) = compiled("encoder_decoder"), draw("encoder_decoder", SIZES, random)
    source = 1 + source % 46
    source[:, 6:] = 0
    before, moved = run(tokens, source), source.copy()
    moved[:, 5] = 1 + source[:, 5] % 46
    assert changed(before, run(tokens, moved), 1).all()
    shorter = run(tokens, source[:, :6])
    assert not changed(before, shorter, 1).any()
