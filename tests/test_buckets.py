"""Bucket ladders: the fit to the traffic is exact, against brute force."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxinfer as ji
from jaxinfer.bucket_fit import Ladder, fit_buckets, fit_ladder
from jaxinfer.buckets import bucket_for, ladder, padded_to, sizes_in

COSTS = {"linear": lambda b: b * 1.0, "attention": lambda b: b + b * b / 16, "steps": lambda b: -(-b // 4) * 4.0 + 3}


def cost_of(buckets, calls, cost, compile_seconds=0.0):
    """The objective, written as its definition: each call is padded to the smallest bucket that holds it."""
    work = sum(n * float(cost(np.array(min(b for b in buckets if b >= size)))) for size, n in calls.items())
    return work + compile_seconds * len(buckets)


@pytest.mark.parametrize("cost", COSTS)
@given(
    calls=st.dictionaries(st.integers(1, 40), st.integers(1, 50), min_size=1, max_size=7),
    programs=st.integers(1, 8),
    compile_seconds=st.sampled_from([0.0, 1.0, 40.0, 1e6]),
    beyond=st.none() | st.integers(0, 10),
)
@settings(max_examples=60, deadline=None)
def test_no_ladder_at_all_is_cheaper(cost, calls, programs, compile_seconds, beyond):
    largest = None if beyond is None else max(calls) + beyond
    found = fit_ladder(calls, programs, cost=COSTS[cost], compile_seconds=compile_seconds, largest=largest)
    top = largest or max(calls)
    # Any integers may be buckets here, not only sizes that were met. More than 4 buckets are too many to try them all.
    possible = range(1, top) if programs <= 3 and top <= 25 else [s for s in calls if s < top]
    ladders = (
        [*rest, top] for k in range(min(programs, len(calls) + 1)) for rest in itertools.combinations(possible, k)
    )
    least = min(cost_of(sizes, calls, COSTS[cost], compile_seconds) for sizes in ladders)
    assert found.cost == pytest.approx(least)
    assert cost_of(found, calls, COSTS[cost], compile_seconds) == pytest.approx(least)
    assert len(found) <= programs and found[-1] == top and list(found) == sorted(set(found))


@given(
    calls=st.dictionaries(st.integers(1, 60), st.integers(1, 9), min_size=1, max_size=6),
    programs=st.integers(1, 4),
    multiple=st.sampled_from([4, 8]),
)
@settings(max_examples=60, deadline=None)
def test_multiples(calls, programs, multiple):
    found = fit_ladder(calls, programs, multiple=multiple)
    top = -(-max(calls) // multiple) * multiple
    ladders = (
        [*rest, top] for k in range(programs) for rest in itertools.combinations(range(multiple, top, multiple), k)
    )
    assert all(size % multiple == 0 for size in found)
    assert found.cost == pytest.approx(min(cost_of(sizes, calls, COSTS["linear"]) for sizes in ladders))


def test_worked_by_hand():
    # 90 calls of 10 and 10 of 100. One program pads all to 100: 10,000 for 1,900 of work. Two pad nothing.
    one, two = (fit_ladder({10: 90, 100: 10}, programs=n) for n in (1, 2))
    assert (list(one), one.cost, one.padding) == ([100], 10_000, pytest.approx(0.81))
    assert (list(two), two.cost, two.padding) == ([10, 100], 1_900, 0)
    assert str(one) == "[100]: 1 programs, 81.0% of the work is padding"
    # The second program saves 8,100: it pays at 8,000 and not at 8,200.
    assert len(fit_ladder({10: 90, 100: 10}, 2, compile_seconds=8_000)) == 2
    assert len(fit_ladder({10: 90, 100: 10}, 2, compile_seconds=8_200)) == 1
    # Once attention counts, 60 belongs with the long ones no more.
    calls = {50: 10, 60: 100, 100: 1}
    assert list(fit_ladder(calls, 2)) == [60, 100]
    assert list(fit_ladder({1: 1000, 60: 1, 100: 10}, 2)) == [1, 100]
    assert list(fit_ladder({1: 10, 60: 5, 100: 10}, 2, cost=lambda b: b**3)) == [60, 100]


def test_a_list_an_array_and_a_histogram_are_the_same():
    sizes = [3, 3, 9, 40, 40, 40]
    wanted = fit_ladder({3: 2, 9: 1, 40: 3}, 2)
    for given_sizes in (sizes, np.array(sizes), np.array(sizes, np.int32), tuple(sizes)):
        found = fit_ladder(given_sizes, 2)
        assert (found, found.cost, found.padding) == (wanted, wanted.cost, wanted.padding)
    assert pickle.loads(pickle.dumps(wanted)).cost == wanted.cost


def test_on_a_recorded_trace_it_beats_powers_of_two(repository):
    """60 rows in the spread of a chat trace: few short prompts, many around 1,000 tokens, a long tail."""
    folder = repository / "tests" / "data"
    for name, column in (("trace.csv", "ContextTokens"), ("trace.jsonl", "input_length")):
        sizes = sizes_in(folder / name, column)
        assert sizes.shape == (60,) and sizes.min() >= 1
        doubling = ladder(int(sizes.max()), 64)
        fitted = fit_ladder(sizes, len(doubling))
        calls = dict(zip(*np.unique(sizes, return_counts=True), strict=True))
        assert fitted.cost < 0.85 * cost_of(doubling, calls, COSTS["linear"])
        assert fitted.padding == pytest.approx(1 - sizes.sum() / fitted.cost)


def test_thousands_of_distinct_sizes():
    sizes = np.unique(np.random.default_rng(0).lognormal(7, 1, 6000).astype(np.int64) + 1)
    assert len(sizes) > 2000
    found = fit_ladder(sizes, 16)
    assert len(found) == 16
    # No bucket can be moved to a neighbouring size for the better: the whole is at least a local optimum.
    calls = dict.fromkeys(sizes.tolist(), 1)
    for i, bucket in enumerate(found[:-1]):
        for other in (sizes[np.searchsorted(sizes, bucket) - 1], sizes[np.searchsorted(sizes, bucket) + 1]):
            moved = np.array(sorted({*found[:i], int(other), *found[i + 1 :]}))
            assert moved[np.searchsorted(moved, sizes)].sum() >= found.cost
    assert calls


def brute_force(calls, programs, cost, compile_seconds):
    """The cheapest pair of ladders."""
    first, second = ([*zip(*calls, strict=True)][i] for i in (0, 1))
    best = np.inf
    for k in range(1, programs + 1):
        for a in itertools.combinations(sorted(set(first)), k):
            for m in range(1, programs // k + 1):
                for b in itertools.combinations(sorted(set(second)), m):
                    if a[-1] < max(first) or b[-1] < max(second):
                        continue
                    work = sum(cost(bucket_for(x, a), bucket_for(y, b)) for x, y in calls)
                    best = min(best, work + compile_seconds * k * m)
    return best


@given(
    calls=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 30)), min_size=1, max_size=12),
    programs=st.integers(1, 6),
    compile_seconds=st.sampled_from([0.0, 25.0]),
)
@settings(max_examples=60, deadline=None)
def test_two_dims_come_close_to_brute_force(calls, programs, compile_seconds):
    def cost(batch, time):
        return batch * (time + time**2 / 8)

    columns = {"batch": [b for b, _ in calls], "time": [t for _, t in calls]}
    found = fit_buckets(columns, programs, cost=cost, compile_seconds=compile_seconds)
    assert len(found["batch"]) * len(found["time"]) <= programs
    work = sum(cost(bucket_for(b, found["batch"]), bucket_for(t, found["time"])) for b, t in calls)
    total = work + compile_seconds * len(found["batch"]) * len(found["time"])
    least = brute_force(calls, programs, cost, compile_seconds)
    assert least * (1 - 1e-9) <= total <= least * 1.25
    # No ladder can be changed for the better while the other stays.
    for name, other in (("batch", "time"), ("time", "batch")):
        sizes = sorted(set(columns[name]))
        for k in range(1, programs // len(found[other]) + 1):
            for own in itertools.combinations(sizes, k):
                if own[-1] == sizes[-1]:
                    pair = {name: own, other: found[other]}
                    work = sum(cost(bucket_for(b, pair["batch"]), bucket_for(t, pair["time"])) for b, t in calls)
                    assert work + compile_seconds * k * len(found[other]) >= total * (1 - 1e-9)


def test_one_dim_is_the_exact_ladder():
    sizes = [3, 5, 5, 17, 40]
    assert fit_buckets({"batch": sizes}, 3) == {"batch": fit_ladder(sizes, 3)}
    squared = fit_buckets({"batch": sizes}, 3, cost=lambda batch: batch**2)
    assert squared == {"batch": fit_ladder(sizes, 3, cost=lambda b: b**2)}
    assert fit_buckets({"batch": sizes}, 2, largest={"batch": 64}, multiple={"batch": 8})["batch"][-1] == 64


def test_compile_takes_what_was_fitted():
    program = ji.trace(lambda p, x: x + 1, (), ji.spec("batch 3"))
    buckets = ji.fit_buckets({"batch": [1, 1, 2, 5, 5, 7]}, programs=3)
    executable = ji.compile(program, buckets=buckets)
    assert executable.buckets == {"batch": [2, 5, 7]} or executable.buckets == {"batch": [1, 5, 7]}
    np.testing.assert_array_equal(executable(np.zeros((6, 3), np.float32)), np.ones((6, 3), np.float32))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([[]], {}, "at least one call"),
        ([[0, 3]], {}, "integers of at least 1"),
        ([[1.5]], {}, "integers of at least 1"),
        ([[5]], {"programs": 0}, "programs and multiple must be at least 1"),
        ([[5]], {"largest": 4}, "largest is 4, and the traffic has a call of 5"),
        ([[5, 6]], {"cost": lambda b: b * np.nan}, "finite number"),
        ([[5, 6]], {"cost": lambda b: 3.0}, "for each of the buckets"),
    ],
)
def test_what_cannot_be_fitted(arguments, options, message):
    with pytest.raises(ji.RequestError, match=message):
        fit_ladder(*arguments, **options)


def test_lists_of_one_length(tmp_path):
    with pytest.raises(ji.RequestError, match="one size a call and named dim"):
        fit_buckets({"batch": [1, 2], "time": [1]})
    (tmp_path / "trace.csv").write_text("a,b\n1,x\n")
    for column in ("b", "c"):
        with pytest.raises(ji.RequestError, match=f"can't read the column '{column}'"):
            sizes_in(tmp_path / "trace.csv", column)
    with pytest.raises(ji.RequestError, match="FileNotFoundError"):
        sizes_in(tmp_path / "none.csv", "a")


def test_ladders():
    assert ladder(100, 16) == [16, 32, 64, 100]
    assert [bucket_for(n, [2, 8]) for n in (1, 2, 3, 8)] == [2, 2, 8, 8]
    assert padded_to([1, 2, 4, 8]) == [4, 8] and padded_to([3]) == [3]
    assert isinstance(fit_ladder([3]), Ladder)
