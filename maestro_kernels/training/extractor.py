"""extract: a smaller model out of a trained one, without training: which layer gives up how much.

Ranks fall along one path from the full model to the smallest one. A budget decides how far along it
a model is cut, so a model for a smaller budget holds a prefix of every layer of a larger one; what
is found there for one budget can then be refined, which gives that up.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from torch import nn

from maestro_kernels.arguments import check_int
from maestro_kernels.measure.progress import Advance, progress_bar, told
from maestro_kernels.nn.moments import calibrating
from maestro_kernels.search.budget import Budget, Params, check_budget
from maestro_kernels.search.knapsack import Choice, descend, fits
from maestro_kernels.search.layers import Observed, observe
from maestro_kernels.search.refine import Refinement
from maestro_kernels.search.solver import refined
from maestro_kernels.search.trial import Trial
from maestro_kernels.search.whole_model import LossFn, check_measured
from maestro_kernels.training.batchnorm import batch_statistics, recalibrate_batchnorm
from maestro_kernels.training.deployment import FORMS, Deployment, ways_to_try
from maestro_kernels.training.extraction import Extraction, Step
from maestro_kernels.training.layers import full_rank, require_layers, unwrapped

_ERRORS = ("measured", "additive")
# What `errors` was called for as `method`.
_METHODS = {"greedy": "measured", "additive": "additive"}
# Stands for a loss that is not finite where sums have to stay ordered.
_HOPELESS = 1e100
Progress = bool | Advance | Callable[[float], None] | None


def extract(
    model: nn.Module,
    budget: Budget,
    *,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    errors: str = "measured",
    levels: int = 16,
    min_rank: int = 1,
    multiple_of: int = 1,
    forms: Sequence[str] = FORMS,
    refine: bool = True,
    passes: int | None = None,
    progress: Progress = None,
    method: str | None = None,
) -> nn.Module:
    """A smaller copy of a model with LoD layers that fits a budget; no training.

    Layers give up components, the last ones first, greedily: always where the loss on `batches`
    grows least for what is saved, until the budget is met. From there, or from uniform ranks if
    their loss is lower, cost is moved between layers for as long as the measured loss falls, as
    `search.allocate` does. Each layer is then deployed in the form that is cheapest under the
    budget: its factors cut to the rank; the [I; U] form (`PivotedLinear`), unless its error is more
    than four times that of the factors; or dense, at full rank. BatchNorm statistics are measured
    again on the batches. `extraction_report` tells ranks, forms, cost and loss.

    Models for several budgets come cheaper from one `ExtractionPath`, where ranks are nested: a
    layer of a smaller model is a prefix of the same layer of a larger one. Refined ranks are each
    better for their own budget, and need not be nested.

    Args:
        model: holds LoD layers; it stays as it is. Wrappers of torch.compile and DDP are left out.
        budget: Params, MACs, Latency, Speedup or Memory. Fractions are of the dense weights (or
            multiply-adds for the first batch) of the LoD layers; times are for the first batch.
        batches: tensors (model(x)), tuples (model(*t)) or dicts (model(**d)), as loss_fn takes
            them; kept and passed many times. BatchNorm averages weigh them alike.
        loss_fn: (model, batch) -> scalar; None is the squared error of the model's first output
            against that at full rank, relative to its squared norm.
        errors: what the greedy steps go by. "measured": the loss of the whole model after each
            step. "additive": each layer alone is measured at each rank once, and errors of layers
            are taken to add up; the steps then follow the exact optima of the sum.
        levels: ranks to choose from per layer, evenly spaced; below the last halves of it follow.
        min_rank: lowest rank of a layer; 0 may remove it but for its bias.
        multiple_of: ranks are multiples of this where the full rank allows.
        forms: which of "factors", "pivoted" and "dense" may be used; "factors" must be among them.
        refine: False returns the model on the path.
        passes: most passes over the batches to refine by; None is 16 and four for every layer, 0
            only compares with uniform ranks.
        progress: show a bar; None does so on a terminal. A function gets (text, done, total),
            before the first pass of every stage the number that there may be.
        method: deprecated: "greedy" is errors="measured", "additive" errors="additive".

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
    progress = told("extract", progress)
    path = _Path(
        model,
        type(budget),
        batches=batches,
        loss_fn=loss_fn,
        errors=_renamed("extract", errors, method),
        levels=levels,
        min_rank=min_rank,
        multiple_of=multiple_of,
        forms=forms,
    )
    return path.extract(budget, refine=refine, passes=passes, progress=progress)


class ExtractionPath:
    """Ever smaller models out of one, nested; walked only as far as budgets ask.

    Args:
        model: copied at once.
        kind: Params, MACs, Latency, Speedup or Memory: what the path saves.

    The other arguments are those of `extract`.

    Attributes:
        unit: of costs: "weights", "MACs", "ms" or "bytes".
        dense: what the layers cost as dense ones; milliseconds of the dense model.
        steps: walked so far, costs falling.
    """

    # What errors name.
    _fn = "ExtractionPath"

    def __init__(
        self,
        model: nn.Module,
        kind: type[Budget] = Params,
        *,
        batches: Iterable[Any],
        loss_fn: LossFn | None = None,
        errors: str = "measured",
        levels: int = 16,
        min_rank: int = 1,
        multiple_of: int = 1,
        forms: Sequence[str] = FORMS,
        method: str | None = None,
    ) -> None:
        fn = self._fn
        require_layers(fn, model)
        if kind not in Budget.__args__:
            raise TypeError(
                f"{fn}: kind: expected Params, MACs, Latency, Speedup or Memory, got {kind!r}"
            )
        data = check_measured(fn, batches, loss_fn)
        if isinstance(forms, str) or not set(forms) <= set(FORMS) or "factors" not in forms:
            raise ValueError(f"{fn}: forms: expected some of {FORMS} with 'factors', got {forms!r}")
        check_int(fn, "levels", levels, 1)
        check_int(fn, "min_rank", min_rank, 0)
        check_int(fn, "multiple_of", multiple_of, 1)
        self._kind, self._batches = kind, data
        self._measures_steps = _renamed(fn, errors, method) == "measured"
        self._model = copy.deepcopy(unwrapped(model))
        self._layers = require_layers(fn, self._model)
        for layer in self._layers.values():
            layer.rank = full_rank(layer)
        self._trial = Trial(
            self._model, {}, data, loss_fn, fn=fn, modules=self._layers, mode=_recalibrated
        )
        full = self._trial.measure()
        if not math.isfinite(full):
            raise ValueError(f"{fn}: loss_fn: expected a finite loss at full rank, got {full}")
        seen = self._observed()
        ways = {
            name: ways_to_try(layer, levels, min_rank, multiple_of, forms)
            for name, layer in self._layers.items()
        }
        run = self._trial.mean.run
        self._deployment = Deployment(self._model, self._layers, seen, kind, ways, data[0], run)
        self._path = self._deployment.path
        start = tuple(len(c.ranks) - 1 for c in self._path.choices)
        # Losses that were measured, by choice.
        self._losses = {start: full}
        self._at = [start]
        self.steps = [Step(None, self._cost(start), full)]
        self._walk: Iterator[tuple[str, Choice, float]] | None = None

    @property
    def unit(self) -> str:  # noqa: D102
        return self._kind.unit

    @property
    def dense(self) -> float:  # noqa: D102
        return self._path.dense.counted(self._kind)

    def extract(
        self,
        budget: Budget,
        *,
        refine: bool = False,
        passes: int | None = None,
        progress: Progress = None,
    ) -> nn.Module:
        """The first model on the path that fits the budget; see the function `extract`.

        Args:
            budget: of the kind of the path.
            refine: go on from there by measuring; the model is then not nested with others.
            passes: as in the function.
            progress: as in the function.

        Raises:
            TypeError: not the kind of budget that the path is for.
            ValueError: no model on the path fits.
        """
        fn = self._fn
        if type(check_budget(fn, budget)) is not self._kind:
            raise TypeError(
                f"{fn}: budget: expected {self._kind.__name__}, got {type(budget).__name__}"
            )
        if passes is not None:
            check_int(fn, "passes", passes, 0)
        with progress_bar(told(fn, progress), fn) as advance:
            choice = self._first(budget, advance)
            refinement = None
            if refine and choice != self._at[0]:
                choice, refinement = refined(
                    self._path.with_errors(self._finite_errors()),
                    budget,
                    choice,
                    nullcontext(self._loss),
                    passes,
                    advance,
                    lambda one: self._fits(one, budget),
                )
        return self._build(choice, budget, refinement)

    def _observed(self) -> dict[str, Observed]:
        run = self._trial.mean.run
        seen = observe(self._model, self._layers, self._batches, run, keep_inputs=True)
        for name, one in seen.items():
            if one.x is None:
                raise ValueError(
                    f"{self._fn}: batches: expected batches that reach {name!r}, got none"
                )
        return seen

    def _loss(self, choice: Choice) -> float:
        """Measured at most once for each choice; infinite where it is not finite."""
        if choice not in self._losses:
            pairs = zip(self._path.choices, choice, strict=True)
            loss = self._trial.measure({c.layer.name: c.ranks[j] for c, j in pairs})
            self._losses[choice] = math.inf if math.isnan(loss) else loss
        return self._losses[choice]

    def _alone(self, advance: Advance) -> list[np.ndarray[Any, Any]]:
        """What each layer alone adds to the loss at each of its ranks."""
        full = self._at[0]
        total, done = sum(full), 0
        text = f"measuring {len(full)} layers: {total} passes"
        advance(text, 0, total)
        found = []
        for i, top in enumerate(full):
            errors = np.zeros(top + 1)
            for j in range(top):
                loss = self._loss((*full[:i], j, *full[i + 1 :]))
                errors[j] = min(loss - self._losses[full], _HOPELESS)
                advance(text, done := done + 1, total)
            found.append(errors)
        return found

    def _finite_errors(self) -> list[np.ndarray[Any, Any]]:
        """Of the path's choices, infinite where there is no hope."""
        errors = (c.costs.error for c in self._path.choices)
        return [np.where(error < _HOPELESS, error, np.inf) for error in errors]

    def _steps(self, advance: Advance) -> Iterator[tuple[str, Choice, float]]:
        """Layer by layer down to the smallest model, one rank at a time."""
        self._path = self._path.with_errors(self._alone(advance))
        at = list(self._at[0])

        def measured(choice: Choice) -> float:
            return min(self._loss(choice), _HOPELESS)

        measure = measured if self._measures_steps else None
        for i, end in descend(self._path.options(self._kind), measure):
            while at[i] > end:
                at[i] -= 1
                choice = tuple(at)
                added = self._path.costs(choice).error
                loss = self.steps[0].loss + added if measure is None else measure(choice)
                yield self._path.choices[i].layer.name, choice, loss

    def _next(self, advance: Advance) -> tuple[str, Choice, float]:
        """The next step; after an error, what was measured is not measured again."""
        if self._walk is None:
            self._walk = itertools.islice(self._steps(advance), len(self.steps) - 1, None)
        try:
            return next(self._walk)
        except BaseException:
            self._walk = None
            raise

    def _first(self, budget: Budget, advance: Advance) -> Choice:
        """The first choice on the path that the budget can pay for in forms that are accurate."""
        limit = budget.limit(self.dense)
        start = self.steps[0].cost
        for k in range(1 + sum(self._at[0])):
            if k == len(self.steps):
                layer, choice, loss = self._next(advance)
                self._at.append(choice)
                self.steps.append(Step(layer, self._cost(choice), loss))
                share = (start - self.steps[-1].cost) / max(start - limit, 1e-12)
                advance(f"removing: loss {loss:.4g}", round(100 * min(max(share, 0.0), 1.0)), 100)
            if fits(self.steps[k].cost, limit) and self._fits(self._at[k], budget):
                return self._at[k]
        raise ValueError(
            f"{self._fn}: budget: expected at least {self.steps[-1].cost:.6g} {self.unit}, which "
            f"the smallest model on the path costs, got {limit:.6g}"
        )

    def _cost(self, choice: Choice) -> float:
        return self._path.costs(choice).counted(self._kind)

    def _fits(self, choice: Choice, budget: Budget) -> bool:
        deployment = self._deployment
        return fits(deployment.cost(deployment.ways(choice)), budget.limit(self.dense))

    def _build(self, choice: Choice, budget: Budget, refinement: Refinement | None) -> nn.Module:
        deployment = self._deployment
        ways = deployment.ways(choice)
        model = deployment.made(ways)
        mean = self._trial.mean
        recalibrate_batchnorm(model, self._batches, run=mean.run)
        with calibrating(model):
            loss = mean(model)
        chosen = {c.layer.name: (c, k) for c, k in zip(deployment.every.choices, ways, strict=True)}
        report = Extraction(
            self.unit,
            budget.limit(self.dense),
            deployment.cost(ways),
            loss,
            self.steps[0].loss,
            {name: int(c.ranks[k]) for name, (c, k) in chosen.items()},
            {name: c.forms[k] for name, (c, k) in chosen.items()},
            refinement,
        )
        return report.attached(model)


@contextmanager
def _recalibrated(model: nn.Module) -> Iterator[None]:
    """Eval mode, but as if BatchNorm were recalibrated."""
    with calibrating(model), batch_statistics(model):
        yield


def _renamed(fn: str, errors: str, method: str | None) -> str:
    """`errors`, which was called `method` and had other values."""
    if method is not None:
        if method not in _METHODS:
            raise ValueError(f"{fn}: method: expected one of {tuple(_METHODS)}, got {method!r}")
        errors = _METHODS[method]
        warnings.warn(
            f"{fn}: method={method!r} is now errors={errors!r}: both walks are greedy",
            DeprecationWarning,
            stacklevel=3,
        )
    if errors not in _ERRORS:
        raise ValueError(f"{fn}: errors: expected one of {_ERRORS}, got {errors!r}")
    return errors


class _Path(ExtractionPath):
    _fn = "extract"
