"""Choose a rank for every layer, so that the model meets a budget with the least error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from maestro_kernels.arguments import check_int
from maestro_kernels.measure.progress import Advance, progress_bar
from maestro_kernels.nn.candidates import Selector
from maestro_kernels.nn.experts import idle_layers
from maestro_kernels.nn.moments import input_moments
from maestro_kernels.search.allocation import Allocation, LayerChoice, reachable
from maestro_kernels.search.budget import Budget, Latency, Speedup, check_budget
from maestro_kernels.search.costs import (
    Choices,
    Costs,
    LatencyProfile,
    below_steps,
    choices,
    current_bytes,
    layer_latency,
    multiples,
)
from maestro_kernels.search.knapsack import Choice, hull_path
from maestro_kernels.search.layers import (
    Layer,
    at_full_rank,
    considered,
    count_rows,
    module_dtype,
    on_open_model,
    storage_bytes,
)
from maestro_kernels.search.model_profile import ModelProfile, profile_model
from maestro_kernels.search.sensitivities import LayerSensitivity, Sensitivity
from maestro_kernels.search.sensitivities import sensitivity as find_sensitivity
from maestro_kernels.search.solver import METHODS, Problem, refined, solve
from maestro_kernels.search.trial import Factors, Trial, factors_of
from maestro_kernels.search.whole_model import LossFn, check_measured, measure_models, present

_FN = "allocate"


@on_open_model
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
    if method not in METHODS:
        raise ValueError(f"{_FN}: method: expected one of {METHODS}, got {method!r}")
    check_int(_FN, "multiple_of", multiple_of, 1)
    check_int(_FN, "min_rank", min_rank, 0)
    data = _check_refinement(batches, loss_fn, passes, method)
    layers = considered(model, include, exclude, fn=_FN)
    sensitivity = _check_sensitivity(model, layers, sensitivity, include, exclude)
    layers = {name: layer for name, layer in layers.items() if name in sensitivity.layers}
    timing = _timing(model, layers, budget, sensitivity, profile, batch)
    steps = method in ("exact", "greedy")
    problem = _problem(model, layers, sensitivity, timing, multiple_of, min_rank, steps)
    known = [sensitivity.layers[name] for name in layers]
    found, least = solve(problem, budget, method, known)
    if found is None:
        raise ValueError(_impossible(problem, budget, method, least))
    choice, gap, refinement = found.choice, found.gap, None
    if data is not None:
        measuring = _measuring(problem, known, model, data, loss_fn)
        with progress_bar(progress, "allocate") as advance:
            choice, refinement = refined(problem, budget, choice, measuring, passes, advance)
        # No method tells the gap of what was found by measuring.
        gap = gap if choice == found.choice else math.nan
    unit, rows = sensitivity.unit, _rows(problem, timing, choice)
    predicted, dense = problem.costs(choice), problem.dense
    path = hull_path(problem.options(budget))
    trade_off = tuple((problem.value(budget, s.cost), s.error) for s in path)
    return Allocation(
        budget, method, unit, rows, predicted, dense, gap, trade_off, refinement
    )  # fmt: skip


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
    return check_measured(_FN, batches, loss_fn)


@contextmanager
def _measuring(
    problem: Problem,
    sensitivities: Sequence[LayerSensitivity],
    model: nn.Module,
    data: list[Any],
    loss_fn: LossFn | None,
) -> Iterator[Callable[[Choice], float]]:
    """The loss of the model at a choice; it is left as it was."""
    layers = {c.layer.name: c.layer for c in problem.choices}
    with at_full_rank(model, layers):
        factors = _factors(problem, sensitivities, model, data)
        with Trial(model, layers, data, loss_fn, fn=_FN, factors=factors) as trial:
            yield lambda choice: trial.loss(
                {c.layer.name: c.ranks[j] for c, j in zip(problem.choices, choice, strict=True)}
            )


def _factors(
    problem: Problem,
    sensitivities: Sequence[LayerSensitivity],
    model: nn.Module,
    data: list[Any],
) -> dict[str, Factors]:
    """Of every dense layer: those of the sensitivity where they reach far enough, or new ones."""
    modules = dict(model.named_modules())
    found, missing = {}, {}
    for c, one in zip(problem.choices, sensitivities, strict=True):
        top = max((r for r in c.ranks if not isinstance(r, str)), default=0)
        if c.layer.factorised:
            continue
        if one.factors is not None and one.factors[0][0].shape[1] >= top:
            found[c.layer.name] = one.factors
        else:
            missing[c.layer.name] = (c.layer, top)
    if missing:
        chosen = {name: modules[name] for name in missing}
        idle = idle_layers(model)
        moments = input_moments(model, chosen, data, fn=_FN, argument="batches", idle=idle)
        for name, (layer, top) in missing.items():
            found[name] = factors_of(layer, modules[name], moments.get(name), top)
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
class _Timing:
    """What layers take for a batch.

    Attributes:
        rows: of x in each call of each layer.
        layer: milliseconds of a layer at a rank; None where there are no latencies.
        rest: milliseconds of everything that stays as it is; None where there are none.
    """

    rows: Mapping[str, tuple[int, ...]]
    layer: Callable[[Layer, int | str], float] | None = None
    rest: float | None = None

    def choices(
        self,
        layer: Layer,
        module: nn.Module,
        ranks: Sequence[int | str],
        error: Callable[[int | str], float] = lambda rank: 0.0,
    ) -> Choices:
        """What a layer costs at these ranks."""
        ms = None if self.layer is None else [self.layer(layer, rank) for rank in ranks]
        return choices(
            layer,
            ranks,
            itemsize=module_dtype(module).itemsize,
            rows=self.rows.get(layer.name, ()),
            error=error,
            ms=ms,
        )


def _timing(
    model: nn.Module,
    layers: Mapping[str, Layer],
    budget: Budget,
    sensitivity: Sensitivity,
    profile: Any,
    batch: Any,
) -> _Timing:
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
        known = profile
        return _Timing(
            known.rows, lambda layer, rank: known.layer(layer.name, rank), known.rest + others
        )
    rows = {name: sensitivity.layers[name].rows for name in layers}
    if batch is not None:
        rows = count_rows(model, layers, batch, fn=_FN)
    if profile is None:
        return _Timing(rows)
    if not callable(getattr(profile, "latency", None)):
        raise TypeError(
            f"{_FN}: profile: expected one from profile_model or profile, "
            f"got {type(profile).__name__}"
        )
    return _of_profile(model, layers, rows, profile, batch)


def _of_profile(
    model: nn.Module,
    layers: Mapping[str, Layer],
    rows: Mapping[str, tuple[int, ...]],
    profile: LatencyProfile,
    batch: Any,
) -> _Timing:
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
        return _Timing(rows, one, 0.0)
    now = present(model, layers)
    total = measure_models({"model": model}, batch, seconds=2.0)["model"].ms
    known = sum(one(layer, now[name]) for name, layer in layers.items())
    # Layers by themselves, with cold caches, may take longer than the model they are from.
    scale = min(1.0, total / known)
    return _Timing(rows, lambda layer, rank: scale * one(layer, rank), max(total - known, 0.0))


def _largest(layer: Layer) -> int | str:
    """What the layer is in the dense model: full rank where it cannot be dense."""
    return "dense" if layer.can_be_dense else layer.max_rank


def _problem(
    model: nn.Module,
    layers: Mapping[str, Layer],
    sensitivity: Sensitivity,
    timing: _Timing,
    multiple_of: int,
    min_rank: int,
    steps: bool,
) -> Problem:
    """What is known of the choices; with times and `steps`, only those below a step of the time."""
    modules = dict(model.named_modules())
    found = []
    for name, layer in layers.items():
        ranks = multiples(layer, multiple_of, min_rank)
        every = timing.choices(layer, modules[name], ranks, sensitivity.layers[name].error)
        if steps and every.costs.ms is not None:
            every = every.keep(below_steps(every.costs.ms))
        found.append(every)
    stored = storage_bytes(model) - sum(current_bytes(modules[n], la) for n, la in layers.items())
    beside = Costs(0.0, 0.0, 0.0, float(stored), timing.rest)
    dense = [timing.choices(la, modules[n], [_largest(la)]).at(0) for n, la in layers.items()]
    return Problem(found, beside, sum(dense, start=beside))


def _impossible(problem: Problem, budget: Budget, method: str, least: float) -> str:
    """The error of a budget that cannot be met."""
    best = reachable(budget, problem.value(budget, least))
    lowest = sum(1 for c in problem.choices if c.ranks[0] == "dense")
    why = f"; {lowest} layers can only be dense" if lowest else ""
    return (
        f"{_FN}: budget: expected one that ranks can meet, the best that method={method!r} "
        f"reaches is {best}{why}, got {budget}"
    )


def _rows(problem: Problem, timing: _Timing, choice: Choice) -> tuple[LayerChoice, ...]:
    rows = []
    for c, j in zip(problem.choices, choice, strict=True):
        costs, rank, layer = c.at(j), c.ranks[j], c.layer
        dense = None if timing.layer is None else timing.layer(layer, _largest(layer))
        weights = layer.weights(rank)
        rows.append(LayerChoice(layer, rank, costs.error, weights, costs.ms, dense))
    return tuple(rows)
