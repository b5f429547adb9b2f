"""The lower convex hull of each layer's options, and the walks along it: what "greedy" means here.

Knows nothing of layers: arrays in, choices out. Costs and errors are additive real numbers.

Greedy is one walk: always the step along some layer's hull at which an error grows least per cost
saved (or, upwards, falls most per cost spent). Where the errors come from is another matter:
`descend` takes the sum of the options' own errors, or measures that of the whole choice as it goes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Choice", "Options", "Solution", "descend", "greedy", "hull", "hull_path"]

Array = NDArray[np.float64]
Options = Sequence[tuple[Array, Array]]
# Index of the option of each layer.
Choice = tuple[int, ...]


@dataclass(frozen=True)
class Solution:
    """One option of each layer.

    Attributes:
        choice: index of the option chosen, per layer.
        cost: their total cost.
        error: their total error.
        gap: the optimum's error is at least error - gap; 0 where the solution is the optimum.
    """

    choice: Choice
    cost: float
    error: float
    gap: float


@dataclass(frozen=True)
class Front:
    """The options of one layer that no other dominates: cost rises, error falls."""

    costs: Array
    errors: Array
    index: NDArray[np.int64]


def hull(costs: Array, errors: Array) -> list[int]:
    """Options on the lower convex hull of (cost, error), from the cheapest to the dearest.

    Args:
        costs: rising.
        errors: any.
    """
    kept: list[int] = []
    for j in range(len(costs)):
        while len(kept) >= 2 and _slope(costs, errors, kept[-1], j) <= _slope(
            costs, errors, kept[-2], kept[-1]
        ):
            kept.pop()
        kept.append(j)
    return kept


def descend(
    options: Options, measure: Callable[[Choice], float] | None = None
) -> Iterator[tuple[int, int]]:
    """(layer, option it steps down to), from every layer's dearest option to its cheapest.

    The next step is always the one with the least error per cost saved, along the hulls of the
    options' own errors.

    Args:
        options: (costs, errors) of each layer, costs rising.
        measure: the error of a whole choice, which then decides in place of the sum. An increase
            measured earlier stands until its step is the best of all; then it is measured again.
            Where increases grow as the model shrinks, that finds the same as measuring all.
    """
    corners = [hull(costs, errors)[:-1] for costs, errors in options]
    at = [len(costs) - 1 for costs, _ in options]
    now, taken = 0.0 if measure is None else measure(tuple(at)), 0

    def step(i: int) -> tuple[float, int, int, float]:
        """Price, layer (negated: of equal prices the last layer's goes first), age, error then."""
        costs, errors = options[i]
        end = corners[i][-1]
        if measure is None:
            then = float(errors[end] - errors[at[i]])
        else:
            then = measure((*at[:i], end, *at[i + 1 :]))
        return (then - now) / float(costs[at[i]] - costs[end]), -i, taken, then

    steps = [step(i) for i, of_layer in enumerate(corners) if of_layer]
    heapq.heapify(steps)
    while steps:
        _, i, age, then = steps[0]
        if measure is not None and age != taken:
            heapq.heapreplace(steps, step(-i))
            continue
        heapq.heappop(steps)
        i, taken, now = -i, taken + 1, 0.0 if measure is None else then
        at[i] = corners[i].pop()
        yield i, at[i]
        if corners[i]:
            heapq.heappush(steps, step(i))


def hull_path(options: Options) -> list[Solution]:
    """The greedy steps from the cheapest to the best choice: each an optimum for its own cost."""
    layers = [undominated(costs, errors) for costs, errors in options]
    choice = [len(layer.costs) - 1 for layer in layers]
    path = [finish(layers, total(layers, choice), 0.0)]
    for i, j in _walk(layers):
        choice[i] = j
        path.append(finish(layers, total(layers, choice), 0.0))
    return path[::-1]


def greedy(options: Options, limit: float) -> Solution | None:
    """From the cheapest options up, always the step with the largest drop in error per cost.

    One that does not fit ends its layer, and what room is left then goes to any single better
    option that fits.
    """
    layers = [undominated(costs, errors) for costs, errors in options]
    if not fits(sum(layer.costs[0] for layer in layers), limit):
        return None
    best = climb(layers, limit)
    return finish(layers, best, max(best.error - relaxed(layers, limit)[0], 0.0))


def fits(cost: float, limit: float) -> bool:
    """Whether a sum of many costs, which carries rounding errors, is within the limit."""
    return cost <= limit + slack(limit)


def slack(limit: float) -> float:
    """What rounding may add to a sum of costs."""
    return 1e-9 * abs(limit)


def undominated(costs: Array, errors: Array) -> Front:
    """The options worth their cost."""
    order = np.lexsort((errors, costs))
    costs, errors = np.asarray(costs, float)[order], np.asarray(errors, float)[order]
    keep = np.ones(len(order), bool)
    keep[1:] = errors[1:] < np.minimum.accumulate(errors)[:-1]
    return Front(costs[keep], errors[keep], order[keep])


def total(layers: Sequence[Front], choice: Sequence[int]) -> Solution:
    """A choice with its sums."""
    cost = sum(float(layer.costs[j]) for layer, j in zip(layers, choice, strict=True))
    error = sum(float(layer.errors[j]) for layer, j in zip(layers, choice, strict=True))
    return Solution(tuple(choice), cost, error, 0.0)


def finish(layers: Sequence[Front], s: Solution, gap: float) -> Solution:
    """In the caller's own numbering of the options."""
    choice = tuple(int(layer.index[j]) for layer, j in zip(layers, s.choice, strict=True))
    return Solution(choice, s.cost, s.error, gap)


def climb(layers: Sequence[Front], limit: float) -> Solution:
    """The choice of `greedy`; the cheapest one must fit."""
    choice = [0] * len(layers)
    room = limit + slack(limit) - sum(layer.costs[0] for layer in layers)
    ended: set[int] = set()
    for _, i, j in _steps(layers):
        step = layers[i].costs[j] - layers[i].costs[choice[i]]
        if i not in ended and step <= room:
            choice[i] = j
            room -= step
        else:
            ended.add(i)
    while True:
        drop, i, j = max(_upgrade(layer, i, choice[i], room) for i, layer in enumerate(layers))
        if drop <= 0:
            return total(layers, choice)
        room -= layers[i].costs[j] - layers[i].costs[choice[i]]
        choice[i] = j


def relaxed(layers: Sequence[Front], limit: float) -> tuple[float, float]:
    """Lower bound on the error, and the price of cost at which the linear relaxation has it."""
    cost = sum(float(layer.costs[0]) for layer in layers)
    error = sum(float(layer.errors[0]) for layer in layers)
    at = [0] * len(layers)
    for slope, i, j in _steps(layers):
        step = float(layers[i].costs[j] - layers[i].costs[at[i]])
        if cost + step > limit + slack(limit):
            return error + slope * max(limit - cost, 0.0), -slope
        cost, error, at[i] = cost + step, error + slope * step, j
    return error, 0.0


def _slope(costs: Array, errors: Array, a: int, b: int) -> float:
    """Error per cost on the way from option a to option b."""
    return float((errors[b] - errors[a]) / (costs[b] - costs[a]))


def _walk(layers: Sequence[Front]) -> Iterator[tuple[int, int]]:
    return descend([(layer.costs, layer.errors) for layer in layers])


def _steps(layers: Sequence[Front]) -> list[tuple[float, int, int]]:
    """(slope, layer, option it leads to) of the greedy steps upwards, steepest first."""
    at = [len(layer.costs) - 1 for layer in layers]
    steps = []
    for i, j in _walk(layers):
        steps.append((_slope(layers[i].costs, layers[i].errors, j, at[i]), i, at[i]))
        at[i] = j
    return steps[::-1]


def _upgrade(layer: Front, i: int, j: int, room: float) -> tuple[float, int, int]:
    """The largest drop in error that a single change of this layer can pay for."""
    last = int(np.searchsorted(layer.costs, layer.costs[j] + room, side="right")) - 1
    last = max(last, j)
    return float(layer.errors[j] - layer.errors[last]), i, last
