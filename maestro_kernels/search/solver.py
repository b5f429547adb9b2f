"""Which layer gets which rank under a budget: the problem that `allocate` and `extract` solve.

What is known of the choices is made elsewhere; here they are chosen, and the choice is improved by
measuring the whole model. Beside the knapsack stand rules that set all ranks by one number: each
gives, for every value of its number, the choice of each layer, and `best_of` picks the value.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from maestro_kernels.search.budget import Budget
from maestro_kernels.search.costs import Choices, Costs
from maestro_kernels.search.knapsack import Choice, Options, Solution, exact, greedy
from maestro_kernels.search.refine import Refinement, refine
from maestro_kernels.search.sensitivities import LayerSensitivity

METHODS = ("exact", "greedy", "threshold", "uniform")
Array = NDArray[np.float64]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Problem:
    """The choices of every layer and what they cost.

    Attributes:
        choices: of each layer.
        beside: what the model costs beside these layers, whatever is chosen.
        dense: what the dense model costs, which budgets are fractions of.
    """

    choices: list[Choices]
    beside: Costs[float]
    dense: Costs[float]

    def options(self, budget: Budget | type[Budget]) -> list[tuple[Array, Array]]:
        """(costs, errors) of each layer, the costs in what the budget counts."""
        return [(c.costs.counted(budget), c.costs.error) for c in self.choices]

    def limit(self, budget: Budget) -> float:
        """What the layers may cost."""
        return budget.limit(self.dense.counted(budget)) - self.beside.counted(budget)

    def value(self, budget: Budget, cost: float) -> float:
        """A cost of the layers in the budget's own measure, everything beside them included."""
        return budget.value(cost + self.beside.counted(budget), self.dense.counted(budget))

    def costs(self, choice: Choice) -> Costs[float]:
        """What the model costs."""
        parts = (c.at(j) for c, j in zip(self.choices, choice, strict=True))
        return sum(parts, start=self.beside)

    def keep(self, index: Sequence[NDArray[np.int64] | Sequence[int]]) -> Problem:
        """With these choices of each layer alone."""
        kept = [c.keep(of_layer) for c, of_layer in zip(self.choices, index, strict=True)]
        return replace(self, choices=kept)

    def with_errors(self, errors: Sequence[Array]) -> Problem:
        """With other errors of each layer's choices."""
        pairs = zip(self.choices, errors, strict=True)
        found = [replace(c, costs=replace(c.costs, error=error)) for c, error in pairs]
        return replace(self, choices=found)


def solve(
    problem: Problem, budget: Budget, method: str, sensitivities: Sequence[LayerSensitivity]
) -> tuple[Solution | None, float]:
    """The choice, None where none fits, and the least that the layers cost by this method."""
    options, limit = problem.options(budget), problem.limit(budget)
    if method == "uniform":
        return best_of(uniform(problem.choices), options, limit)
    if method == "threshold":
        return best_of(by_threshold(problem.choices, sensitivities), options, limit)
    least = sum(float(costs.min()) for costs, _ in options)
    return (exact if method == "exact" else greedy)(options, limit), least


def refined(
    problem: Problem,
    budget: Budget,
    start: Choice,
    measuring: AbstractContextManager[Callable[[Choice], float]],
    passes: int | None,
    advance: Callable[[str, int, int], None],
    fits: Callable[[Choice], bool] = lambda choice: True,
) -> tuple[Choice, Refinement]:
    """The better of a choice and uniform ranks, improved by `refine`.

    Args:
        problem: with errors that are taken to add up.
        budget: that the choice meets.
        start: a choice.
        measuring: gives the loss of a choice; entered after the number of passes was told.
        passes: most passes over the batches; None is 16 and four for every layer.
        advance: told (text, passes done, passes in all), at first the number that there may be.
        fits: whether a choice within the limit can be had.
    """
    options: Options = problem.options(budget)
    limit = problem.limit(budget)
    even, _ = best_of(uniform(problem.choices), options, limit)
    starts = [start]
    if even is not None and fits(even.choice):
        starts.append(even.choice)
    total = max(16 + 4 * len(options) if passes is None else passes, len(starts))
    advance(f"refining {len(options)} layers: at most {total} passes", 0, total)
    done = itertools.count(1)
    with measuring as measure:

        def loss(choice: Choice) -> float:
            value = measure(choice)
            advance(f"refining: loss {value:.4g}", next(done), total)
            return value

        found = refine(options, starts, limit, loss, total, fits)
    advance("done", total, total)
    return found


def uniform(layers: Sequence[Choices]) -> list[Index]:
    """R = floor(f N K / (N + K)) down to a choice, for every f at which a rank changes; dense last.

    This is what `convert(rank=f)` does.
    """
    numbers = [_shares(c) for c in layers]
    fractions = np.unique(np.concatenate([n[n <= 1] for n in numbers]))
    chosen = []
    for n in numbers:
        low = int(np.isfinite(n).sum())
        index = np.searchsorted(n[:low], fractions * (1 + 1e-12), side="right") - 1
        chosen.append(np.append(np.clip(index, 0, max(low - 1, 0)), len(n) - 1))
    return chosen


def by_threshold(layers: Sequence[Choices], values: Sequence[LayerSensitivity]) -> list[Index]:
    """R = the number of values with (s - min) / (max - min) >= t, up to a choice, for every t.

    A layer whose factors would then save nothing is dense.

    Source: WeLore (arXiv 2407.11239).
    """
    scaled = [_scaled(s.values) for s in values]
    thresholds = np.unique(np.concatenate(scaled))
    chosen = []
    for c, s in zip(layers, scaled, strict=True):
        rank = len(s) - np.searchsorted(s, thresholds, side="left")
        index = np.searchsorted(_numbers(c), rank, side="left")
        chosen.append(np.minimum(index, len(c.ranks) - 1))
    return chosen


def best_of(
    chosen: Sequence[Index], options: Options, limit: float
) -> tuple[Solution | None, float]:
    """The value of the number with least error within the limit, and the least cost of any.

    Returns:
        The solution, None where no value fits, and the least total cost that the rule reaches.
    """
    cost = sum(costs[index] for (costs, _), index in zip(options, chosen, strict=True))
    error = sum(errors[index] for (_, errors), index in zip(options, chosen, strict=True))
    cost, error = np.asarray(cost), np.asarray(error)
    fits = np.flatnonzero(cost <= limit * (1 + 1e-9))
    if not len(fits):
        return None, float(cost.min())
    at = fits[np.lexsort((cost[fits], error[fits]))[0]]
    choice = tuple(int(index[at]) for index in chosen)
    # Optimal for the rule's own one-dimensional family, which says nothing of all choices.
    return Solution(choice, float(cost[at]), float(error[at]), float("nan")), float(cost.min())


def _numbers(c: Choices) -> NDArray[np.float64]:
    """The choices as ranks; dense is above all of them."""
    return np.array([np.inf if isinstance(rank, str) else rank for rank in c.ranks], float)


def _shares(c: Choices) -> NDArray[np.float64]:
    """The weights of each choice in those of the dense layer; dense is above all of them.

    Where forms change with the rank, one of fewer weights than a smaller rank counts as that one.
    """
    shares = np.maximum.accumulate(c.costs.weights / c.layer.dense_weights)
    return np.where(np.isinf(_numbers(c)), np.inf, shares)


def _scaled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """To 0..1, rising."""
    low, high = values.min(), values.max()
    return np.sort((values - low) / ((high - low) or 1.0))
