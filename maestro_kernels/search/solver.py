"""Which layer gets which rank under a budget: the problem that `allocate` and `extract` solve.

What is known of the choices is made elsewhere; here they are chosen, and the choice is improved by
measuring the whole model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from maestro_kernels.search import knapsack, rules
from maestro_kernels.search.budget import Budget
from maestro_kernels.search.costs import Choices, Costs
from maestro_kernels.search.descent import Choice, Options, Solution, greedy
from maestro_kernels.search.refine import Refinement, refine
from maestro_kernels.search.sensitivities import LayerSensitivity

__all__ = ["METHODS", "Problem", "refined", "solve"]

METHODS = ("exact", "greedy", "threshold", "uniform")
Array = NDArray[np.float64]


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
        return rules.best_of(rules.uniform(problem.choices), options, limit)
    if method == "threshold":
        return rules.best_of(rules.by_threshold(problem.choices, sensitivities), options, limit)
    least = sum(float(costs.min()) for costs, _ in options)
    return (knapsack.exact if method == "exact" else greedy)(options, limit), least


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
    uniform, _ = rules.best_of(rules.uniform(problem.choices), options, limit)
    starts = [start]
    if uniform is not None and fits(uniform.choice):
        starts.append(uniform.choice)
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
