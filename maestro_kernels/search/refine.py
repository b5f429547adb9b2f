"""Choices that were made by an additive model of the error, improved by measuring the true one.

Knows nothing of layers: options and a loss in, a choice out, like knapsack.py, which it calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maestro_kernels.search.knapsack import Choice, Options, exact, hull_path

Array = NDArray[np.float64]

# A smaller fall of the loss is not worth another choice.
_WORTH = 1e-4
# Of a layer's whole cost, how far the first probes reach, and the least that later ones do.
_FIRST, _LAST = 0.25, 0.01
# Pairs of layers tried one by one where all changes together do not help.
_PAIRS = 4
# Probes leave so many passes for the choices that they lead to.
_SPARE = _PAIRS + 2


@dataclass(frozen=True)
class Refinement:
    """What measuring changed.

    Attributes:
        starts: loss of each choice to start from, in their order.
        loss: of the choice at the end: at most the least of `starts`.
        passes: how often the loss was measured.
        limit: how often it might have been.
    """

    starts: tuple[float, ...]
    loss: float
    passes: int
    limit: int


def refine(
    options: Options,
    starts: Sequence[Choice],
    limit: float,
    loss: Callable[[Choice], float],
    passes: int,
    fits: Callable[[Choice], bool] = lambda choice: True,
) -> tuple[Choice, Refinement]:
    """The best of `starts`, then swaps of cost between layers for as long as the loss falls.

    Around the best choice c so far each layer alone is moved down and up its convex front and the
    loss L is measured. That gives each layer a local error curve

        e(j) = (L(moved) - L(c)) * (error_j - error_c) / (error_moved - error_c),

    the given curve scaled to what was measured on that side. A knapsack over these, within the
    probes and then over the whole curves, gives the next choices to measure; then single pairs. One
    becomes c if its loss is lower; else the probes move closer, until they are next to c.

    The loss is measured at least once per start and never more often than `passes` or that.

    Args:
        options: (costs, errors) of each layer, as knapsack.exact takes them.
        starts: choices within the limit.
        limit: on the total cost.
        loss: of a choice; lower is better, infinite where it is beyond hope.
        passes: most calls of loss.
        fits: asked of a choice within the limit before it is measured.
    """
    meter = _Meter(loss, max(passes, len(set(starts))))
    found = [meter(start) for start in starts]
    best = min(range(len(starts)), key=found.__getitem__)
    now, low = starts[best], found[best]
    fronts = [_front(costs, errors) for costs, errors in options]
    reach = _FIRST
    while reach >= _LAST and meter.left > _SPARE and np.isfinite(low):
        curves = _probed(options, fronts, now, low, reach, meter)
        better = None
        for candidate in _candidates(options, curves, now, limit):
            if not meter.left:
                break
            if not fits(candidate):
                continue
            value = meter(candidate)
            if value < low - _WORTH * abs(low):
                better, low = candidate, value
                break
        if better is None:
            reach /= 2
        else:
            now = better
    return now, Refinement(tuple(found), low, meter.used, meter.limit)


class _Meter:
    """Counts the calls of the loss; a choice that was measured costs nothing again."""

    def __init__(self, loss: Callable[[Choice], float], limit: int) -> None:
        self._loss, self.limit = loss, limit
        self._known: dict[Choice, float] = {}

    @property
    def used(self) -> int:
        return len(self._known)

    @property
    def left(self) -> int:
        return self.limit - self.used

    def __call__(self, choice: Choice) -> float:
        if choice not in self._known:
            self._known[choice] = self._loss(choice)
        return self._known[choice]


@dataclass(frozen=True)
class _Curve:
    """A layer's error around the present choice: at its own options, nan where nothing is known.

    Attributes:
        near: between the probes.
        far: everywhere, scaled by the probes.
        down: the probe of lower cost, None where there is none.
        up: the probe of higher cost, None where there is none.
    """

    near: Array
    far: Array
    down: int | None
    up: int | None


def _front(costs: Array, errors: Array) -> list[int]:
    """Options on the falling part of the lower convex hull of (cost, error), cheapest first."""
    known = np.flatnonzero(np.isfinite(errors))
    path = hull_path([(costs[known], errors[known])])
    return [int(known[solution.choice[0]]) for solution in path]


def _probed(
    options: Options, fronts: list[list[int]], now: Choice, low: float, reach: float, meter: _Meter
) -> list[_Curve]:
    """The loss of each layer moved down and up by about `reach` of its cost, as far as it goes."""
    curves = []
    for i, (costs, errors) in enumerate(options):
        here = now[i]
        step = reach * float(costs.max())
        down = next((j for j in reversed(fronts[i]) if costs[j] <= costs[here] - step), None)
        up = next((j for j in fronts[i] if costs[j] >= costs[here] + step), None)
        # The ends of the front are nearer than a step: they still are the way down and up.
        if down is None and costs[fronts[i][0]] < costs[here]:
            down = fronts[i][0]
        if up is None and costs[fronts[i][-1]] > costs[here]:
            up = fronts[i][-1]
        known = np.where(np.isfinite(errors), errors, np.nan)
        relative = known - known[here]
        near, far = np.full(len(costs), np.nan), relative.copy()
        near[here] = far[here] = 0.0
        measured: list[int | None] = []
        for probe, side in ((down, costs < costs[here]), (up, costs > costs[here])):
            if probe is None or meter.left <= _SPARE:
                measured.append(None)
                continue
            change = meter((*now[:i], probe, *now[i + 1 :])) - low
            scale = change / relative[probe] if relative[probe] else 0.0
            if not np.isfinite(scale):
                far[side] = np.nan
                measured.append(None)
                continue
            far[side] = relative[side] * scale
            within = side & (np.abs(costs - costs[here]) <= abs(costs[probe] - costs[here]))
            near[within] = far[within]
            measured.append(probe)
        curves.append(_Curve(near, far, *measured))
    return curves


def _candidates(options: Options, curves: list[_Curve], now: Choice, limit: float) -> list[Choice]:
    """Choices that the probed curves say are better, the most promising first."""
    found = []
    for curve in ("near", "far"):
        known = [np.flatnonzero(~np.isnan(getattr(c, curve))) for c in curves]
        narrowed = [
            (costs[k], getattr(c, curve)[k])
            for (costs, _), c, k in zip(options, curves, known, strict=True)
        ]
        solution = exact(narrowed, limit)
        if solution is not None and solution.error < 0:
            found.append(tuple(int(k[j]) for k, j in zip(known, solution.choice, strict=True)))
    found += _pairs(options, curves, now, limit)
    return [c for c in dict.fromkeys(found) if c != now]


def _pairs(options: Options, curves: list[_Curve], now: Choice, limit: float) -> list[Choice]:
    """Now with one layer at its upper probe and one at its lower, the best few."""
    spent = sum(float(costs[j]) for (costs, _), j in zip(options, now, strict=True))
    gains = []
    for a, curve in enumerate(curves):
        if curve.up is None:
            continue
        for b, other in enumerate(curves):
            if a == b or other.down is None:
                continue
            cost = spent + sum(
                float(options[i][0][j] - options[i][0][now[i]])
                for i, j in ((a, curve.up), (b, other.down))
            )
            if cost <= limit * (1 + 1e-9):
                gains.append((curve.near[curve.up] + other.near[other.down], a, b))
    gains.sort()
    pairs = []
    for gain, a, b in gains[:_PAIRS]:
        if gain < 0:
            moved = list(now)
            up, down = curves[a].up, curves[b].down
            assert up is not None
            assert down is not None
            moved[a], moved[b] = up, down
            pairs.append(tuple(moved))
    return pairs
