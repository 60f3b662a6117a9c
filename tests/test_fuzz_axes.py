"""Random programs: what the batch proof claims of them must be so when they run; of those built to keep rows apart
nearly all must be proved. benchmarks/fuzz_axes.py runs ten thousand."""

import fuzz_rows
import pytest
from fuzz_check import OTHER, ROWS, check, traced
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from jaxinfer.axes.proof import prove

pytestmark = pytest.mark.jax_defaults

seeds = st.integers(0, 2**20)
apart = st.tuples(st.sampled_from(sorted(fuzz_rows.APART)), seeds)
mixing = st.tuples(st.sampled_from(sorted(fuzz_rows.MIXING)), seeds)
COUNT = 40


def fuzz(count: int):
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=quiet,
        phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip


def test_programs_built_to_keep_rows_apart():
    tried, refused = [], []

    @fuzz(COUNT)
    @given(st.lists(apart, min_size=1, max_size=4))
    def run(steps):
        outcome = check(steps, sizes=len(tried) % 6 == 0)
        tried.append(steps)
        if outcome:
            refused.append((steps, outcome))

    run()
    print(f"{len(refused)} of {len(tried)} refused: {refused[:5]}")
    assert len(refused) <= 0.02 * len(tried), refused[:5]


def test_programs_that_mix_somewhere():
    refused = []

    @fuzz(COUNT)
    @given(st.lists(apart, max_size=2), mixing, st.lists(apart, max_size=2))
    def run(before, one, after):
        refused.append(bool(check([*before, one, *after], sizes=False)))

    run()
    assert sum(refused) > 0.9 * len(refused)


@pytest.mark.parametrize("name", sorted(fuzz_rows.APART))
def test_each_step_alone_is_proved(name: str):
    for seed in range(6):
        graph, other = traced([(name, seed)], ROWS), traced([(name, seed)], OTHER)
        verdict = prove("batch", ROWS, graph, [0, 0], other, OTHER)
        assert verdict.independent, verdict.mixed


@pytest.mark.parametrize("name", sorted(fuzz_rows.MIXING))
def test_each_mixing_step_is_refused(name: str):
    assert all(check([(name, seed)]) for seed in range(6))
