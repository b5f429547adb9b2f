"""Latency over rank as a curve: where to measure next, its steps, and where dense is as fast.

Pure functions of measured points; nothing is timed here.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maestro_kernels.measure.cost import break_even_rank

__all__ = [
    "Knot",
    "Step",
    "break_even",
    "coarse_ranks",
    "curve_of",
    "edges",
    "interpolate",
    "left_out",
    "odd_penalty",
    "on_lines",
    "preferred",
    "refine",
    "steps",
]  # fmt: skip

# Ranks are proposed in multiples of this: what fast kernels and library matmuls like.
GRID = 8
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


def coarse_ranks(N: int, K: int, count: int = 6) -> list[int]:
    """A few ranks from 16 to a little above break-even, evenly spread in log scale, on the grid."""
    top = min(N, K, math.ceil(1.15 * break_even_rank(N, K)))
    if top <= GRID:
        return sorted({max(1, top // 2), top})
    low = min(16, top)
    found = {round(low * (top / low) ** (i / (count - 1))) for i in range(count)}
    return sorted({min(max(GRID, GRID * round(r / GRID)), max(GRID, top // GRID * GRID))
                   for r in found})  # fmt: skip


def refine(
    curve: Curve, dense: float | None = None, *, limit: int = 4, grid: int = GRID
) -> list[int]:
    """Ranks to measure next: midpoints of the intervals where a straight line is wrong.

    How wrong is judged by how much the slope changes at the interval's ends, or by what the
    nearest three points leave open about the crossing with the dense layer.

    Args:
        curve: rank -> time.
        dense: time of the dense layer, None where it does not matter.
        limit: at most this many.
        grid: ranks are multiples of this.
    """
    ranks = sorted(curve)
    slopes = [(curve[b].ms - curve[a].ms) / (b - a) for a, b in itertools.pairwise(ranks)]
    scored = []
    for i, (a, b) in enumerate(itertools.pairwise(ranks)):
        middle = _between(a, b, grid)
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
    return sorted(middle for _, middle in scored[:limit])


def _between(a: int, b: int, grid: int) -> int | None:
    """A multiple of the grid strictly between two ranks, near the middle."""
    middle = grid * round((a + b) / (2 * grid))
    for candidate in (middle, middle - grid, middle + grid):
        if a < candidate < b:
            return candidate
    return None


def edges(ranks: Sequence[int], grid: int = GRID) -> list[int]:
    """One grid step above each rank that is a multiple of 64: where tiles of kernels end."""
    known = set(ranks)
    return [r + grid for r in ranks if r % 64 == 0 and r + grid not in known]


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
