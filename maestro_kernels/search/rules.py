"""Rules that set all ranks by one number: one fraction, or one threshold on singular values.

Each gives, for every value of its number, the choice of each layer; `best_of` picks the value.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from maestro_kernels.search.costs import Choices
from maestro_kernels.search.descent import Options, Solution
from maestro_kernels.search.sensitivities import LayerSensitivity

__all__ = ["best_of", "by_threshold", "uniform"]

Index = NDArray[np.int64]


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
