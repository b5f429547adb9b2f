"""Latency as curves through measured points: over rank, over rows, and fitted over sizes.

Where to measure next, the steps of a curve, and where dense is as fast. Nothing is timed here.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maestro_kernels.measure.cost import break_even_rank

# Ranks are proposed in multiples of this: what fast kernels and library matmuls like.
GRID = 8
# Most ranks that one round of refinement adds.
_REFINED = 4
# Deviations below this are not worth a measurement.
_TOLERANCE = 0.03
# A step rises at least this many times as steeply as the whole curve.
_STEEP = 3.0


@dataclass(frozen=True)
class Knot:
    """Time at one rank: median and the half-width of its 20-80 % interval, same unit."""

    ms: float
    noise: float = 0.0


Curve = Mapping[int, Knot]
Sample = tuple[int, int, int, float]  # N, K, rank (0 is dense), ms


@dataclass(frozen=True)
class Step:
    """A jump of the curve: `rank` is the last one before it.

    Attributes:
        rank: just below the step.
        next: the measured rank above it.
        ms: time at rank.
        next_ms: time at next.
    """

    rank: int
    next: int
    ms: float
    next_ms: float


def curve_of(points: Iterable[Any]) -> dict[int, Knot]:
    """The curve through points with `rank`, `p20`, `p50` and `p80`; dense ones are left out.

    A rank beside a measured multiple of 8 was a probe of what odd ranks cost: no part of the curve.
    """
    found = {p.rank: Knot(p.p50, (p.p80 - p.p20) / 2) for p in points if p.rank}
    return {r: found[r] for r in sorted(found) if not _probe(r, found)}


def odd_penalty(points: Iterable[Any]) -> float:
    """Time at a rank off the grid over that of the curve there, at least 1; 1 without a probe."""
    found = {p.rank: Knot(p.p50) for p in points if p.rank}
    curve = {r: k for r, k in found.items() if not _probe(r, found)}
    ratios = [found[r].ms / interpolate(curve, r) for r in found if _probe(r, found)]
    return max(1.0, *ratios) if ratios else 1.0


def _probe(rank: int, ranks: Container[int]) -> bool:
    return rank % GRID == GRID - 1 and rank + 1 in ranks


def coarse_ranks(N: int, K: int) -> list[int]:
    """A few ranks from 16 to a little above break-even, evenly spread in log scale, on the grid."""
    top = min(N, K, math.ceil(1.15 * break_even_rank(N, K)))
    if top <= GRID:
        return sorted({max(1, top // 2), top})
    low = min(16, top)
    found = {round(low * (top / low) ** (i / 5)) for i in range(6)}
    return sorted({min(max(GRID, GRID * round(r / GRID)), max(GRID, top // GRID * GRID))
                   for r in found})  # fmt: skip


def refine(curve: Curve, dense: float | None = None) -> list[int]:
    """Ranks to measure next: midpoints of the intervals where a straight line is wrong.

    How wrong is judged by how much the slope changes at the interval's ends, or by what the
    nearest three points leave open about the crossing with the dense layer.

    Args:
        curve: rank -> time.
        dense: time of the dense layer, None where it does not matter.
    """
    ranks = sorted(curve)
    slopes = [(curve[b].ms - curve[a].ms) / (b - a) for a, b in itertools.pairwise(ranks)]
    scored = []
    for i, (a, b) in enumerate(itertools.pairwise(ranks)):
        middle = _between(a, b)
        if middle is None:
            continue
        level = (curve[a].ms + curve[b].ms) / 2
        beside = [slopes[j] for j in (i - 1, i + 1) if 0 <= j < len(slopes)]
        bend = max((abs(slopes[i] - s) for s in beside), default=0.0) * (b - a) / 4
        noise = max(curve[a].noise, curve[b].noise)
        if dense is not None and (curve[a].ms - dense) * (curve[b].ms - dense) < 0:
            # The crossing is what the curve is measured for: its place counts like a bend.
            bend = max(bend, 0.5 * (b - a) * abs(slopes[i]) + noise)
        if bend > max(_TOLERANCE * level, noise):
            scored.append((bend / level, middle))
    scored.sort(reverse=True)
    return sorted(middle for _, middle in scored[:_REFINED])


def _between(a: int, b: int) -> int | None:
    """A multiple of the grid strictly between two ranks, near the middle."""
    middle = GRID * round((a + b) / (2 * GRID))
    for candidate in (middle, middle - GRID, middle + GRID):
        if a < candidate < b:
            return candidate
    return None


def edges(ranks: Sequence[int]) -> list[int]:
    """One grid step above each rank that is a multiple of 64: where tiles of kernels end."""
    known = set(ranks)
    return [r + GRID for r in ranks if r % 64 == 0 and r + GRID not in known]


def steps(curve: Curve, *, widest: int = 2 * GRID) -> list[Step]:
    """Jumps beyond noise between ranks at most `widest` apart."""
    ranks = sorted(curve)
    if len(ranks) < 3:
        return []
    mean = (curve[ranks[-1]].ms - curve[ranks[0]].ms) / (ranks[-1] - ranks[0])
    found = []
    for a, b in itertools.pairwise(ranks):
        rise, noise = curve[b].ms - curve[a].ms, curve[a].noise + curve[b].noise
        expected = _STEEP * max(mean, 0.0) * (b - a)
        if b - a <= widest and rise > max(expected, noise, _TOLERANCE * curve[a].ms):
            found.append(Step(a, b, curve[a].ms, curve[b].ms))
    return found


def preferred(curve: Curve) -> list[int]:
    """Ranks worth choosing: no larger measured rank is as fast, noise left out of account."""
    kept: list[int] = []
    fastest = math.inf
    for rank in sorted(curve, reverse=True):
        if curve[rank].ms < fastest:
            kept.append(rank)
            fastest = curve[rank].ms
    return kept[::-1]


def break_even(curve: Curve, dense: float) -> float | None:
    """The rank up to which low rank is faster than dense; None where it never is.

    Infinite where it is faster at every measured rank. A rank that is slower within its noise does
    not count while a larger one is faster.
    """
    ranks = sorted(curve)
    faster = [r for r in ranks if curve[r].ms < dense]
    slower = [
        r
        for r in ranks
        if curve[r].ms >= dense
        and (curve[r].ms - curve[r].noise >= dense or not faster or r > faster[-1])
    ]
    if not slower:
        return math.inf
    b = slower[0]
    below = [r for r in faster if r < b]
    if not below:
        return None
    a = below[-1]
    return a + (b - a) * (dense - curve[a].ms) / (curve[b].ms - curve[a].ms)


def interpolate(curve: Curve, rank: int) -> float:
    """Time at a rank of a curve, as `on_lines`."""
    return on_lines({r: knot.ms for r, knot in curve.items()}, rank)


def on_lines(points: Mapping[int, float], rank: int) -> float:
    """Time at a rank on straight lines between the measured ones, constant below the first.

    Above the last the line goes on.
    """
    ranks = sorted(points)
    if rank <= ranks[0] or len(ranks) == 1:
        return points[ranks[0]]
    i = min(bisect.bisect_left(ranks, rank), len(ranks) - 1)
    a, b = ranks[i - 1], ranks[i]
    slope = (points[b] - points[a]) / (b - a)
    if rank > b:
        slope = max(slope, 0.0)
    return points[a] + slope * (rank - a)


def left_out(curve: Curve) -> list[float]:
    """Relative error of each inner rank when it is interpolated from the others."""
    ranks = sorted(curve)
    errors = []
    for rank in ranks[1:-1]:
        others = {r: curve[r] for r in ranks if r != rank}
        errors.append(abs(interpolate(others, rank) / curve[rank].ms - 1))
    return errors


def over_rows(M: int, Ms: Sequence[int], ms: Callable[[int], float]) -> float:
    """Between measured M on logarithmic axes; beyond them a call costs in proportion, at most.

    Below the smallest M a call costs what it does there: it reads the same weights.
    """
    if Ms[0] >= M:
        return ms(Ms[0])
    if Ms[-1] <= M:
        return ms(Ms[-1]) * M / Ms[-1]
    high = next(i for i, m in enumerate(Ms) if m > M)
    a, b = Ms[high - 1], Ms[high]
    t = math.log(M / a) / math.log(b / a)
    return math.exp((1 - t) * math.log(ms(a)) + t * math.log(ms(b)))


@dataclass(frozen=True)
class Fit:
    """What a layer of a size that was not measured takes, at a measured M.

    ms = c0 + c1 r K + c2 r N + c3 K + c4 N     low rank r
    ms = c0 + c1 N K + c2 K + c3 N              dense

    with coefficients >= 0: work, bytes of the factors and of x and y, a fixed cost per call. One
    fit per strategy, cache state, launch mode and M: the cost of a product changes with M in steps
    that no line follows.
    """

    coefficients: tuple[float, ...]
    dense: bool

    def ms(self, N: int, K: int, rank: int) -> float:
        """Predicted milliseconds."""
        return float(_features(N, K, rank, self.dense) @ np.array(self.coefficients))


def _features(N: int, K: int, rank: int, dense: bool) -> np.ndarray:
    if dense:
        return np.array([1.0, N * K, K, N])
    return np.array([1.0, rank * K, rank * N, K, N])


def fit(samples: Sequence[Sample]) -> Fit | None:
    """Least squares of the relative error with coefficients >= 0; None without samples.

    The samples are all dense (rank 0) or all low rank.
    """
    if not samples:
        return None
    dense = samples[0][2] == 0
    rows = np.array([_features(N, K, r, dense) / ms for N, K, r, ms in samples])
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)
    found = _nonnegative(rows / scale, np.ones(len(samples)))
    return Fit(tuple(float(c) for c in found / scale), dense)


def _nonnegative(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Minimise |A c - b| over c >= 0 (Lawson and Hanson, 1974)."""
    n = A.shape[1]
    c, passive = np.zeros(n), np.zeros(n, dtype=bool)
    for _ in range(3 * n):
        gradient = A.T @ (b - A @ c)
        free = ~passive & (gradient > 1e-10)
        if not free.any():
            break
        passive[np.argmax(np.where(free, gradient, -np.inf))] = True
        while True:
            trial = np.zeros(n)
            trial[passive] = np.linalg.lstsq(A[:, passive], b, rcond=None)[0]
            bad = passive & (trial <= 0)
            if not bad.any():
                c = trial
                break
            # Go as far towards the trial as no coefficient turns negative, and drop what reached 0.
            steps = c[bad] / np.maximum(c[bad] - trial[bad], 1e-300)
            c = c + float(steps.min()) * (trial - c)
            passive &= c > 1e-12
            c[~passive] = 0.0
            if not passive.any():
                break
    return c


def left_out_shapes(samples: Sequence[Sample]) -> list[float]:
    """Relative error at each sample of a fit that saw no sample of that shape.

    Empty where fewer than three shapes were measured: two points make no line.
    """
    shapes = sorted({(N, K) for N, K, _, _ in samples})
    if len(shapes) < 3:
        return []
    errors = []
    for shape in shapes:
        model = fit([s for s in samples if s[:2] != shape])
        for N, K, rank, ms in samples:
            if model is not None and shape == (N, K):
                errors.append(abs(model.ms(N, K, rank) / ms - 1))
    return errors
