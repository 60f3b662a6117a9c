"""Router policies: pure, each by its rule and against each other in virtual time."""

import inspect
import random

import pytest

import jaxinfer as ji
from jaxinfer.runtime import router
from jaxinfer.runtime.core import Core
from jaxinfer.runtime.router import POLICIES, Snapshot, policy_of
from jaxinfer.runtime.scheduler import Scheduler
from jaxinfer.testing import FakeClock, FakeReplica, Simulation


def shot(index, *, rows=0, backlog=0.0, seconds=1.0, turn=0.0):
    return Snapshot(index, rows, backlog, seconds, turn)


def test_round_robin_takes_turns_weighted_by_speed():
    turns = {0: 0.0, 1: 0.0, 2: 0.0}
    seconds = {0: 1.0, 1: 2.0, 2: 1.0}
    chosen = []
    for _ in range(500):
        picked = router.round_robin([shot(i, seconds=seconds[i], turn=turns[i]) for i in turns], random.Random(0))
        turns[picked.index] += picked.seconds
        chosen.append(picked.index)
    assert [chosen.count(i) for i in turns] == [200, 100, 200]
    alike = {0: 0.0, 1: 0.0}
    order = []
    for _ in range(6):
        picked = router.round_robin([shot(i, turn=alike[i]) for i in alike], random.Random(0))
        alike[picked.index] += 1
        order.append(picked.index)
    assert order == [0, 1] * 3


def test_least_outstanding_is_where_the_batch_is_done_first():
    candidates = [
        shot(0, backlog=1.0, seconds=1.0),
        shot(1, backlog=0.0, seconds=3.0),
        shot(2, backlog=1.5, seconds=0.4),
    ]
    assert router.least_outstanding(candidates, random.Random(0)).index == 2
    even = [shot(0, turn=5.0), shot(1, turn=4.0), shot(2, rows=1)]
    assert router.least_outstanding(even, random.Random(0)).index == 1


def test_power_of_two_asks_two_and_draws_fast_ones_more_often():
    draw = random.Random(0)
    candidates = [shot(i, backlog=float(i)) for i in range(8)]
    count = [0] * 8
    for _ in range(7000):
        count[router.power_of_two(candidates, draw).index] += 1
    # Of two drawn from 8 the lesser is i with probability 2 (7 - i) / 56.
    for index, times in enumerate(count):
        assert times == pytest.approx(7000 * 2 * (7 - index) / 56, abs=110)
    slow = [shot(0, seconds=1.0), shot(1, seconds=100.0, backlog=-1e3), shot(2, seconds=1.0)]
    drawn = sum(router.power_of_two(slow, draw).index == 1 for _ in range(2000))
    assert drawn == pytest.approx(2000 * (1 / 201 + 200 / 201 * 0.01 / 1.01), abs=25)  # only when it is drawn


def test_every_policy_returns_a_candidate_and_fits_forty_lines():
    draw = random.Random(0)
    for policy in POLICIES.values():
        assert len(inspect.getsource(policy).splitlines()) < 40
        for size in range(1, 6):
            candidates = [
                shot(i, rows=draw.randrange(9), backlog=draw.random(), seconds=draw.random(), turn=draw.random())
                for i in range(size)
            ]
            assert policy(candidates, draw) in candidates


def test_unknown_and_later_policies_are_refused():
    with pytest.raises(ji.RequestError, match=r"should be one of .*'power_of_two'.* got 'fastest'"):
        policy_of("fastest")
    for name in ("prefix_affinity", "session"):
        with pytest.raises(ji.RequestError, match="an Executable caches nothing between requests"):
            policy_of(name)


def traffic(name, speeds, load, seed=0, count=4000):
    """(latencies, rows by replica) of Poisson arrivals at a share of what the replicas can do, batches of up to 4."""

    def seconds(shape):
        return 0.004 + 0.001 * shape[0][1]

    clock, line = FakeClock(), Scheduler([1, 2, 4], max_batch=4, max_delay=0.001, max_queue=10_000)
    replicas = [
        FakeReplica(str(n), seconds=lambda s, speed=speed: seconds(s) / speed) for n, speed in enumerate(speeds)
    ]
    known = {(("batch", size),): seconds((("batch", size),)) for size in (1, 2, 4)}
    core = Core(line, [{s: t / speed for s, t in known.items()} for speed in speeds], policy_of(name), step_timeout=1e3)
    world, draw, ends, requests = Simulation(core, replicas, clock), random.Random(seed), [], []
    rate = load * sum(speeds) * 4 / known[("batch", 4),]
    for _ in range(count):
        world.advance(draw.expovariate(rate))
        request = world.submit(len(requests))
        request.future.add_done_callback(lambda future, request=request: ends.append(clock() - request.arrival))
        requests.append(request)
    world.drain()
    assert len(ends) == count
    return sorted(ends), [sum(map(len, replica.seen)) for replica in replicas]


@pytest.mark.parametrize("name", POLICIES)
def test_under_load_a_replica_at_half_speed_gets_half_of_the_work(name):
    _, rows = traffic(name, [1.0, 1.0, 1.0, 0.5], load=1.05)
    assert rows[3] / (sum(rows[:3]) / 3) == pytest.approx(0.5, abs=0.03)
    assert min(rows[:3]) / max(rows[:3]) > 0.97


def test_speed_is_learnt_where_it_was_told_wrong():
    clock, line = FakeClock(), Scheduler([1], max_batch=1, max_delay=0.0, max_queue=10_000)
    replicas = [FakeReplica(str(n), seconds=lambda shape, n=n: 0.01 * (1 + n)) for n in range(2)]
    core = Core(line, [{(("batch", 1),): 0.01}] * 2, policy_of("round_robin"), step_timeout=1e3)
    world = Simulation(core, replicas, clock)
    for number in range(600):
        world.advance(0.011)
        world.submit(number)
    world.drain()
    assert core.fleet.cost((("batch", 1),), core.fleet.members[1]) == pytest.approx(0.02, rel=0.01)
    assert len(replicas[1].seen) / len(replicas[0].seen) == pytest.approx(0.5, abs=0.03)


def test_dynamic_policies_avoid_the_slow_replica_while_others_are_free():
    tails, rows = {}, {}
    for name in POLICIES:
        ends, rows[name] = traffic(name, [1.0] * 7 + [0.5], load=0.5, seed=3, count=2500)
        tails[name] = ends[int(0.99 * len(ends))]
    assert tails["least_outstanding"] < 0.6 * tails["round_robin"]
    assert tails["power_of_two"] < 0.9 * tails["round_robin"]
    assert rows["round_robin"][7] > 5 * rows["least_outstanding"][7]
