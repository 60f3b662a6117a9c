"""Random programs over time: a step that is derived must decode what its forward computes, nothing that looks ahead may
be derived, and nearly all that is causal by construction must be. benchmarks/fuzz_causal.py runs hundreds.

Left out of tests/fuzz_time.py, since they are refused though causal: a sink's column in front of the scores; keys
shifted to the right under a mask that lets as many more rows be seen; a running sum over padded rows cut in front; a
sort of masked scores; (z @ z) @ x where z is masked; the diagonal of [t, s].
Refused too and still drawn: an indexing scan under vmap, attention over running sums of shortened rows.
"""

import random

import fuzz_time
import jax
import pytest
from fuzz_decode import check

pytestmark = pytest.mark.jax_defaults

COUNT = 10


def program(number: int, ahead: bool) -> list[tuple[str, int]]:
    rng = random.Random(number)
    names = [rng.choice(sorted(fuzz_time.CAUSAL)) for _ in range(rng.randint(1, 3))]
    if ahead:
        names.insert(rng.randint(0, len(names)), rng.choice(sorted(fuzz_time.AHEAD)))
    return [(name, rng.randrange(1 << 20)) for name in names]


def test_causal_programs_decode():
    refused = {}
    for number in range(COUNT):
        steps = program(number, ahead=False)
        if why := check(steps, last=number % 6 == 0):
            refused[str(steps)] = why
    assert len(refused) <= 0.1 * COUNT, refused


def test_programs_that_look_ahead():
    """Refused, or causal all the same (`check` tries): where nothing of the one step reaches an output."""
    refused = [bool(check(program(number, ahead=True))) for number in range(COUNT)]
    assert sum(refused) > 0.6 * COUNT


@pytest.mark.parametrize("name", sorted(fuzz_time.AHEAD))
def test_each_step_that_looks_ahead_is_refused(name: str):
    assert all(check([(name, seed)]) for seed in range(4))
    jax.clear_caches()
