"""The ranks that an allocation chose, what they were predicted to cost, and what they do cost."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from maestro_kernels.nn.active_ranks import ranks as present_ranks
from maestro_kernels.nn.active_ranks import set_ranks
from maestro_kernels.nn.conversion import convert
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.search.budget import Budget, MACs, Memory, Params, Speedup
from maestro_kernels.search.costs import Costs
from maestro_kernels.search.layers import Layer
from maestro_kernels.search.refine import Refinement
from maestro_kernels.search.whole_model import measure_models, output_error


@dataclass(frozen=True)
class LayerChoice:
    """One layer of an allocation.

    Attributes:
        layer: which.
        rank: chosen, or "dense".
        error: predicted.
        weights: stored.
        ms: milliseconds for the batch; None without a profile.
        dense_ms: of the dense layer, or at max_rank where it cannot be dense.
    """

    layer: Layer
    rank: int | str
    error: float
    weights: int
    ms: float | None
    dense_ms: float | None


@dataclass(frozen=True)
class Allocation(Mapping[str, int | str]):
    """Ranks by layer name, as `mk.set_ranks` takes them, with what they were chosen for.

    Attributes:
        budget: what was asked for.
        method: how they were chosen.
        unit: of the errors.
        layers: the layers considered, in module order.
        predicted: what the ranks cost.
        dense: what the dense model costs; layers that cannot be dense count at max_rank.
        gap: the least error possible within the budget is at least predicted.error - gap: 0 for an
            optimum, nan where the method does not tell.
        trade_off: (value, error) of allocations along the convex front, the value in the budget's
            own measure: what a smaller or a larger budget would buy.
        refined: losses measured on the way from the predicted optimum; None without batches.
    """

    budget: Budget
    method: str
    unit: str
    layers: tuple[LayerChoice, ...]
    predicted: Costs[float]
    dense: Costs[float]
    gap: float
    trade_off: tuple[tuple[float, float], ...]
    refined: Refinement | None = None

    def __getitem__(self, name: str) -> int | str:
        for choice in self.layers:
            if choice.layer.name == name:
                return choice.rank
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (choice.layer.name for choice in self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def apply(
        self, model: nn.Module, batches: Iterable[Any] | None = None, *, inplace: bool = True
    ) -> nn.Module:
        """Give a model these ranks: factorise dense layers, cut or merge factorised ones.

        Args:
            model: the one the ranks were chosen for.
            batches: calibration batches: dense layers then get the factors with the least output
                error on them (`convert(init="data")`), else those of the SVD.
            inplace: False leaves the model alone and returns another.

        Returns:
            The model. Parameters are new: make the optimizer afterwards.

        Raises:
            TypeError: model is no module, or batches no iterable of batches.
            ValueError: the model has not the layers of the allocation, or as `convert`.
        """
        known = present_ranks(model)
        for name in self:
            if name not in known:
                raise ValueError(
                    f"apply: model: expected the layers of the allocation, got none named {name!r}"
                )
        if not inplace:
            model = copy.deepcopy(model)
        ranks = dict(self)
        # At least 1: an empty factor is what truncation makes of it.
        wanted = {
            n: max(r, 1) for n, r in ranks.items() if known[n] == "dense" and not isinstance(r, str)
        }
        if wanted:
            model = convert(
                model,
                lambda name, _: wanted.get(name, "dense"),
                init="svd" if batches is None else "data",
                batches=batches,
            )
        model = set_ranks(model, ranks)
        modules = dict(model.named_modules())
        for name in self:
            # What stays closed has no layer of that name.
            if isinstance(layer := modules.get(name), LoDLayer):
                layer.truncate()
        return model

    def verify(
        self,
        model: nn.Module,
        batch: Any,
        reference: nn.Module | None = None,
        *,
        seconds: float = 4.0,
    ) -> Verification:
        """Time the model that these ranks were applied to, and compare with the prediction.

        Args:
            model: as `apply` returned it, and as it will be deployed.
            batch: what the latency was predicted for.
            reference: the model as it was: timed in turns with it, and what the outputs are
                compared with.
            seconds: of timing.

        Raises:
            TypeError: model is no module, or batch no batch.
            ValueError: a layer of the model does not run at its rank.
        """
        now = present_ranks(model)
        for name, rank in self.items():
            if now.get(name) != rank:
                raise ValueError(
                    f"verify: model: expected {name!r} at rank {rank}, got {now.get(name)}"
                )
        models = {"model": model} if reference is None else {"model": model, "before": reference}
        found = measure_models(models, batch, seconds=seconds)
        error = None if reference is None else output_error(model, reference, [batch])
        before = found["before"].ms if reference is not None else None
        return Verification(self, found["model"].ms, before, error)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "schema": 1,
            "budget": {type(self.budget).__name__: next(iter(asdict(self.budget).values()))},
            "method": self.method,
            "unit": self.unit,
            "ranks": dict(self),
            "predicted": asdict(self.predicted),
            "dense": asdict(self.dense),
            "gap": None if self.gap != self.gap else self.gap,
            "trade_off": [list(point) for point in self.trade_off],
        }

    def __str__(self) -> str:
        rows = [("layer", "rank", "weights", "ms", "dense ms", "error")]
        for c in self.layers:
            rank = c.rank if isinstance(c.rank, str) else f"{c.rank} of {c.layer.max_rank}"
            ms, dense = (_number(value, "{:.3f}") for value in (c.ms, c.dense_ms))
            name = c.layer.name or "(model)"
            rows.append((name, rank, f"{c.weights:,}", ms, dense, f"{c.error:.2g}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line: what was asked for and what was predicted."""
        p, d = self.predicted, self.dense
        text = (
            f"{self.budget}, {self.method}: {p.weights / d.weights:.1%} of the weights, "
            f"{p.macs / d.macs:.1%} of the multiply-adds, {p.bytes / 1e6:.1f} MB"
        )
        if p.ms is not None and d.ms is not None:
            text += f", {p.ms:.2f} ms, {d.ms / p.ms:.2f}× dense"
        text = f"{text}; error {p.error:.3g} ({self.unit})"
        if self.refined is not None:
            solved, *uniform = self.refined.starts
            others = f", uniform {uniform[0]:.3g}" if uniform else ""
            text += (
                f"; measured loss {self.refined.loss:.3g} (as predicted best {solved:.3g}{others}; "
                f"{self.refined.passes} passes)"
            )
        return text


@dataclass(frozen=True)
class Verification:
    """Predicted against measured.

    Attributes:
        allocation: what was predicted.
        ms: measured milliseconds of the model with its ranks.
        before: of the model as it was; None without a reference.
        output_error: ||f(batch) - f0(batch)||^2 / ||f0(batch)||^2; None without a reference.
    """

    allocation: Allocation
    ms: float
    before: float | None = None
    output_error: float | None = None

    @property
    def ratio(self) -> float | None:
        """Predicted over measured milliseconds; None where none were predicted."""
        predicted = self.allocation.predicted.ms
        return None if predicted is None else predicted / self.ms

    def __str__(self) -> str:
        text = f"measured {self.ms:.2f} ms"
        if self.ratio is not None:
            text += f", predicted {self.allocation.predicted.ms:.2f} ms ({self.ratio - 1:+.1%})"
        if self.before is not None:
            text += f", before {self.before:.2f} ms: {self.before / self.ms:.2f}× as fast"
        if self.output_error is not None:
            text += f", output error {self.output_error:.3g}"
        return text


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def reachable(budget: Budget, value: float) -> Budget:
    """The budget nearest to `value` on its reachable side, in few digits."""
    if isinstance(budget, Memory):
        return Memory(math.ceil(value))
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    if isinstance(budget, Speedup):
        return Speedup(float(f"{math.floor(value / step) * step:.4g}"))
    rounded = float(f"{math.ceil(value / step) * step:.4g}")
    return type(budget)(min(rounded, 1.0) if isinstance(budget, Params | MACs) else rounded)
