import itertools
import time
from collections import Counter
from functools import partial

import pytest
import torch

from maestro_kernels.measure import timing
from maestro_kernels.measure.timing import (
    CpuClock,
    CudaClock,
    CudaGraphClock,
    Stats,
    interleave,
    rounds,
)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_rounds_balance_places_and_predecessors(n):
    names = [f"c{i}" for i in range(n)]
    orders = list(itertools.islice(rounds(names), 2 * n))
    assert all(sorted(order) == names for order in orders)
    places = Counter((name, place) for order in orders for place, name in enumerate(order))
    assert set(places.values()) == {2}
    assert len(places) == n * n
    before = Counter((a, b) for order in orders[:2] for a, b in itertools.combinations(order, 2))
    assert set(before.values()) <= {1}
    assert len(before) == n * (n - 1)


class ScriptedClock(CpuClock):
    """Gives the times it is told and records who was asked."""

    def __init__(self, seconds):
        self.seconds, self.asked = seconds, []

    def time(self, name, call, calls):
        self.asked.append(name)
        return next(self.seconds[name]) * calls


def test_interleave_follows_the_rounds_and_takes_percentiles():
    clock = ScriptedClock({"a": iter(range(1, 100)), "b": itertools.repeat(7.0)})
    stats = interleave(
        {"a": lambda: None, "b": lambda: None}, min_rounds=11, max_rounds=11, clock=clock
    )
    expected = itertools.chain.from_iterable(itertools.islice(rounds(["a", "b"]), 11))
    assert clock.asked == list(expected)
    assert list(stats) == ["a", "b"]
    a = stats["a"]
    assert (a.p20, a.p50, a.p80, a.samples) == pytest.approx((3.0, 6.0, 9.0, 11))
    assert a.spread == pytest.approx(1.0)
    assert stats["b"].spread == 0


def test_prime_calls_once_before_each_sample_and_cold_does_not():
    counts = {}
    for prime in (True, False):
        calls = Counter()
        clock = ScriptedClock({"a": itertools.repeat(1.0)})
        interleave(
            {"a": lambda calls=calls: calls.update("a")},
            min_rounds=4,
            max_rounds=4,
            prime=prime,
            clock=clock,
        )
        counts[prime] = calls["a"]
    assert counts[True] - counts[False] == 4


def test_time_box_stops_after_the_fewest_rounds():
    stats = interleave({"a": lambda: time.sleep(2e-3)}, seconds=0.0, min_rounds=3)
    assert stats["a"].samples == 3


def test_short_calls_are_repeated_within_a_sample():
    stats = interleave({"a": lambda: None}, seconds=0.05, sample_seconds=1e-3, min_rounds=1)
    assert stats["a"].calls > 100
    assert stats["a"].p50 < 1e-5


def test_a_cold_sample_walks_through_no_more_calls_than_there_are_weights():
    stats = interleave(
        {"a": lambda: None, "b": lambda: None}, seconds=0.0, min_rounds=1, most_calls={"a": 3}
    )
    assert stats["a"].calls == 3
    assert stats["b"].calls > 3


@pytest.mark.parametrize("flush", [0, 64])
@pytest.mark.parametrize("graph", [False, True])
def test_a_gpu_clock_flushes_before_it_starts(monkeypatch, flush, graph):
    log = []

    class Event:
        def __init__(self, enable_timing):
            self.record = lambda: log.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 3.0

    class Buffer:
        def zero_(self):
            log.append("flush")

    class Graph:
        def replay(self):
            log.append("call")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    sizes = []
    monkeypatch.setattr(timing.torch, "empty", lambda size, **_: sizes.append(size) or Buffer())
    clock = CudaGraphClock(flush) if graph else CudaClock(flush)
    if graph:
        clock._graphs["a", 1] = Graph()
    for _ in range(2):
        assert clock.time("a", lambda: log.append("call"), 1) == pytest.approx(3e-3)
    once = ["wait", *["flush"] * bool(flush), "event", "call", "event"]
    assert log == 2 * once
    assert sizes == [flush] * bool(flush)


def test_wall_clock_tells_a_slow_call_from_a_fast_one():
    stats = interleave(
        {"fast": lambda: time.sleep(1e-3), "slow": lambda: time.sleep(2e-2)},
        seconds=0.3,
        prime=False,
    )
    assert stats["slow"].p50 > 3 * stats["fast"].p50
    assert stats["slow"].p50 >= 2e-2


def test_one_sample_has_no_spread():
    assert Stats.of([2.0], 3) == Stats(2.0, 2.0, 2.0, 1, 3)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="interleave: candidates: expected at least one, got none"):
        interleave({})
    with pytest.raises(ValueError, match="interleave: min_rounds: expected 1 <= min_rounds"):
        interleave({"a": lambda: None}, min_rounds=5, max_rounds=4)


class FakeTime:
    """A clock, and the time that what it times takes; nothing really waits."""

    def __init__(self, **seconds):
        self.seconds, self.now, self.samples = seconds, 0.0, []

    def perf_counter(self):
        return self.now

    def prepare(self, name, call):
        pass

    def wait(self, name):
        self.now += self.seconds[name]

    def time(self, name, call, calls):
        self.samples.append(name)
        before = self.now
        for _ in range(calls):
            call()
        return self.now - before


def _race(monkeypatch, fake, **kwargs):
    monkeypatch.setattr(timing.time, "perf_counter", fake.perf_counter)
    calls = {name: partial(fake.wait, name) for name in fake.seconds}
    return timing.race(calls, seconds=0.05, clock=fake, **kwargs)


def test_a_race_ends_as_soon_as_it_is_decided(monkeypatch):
    fake = FakeTime(a=1e-5, b=2e-5)
    found = _race(monkeypatch, fake)
    assert found.decided
    assert found.seconds == pytest.approx({"a": 1e-5, "b": 2e-5})
    assert len(fake.samples) == 4 + 2 * 5
    assert fake.now < 0.01


def test_a_race_between_equals_ends_undecided(monkeypatch):
    fake = FakeTime(a=1e-5, b=1e-5)
    assert not _race(monkeypatch, fake, max_rounds=9).decided
    assert len(fake.samples) == 4 + 2 * 9


def test_a_race_of_slow_calls_keeps_its_time(monkeypatch):
    fake = FakeTime(a=0.005, b=0.006)
    assert set(_race(monkeypatch, fake).seconds) == {"a", "b"}
    assert fake.now < 0.05 + 0.011
    # One call of the first tells that four of each are too many.
    fake = FakeTime(a=0.02, b=0.03)
    found = _race(monkeypatch, fake)
    assert found.given_up
    assert not found.seconds
    assert fake.now == 0.02


def test_what_raises_is_out_of_the_race(monkeypatch):
    def fails():
        raise MemoryError

    found = timing.race({"a": fails, "b": lambda: None}, seconds=0.01)
    assert list(found.seconds) == ["b"]
    assert not found.decided
    assert timing.race({"a": fails}, seconds=0.01).seconds == {}
