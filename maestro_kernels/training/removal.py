"""Walks from a full model to the smallest one: which layer gives up components next.

Both walks yield (layer, loss) and are nested by construction: a layer's rank only ever falls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from maestro_kernels.nn import LoDLayer
from maestro_kernels.nn.moments import calibrating, run_batch
from maestro_kernels.search.descent import hull_path
from maestro_kernels.search.whole_model import OutputError
from maestro_kernels.training.batchnorm import batch_statistics
from maestro_kernels.training.deployment_cost import Level
from maestro_kernels.training.layers import full_rank

__all__ = ["LossFn", "Objective", "additive", "greedy", "ranks_to_try"]

LossFn = Callable[[nn.Module, Any], Any]
# Stands for a loss that is not finite where sums have to stay ordered.
_HOPELESS = 1e100


class Objective:
    """The loss of a model at its present ranks, mean over the batches.

    Args:
        fn: the public function that errors name.
        model: at full rank.
        batches: kept.
        loss_fn: (model, batch) -> scalar; None is the relative squared error of the first output
            against the model's as it is now.

    Attributes:
        run: run(model, batch), a pass that reaches every layer the loss depends on.
        full: the loss as the model is now.

    Raises:
        ValueError: the loss is no scalar, or not finite as the model is now.
    """

    def __init__(
        self, fn: str, model: nn.Module, batches: list[Any], loss_fn: LossFn | None
    ) -> None:
        self._fn, self._model, self._batches = fn, model, batches
        self._loss: LossFn
        self.run: LossFn
        if loss_fn is None:
            self._loss = OutputError(model, batches, fn=fn)
            self.run = partial(run_batch, fn=fn, argument="batches")
        else:
            self._loss = self.run = loss_fn
        self.full = self()
        if not math.isfinite(self.full):
            raise ValueError(f"{fn}: loss_fn: expected a finite loss at full rank, got {self.full}")

    def __call__(self) -> float:
        """As if BatchNorm were recalibrated; infinite where the loss is NaN."""
        with calibrating(self._model), batch_statistics(self._model):
            loss = self._mean(self._model)
        return math.inf if math.isnan(loss) else loss

    def of(self, model: nn.Module) -> float:
        """The loss of another model, in eval mode."""
        with calibrating(model):
            return self._mean(model)

    def _mean(self, model: nn.Module) -> float:
        return sum(self._one(model, batch) for batch in self._batches) / len(self._batches)

    def _one(self, model: nn.Module, batch: Any) -> float:
        loss = self._loss(model, batch)
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(
                f"{self._fn}: loss_fn: expected a scalar, got shape {tuple(loss.shape)}"
            )
        return float(loss)


def ranks_to_try(layer: LoDLayer, levels: int, min_rank: int, multiple_of: int) -> list[int]:
    """Even steps down from the full rank, then halves down to min_rank; rising."""
    full = full_rank(layer)
    lowest = -(-max(min_rank, 1) // multiple_of) * multiple_of
    wanted = [full * k / levels for k in range(1, levels + 1)]
    while wanted[0] > lowest:
        wanted.insert(0, wanted[0] / 2)
    rounded = {max(round(r / multiple_of) * multiple_of, lowest) for r in wanted}
    return sorted({r for r in rounded if r < full} | {full} | ({0} if min_rank == 0 else set()))


def greedy(
    levels: Mapping[str, list[Level]], layers: Mapping[str, LoDLayer], loss: Objective
) -> Iterator[tuple[str, float]]:
    """Always the stretch with the least loss per cost saved, measured on the model as it then is.

    Stretches end where the loss of the layer alone touches the lower convex hull over its cost:
    the cost of a form may fall slowly at first (that of [I; U] does), so a single step says little.
    An increase measured earlier stands until its stretch is the best of all; then it is measured
    again. Where increases grow as the model shrinks, that finds the same as measuring all.
    """
    ends = {name: _hull(levels[name], errors) for name, errors in _probes(levels, layers, loss)}
    at = dict.fromkeys(levels, 0)
    known: dict[str, tuple[float, int]] = {}
    now, taken = loss.full, 0

    def measure(name: str) -> tuple[float, int]:
        here, there = levels[name][at[name]], levels[name][ends[name][0]]
        layers[name].rank = there.rank
        new = min(loss(), _HOPELESS)
        layers[name].rank = here.rank
        return (new - now) / (here.cost - there.cost), taken

    while left := [name for name in levels if ends[name]]:
        for name in left:
            if name not in known:
                known[name] = measure(name)
        best = min(left, key=lambda name: known[name][0])
        while known[best][1] != taken:
            known[best] = measure(best)
            best = min(left, key=lambda name: known[name][0])
        del known[best]
        taken += 1
        end = ends[best].pop(0)
        while at[best] < end:
            at[best] += 1
            layers[best].rank = levels[best][at[best]].rank
            now = min(loss(), _HOPELESS)
            yield best, now


def additive(
    levels: Mapping[str, list[Level]], layers: Mapping[str, LoDLayer], loss: Objective
) -> Iterator[tuple[str, float]]:
    """Along the optima of the sum of what each layer alone, at each rank, adds to the loss."""
    errors = dict(_probes(levels, layers, loss))
    costs = {name: np.array([level.cost for level in levels[name]]) for name in levels}
    at = dict.fromkeys(levels, 0)
    for solution in reversed(hull_path([(costs[name], errors[name]) for name in levels])):
        for name, end in zip(levels, solution.choice, strict=True):
            while at[name] < end:
                at[name] += 1
                yield name, loss.full + sum(float(errors[n][i]) for n, i in at.items())


def _probes(
    levels: Mapping[str, list[Level]], layers: Mapping[str, LoDLayer], loss: Objective
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """What each layer alone adds to the loss at each of its levels."""
    for name, of_layer in levels.items():
        errors = np.zeros(len(of_layer))
        for i, level in enumerate(of_layer[1:], 1):
            layers[name].rank = level.rank
            errors[i] = min(loss() - loss.full, _HOPELESS)
        layers[name].rank = of_layer[0].rank
        yield name, errors


def _hull(levels: list[Level], errors: NDArray[np.float64]) -> list[int]:
    """Levels after the first on the lower convex hull of (cost, error), cost falling."""
    kept = [0]
    for i in range(1, len(levels)):
        while len(kept) > 1 and _price(levels, errors, kept[-1], i) <= _price(
            levels, errors, kept[-2], kept[-1]
        ):
            kept.pop()
        kept.append(i)
    return kept[1:]


def _price(levels: list[Level], errors: NDArray[np.float64], a: int, b: int) -> float:
    """Error per cost saved on the way from level a to the cheaper level b."""
    return float((errors[b] - errors[a]) / (levels[a].cost - levels[b].cost))
