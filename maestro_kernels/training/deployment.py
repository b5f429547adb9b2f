"""The ways to deploy the layers of a trained model: ranks, forms, costs, and the model made."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maestro_kernels.measure.timing import interleave
from maestro_kernels.nn import LoDLayer, LoDLinear, lod_layers, to_dense, ungroup
from maestro_kernels.nn.conversion import dense_form, in_place_of
from maestro_kernels.nn.pivoted import PivotedLinear, error_ratio
from maestro_kernels.nn.swapping import swap_layers
from maestro_kernels.search.budget import Budget, Speedup
from maestro_kernels.search.costs import Choices, Costs, below_steps, choices, current_bytes
from maestro_kernels.search.knapsack import Choice
from maestro_kernels.search.layers import Observed, factorised_layer, storage_bytes
from maestro_kernels.search.solver import Problem
from maestro_kernels.search.whole_model import measure_models
from maestro_kernels.training.layers import full_rank

# [I; U] is "pivoted".
FORMS = ("factors", "pivoted", "dense")
# A rank and a form.
Way = tuple[int, str]
# Wall time per shape for all ranks together.
_SECONDS = 0.4
# The [I; U] form may be this much less accurate than two matmuls on the factors.
_ERROR_RATIO = 4.0
# Rows of a layer's input on which that is checked.
_ROWS = 256


class Deployment:
    """Every way to deploy the layers of a model, under one kind of budget.

    Args:
        model: at full rank; kept.
        layers: its LoD layers.
        seen: their inputs, and their rows for the first batch.
        kind: what is counted.
        ways: ranks and forms to consider of each layer, rising, the full rank among them.
        batch: what times are of.
        run: run(model, batch).

    Attributes:
        every: all ways of each layer; errors are unknown.
        path: of those, one for each rank worth its cost: in the form that is cheapest.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, LoDLayer],
        seen: Mapping[str, Observed],
        kind: type[Budget],
        ways: Mapping[str, Sequence[Way]],
        batch: Any,
        run: Callable[[nn.Module, Any], Any],
    ) -> None:
        self._model, self._layers, self._seen, self._kind = model, layers, seen, kind
        # The [I; U] form of (layer, rank), None where it is too inaccurate.
        self._pivoted: dict[tuple[str, int], PivotedLinear | None] = {}
        self.every = self._costed(ways)
        if kind.unit == "ms":
            self.every = self._fitted(batch, run)
        self.path = self.every.keep(self._cheapest())

    def cost(self, ways: Choice) -> float:
        """What the model costs in these ways."""
        return self.every.costs(ways).counted(self._kind)

    def ways(self, choice: Choice) -> Choice:
        """For a choice on the path, the cheapest way of each layer that is accurate enough."""
        found = []
        for every, path, j in zip(self.every.choices, self.path.choices, choice, strict=True):
            costs, rank = every.costs.counted(self._kind), path.ranks[j]
            same = [k for k, r in enumerate(every.ranks) if r == rank]
            found.append(
                next(
                    k
                    for k in sorted(same, key=costs.__getitem__)
                    if every.forms[k] != "pivoted" or self._is_accurate(every.layer.name, int(rank))
                )
            )
        return tuple(found)

    def made(self, ways: Choice) -> nn.Module:
        """A copy of the model in these ways."""
        twin = copy.deepcopy(self._model)
        made: dict[nn.Module, nn.Module] = {}
        # Copies of a model list their layers in the same order, under whatever name.
        for c, k, layer in zip(self.every.choices, ways, lod_layers(twin).values(), strict=True):
            rank, form = int(c.ranks[k]), c.forms[k]
            made_before = self._pivoted.get((c.layer.name, rank))
            if form == "pivoted" and made_before is not None:
                new = in_place_of(layer, copy.deepcopy(made_before), share=True)
            else:
                new = _deployed(layer, rank, form)
            if new is not layer:
                made[layer] = new
        ungroup(twin, only=made)
        return swap_layers(twin, made, inplace=True)

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

    def _costed(self, ways: Mapping[str, Sequence[Way]]) -> Problem:
        times = _timed(self._layers, self._seen, ways) if self._kind.unit == "ms" else {}
        found, dense, own = [], [], 0
        for name, layer in self._layers.items():
            one = factorised_layer(name, layer, full_rank(layer))
            ranks, forms = zip(*ways[name], strict=True)
            cost = partial(
                choices,
                one,
                itemsize=layer.u.element_size(),
                # A layer that the first batch does not reach takes no multiply-adds.
                rows=self._seen[name].rows or (0,),
            )
            found.append(cost(ranks, forms, ms=times.get(name)))
            dense.append(cost(["dense"]).at(0))
            own += current_bytes(layer, one)
        nothing = Costs(0.0, 0.0, 0.0, 0.0, 0.0 if times else None)
        beside = replace(nothing, bytes=float(storage_bytes(self._model) - own))
        return Problem(found, beside, sum(dense, start=nothing))

    def _cheapest(self) -> list[list[int]]:
        return [_cheapest(c, self._kind) for c in self.every.choices]

    def _fitted(self, batch: Any, run: Callable[[nn.Module, Any], Any]) -> Problem:
        """Milliseconds such that both ends of the path cost what the whole models take."""
        kept = self._cheapest()
        dearest, cheapest = tuple(j[-1] for j in kept), tuple(j[0] for j in kept)
        models = {"dearest": self.made(dearest), "cheapest": self.made(cheapest)}
        if self._kind is Speedup:
            models["dense"] = to_dense(self._model, inplace=False)
        found = measure_models(models, batch, seconds=2.0, run=run)
        ms = {name: one.ms for name, one in found.items()}
        first, last = self.cost(dearest), self.cost(cheapest)
        scale = 1.0
        # Else it is noise: the layers hardly count, or nothing can be removed.
        if ms["dearest"] > ms["cheapest"] and first > last:
            scale = (ms["dearest"] - ms["cheapest"]) / (first - last)
        scaled = [
            replace(c, costs=replace(c.costs, ms=scale * c.costs.counted(self._kind)))
            for c in self.every.choices
        ]
        return Problem(
            scaled,
            replace(self.every.beside, ms=ms["dearest"] - scale * first),
            replace(self.every.dense, ms=ms.get("dense", 0.0)),
        )


def ways_to_try(
    layer: LoDLayer, levels: int, min_rank: int, multiple_of: int, forms: Sequence[str]
) -> list[Way]:
    """Every form at even steps down from the full rank, then halves down to min_rank; rising."""
    full = full_rank(layer)
    lowest = -(-max(min_rank, 1) // multiple_of) * multiple_of
    wanted = [full * k / levels for k in range(1, levels + 1)]
    while wanted[0] > lowest:
        wanted.insert(0, wanted[0] / 2)
    rounded = {max(round(r / multiple_of) * multiple_of, lowest) for r in wanted}
    ranks = {r for r in rounded if r < full} | {full} | ({0} if min_rank == 0 else set())
    return [(rank, form) for rank in sorted(ranks) for form in forms if _has(layer, rank, form)]


def _has(layer: LoDLayer, rank: int, form: str) -> bool:
    """Whether a layer has this form: dense layers have no activation, pivoted ones are linear."""
    if form == "pivoted":
        return isinstance(layer, LoDLinear) and rank > 0
    return form == "factors" or (
        rank == full_rank(layer) and getattr(layer, "activation", None) is None
    )


def _cheapest(every: Choices, budget: type[Budget]) -> list[int]:
    """The cheapest form of each rank; ranks that cost as much as a larger one are left out."""
    costs = every.costs.counted(budget)
    best: dict[int | str, int] = {}
    for j, rank in enumerate(every.ranks):
        if rank not in best or costs[j] < costs[best[rank]]:
            best[rank] = j
    found = list(best.values())
    return [found[k] for k in below_steps(costs[found], tolerance=0.0)]


def _deployed(layer: LoDLayer, rank: int, form: str) -> nn.Module:
    """The layer as it is deployed, with its bias and hooks; truncated itself for "factors"."""
    layer.rank = rank
    if form == "dense":
        return dense_form(layer, share=True)
    if form == "pivoted":
        assert isinstance(layer, LoDLinear)
        return in_place_of(layer, PivotedLinear.from_lod(layer), share=True)
    layer.truncate()
    return layer


def _timed(
    layers: Mapping[str, LoDLayer],
    seen: Mapping[str, Observed],
    ways: Mapping[str, Sequence[Way]],
) -> dict[str, list[float]]:
    """Milliseconds of all calls of each layer in each way; layers that look alike are timed once.

    Args:
        layers: at full rank.
        seen: the input of each, and its calls.
        ways: to time.
    """
    known: dict[Any, list[float]] = {}
    found = {}
    for name, layer in layers.items():
        x, calls = seen[name].x, len(seen[name].rows)
        if x is None or not calls:
            found[name] = [0.0] * len(ways[name])
            continue
        key = (str(layer), layer.u.dtype, tuple(x.shape), x.stride(), tuple(ways[name]))
        if key not in known:
            candidates = {
                f"{r} {f}": _call(_deployed(copy.deepcopy(layer), r, f), x) for r, f in ways[name]
            }
            stats = interleave(candidates, seconds=_SECONDS, min_rounds=6)
            known[key] = [s.p50 * 1e3 for s in stats.values()]
        found[name] = [calls * ms for ms in known[key]]
    return found


def _call(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    module.eval()

    @torch.no_grad()
    def call() -> Tensor:
        y: Tensor = module(x)
        return y

    return call
