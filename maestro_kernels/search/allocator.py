"""Choose a rank for every layer, so that the model meets a budget with the least error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from maestro_kernels.nn.candidates import Selector
from maestro_kernels.nn.layer import check_int
from maestro_kernels.nn.moments import check_batches, input_moments
from maestro_kernels.search import knapsack, rules
from maestro_kernels.search.allocation import Allocation, Costs, LayerChoice, reachable
from maestro_kernels.search.budget import (
    Budget,
    Latency,
    MACs,
    Memory,
    Params,
    Speedup,
    check_budget,
)
from maestro_kernels.search.costs import (
    Choices,
    LatencyProfile,
    below_steps,
    choices,
    current_bytes,
    layer_latency,
)
from maestro_kernels.search.descent import Solution, greedy, hull_path
from maestro_kernels.search.layer_profile import Advance, progress_bar
from maestro_kernels.search.layers import Layer, at_full_rank, considered, count_rows, storage_bytes
from maestro_kernels.search.model_profile import ModelProfile, profile_model
from maestro_kernels.search.refine import Refinement, refine
from maestro_kernels.search.sensitivities import LayerSensitivity, Sensitivity
from maestro_kernels.search.sensitivities import sensitivity as find_sensitivity
from maestro_kernels.search.trial import Factors, Trial, factors_of
from maestro_kernels.search.whole_model import LossFn, measure_model, present

__all__ = ["allocate"]

_FN = "allocate"
_METHODS = ("exact", "greedy", "threshold", "uniform")
Array = NDArray[np.float64]


def allocate(
    model: nn.Module,
    budget: Budget,
    sensitivity: Sensitivity | None = None,
    profile: ModelProfile | LatencyProfile | None = None,
    *,
    batch: Any = None,
    method: str = "exact",
    multiple_of: int = 8,
    min_rank: int = 1,
    include: Selector = None,
    exclude: Selector = None,
    batches: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    passes: int | None = None,
    progress: bool | Advance | None = None,
) -> Allocation:
    """Min sum_i error_i(r_i) over ranks with sum_i cost_i(r_i) + rest <= budget; r_i may be dense.

    The methods are

    - "exact": the optimum, by a multiple-choice knapsack.
    - "greedy": from the cheapest ranks up, always the step with the largest drop in error per cost.
    - "threshold": WeLore's rule, one threshold on all layers' normalised singular values, the
      lowest that meets the budget.
    - "uniform": one fraction of every layer's weights, the largest that meets the budget.

    With a latency profile the first two only take ranks just below a step of a layer's latency: a
    rank gives way to a larger one, or to the dense layer, that takes no longer.

    Errors of layers do not quite add up. With `batches`, "exact" and "greedy" therefore go on from
    the better of their answer and uniform ranks, by the loss of the whole model on the batches, and
    move cost between layers for as long as that loss falls; see `search.refine`.

    Args:
        model: dense, factorised or both; not changed.
        budget: Params(fraction), MACs(fraction), Memory(bytes), Latency(ms) or Speedup(x).
        sensitivity: errors of the layers; None computes `sensitivity(model, method="svd")`. Layers
            that it does not cover stay as they are.
        profile: latencies: of `profile_model`, which predicts the whole model, or of `profile` (or
            anything with its `latency`). Optional but for latency budgets: it rules out ranks that
            are not worth their time. None with a latency budget calls `profile_model`.
        batch: what the latency is of. Needed for latency budgets without a `profile_model`. Beside
            a `profile` the model is timed on it once, and what its layers do not explain is taken
            to be there at all ranks.
        method: as above.
        multiple_of: ranks are multiples of this (or a factorised layer's max_rank).
        min_rank: lowest rank; 0 lets a layer become its bias.
        include: only these layers; as `classify`.
        exclude: not these layers; as `classify`.
        batches: to measure the loss on: tensors, tuples or dicts; kept and passed many times.
            Dense layers run with the factors that the sensitivity measured ("loss"), or with those
            of least output error on these batches.
        loss_fn: (model, batch) -> scalar, of the refinement; None is the squared error of the
            model's first output against its present one, relative to that output's squared norm.
        passes: most passes over the batches; None is 16 and four for every layer, 0 only compares
            the answer with uniform ranks.
        progress: show a bar; None does so on a terminal. A function gets (text, done, total), at
            first the number of passes that there may be.

    Returns:
        An `Allocation`: a mapping for `mk.set_ranks`, with the predicted costs and `apply`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: the budget cannot be met (the error names the best that can), the sensitivity
            or the profile is of another model, a value does not fit, or a loss is not finite.
        NotImplementedError: a `profile` is asked about a convolution.

    Example:
        >>> import torch
        >>> from maestro_kernels import search
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> ranks = search.allocate(model, search.Params(0.5))
        >>> small = ranks.apply(model)

    Source:
        Ranks just below a step: Hajimolahoseini et al. (arXiv 2407.20266). Threshold: WeLore
        (arXiv 2407.11239).
    """
    check_budget(_FN, budget)
    if method not in _METHODS:
        raise ValueError(f"{_FN}: method: expected one of {_METHODS}, got {method!r}")
    check_int(_FN, "multiple_of", multiple_of, 1)
    check_int(_FN, "min_rank", min_rank, 0)
    data = _check_refinement(batches, loss_fn, passes, method)
    layers = considered(model, include, exclude, fn=_FN)
    sensitivity = _check_sensitivity(model, layers, sensitivity, include, exclude)
    layers = {name: layer for name, layer in layers.items() if name in sensitivity.layers}
    timing = _times(model, layers, budget, sensitivity, profile, batch)
    steps = method in ("exact", "greedy")
    problem = _Problem.of(model, layers, sensitivity, timing, multiple_of, min_rank, steps)
    options = problem.options(budget)
    limit = budget.limit(problem.dense_cost(budget)) - problem.fixed(budget)
    found, least = _solve(problem, options, limit, method)
    if found is None:
        raise ValueError(problem.impossible(budget, method, least))
    refined = None
    if data is not None:
        most = 16 + 4 * len(layers) if passes is None else passes
        with progress_bar(progress, "allocate") as advance:
            found, refined = _refined(
                problem, model, (options, found, limit), data, loss_fn, most, advance
            )
    return problem.allocation(budget, method, options, found, refined)


def _check_refinement(batches: Any, loss_fn: Any, passes: Any, method: str) -> list[Any] | None:
    if passes is not None:
        check_int(_FN, "passes", passes, 0)
    if batches is None:
        if loss_fn is not None or passes is not None:
            name = "passes" if loss_fn is None else "loss_fn"
            raise ValueError(f"{_FN}: {name}: expected None without batches to measure a loss on")
        return None
    if method not in ("exact", "greedy"):
        raise ValueError(
            f"{_FN}: batches: expected None with method={method!r}, whose ranks follow from one "
            "number and are not refined, got batches"
        )
    check_batches(_FN, "batches", batches)
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"{_FN}: loss_fn: expected a function, got {type(loss_fn).__name__}")
    data = list(batches)
    if not data:
        raise ValueError(f"{_FN}: batches: expected at least one batch, got none")
    return data


def _refined(
    problem: _Problem,
    model: nn.Module,
    solved: tuple[list[tuple[Array, Array]], Solution, float],
    data: list[Any],
    loss_fn: LossFn | None,
    passes: int,
    advance: Advance,
) -> tuple[Solution, Refinement]:
    """The solution after measuring, its predicted cost and error, and what was measured."""
    options, found, limit = solved
    uniform, _ = rules.best_of(rules.uniform(problem.choices), options, limit)
    starts = [found.choice, *([] if uniform is None else [uniform.choice])]
    total = max(passes, len(starts))
    advance(f"refining {len(options)} layers: at most {total} passes", 0, total)
    layers = {c.layer.name: c.layer for c in problem.choices}
    done = itertools.count(1)
    with at_full_rank(model, layers), ExitStack() as stack:
        factors = _factors(problem, model, data)
        trial = stack.enter_context(Trial(model, layers, factors, data, loss_fn, fn=_FN))

        def loss(choice: tuple[int, ...]) -> float:
            ranks = {c.layer.name: c.ranks[j] for c, j in zip(problem.choices, choice, strict=True)}
            value = trial.loss(ranks)
            advance(f"refining: loss {value:.4g}", next(done), total)
            return value

        choice, refined = refine(options, starts, limit, loss, passes)
    advance("done", total, total)
    if choice == found.choice:
        return found, refined
    chosen = list(zip(options, choice, strict=True))
    return Solution(
        choice,
        sum(float(costs[j]) for (costs, _), j in chosen),
        sum(float(errors[j]) for (_, errors), j in chosen),
        math.nan,
    ), refined


def _factors(problem: _Problem, model: nn.Module, data: list[Any]) -> dict[str, Factors]:
    """Of every dense layer: those of the sensitivity where they reach far enough, or new ones."""
    modules = dict(model.named_modules())
    found, missing = {}, {}
    for c, one in zip(problem.choices, problem.sensitivities, strict=True):
        top = max((r for r in c.ranks if not isinstance(r, str)), default=0)
        if c.layer.factorised:
            continue
        if one.factors is not None and one.factors[0][0].shape[1] >= top:
            found[c.layer.name] = one.factors
        else:
            missing[c.layer.name] = (c.layer, top)
    if missing:
        chosen = {name: modules[name] for name in missing}
        moments = input_moments(model, chosen, data, fn=_FN, argument="batches")
        for name, (layer, top) in missing.items():
            found[name] = factors_of(layer, modules[name], moments[name], top)
    return found


def _check_sensitivity(
    model: nn.Module,
    layers: Mapping[str, Layer],
    sensitivity: Any,
    include: Selector,
    exclude: Selector,
) -> Sensitivity:
    if sensitivity is None:
        return find_sensitivity(model, method="svd", include=include, exclude=exclude)
    if not isinstance(sensitivity, Sensitivity):
        raise TypeError(
            f"{_FN}: sensitivity: expected a Sensitivity or None, got {type(sensitivity).__name__}"
        )
    for name, one in sensitivity.layers.items():
        if name in layers and layers[name] != one.layer:
            raise ValueError(
                f"{_FN}: sensitivity: expected one of this model, whose {name!r} is "
                f"{layers[name]}, got one with {one.layer}"
            )
    if not any(name in sensitivity.layers for name in layers):
        some = ", ".join(repr(n) for n in list(layers)[:4])
        raise ValueError(
            f"{_FN}: sensitivity: expected errors of the model's layers ({some}), got none of them"
        )
    return sensitivity


@dataclass(frozen=True)
class _Times:
    """Milliseconds of a layer at a rank, and of everything that stays as it is."""

    layer: Callable[[Layer, int | str], float]
    rest: float


def _times(
    model: nn.Module,
    layers: Mapping[str, Layer],
    budget: Budget,
    sensitivity: Sensitivity,
    profile: Any,
    batch: Any,
) -> tuple[_Times | None, dict[str, tuple[int, ...]]]:
    """Latencies, None where there are none, and the rows of x in each call of each layer."""
    timed = isinstance(budget, Latency | Speedup)
    if profile is None and timed:
        if batch is None:
            raise ValueError(
                f"{_FN}: batch: expected the batch to predict the latency of, or a profile from "
                f"profile_model, with {budget}, got None"
            )
        profile = profile_model(model, batch, include=lambda name, _: name in layers)
    if isinstance(profile, ModelProfile):
        missing = next((name for name in layers if name not in profile.layers), None)
        if missing is not None:
            raise ValueError(f"{_FN}: profile: expected one of this model, got none of {missing!r}")
        others = sum(
            profile.layer(name, rank) for name, rank in profile.ranks.items() if name not in layers
        )
        model_profile = profile
        return (
            _Times(
                lambda layer, rank: model_profile.layer(layer.name, rank), profile.rest + others
            ),
            profile.rows,
        )
    rows = {name: sensitivity.layers[name].rows for name in layers}
    if batch is not None:
        rows = count_rows(model, layers, batch, fn=_FN)
    if profile is None:
        return None, rows
    if not callable(getattr(profile, "latency", None)):
        raise TypeError(
            f"{_FN}: profile: expected one from profile_model or profile, "
            f"got {type(profile).__name__}"
        )
    return _of_profile(model, layers, rows, profile, batch), rows


def _of_profile(
    model: nn.Module, layers: Mapping[str, Layer], rows: Any, profile: LatencyProfile, batch: Any
) -> _Times:
    for name, layer in layers.items():
        if layer.convolution:
            raise NotImplementedError(
                f"{_FN}: profile: expected one from profile_model, because {name!r} is a "
                f"convolution, got {type(profile).__name__}"
            )
        if not rows[name]:
            raise ValueError(
                f"{_FN}: batch: expected a batch that reaches {name!r}, to know its rows, got "
                + ("None" if batch is None else "one that does not")
            )
    one = layer_latency(profile, rows, _FN)
    if batch is None:
        return _Times(one, 0.0)
    now = present(model, layers)
    total = measure_model(model, batch).ms
    known = sum(one(layer, now[name]) for name, layer in layers.items())
    # Layers by themselves, with cold caches, may take longer than the model they are from.
    scale = min(1.0, total / known)
    return _Times(lambda layer, rank: scale * one(layer, rank), max(total - known, 0.0))


@dataclass(frozen=True)
class _Problem:
    """Everything that is known of the choices."""

    choices: list[Choices]
    errors: list[Array]
    sensitivities: list[LayerSensitivity]
    unit: str
    dense: Costs
    other_bytes: float
    rest: float | None
    dense_ms: list[float | None]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layers: Mapping[str, Layer],
        sensitivity: Sensitivity,
        timing: tuple[_Times | None, Mapping[str, tuple[int, ...]]],
        multiple_of: int,
        min_rank: int,
        steps: bool,
    ) -> _Problem:
        times, rows = timing
        modules = dict(model.named_modules())
        found, references = [], []
        for name, layer in layers.items():
            every = choices(
                layer,
                modules[name],
                multiple_of=multiple_of,
                min_rank=min_rank,
                rows=rows.get(name, ()),
                latency=None if times is None else times.layer,
            )
            references.append(_reference(layer, modules[name], rows.get(name, ()), times))
            if steps and every.ms is not None:
                every = every.keep(below_steps(every.ms))
            found.append(every)
        other_bytes = storage_bytes(model) - sum(
            current_bytes(modules[name], layer) for name, layer in layers.items()
        )
        rest = None if times is None else times.rest
        dense = Costs(
            error=0.0,
            weights=sum(float(c.weights[0]) for c in references),
            macs=sum(float(c.macs[0]) for c in references),
            bytes=other_bytes + sum(float(c.bytes[0]) for c in references),
            ms=None
            if rest is None
            else rest + sum(float(c.ms[0]) for c in references if c.ms is not None),
        )
        chosen = [sensitivity.layers[name] for name in layers]
        errors = [
            np.array([one.error(rank) for rank in c.ranks])
            for one, c in zip(chosen, found, strict=True)
        ]
        dense_ms = [None if c.ms is None else float(c.ms[0]) for c in references]
        return cls(found, errors, chosen, sensitivity.unit, dense, other_bytes, rest, dense_ms)

    def costs(self, c: Choices, budget: Budget) -> Array:
        """Of one layer's choices, in what the budget counts."""
        if isinstance(budget, Params):
            return c.weights
        if isinstance(budget, MACs):
            return c.macs
        if isinstance(budget, Memory):
            return c.bytes
        assert c.ms is not None
        return c.ms

    def options(self, budget: Budget) -> list[tuple[Array, Array]]:
        """(costs, errors) of each layer."""
        pairs = zip(self.choices, self.errors, strict=True)
        return [(self.costs(c, budget), errors) for c, errors in pairs]

    def fixed(self, budget: Budget) -> float:
        """What the budget counts beside the layers."""
        if isinstance(budget, Memory):
            return self.other_bytes
        if isinstance(budget, Latency | Speedup):
            assert self.rest is not None
            return self.rest
        return 0.0

    def dense_cost(self, budget: Budget) -> float:
        """What the dense model costs, in what the budget counts."""
        d = self.dense
        if isinstance(budget, Params):
            return d.weights
        if isinstance(budget, MACs):
            return d.macs
        return d.bytes if isinstance(budget, Memory) else d.ms or 0.0

    def value(self, budget: Budget, cost: float) -> float:
        """A total cost of the layers in the budget's own measure."""
        total = cost + self.fixed(budget)
        if isinstance(budget, Params | MACs):
            return total / self.dense_cost(budget)
        return self.dense_cost(budget) / total if isinstance(budget, Speedup) else total

    def impossible(self, budget: Budget, method: str, least: float) -> str:
        """The error of a budget that cannot be met."""
        best = reachable(budget, self.value(budget, least))
        lowest = sum(1 for c in self.choices if c.ranks[0] == "dense")
        why = f"; {lowest} layers can only be dense" if lowest else ""
        return (
            f"{_FN}: budget: expected one that ranks can meet, the best that method={method!r} "
            f"reaches is {best}{why}, got {budget}"
        )

    def allocation(
        self,
        budget: Budget,
        method: str,
        options: Any,
        found: Solution,
        refined: Refinement | None,
    ) -> Allocation:
        """The result."""
        rows = []
        for i, j in enumerate(found.choice):
            c, layer = self.choices[i], self.choices[i].layer
            ms = None if c.ms is None else float(c.ms[j])
            error = float(self.errors[i][j])
            rank = c.ranks[j]
            rows.append(LayerChoice(layer, rank, error, layer.weights(rank), ms, self.dense_ms[i]))
        taken = list(zip(self.choices, found.choice, strict=True))
        predicted = Costs(
            error=found.error,
            weights=sum(float(c.weights[j]) for c, j in taken),
            macs=sum(float(c.macs[j]) for c, j in taken),
            bytes=self.other_bytes + sum(float(c.bytes[j]) for c, j in taken),
            ms=None if self.rest is None else self.rest + sum(row.ms or 0.0 for row in rows),
        )
        trade_off = tuple((self.value(budget, s.cost), s.error) for s in hull_path(options))
        return Allocation(
            budget, method, self.unit, tuple(rows), predicted, self.dense, found.gap, trade_off,
            refined,
        )  # fmt: skip


def _reference(
    layer: Layer, module: nn.Module, rows: tuple[int, ...], times: _Times | None
) -> Choices:
    """The dense layer, or the largest rank where it cannot be dense, as the only choice."""
    every = choices(
        layer, module, multiple_of=max(layer.max_rank, 1), min_rank=1, rows=rows,
        latency=None if times is None else times.layer,
    )  # fmt: skip
    return every.keep(np.array([len(every.ranks) - 1]))


def _solve(
    problem: _Problem, options: Sequence[tuple[Array, Array]], limit: float, method: str
) -> tuple[Solution | None, float]:
    """The choice, and the least total cost that the method reaches."""
    if method in ("threshold", "uniform"):
        chosen = (
            rules.uniform(problem.choices)
            if method == "uniform"
            else rules.by_threshold(problem.choices, problem.sensitivities)
        )
        return rules.best_of(chosen, options, limit)
    least = sum(float(costs.min()) for costs, _ in options)
    found = (knapsack.exact if method == "exact" else greedy)(options, limit)
    return found, least
