"""extract: a smaller model out of a trained one, without training: which layer gives up how much.

Ranks fall along one path from the full model to the smallest one. A budget decides how far along it
a model is cut, so a model for a smaller budget holds a prefix of every layer of a larger one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from maestro_kernels.arguments import check_int
from maestro_kernels.nn import LoDLinear, lod_layers, to_dense, ungroup
from maestro_kernels.nn.conversion import in_place_of, swap_layers
from maestro_kernels.nn.moments import check_batches
from maestro_kernels.nn.pivoted import PivotedLinear, error_ratio
from maestro_kernels.search.budget import Budget, Params, Speedup, check_budget
from maestro_kernels.training.batchnorm import recalibrate_batchnorm
from maestro_kernels.training.deployment_cost import (
    Costs,
    Way,
    deployed,
    measure_costs,
    milliseconds,
    observe,
)
from maestro_kernels.training.layers import full_rank, require_layers, unwrapped
from maestro_kernels.training.removal import Objective, additive, greedy, ranks_to_try

__all__ = ["Extraction", "ExtractionPath", "Step", "extract", "extraction_report"]

LossFn = Callable[[nn.Module, Any], Any]
_REPORT = "_maestro_extraction"
_FORMS = ("factors", "pivoted", "dense")
_METHODS = ("greedy", "additive")
# The [I; U] form may be this much less accurate than two matmuls on the factors.
_ERROR_RATIO = 4.0
# Rows of a layer's input on which that is checked.
_ROWS = 256


@dataclass(frozen=True)
class Step:
    """One place on the path.

    Attributes:
        layer: the layer that gave up rank on the way here, None at the start.
        cost: of the model here, each layer in its cheapest form.
        loss: mean over the batches, measured by "greedy", predicted by "additive".
    """

    layer: str | None
    cost: float
    loss: float


@dataclass(frozen=True)
class Extraction:
    """What `extract` did to get a model.

    Attributes:
        unit: of cost and limit: "weights", "MACs", "ms" or "bytes".
        limit: what the budget allows.
        cost: what the model costs; milliseconds are the layers' measured times added up, scaled to
            the measured times of the whole model at both ends of the path.
        loss: mean over the batches, of the model as it is returned.
        full_loss: the same of the model it was cut from.
        ranks: per layer.
        forms: per layer, "factors", "pivoted" or "dense".
    """

    unit: str
    limit: float
    cost: float
    loss: float
    full_loss: float
    ranks: dict[str, int] = field(default_factory=dict)
    forms: dict[str, str] = field(default_factory=dict)


def extraction_report(model: nn.Module) -> Extraction | None:
    """How this model was extracted, or None."""
    report: Extraction | None = vars(model).get(_REPORT)
    return report


def extract(
    model: nn.Module,
    budget: Budget,
    *,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    method: str = "greedy",
    levels: int = 16,
    min_rank: int = 1,
    multiple_of: int = 1,
    forms: Sequence[str] = _FORMS,
    progress: Callable[[float], None] | None = None,
) -> nn.Module:
    """A smaller copy of a model with LoD layers that fits a budget; no training.

    Layers give up components, the last ones first, where the loss on `batches` grows least for what
    is saved, until the budget is met. Each is then deployed in the form that is cheapest under the
    budget: its factors cut to the rank; the [I; U] form (`PivotedLinear`), unless its error is more
    than four times that of the factors; or dense, at full rank. BatchNorm statistics are measured
    again on the batches. `extraction_report` tells ranks, forms, cost and loss.

    Models for several budgets come cheaper from one `ExtractionPath`, where ranks are nested: a
    layer of a smaller model is a prefix of the same layer of a larger one. Separate calls walk
    along the same path too, except for noise where milliseconds are measured.

    Args:
        model: holds LoD layers; it stays as it is. Wrappers of torch.compile and DDP are left out.
        budget: Params, MACs, Latency, Speedup or Memory. Fractions are of the dense weights (or
            multiply-adds for the first batch) of the LoD layers; times are for the first batch.
        batches: tensors (model(x)), tuples (model(*t)) or dicts (model(**d)), as loss_fn takes
            them; kept and passed many times. BatchNorm averages weigh them alike.
        loss_fn: (model, batch) -> scalar; None is the squared error of the model's first output
            against that at full rank, relative to its squared norm.
        method: "greedy" measures the loss of the whole model after each step; "additive" measures
            each layer alone at each rank once, and follows the exact optima of the sum.
        levels: ranks to choose from per layer, evenly spaced; below the last halves of it follow.
        min_rank: lowest rank of a layer; 0 may remove it but for its bias.
        multiple_of: ranks are multiples of this where the full rank allows.
        forms: which of "factors", "pivoted" and "dense" may be used; "factors" must be among them.
        progress: called with the share of the way to the budget, 0..1.

    Returns:
        A new model in the mode of the old one; make an optimizer afterwards, if ever.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: no LoD layer, no batch, a layer that no batch reaches, a loss that is no finite
            scalar, or a budget below the smallest model's cost.

    Example:
        >>> import torch, maestro_kernels as mk
        >>> from maestro_kernels import search, training
        >>> model = mk.convert(torch.nn.Sequential(torch.nn.Linear(32, 64)), allow_larger=True)
        >>> small = training.extract(model, search.Params(0.25), batches=[torch.randn(64, 32)])
        >>> small[0].rank < 32
        True

    Source:
        Greedy removal by the loss on one batch: Horvath et al., Maestro (arXiv 2308.14929); probes
        and nested ranks: FlexRank (arXiv 2602.02680).
    """
    check_budget("extract", budget)
    path = ExtractionPath(
        model,
        type(budget),
        batches=batches,
        loss_fn=loss_fn,
        method=method,
        levels=levels,
        min_rank=min_rank,
        multiple_of=multiple_of,
        forms=forms,
        fn="extract",
    )
    return path.extract(budget, progress=progress)


class ExtractionPath:
    """Ever smaller models out of one, nested; walked only as far as budgets ask.

    Args:
        model: copied at once.
        kind: Params, MACs, Latency, Speedup or Memory: what the path saves.
        batches: this and the other arguments as in `extract`.
        loss_fn: see batches.
        method: see batches.
        levels: see batches.
        min_rank: see batches.
        multiple_of: see batches.
        forms: see batches.
        fn: the public function that errors name.

    Attributes:
        unit: of costs: "weights", "MACs", "ms" or "bytes".
        dense: what the layers cost as dense ones; milliseconds of the dense model.
        steps: walked so far, costs falling.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: type[Budget] = Params,
        *,
        batches: Iterable[Any],
        loss_fn: LossFn | None = None,
        method: str = "greedy",
        levels: int = 16,
        min_rank: int = 1,
        multiple_of: int = 1,
        forms: Sequence[str] = _FORMS,
        fn: str = "ExtractionPath",
    ) -> None:
        require_layers(fn, model)
        data = _checked(fn, kind, batches, loss_fn, method, forms)
        check_int(fn, "levels", levels, 1)
        check_int(fn, "min_rank", min_rank, 0)
        check_int(fn, "multiple_of", multiple_of, 1)
        self._fn, self._batches = fn, data
        # The [I; U] form of (layer, rank), None where it is too inaccurate.
        self._pivoted: dict[tuple[str, int], PivotedLinear | None] = {}
        self._model = copy.deepcopy(unwrapped(model))
        self._layers = require_layers(fn, self._model)
        for layer in self._layers.values():
            layer.rank = full_rank(layer)
        self._objective = Objective(fn, self._model, data, loss_fn)
        self._seen = observe(self._model, self._layers, data, self._objective.run)
        for name, seen in self._seen.items():
            if seen.x is None:
                raise ValueError(f"{fn}: batches: expected batches that reach {name!r}, got none")
        ranks = {
            n: ranks_to_try(la, levels, min_rank, multiple_of) for n, la in self._layers.items()
        }
        args = (self._model, self._layers, kind, self._seen, ranks, tuple(forms))
        self._kind, self._costs = kind, measure_costs(*args)
        if self._costs.unit == "ms":
            self._costs = self._fitted()
        self._at = [dict.fromkeys(self._layers, 0)]
        self.steps = [Step(None, self._nominal(self._at[0]), self._objective.full)]
        walk = greedy if method == "greedy" else additive
        self._walk = walk(self._costs.levels, self._layers, self._objective)

    @property
    def unit(self) -> str:  # noqa: D102
        return self._costs.unit

    @property
    def dense(self) -> float:  # noqa: D102
        return self._costs.dense

    def extract(
        self, budget: Budget, *, progress: Callable[[float], None] | None = None
    ) -> nn.Module:
        """The first model on the path that fits the budget; see the function `extract`.

        Raises:
            TypeError: not the kind of budget that the path is for.
            ValueError: no model on the path fits.
        """
        fn = self._fn
        if type(check_budget(fn, budget)) is not self._kind:
            raise TypeError(
                f"{fn}: budget: expected {self._kind.__name__}, got {type(budget).__name__}"
            )
        limit = budget.limit(self._costs.dense)
        for i in range(self._longest()):
            if i == len(self.steps) and not self._advance(limit, progress):
                break
            # Sums of many costs carry rounding errors.
            if self.steps[i].cost <= limit * (1 + 1e-9):
                ways = self._ways(self._at[i])
                cost = self._costs.total(way.cost for way in ways.values())
                if cost <= limit * (1 + 1e-9):
                    return self._build(self._at[i], ways, limit, cost)
        raise ValueError(
            f"{fn}: budget: expected at least {self.steps[-1].cost:.6g} {self.unit}, which the "
            f"smallest model on the path costs, got {limit:.6g}"
        )

    def _longest(self) -> int:
        return 1 + sum(len(levels) - 1 for levels in self._costs.levels.values())

    def _advance(self, limit: float, progress: Callable[[float], None] | None) -> bool:
        """Append the next step of the walk; False at its end."""
        layer, loss = next(self._walk, (None, math.nan))
        if layer is None:
            return False
        at = dict(self._at[-1])
        at[layer] += 1
        self._at.append(at)
        self.steps.append(Step(layer, self._nominal(at), loss))
        if progress is not None:
            start = self.steps[0].cost
            share = (start - self.steps[-1].cost) / max(start - limit, 1e-12)
            progress(min(max(share, 0.0), 1.0))
        return True

    def _nominal(self, at: Mapping[str, int]) -> float:
        return self._costs.total(self._costs.levels[n][i].cost for n, i in at.items())

    def _ways(self, at: Mapping[str, int]) -> dict[str, Way]:
        """The cheapest form of each layer that is accurate enough."""
        found = {}
        for name, i in at.items():
            level = self._costs.levels[name][i]
            found[name] = next(
                way
                for way in level.ways
                if way.form != "pivoted" or self._is_accurate(name, level.rank)
            )
        return found

    def _is_accurate(self, name: str, rank: int) -> bool:
        if (name, rank) not in self._pivoted:
            layer, x = self._layers[name], self._seen[name].x
            assert isinstance(layer, LoDLinear)
            assert x is not None
            rows = x.reshape(-1, layer.in_features)[:_ROWS].to(layer.v.dtype)
            before = layer.rank
            layer.rank = rank
            made = PivotedLinear.from_lod(layer)
            accurate = error_ratio(layer, made, rows) <= _ERROR_RATIO
            layer.rank = before
            self._pivoted[name, rank] = made if accurate else None
        return self._pivoted[name, rank] is not None

    def _build(
        self, at: Mapping[str, int], ways: Mapping[str, Way], limit: float, cost: float
    ) -> nn.Module:
        model = self._deploy(at, ways)
        run = self._objective.run
        recalibrate_batchnorm(model, self._batches, run=run)
        report = Extraction(
            self.unit,
            limit,
            cost,
            self._objective.of(model),
            self._objective.full,
            {name: self._costs.levels[name][i].rank for name, i in at.items()},
            {name: way.form for name, way in ways.items()},
        )
        setattr(model, _REPORT, report)
        return model

    def _deploy(self, at: Mapping[str, int], ways: Mapping[str, Way]) -> nn.Module:
        twin = copy.deepcopy(self._model)
        # Copies of a model list their layers in the same order, under whatever name.
        layers = dict(zip(self._layers, lod_layers(twin).values(), strict=True))
        made: dict[nn.Module, nn.Module] = {}
        for name, layer in layers.items():
            rank = self._costs.levels[name][at[name]].rank
            made_before = self._pivoted.get((name, rank))
            if ways[name].form == "pivoted" and made_before is not None:
                new = in_place_of(layer, copy.deepcopy(made_before), share=True)
            else:
                new = deployed(layer, rank, ways[name].form)
            if new is not layer:
                made[layer] = new
        ungroup(twin, only=made)
        return swap_layers(twin, made, inplace=True)

    def _fitted(self) -> Costs:
        """Milliseconds such that both ends of the path cost what the whole models take."""
        levels = self._costs.levels
        last = {name: len(of_layer) - 1 for name, of_layer in levels.items()}
        models = {
            end: self._deploy(at, {n: levels[n][i].ways[0] for n, i in at.items()})
            for end, at in (("dearest", dict.fromkeys(levels, 0)), ("cheapest", last))
        }
        if self._kind is Speedup:
            models["dense"] = to_dense(self._model, inplace=False)
        ms = milliseconds(models, self._batches[0], self._objective.run)
        costs = self._costs.through(ms["dearest"], ms["cheapest"])
        return Costs(costs.unit, levels, ms.get("dense", 0.0), costs.fixed, costs.scale)


def _checked(
    fn: str, kind: Any, batches: Any, loss_fn: Any, method: Any, forms: Sequence[str]
) -> list[Any]:
    if kind not in Budget.__args__:
        raise TypeError(
            f"{fn}: kind: expected Params, MACs, Latency, Speedup or Memory, got {kind!r}"
        )
    check_batches(fn, "batches", batches)
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"{fn}: loss_fn: expected a function, got {type(loss_fn).__name__}")
    if method not in _METHODS:
        raise ValueError(f"{fn}: method: expected one of {_METHODS}, got {method!r}")
    if isinstance(forms, str) or not set(forms) <= set(_FORMS) or "factors" not in forms:
        raise ValueError(f"{fn}: forms: expected some of {_FORMS} with 'factors', got {forms!r}")
    data = list(batches)
    if not data:
        raise ValueError(f"{fn}: batches: expected at least one batch, got none")
    return data
