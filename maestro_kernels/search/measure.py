"""Timing one layer size over ranks: every rank and strategy takes turns in one interleaved run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from maestro_kernels import hardware
from maestro_kernels.benchmark.cases import Case, Layer
from maestro_kernels.benchmark.providers import Inputs, Provider, Unavailable
from maestro_kernels.benchmark.run import Options, Rings, checked, walk
from maestro_kernels.measure import records
from maestro_kernels.measure.timing import Stats, interleave, prepared
from maestro_kernels.search.strategies import DENSE, TWO, for_profile
from maestro_kernels.testing import make_inputs

__all__ = ["Point", "Sweep", "passing", "point_from", "ring_bytes", "timed"]

# Walking through this many times the private caches leaves nothing in them.
_CACHES = 4
_MIN_RING, _MAX_RING = 32 << 20, 512 << 20
# Seconds of samples for one candidate: about ten of a millisecond, each with an untimed call.
_SECONDS = 0.025


@dataclass(frozen=True)
class Point:
    """One time: a strategy at a rank.

    Attributes:
        N: out_features.
        K: in_features.
        M: rows of x.
        bias: whether the layer adds one.
        rank: of the factors; 0 stands for the dense layer.
        strategy: as strategies.py names it: "dense", "two matmuls", "ours", "native: fused", ...
        cache: "warm" repeats one set of tensors, "cold" walks through copies.
        launch: "eager" or "graph" (CUDA graph).
        p20: milliseconds per call, 20th percentile.
        p50: median.
        p80: 80th percentile.
    """

    N: int
    K: int
    M: int
    bias: bool
    rank: int
    strategy: str
    cache: str
    launch: str
    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Sweep:
    """One layer size at one M, to be measured at ranks that are decided as one goes.

    Attributes:
        N: out_features.
        K: in_features.
        M: rows of x.
        bias: whether the layer adds one.
        dtype: dtype of everything.
        device: where.
        seconds: of samples per candidate, cache state and launch mode.
    """

    N: int
    K: int
    M: int
    bias: bool
    dtype: torch.dtype
    device: torch.device
    seconds: float = _SECONDS

    def case(self, rank: int) -> Case:
        """The benchmark's description of one rank."""
        name = str(self.dtype).removeprefix("torch.")
        layer = Layer(self.N, self.K, rank, rank)
        return Case("profile", self.M, (layer,), name, bias=self.bias)

    def measure(
        self,
        ranks: Sequence[int],
        providers: Callable[[Case], Sequence[Provider]] = for_profile,
    ) -> list[Point]:
        """Time the dense layer and every strategy at every rank against each other.

        What cannot run, or is less accurate than two matmuls allow, gives no point.
        """
        inputs, admitted = {}, {}
        with torch.no_grad():
            for rank in (0, *ranks):
                case = self.case(max(rank, 1))
                inputs[rank] = self._inputs(rank)
                # What follows from the rank is timed at every rank, dense layers once.
                chosen = [p for p in providers(case) if (p.family == "dense") == (rank == 0)]
                admitted[rank] = passing(case, chosen, inputs[rank], yardstick=(DENSE, TWO))
            points: list[Point] = []
            for cache in ("warm", "cold"):
                ring = ring_bytes(self.device) if cache == "cold" else 0
                calls, copies = {}, {}
                for rank, chosen in admitted.items():
                    rings = Rings(inputs[rank], ring)
                    case = self.case(max(rank, 1))
                    for provider in chosen:
                        bound = provider.bound(case, rings[provider.family])
                        calls[f"{rank} {provider.name}"] = walk(bound)
                        copies[f"{rank} {provider.name}"] = len(bound)
                points += self._time(calls, cache, copies)
        return points

    def _inputs(self, rank: int) -> Inputs:
        """Factors of one rank; for 0 the dense weight instead, which is no product of any."""
        R = rank or self.N
        outs = self.N if rank else 1
        x, u, v, b = make_inputs(
            self.M, outs, self.K, R, dtype=self.dtype, device=self.device, bias=False, seed=rank
        )
        if self.bias:
            b = make_inputs(1, self.N, 1, 1, dtype=self.dtype, device=self.device)[3]
        if rank:
            return Inputs(x, (u,), (v,), (b,), (), (rank,))
        return Inputs(x, (), (), (b,), (), (1,), dense=(v,))

    def _time(
        self, calls: dict[str, Callable[[], object]], cache: str, copies: dict[str, int]
    ) -> list[Point]:
        points = []
        for launch, stats in timed(
            calls, self.device, cache, self.seconds, rounds=(5, 40), copies=copies
        ):
            for name, s in stats.items():
                rank, _, strategy = name.partition(" ")
                times = (1e3 * s.p20, 1e3 * s.p50, 1e3 * s.p80)
                where = (self.N, self.K, self.M, self.bias, int(rank), strategy, cache, launch)
                points.append(Point(*where, *times))
        return points


def passing(
    case: Case,
    providers: Sequence[Provider],
    inputs: Inputs,
    yardstick: Sequence[str] = (),
    refused: dict[str, str] | None = None,
) -> list[Provider]:
    """The providers that run and pass the accuracy gate, or are what it measures by.

    Args:
        case: what they compute.
        providers: the candidates.
        inputs: of the case.
        yardstick: names that need no gate.
        refused: gets name -> why of those that failed, but for those that do not take the case.
    """
    refused = {} if refused is None else refused
    found = []
    for provider in providers:
        if provider.name not in yardstick:
            try:
                _, problem = checked(case, provider, inputs)
            except Unavailable:
                continue
            except RuntimeError as error:
                refused[provider.name] = f"{type(error).__name__}: {error}"
                continue
            if problem is not None:
                refused[provider.name] = problem
                continue
        found.append(provider)
    return found


def timed(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    cache: str,
    seconds: float,
    *,
    rounds: tuple[int, int],
    copies: Mapping[str, int] | None = None,
) -> Iterator[tuple[str, dict[str, Stats]]]:
    """(launch mode, what its clock can time, in turns) for every launch mode of a device.

    Args:
        calls: by name.
        device: where they run.
        cache: "warm" or "cold".
        seconds: of samples per call.
        rounds: fewest and most samples.
        copies: name -> sets of weights that a cold call walks through; on a GPU, whose caches are
            flushed before a sample, that is the most calls one may hold.
    """
    options = Options(device=str(device))
    for launch in options.launches:
        timer = options.clock(launch, cache)
        fit, _ = prepared(timer, calls)
        yield (
            launch,
            interleave(
                fit,
                seconds=seconds * len(fit),
                min_rounds=rounds[0],
                max_rounds=rounds[1],
                prime=cache == "warm",
                clock=timer,
                most_calls=copies if device.type == "cuda" and cache == "cold" else None,
            ),
        )


def ring_bytes(device: torch.device) -> int:
    """What a cold measurement walks through: several times the private caches."""
    private = hardware.current_device(device).l2_bytes or 0
    return min(max(_CACHES * private, _MIN_RING), _MAX_RING)


def point_from(record: dict[str, Any]) -> Point:
    """A Point from its dictionary.

    Raises:
        ValueError: fields are missing or of another kind.
    """
    point = records.checked(Point, record, "point")
    if not 0 < point.p20 <= point.p50 <= point.p80:
        raise ValueError(f"p50: expected 0 < p20 <= p50 <= p80, got {record}")
    return point
