"""The interleaved timer: candidates take turns, so that a busy machine is busy for all of them.

It times callables and knows nothing of layers; what it may time is decided by accuracy.py.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from maestro_kernels.measure.noise import Times, beyond_noise
from maestro_kernels.measure.wording import first_line

Call = Callable[[], object]


@dataclass(frozen=True)
class Stats:
    """Seconds for one call: percentiles over samples, each the mean of `calls` calls in a row."""

    p20: float
    p50: float
    p80: float
    samples: int
    calls: int

    @property
    def spread(self) -> float:
        """(p80 - p20) / p50: how far apart repeated samples lie."""
        return (self.p80 - self.p20) / self.p50 if self.p50 else 0.0

    @classmethod
    def of(cls, seconds: Sequence[float], calls: int) -> Stats:
        """Percentiles of samples that are seconds per call already."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1, calls)
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(seconds), fifths[3], len(seconds), calls)


class CpuClock:
    """Wall time of `calls` calls in a row."""

    def prepare(self, name: str, call: Call) -> None:
        """Nothing to prepare."""

    def time(self, name: str, call: Call, calls: int) -> float:
        """Seconds for all `calls` calls together."""
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        return (time.perf_counter_ns() - start) * 1e-9


class _Flush:
    """Overwrites a buffer: what lay in a GPU's L2 before has to come from memory again.

    Args:
        size: bytes; twice the L2 leaves nothing of what was there. 0 does nothing.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._buffer: torch.Tensor | None = None

    def __call__(self) -> None:
        if self._size:
            if self._buffer is None:
                self._buffer = torch.empty(self._size, dtype=torch.uint8, device="cuda")
            self._buffer.zero_()


class CudaClock:
    """Eager launches between two events on the current stream, so launch cost is part of it.

    Args:
        flush: bytes that are overwritten before each sample, so that caches are cold.
    """

    def __init__(self, flush: int = 0) -> None:
        self._flush = _Flush(flush)

    def prepare(self, name: str, call: Call) -> None:
        """Nothing to prepare."""

    def time(self, name: str, call: Call, calls: int) -> float:
        """Seconds for all `calls` calls together."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self._flush()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


class CudaGraphClock:
    """Replays of one CUDA graph per candidate that holds `calls` calls: device time alone.

    Args:
        flush: bytes that are overwritten before each replay, so that caches are cold.
    """

    def __init__(self, flush: int = 0) -> None:
        self._flush = _Flush(flush)
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}

    def prepare(self, name: str, call: Call, calls: int = 1) -> None:
        """Capture the graph; RuntimeError where the call cannot be captured."""
        if (name, calls) not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(calls):
                    call()
            graph.replay()
            self._graphs[name, calls] = graph

    def time(self, name: str, call: Call, calls: int) -> float:
        """Seconds for all `calls` calls together; the first use captures the graph."""
        self.prepare(name, call, calls)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        # It also keeps the device busy while the host launches the graph.
        self._flush()
        start.record()
        self._graphs[name, calls].replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


class SmallGraphClock:
    """Replays of a small CUDA graph per candidate, with weights fetched from memory each time.

    For use in the middle of a program: it waits for nothing but its own replays and leaves the
    allocator's cache alone, unlike torch.cuda.graph, and other threads may launch meanwhile. Each
    call comes after a write of twice the L2 cache, whose own time is taken off.

    Args:
        flush_bytes: how much to write before each call.
    """

    def __init__(self, flush_bytes: int) -> None:
        self._flushed = torch.empty(max(flush_bytes, 4) // 4, dtype=torch.int32, device="cuda")
        self._stream = torch.cuda.Stream()
        self._graphs: dict[tuple[str | None, int], torch.cuda.CUDAGraph] = {}

    def prepare(self, name: str, call: Call) -> None:
        """Run the call once and capture it; RuntimeError where it cannot be captured."""
        call()
        self._graph(name, call, 1)

    def time(self, name: str, call: Call, calls: int) -> float:
        """Seconds for all `calls` calls together."""
        with_call = self._replay(self._graph(name, call, calls))
        return max(with_call - self._replay(self._graph(None, _nothing, calls)), 1e-9)

    def _graph(self, name: str | None, call: Call, calls: int) -> torch.cuda.CUDAGraph:
        if (name, calls) not in self._graphs:
            graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    for _ in range(calls):
                        self._flushed.zero_()
                        call()
                finally:
                    graph.capture_end()
            current.wait_stream(self._stream)
            self._graphs[name, calls] = graph
        return self._graphs[name, calls]

    def _replay(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


def _nothing() -> None:
    """What a graph holds that only flushes."""


Clock = CpuClock | CudaClock | CudaGraphClock


def launch_modes(device: torch.device | str, flush: int = 0) -> dict[str, Clock]:
    """Launch mode -> a new clock, for the modes that a device has.

    Args:
        device: where calls run.
        flush: bytes that a GPU overwrites before each sample.
    """
    if torch.device(device).type == "cuda":
        return {"eager": CudaClock(flush), "graph": CudaGraphClock(flush)}
    return {"eager": CpuClock()}


def rounds(names: Sequence[str]) -> Iterator[list[str]]:
    """Orders to call the candidates in: rotated by one every second round, reversed in between.

    In any pair of rounds every candidate stands as often before as after every other one, and
    over 2n rounds it stands twice in every place.
    """
    n = len(names)
    for k in itertools.count():
        shift = (k // 2) % n if n else 0
        order = [*names[shift:], *names[:shift]]
        yield order if k % 2 == 0 else order[::-1]


def prepared(clock: Clock, calls: Mapping[str, Call]) -> tuple[dict[str, Call], dict[str, str]]:
    """(calls that the clock can time, name -> why it cannot time the others)."""
    fit: dict[str, Call] = {}
    unfit: dict[str, str] = {}
    for name, call in calls.items():
        try:
            clock.prepare(name, call)
        except RuntimeError as error:
            unfit[name] = first_line(error)
        else:
            fit[name] = call
    return fit, unfit


def interleave(
    candidates: Mapping[str, Call],
    *,
    seconds: float = 2.0,
    sample_seconds: float = 1e-3,
    min_rounds: int = 6,
    max_rounds: int = 100,
    prime: bool = True,
    clock: Clock | None = None,
    most_calls: Mapping[str, int] | None = None,
) -> dict[str, Stats]:
    """Time callables against each other and return seconds per call for each.

    Every candidate is called twice untimed first, so compilation and lazy packing do not count.
    Then rounds follow in which each gives one sample, until `seconds` are over.

    Args:
        candidates: name -> zero-argument callable. A callable that walks through several sets of
            weights measures cold caches; one that keeps its arguments measures warm ones.
        seconds: time for all candidates together; at least `min_rounds` rounds run even beyond it.
        sample_seconds: a sample repeats a short call until it lasts about this long.
        min_rounds: fewest samples per candidate.
        max_rounds: most samples per candidate.
        prime: call once untimed before each sample, which brings back into the caches what other
            candidates pushed out; leave it off for cold measurements.
        clock: how `calls` calls are timed; wall time by default.
        most_calls: name -> most calls in a sample: the sets of weights that a cold one walks
            through, because the next round of them would be warm.

    Returns:
        A Stats for every candidate, in the order of `candidates`.

    Raises:
        ValueError: no candidate, or rounds that do not make sense.
    """
    if not candidates:
        raise ValueError("interleave: candidates: expected at least one, got none")
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(
            f"interleave: min_rounds: expected 1 <= min_rounds <= max_rounds = {max_rounds}, "
            f"got {min_rounds}"
        )
    clock = clock or CpuClock()
    deadline = time.perf_counter() + seconds
    most = most_calls or {}
    calls = {
        name: min(_repeats(call, sample_seconds), most.get(name, 10_000))
        for name, call in candidates.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    with _no_garbage_collection():
        for k, order in enumerate(rounds(list(candidates))):
            if k == max_rounds or (k >= min_rounds and time.perf_counter() > deadline):
                break
            for name in order:
                call, repeats = candidates[name], calls[name]
                if prime:
                    call()
                samples[name].append(clock.time(name, call, repeats) / repeats)
    return {name: Stats.of(samples[name], calls[name]) for name in candidates}


@dataclass(frozen=True)
class Race:
    """What a race found.

    Attributes:
        seconds: per call of each candidate, the median.
        decided: whether the fastest was faster than each other one beyond noise.
        given_up: the first call alone took too much of the time.
    """

    seconds: dict[str, float]
    decided: bool
    given_up: bool = False


def race(
    candidates: Mapping[str, Call],
    *,
    seconds: float,
    clock: Clock | SmallGraphClock | None = None,
    sample_seconds: float = 5e-4,
    max_rounds: int = 25,
) -> Race:
    """Time candidates for no longer than it takes to tell which is fastest.

    After one untimed call and two timed calls of each, rounds follow as in `interleave`, until the
    fastest is faster than all others beyond noise, or `seconds` are over. Two untimed calls come
    before each sample: the threads of another library have to fall asleep, and one's own to wake.
    No garbage is collected, so that a race in the middle of a program costs little. A candidate
    that raises is left out.

    Args:
        candidates: name -> zero-argument callable.
        seconds: time for everything; where the first call takes a quarter of it, it is the last.
        clock: how `calls` calls are timed; wall time by default.
        sample_seconds: a sample repeats a short call until it lasts about this long.
        max_rounds: most samples per candidate.
    """
    clock = clock or CpuClock()
    begin = time.perf_counter()
    samples: dict[str, list[float]] = {}
    repeats: dict[str, int] = {}
    for name, call in candidates.items():
        try:
            clock.prepare(name, call)
            call()
            if not samples and time.perf_counter() - begin > seconds / 4:
                return Race({}, decided=False, given_up=True)
            first = min(clock.time(name, call, 1) for _ in range(2))
        except Exception:  # out of memory, not compiled, not to be captured
            continue
        samples[name] = [first]
        repeats[name] = max(1, min(1000, round(sample_seconds / max(first, 1e-7))))
    decided = False
    for k, order in enumerate(rounds(list(samples))):
        if decided or k == max_rounds or time.perf_counter() - begin > seconds or len(samples) < 2:
            break
        for name in order:
            call = candidates[name]
            for _ in range(2 if repeats[name] > 2 else 0):
                call()
            times = clock.time(name, call, repeats[name])
            samples[name].append(times / repeats[name])
        decided = k + 1 >= _LEAST_ROUNDS and _decided(samples)
    # The first sample holds what only a first call costs, where others are there to do without it.
    return Race({name: statistics.median(s[1:] or s) for name, s in samples.items()}, decided)


_LEAST_ROUNDS = 5


def _decided(samples: Mapping[str, Sequence[float]]) -> bool:
    """Whether the fastest candidate is faster than each other one beyond noise."""
    times = {n: _times(Stats.of(s[1:], 1)) for n, s in samples.items()}
    fastest = min(times, key=lambda name: times[name][1])
    others = (t for name, t in times.items() if name != fastest)
    return all(beyond_noise(other, times[fastest]) == "faster" for other in others)


def _times(stats: Stats) -> Times:
    return stats.p20, stats.p50, stats.p80


def timed(
    calls: Mapping[str, Call],
    device: torch.device,
    cache: str,
    seconds: float,
    *,
    rounds: tuple[int, int],
    flush: int = 0,
    copies: Mapping[str, int] | None = None,
) -> Iterator[tuple[str, dict[str, Stats]]]:
    """(launch mode, what its clock can time, in turns) for every launch mode of a device.

    Args:
        calls: by name.
        device: where they run.
        cache: "warm" or "cold".
        seconds: of samples per call.
        rounds: fewest and most samples.
        flush: bytes that a GPU overwrites before each sample.
        copies: name -> sets of weights that a cold call walks through: where caches are flushed
            before a sample, that is the most calls one may hold.
    """
    for launch, clock in launch_modes(device, flush).items():
        fit, _ = prepared(clock, calls)
        yield (
            launch,
            interleave(
                fit,
                seconds=seconds * len(fit),
                min_rounds=rounds[0],
                max_rounds=rounds[1],
                prime=cache == "warm",
                clock=clock,
                most_calls=copies if flush else None,
            ),
        )


def _repeats(call: Call, sample_seconds: float) -> int:
    call()
    estimate = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        estimate = min(estimate, time.perf_counter() - start)
    return max(1, min(10_000, round(sample_seconds / max(estimate, 1e-7))))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
