"""The scheduler and the engine's core in virtual time: against a brute-force scheduler, and under random faults."""

import random
from concurrent.futures import CancelledError

import pytest

import jaxinfer as ji
from jaxinfer.runtime.core import Core
from jaxinfer.runtime.fleet import DEPTH, Health
from jaxinfer.runtime.queue import Heap
from jaxinfer.runtime.request import Group, Request, State
from jaxinfer.runtime.router import policy_of
from jaxinfer.runtime.scheduler import Scheduler
from jaxinfer.testing import FakeClock, FakeReplica, Simulation

GROUPS = [Group((("length", size),)) for size in (16, 32, 64)]


def scheduler(**changes):
    return Scheduler(**({"sizes": [1, 4, 8], "max_batch": 8, "max_delay": 0.01, "max_queue": 100} | changes))


def simulation(*replicas, router="least_outstanding", timeout=60.0, **changes):
    fleet = replicas or (FakeReplica(seconds=lambda shape: 0.1),)
    line = scheduler(**changes)
    core = Core(line, [{} for _ in fleet], policy_of(router), step_timeout=timeout)
    return Simulation(core, fleet, FakeClock())


def add(line, payload, now, **more):
    request = Request(payload, **more)
    line.add(request, now)
    return request


def payloads(batch):
    return [request.payload for request in batch.requests]


def test_a_heap_is_a_sorted_list_whatever_is_taken_out():
    draw, heap, model = random.Random(0), Heap(), {}
    for step in range(5000):
        action = draw.random()
        if action < 0.5:
            key, item = draw.randrange(50), object()
            heap.push(key, item)
            model[item] = (key, step)
        elif action < 0.8 and model:
            heap.discard(draw.choice(list(model)) if draw.random() < 0.9 else object())
            model = {item: place for item, place in model.items() if item in heap}
        elif model:
            first = min(model, key=model.__getitem__)
            assert heap.first() == (model[first][0], first) and heap.pop() is first
            del model[first]
        assert len(heap) == len(model) and len(heap._entries) <= 2 * len(model) + 17
    assert set(heap) == set(model)


def test_a_full_batch_goes_at_once_and_others_when_due():
    line = scheduler()
    for number in range(11):
        add(line, number, now=0.001 * number)
    full = line.schedule(0.01, partial=False)
    assert (payloads(full), full.size, full.full) == (list(range(8)), 8, True)
    due = line.next_due()
    assert line.schedule(0.0179) is None and due == pytest.approx(0.018)
    assert line.schedule(due, partial=False) is None
    rest = line.schedule(due)
    assert (payloads(rest), rest.size, rest.full) == ([8, 9, 10], 4, False)
    assert len(line) == 0 and line.next_due() is None


def test_flush_waits_for_nobody():
    line = scheduler()
    add(line, 0, now=0.0)
    assert line.schedule(0.0) is None and payloads(line.schedule(0.0, flush=True)) == [0]


def test_priority_is_worth_a_second_a_step_and_no_more():
    line = scheduler(max_batch=1, sizes=[1])
    add(line, "old", now=0.0)
    for late, priority in ((0.9, 1), (1.1, 1), (1.95, 2), (2.0, -1), (2.05, 0), (2.05, 0)):
        add(line, (late, priority), now=late, priority=priority)
    order = [payloads(line.schedule(5.0))[0] for _ in range(7)]
    assert order == [(0.9, 1), (1.95, 2), "old", (1.1, 1), (2.05, 0), (2.05, 0), (2.0, -1)]


def test_a_deadline_brings_a_request_forward_and_ends_its_wait():
    line = scheduler(max_delay=1.0, cost=lambda group, size: 0.1)
    hurried = add(line, "hurried", now=0.0, deadline=0.5)
    add(line, "patient", now=0.0)
    assert line.next_due() == pytest.approx(0.35)  # one and a half runs before it is too late
    assert line.expired(0.49) == [] and line.expired(0.5) == [hurried]
    assert len(line) == 1 and line.next_due() == 1.0 and hurried.state is State.DONE


@pytest.mark.parametrize(("nine", "rows", "size"), [(None, 9, 32), (3.9, 8, 8), (1.13, 8, 8), (1.12, 9, 32)])
def test_padding_or_splitting_whichever_costs_less_a_row(nine, rows, size):
    cost = None if nine is None else {1: 0.2, 8: 1.0, 32: nine}
    line = scheduler(sizes=[1, 8, 32], max_batch=32, cost=lambda group, n: cost and cost[n])
    for number in range(9):
        add(line, number, now=0.0)
    batch = line.schedule(1.0)
    assert (len(batch.requests), batch.size) == (rows, size)


def test_max_batch_between_two_buckets():
    line = scheduler(max_batch=6)
    for number in range(13):
        add(line, number, now=0.0)
    batches = [line.schedule(1.0) for _ in range(3)]
    assert [(len(b.requests), b.size, b.full) for b in batches] == [(6, 8, True), (6, 8, True), (1, 1, False)]


def test_the_queue_is_bounded_and_cancelled_requests_make_room():
    line = scheduler(max_queue=3)
    first, _, third = (add(line, number, now=0.0) for number in range(3))
    with pytest.raises(ji.QueueFullError, match="3 requests wait and max_queue is 3"):
        line.add(Request(3), 0.0)
    for request in (first, third):
        assert request.future.cancel()
        line.discard(request)
        line.discard(request)
    assert line.room == 2
    add(line, 4, now=0.0)
    assert payloads(line.schedule(1.0)) == [1, 4]


def test_a_request_cancelled_at_its_deadline_or_as_its_batch_is_made_is_gone():
    line = scheduler(max_delay=0.0)
    for number in range(2):
        request = add(line, number, now=0.0, deadline=1.0)
        assert request.future.cancel()  # and the scheduler hasn't been told
        if number:
            assert line.schedule(0.5) is None and len(line) == 0
            assert line.expired(1.0) == [] and line.next_deadline() is None
        else:
            (late,) = line.expired(1.0)
            late.resolve(ji.DeadlineExceededError("too late"))  # does no harm
        assert request.future.cancelled()
        line.discard(request)
    assert len(line) == 0


def brute_force(waiting, now, partial, flush):
    """The same rules, from scratch, over a plain list; costs unknown."""
    place = {request: (request.arrival - request.priority, request.number) for request in waiting}

    def due(request):
        return min(request.arrival + 0.01, request.deadline if request.deadline is not None else 1e9)

    ready = []
    for group in {request.group for request in waiting}:
        line = sorted((r for r in waiting if r.group == group), key=place.__getitem__)
        if len(line) >= 8 or (partial and (flush or min(map(due, line)) <= now)):
            ready.append(line)
    return min(ready, key=lambda line: place[line[0]])[:8] if ready else None


def test_twenty_thousand_random_steps_against_brute_force():
    draw, line, waiting, now = random.Random(1), scheduler(max_queue=20), [], 0.0
    served, refused = 0, 0
    for step in range(20_000):
        now += draw.choice([0, 0, 0.001, 0.004])
        action = draw.random()
        if action < 0.7:
            deadline = now + draw.choice([0.002, 0.02, 0.2]) if draw.random() < 0.2 else None
            request = Request(step, draw.choice(GROUPS), draw.choice([0, 0, 0, 1, -2]), deadline)
            try:
                line.add(request, now)
                waiting.append(request)
            except ji.QueueFullError:
                assert len(waiting) == 20
                refused += 1
        elif action < 0.78 and waiting:
            request = draw.choice(waiting)
            assert request.future.cancel()
            if draw.random() < 0.5:  # else the scheduler comes upon it before it is told
                line.discard(request)
                waiting.remove(request)
        else:
            late = [r for r in waiting if r.deadline is not None and r.deadline <= now]
            assert sorted(line.expired(now), key=lambda r: r.number) == sorted(late, key=lambda r: r.number)
            waiting = [r for r in waiting if r not in late]
            partial, flush = draw.random() < 0.5, draw.random() < 0.1
            for request in [r for r in waiting if r.future.cancelled()]:
                line.discard(request)
                waiting.remove(request)
            expected, batch = (
                brute_force(waiting, now, partial, flush),
                line.schedule(now, partial=partial, flush=flush),
            )
            assert (batch and list(batch.requests)) == expected
            if batch is not None:
                served += len(batch.requests)
                waiting = [r for r in waiting if r not in set(batch.requests)]
                assert all(r.state is State.RUNNING and r.future.running() for r in batch.requests)
                assert batch.size == min(s for s in (1, 4, 8) if s >= len(batch.requests))
                for request in batch.requests:
                    line.done(request)
        assert len(line) == len(waiting)
    assert served > 5000 and refused > 50
    assert len(line._deadlines) == sum(r.deadline is not None for r in waiting)


def test_nobody_starves_under_a_stream_of_higher_priority():
    world = simulation(FakeReplica(seconds=lambda shape: 0.1), max_batch=1, sizes=[1], max_queue=1000)
    for _ in range(DEPTH):
        world.submit("first")
    low = world.submit("low")
    for _ in range(120):
        for _ in range(3):
            world.submit("high", priority=3)
        world.advance(0.1)
    assert low.future.done() and 9.0 < low.started < 9.6  # after the 90 that came within three seconds of it


def test_a_batch_grows_while_the_replica_is_busy():
    replica = FakeReplica(seconds=lambda shape: 1.0)
    world = simulation(replica)
    world.submit(0)
    world.advance(0.01)
    for number in range(1, 6):
        world.advance(0.1)
        world.submit(number)
    assert replica.seen == [[0]]  # long overdue, but nothing is gained by starting a batch of 4
    world.advance(1.0)
    assert replica.seen == [[0], [1, 2, 3, 4, 5]]


def test_a_batch_that_is_not_full_goes_to_a_free_replica_whoever_s_turn_it_is():
    fast, slow = FakeReplica(seconds=lambda shape: 1.0), FakeReplica(seconds=lambda shape: 9.0)
    world = simulation(fast, slow, router="round_robin", max_delay=0.0)
    for number in range(5):
        world.submit(number)
        world.advance(0.1 if number == 0 else 2.0)
    assert (fast.seen, slow.seen) == ([[0], [2], [3], [4]], [[1]])


def test_full_batches_are_prepared_while_another_runs():
    replica = FakeReplica(seconds=lambda shape: 1.0)
    world = simulation(replica)
    for number in range(40):
        world.submit(number)
    assert [len(batch) for batch in replica.seen] == [8] * DEPTH
    world.advance(1.0)
    assert [len(batch) for batch in replica.seen] == [8] * (DEPTH + 1)


def test_a_deadline_passes_while_the_request_runs():
    world = simulation(FakeReplica(seconds=lambda shape: 1.0))
    late, fine = world.submit("late", after=0.5), world.submit("fine", after=2.0)
    when = []
    late.future.add_done_callback(lambda _: when.append(world.clock()))
    world.advance(0.9)
    assert when == [0.5]  # at the moment, not when something else happens
    with pytest.raises(ji.DeadlineExceededError, match=r"deadline of 0.5 s passed: it was running"):
        late.future.result(0)
    assert not fine.future.done()
    world.drain()
    assert fine.future.result(0) == "fine"


def test_a_row_that_makes_its_batch_raise_fails_alone():
    world = simulation(FakeReplica(seconds=lambda shape: 0.1, bad=lambda p: p == "bad"))
    first = world.submit("first")
    world.advance(0.2)
    requests = [world.submit(p) for p in ("a", "b", "bad", "c")]
    world.drain()
    assert first.future.result(0) == "first"
    for request in requests:
        if request.payload == "bad":
            with pytest.raises(ValueError, match="batch of 1"):  # of the run that it had to itself
                request.future.result(0)
        else:
            assert request.future.result(0) == request.payload
    assert world.core.fleet.members[0].failed == 0 and world.core.retried == 5  # the bad one twice


def test_before_anything_ran_a_row_that_raises_alone_is_to_blame():
    world = simulation(FakeReplica(bad=lambda p: p == "bad"))
    requests = [world.submit(p) for p in ("bad", "good")]
    world.drain()
    assert requests[0].future.exception(0) is not None and requests[1].future.result(0) == "good"


def test_a_replica_that_raises_is_quarantined_and_its_batch_goes_elsewhere():
    broken = FakeReplica("broken", seconds=lambda shape: 0.1, fault=lambda run: "raise" if run in (1, 2) else None)
    sound = FakeReplica("sound", seconds=lambda shape: 0.1)
    world = simulation(broken, sound, router="round_robin", max_delay=0.0, max_batch=1, sizes=[1])
    requests = [world.submit(number) for number in range(3)]
    world.advance(0.35)
    member = world.core.fleet.members[0]
    assert member.health is Health.QUARANTINED
    world.advance(0.4)
    assert [r.future.result(0) for r in requests] == [0, 1, 2]
    world.advance(0.5)  # restarted after half a second, and tried with a row that ran before
    assert member.health is Health.SERVING and member.failed == 1 and world.core.fleet.members[1].failed == 0


def test_a_hang_is_noticed_and_its_rows_run_elsewhere_one_by_one():
    hanging = FakeReplica("hanging", seconds=lambda shape: 0.1, fault=lambda run: "hang" if run == 1 else None)
    world = simulation(hanging, FakeReplica("sound", seconds=lambda shape: 0.1), timeout=5.0)
    world.submit("warm")
    world.advance(0.2)
    world.core.fleet.members[1].health = Health.SUSPECT  # so that the first replica gets all
    requests = [world.submit(number) for number in range(8)]
    world.core.fleet.members[1].health = Health.SERVING
    world.advance(4.9)
    assert not any(r.future.done() for r in requests)
    world.drain()
    assert [r.future.result(0) for r in requests] == list(range(8))
    assert len(hanging.seen[1]) == 8 and {len(b) for b in hanging.seen[2:] + world.replicas[1].seen} == {1}
    assert world.core.fleet.members[0].failed == 1


def test_a_replica_that_fails_now_and_then_is_never_given_up():
    flaky = FakeReplica(seconds=lambda shape: 0.1, fault=lambda run: "raise" if run % 5 in (3, 4) else None)
    world = simulation(flaky, max_batch=1, sizes=[1])
    for number in range(
        40
    ):  # of five runs two are good, two raise (the second one a probe), one is a probe that passes
        request = world.submit(number)
        world.advance(60)
        assert request.future.result(0) == number
    member = world.core.fleet.members[0]
    assert member.failed > 8 and member.health is Health.SERVING and member.failures == 0


def test_a_row_that_brings_replicas_down_fails_after_three():
    replicas = []
    for place in range(3):
        fault = lambda run, place=place: "hang" if "poison" in replicas[place].seen[-1] else None  # noqa: E731
        replicas.append(FakeReplica(str(place), seconds=lambda shape: 0.1, fault=fault))
    world = simulation(*replicas, timeout=1.0)
    requests = [world.submit(payload) for payload in (0, 1, "poison", 2, 3)]
    world.drain()
    with pytest.raises(ji.ReplicaError, match="3 replicas failed while they ran this request"):
        requests[2].future.result(0)
    assert [r.future.result(0) for r in requests if r.payload != "poison"] == [0, 1, 2, 3]


def test_when_all_replicas_are_gone_requests_fail_and_none_hangs():
    options = {"seconds": lambda shape: 0.1, "revives": lambda restart: False}
    dead = [FakeReplica(fault=lambda run, fine=fine: "raise" if run >= fine else None, **options) for fine in (1, 0)]
    world = simulation(*dead, max_delay=0.0)
    assert world.submit("fine").future is not None
    world.advance(1.0)
    requests = [world.submit(number) for number in range(20)]
    quick = world.submit("quick", after=0.3)
    world.advance(0.31)
    assert isinstance(quick.future.exception(0), ji.DeadlineExceededError)
    world.drain(limit=60)
    assert all(isinstance(r.future.exception(0), ji.ReplicaError) for r in requests)
    with pytest.raises(ji.ReplicaError, match="all 2 replicas of this engine have failed"):
        world.submit("late")


@pytest.mark.parametrize("seed", range(8))
def test_random_traffic_under_random_faults_ends_every_request_exactly_once(seed):
    """Conservation: each request has one end, the right one; none runs twice at a time; nothing is left behind."""
    draw = random.Random(seed)
    rates = {"raise": draw.choice([0, 0.01]), "hang": draw.choice([0, 0.003])}

    def fault(run):
        return next((kind for kind, rate in rates.items() if run > 3 and draw.random() < rate), None)

    paces = [draw.uniform(0.5, 2) for _ in range(draw.choice([1, 2, 4]))]
    replicas = [
        FakeReplica(
            str(pace),
            answer=lambda p: p[0],
            seconds=lambda shape, pace=pace: pace * 1e-3 * (2 + shape[0][1]),
            bad=lambda p: p[1],
            fault=fault,
            revives=lambda restart: draw.random() < 0.9,
        )
        for pace in paces
    ]
    router = draw.choice(["round_robin", "least_outstanding", "power_of_two"])
    world = simulation(*replicas, router=router, timeout=0.5, max_queue=60)
    requests, cancelled, refused = [], set(), 0
    for number in range(1500):
        if draw.random() < 0.8:
            world.advance(draw.expovariate(400))
        more = {"priority": draw.choice([0, 0, 1, -1]), "after": draw.choice([None, None, 0.01, 0.5])}
        try:
            requests.append(world.submit((number, draw.random() < 0.01), group=draw.choice(GROUPS), **more))
        except (ji.QueueFullError, ji.ReplicaError):
            refused += 1
            world.advance(0.05)
        if draw.random() < 0.05 and requests and world.cancel(victim := draw.choice(requests)):
            cancelled.add(victim)
        running = world.core.fleet.running()
        assert len(set(running)) == len(running)
        waiting = {r for r in requests if r.state is State.QUEUED}
        assert len(world.core.scheduler) == len(waiting) <= 60 + DEPTH * 8 * len(replicas)
        assert not waiting & set(running)
    world.drain()
    ends, unlucky = {"ok": 0}, 0
    for request in requests:
        assert request.future.done() and request.state is State.DONE
        if request in cancelled:
            with pytest.raises(CancelledError):
                request.future.result(0)
            continue
        error = request.future.exception(0)
        ends[type(error).__name__ if error else "ok"] = ends.get(type(error).__name__ if error else "ok", 0) + 1
        if error is None:
            assert request.future.result(0) == request.payload[0] and not request.payload[1]
        elif isinstance(error, ji.DeadlineExceededError):
            assert request.deadline is not None and world.clock() >= request.deadline
        else:  # its own fault; or three replicas failed under it, or raised twice while it ran alone
            assert request.payload[1] or isinstance(error, ji.ReplicaError | OSError)
            unlucky += not request.payload[1]
    assert len(world.core.scheduler) == len(world.core.scheduler._deadlines) == len(world.core.fleet.running()) == 0
    assert world.core.scheduler._lines == {} and ends["ok"] > 300
    assert unlucky <= (3 if all(member.failures <= 5 for member in world.core.fleet.members) else 1500)
