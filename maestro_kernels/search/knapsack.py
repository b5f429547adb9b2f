"""The multiple-choice knapsack: one option per layer, least total error within a total cost.

Knows nothing of layers: arrays in, choices out. Costs and errors are additive real numbers.

Greedy is one walk: always the step along some layer's hull at which an error grows least per cost
saved (or, upwards, falls most per cost spent). Where the errors come from is another matter:
`descend` takes the sum of the options' own errors, or measures that of the whole choice as it goes.
`exact` finds the optimum of the sum.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Options = Sequence[tuple[Array, Array]]
# Index of the option of each layer.
Choice = tuple[int, ...]

# Partial solutions kept per layer. 2^19 take 6 MB a layer; a model of 100 layers of few shapes
# needs some thousands.
_STATES = 1 << 19
_FIRST_STATES = 1 << 11


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
    layers = [_undominated(costs, errors) for costs, errors in options]
    choice = [len(layer.costs) - 1 for layer in layers]
    path = [_finish(layers, _total(layers, choice), 0.0)]
    for i, j in _walk(layers):
        choice[i] = j
        path.append(_finish(layers, _total(layers, choice), 0.0))
    return path[::-1]


def greedy(options: Options, limit: float) -> Solution | None:
    """From the cheapest options up, always the step with the largest drop in error per cost.

    One that does not fit ends its layer, and what room is left then goes to any single better
    option that fits.
    """
    layers = [_undominated(costs, errors) for costs, errors in options]
    if not fits(sum(layer.costs[0] for layer in layers), limit):
        return None
    best = _climb(layers, limit)
    return _finish(layers, best, max(best.error - _relaxed(layers, limit)[0], 0.0))


def fits(cost: float, limit: float) -> bool:
    """Whether a sum of many costs, which carries rounding errors, is within the limit."""
    return cost <= limit + _slack(limit)


def _slack(limit: float) -> float:
    """What rounding may add to a sum of costs."""
    return 1e-9 * abs(limit)


def _undominated(costs: Array, errors: Array) -> Front:
    """The options worth their cost."""
    costs, errors = np.asarray(costs, float), np.asarray(errors, float)
    kept = _front(costs, errors)
    return Front(costs[kept], errors[kept], kept)


def _total(layers: Sequence[Front], choice: Sequence[int]) -> Solution:
    """A choice with its sums."""
    cost = sum(float(layer.costs[j]) for layer, j in zip(layers, choice, strict=True))
    error = sum(float(layer.errors[j]) for layer, j in zip(layers, choice, strict=True))
    return Solution(tuple(choice), cost, error, 0.0)


def _finish(layers: Sequence[Front], s: Solution, gap: float) -> Solution:
    """In the caller's own numbering of the options."""
    choice = tuple(int(layer.index[j]) for layer, j in zip(layers, s.choice, strict=True))
    return Solution(choice, s.cost, s.error, gap)


def _climb(layers: Sequence[Front], limit: float) -> Solution:
    """The choice of `greedy`; the cheapest one must fit."""
    choice = [0] * len(layers)
    room = limit + _slack(limit) - sum(layer.costs[0] for layer in layers)
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
            return _total(layers, choice)
        room -= layers[i].costs[j] - layers[i].costs[choice[i]]
        choice[i] = j


def _relaxed(layers: Sequence[Front], limit: float) -> tuple[float, float]:
    """Lower bound on the error, and the price of cost at which the linear relaxation has it."""
    cost = sum(float(layer.costs[0]) for layer in layers)
    error = sum(float(layer.errors[0]) for layer in layers)
    at = [0] * len(layers)
    for slope, i, j in _steps(layers):
        step = float(layers[i].costs[j] - layers[i].costs[at[i]])
        if cost + step > limit + _slack(limit):
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


def exact(options: Options, limit: float, states: int = _STATES) -> Solution | None:
    """Min sum_i error_i[j_i] over choices j with sum_i cost_i[j_i] <= limit; None if there is none.

    Dynamic programming over the layers. A state is a (cost, error) pair of the layers so far, kept
    if no other state is as cheap with as little error, and if the Lagrangian bound

        error + l cost + sum over the other layers of min_j (error_j + l cost_j) - l limit

    does not exceed the best solution known, l being the price of cost in the linear relaxation.
    Both rules keep an optimum. Only if more than `states` are left are they thinned, and the gap
    then says by how much the result may miss the optimum.

    Args:
        options: (costs, errors) of each layer, one entry per option.
        limit: on the total cost.
        states: most states kept per layer.

    Source:
        Nemhauser and Ullmann, 1969, for states by dominance; Pisinger, 1995, for the bound.
    """
    layers = [_undominated(costs, errors) for costs, errors in options]
    if not fits(sum(layer.costs[0] for layer in layers), limit):
        return None
    best = _climb(layers, limit)
    bound, price = _relaxed(layers, limit)
    for cap in (min(_FIRST_STATES, states), states):
        if best.error - bound <= 1e-12 * max(abs(best.error), abs(bound)):
            return _finish(layers, best, 0.0)
        found, thinned = _search(layers, limit, best, bound, price, cap)
        best = found if found.error < best.error else best
        if not thinned:
            return _finish(layers, best, 0.0)
    return _finish(layers, best, best.error - bound)


def _search(
    layers: Sequence[Front], limit: float, best: Solution, bound: float, price: float, cap: int
) -> tuple[Solution, bool]:
    """The dynamic programme within the gap of `best`; says whether states had to be thinned."""
    gap = best.error - bound
    allowance = gap + 1e-12 * max(abs(best.error), abs(bound))
    narrowed = []
    for layer in layers:
        reduced = layer.errors + price * layer.costs
        near = np.flatnonzero(reduced - reduced.min() <= allowance)
        narrowed.append((near, layer.costs[near], reduced[near] - reduced.min()))
    order = sorted(range(len(layers)), key=lambda i: len(narrowed[i][0]))
    cheapest_left = sum(narrowed[i][1].min() for i in order)
    dearest_left = sum(narrowed[i][1].max() for i in order)
    # Room that stays unused costs its price: a solution that leaves more is worse than the best.
    floor = limit - allowance / price if price > 0 else -np.inf
    cost, reduced = np.zeros(1), np.zeros(1)
    trail: list[tuple[NDArray, NDArray]] = []
    thinned = False
    for i in order:
        near, costs, extra = narrowed[i]
        cheapest_left -= costs.min()
        dearest_left -= costs.max()
        spent = (cost[:, None] + costs).ravel()
        worse = (reduced[:, None] + extra).ravel()
        possible = (
            (worse <= allowance)
            & (spent + cheapest_left <= limit + _slack(limit))
            & (spent + dearest_left >= floor - _slack(limit))
        )
        at = np.flatnonzero(possible)
        at = at[_front(spent[at], worse[at] - price * spent[at])]
        if len(at) > cap:
            thinned = True
            at = at[_thin(spent[at], worse[at], cap)]
        trail.append((at // len(near), near[at % len(near)]))
        cost, reduced = spent[at], worse[at]
    if len(cost) == 0:
        return best, thinned
    return _total(layers, _walk_back(order, trail, int(np.argmin(reduced - price * cost)))), thinned


def _front(cost: Array, error: Array) -> NDArray[np.int64]:
    """Indices of states that no other dominates, in order of cost."""
    order = np.lexsort((error, cost))
    falling = error[order]
    keep = np.ones(len(order), bool)
    keep[1:] = falling[1:] < np.minimum.accumulate(falling)[:-1]
    return order[keep]


def _thin(cost: Array, reduced: Array, cap: int) -> NDArray[np.int64]:
    """In each of `cap` equal intervals of cost, the state of least reduced error."""
    width = (cost[-1] - cost[0]) / cap or 1.0
    cell = np.minimum(((cost - cost[0]) / width).astype(np.int64), cap - 1)
    order = np.lexsort((reduced, cell))
    first = np.ones(len(order), bool)
    first[1:] = cell[order][1:] != cell[order][:-1]
    return np.sort(order[first])


def _walk_back(order: list[int], trail: list[tuple[NDArray, NDArray]], state: int) -> list[int]:
    choice = [0] * len(order)
    for i, (parents, chosen) in zip(reversed(order), reversed(trail), strict=True):
        choice[i] = int(chosen[state])
        state = int(parents[state])
    return choice
