"""The multiple-choice knapsack: one option per layer, least total error within a total cost.

Knows nothing of layers: arrays in, choices out. Costs and errors are additive real numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from maestro_kernels.search.descent import (
    Front,
    Options,
    Solution,
    climb,
    finish,
    fits,
    relaxed,
    slack,
    total,
    undominated,
)

__all__ = ["exact"]

Array = NDArray[np.float64]

# Partial solutions kept per layer. 2^19 take 6 MB a layer; a model of 100 layers of few shapes
# needs some thousands.
_STATES = 1 << 19
_FIRST_STATES = 1 << 11


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
    layers = [undominated(costs, errors) for costs, errors in options]
    if not fits(sum(layer.costs[0] for layer in layers), limit):
        return None
    best = climb(layers, limit)
    bound, price = relaxed(layers, limit)
    for cap in (min(_FIRST_STATES, states), states):
        if best.error - bound <= 1e-12 * max(abs(best.error), abs(bound)):
            return finish(layers, best, 0.0)
        found, thinned = _search(layers, limit, best, bound, price, cap)
        best = found if found.error < best.error else best
        if not thinned:
            return finish(layers, best, 0.0)
    return finish(layers, best, best.error - bound)


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
            & (spent + cheapest_left <= limit + slack(limit))
            & (spent + dearest_left >= floor - slack(limit))
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
    return total(layers, _walk_back(order, trail, int(np.argmin(reduced - price * cost)))), thinned


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
