"""What the layers of a model cost at each rank they may be deployed at."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maestro_kernels.measure.timing import interleave
from maestro_kernels.nn import LoDConv2d, LoDLayer, LoDLinear
from maestro_kernels.nn.conversion import dense_form, in_place_of
from maestro_kernels.nn.moments import calibrating
from maestro_kernels.nn.pivoted import PivotedLinear
from maestro_kernels.search.budget import Budget, Latency, MACs, Memory, Speedup
from maestro_kernels.training.layers import full_rank

__all__ = ["Costs", "Level", "Observed", "Way", "measure_costs", "milliseconds", "observe"]

Run = Callable[[nn.Module, Any], Any]
# Wall time per shape for all ranks together.
_SECONDS = 0.4


@dataclass(frozen=True)
class Way:
    """A form of a layer, "factors", "pivoted" ([I; U]) or "dense" (merged), and what it costs."""

    form: str
    cost: float


@dataclass(frozen=True)
class Level:
    """A rank a layer may be deployed at.

    Attributes:
        rank: components kept.
        ways: the forms it may take, cheapest first.
    """

    rank: int
    ways: tuple[Way, ...]

    @property
    def cost(self) -> float:
        """Of the cheapest form."""
        return self.ways[0].cost


@dataclass(frozen=True)
class Observed:
    """What the calibration batches show of a layer.

    Attributes:
        x: input of its first call, None where no batch reaches it.
        calls: how often the first batch calls it.
        positions: rows of x, or output positions of a convolution, over these calls.
    """

    x: Tensor | None = None
    calls: int = 0
    positions: int = 0


@dataclass(frozen=True)
class Costs:
    """The cost of a model: fixed + scale * the sum over its layers.

    Attributes:
        unit: "weights", "MACs", "ms" or "bytes".
        levels: per layer, from the dearest to the cheapest, strictly falling in rank and cost.
        dense: what the layers would cost as dense ones (milliseconds: the dense model).
        fixed: cost of everything but the layers.
        scale: 1 unless milliseconds of layers add up to other times than the model's.
    """

    unit: str
    levels: dict[str, list[Level]]
    dense: float
    fixed: float = 0.0
    scale: float = 1.0

    def total(self, costs: Iterable[float]) -> float:
        """Cost of a model whose layers cost this."""
        return self.fixed + self.scale * sum(costs)

    def through(self, dearest: float, cheapest: float) -> Costs:
        """With fixed and scale such that the first and the last levels of all layers cost this."""
        first = sum(levels[0].cost for levels in self.levels.values())
        last = sum(levels[-1].cost for levels in self.levels.values())
        if dearest > cheapest and first > last:
            scale = (dearest - cheapest) / (first - last)
            return replace(self, fixed=dearest - scale * first, scale=scale)
        # Noise: the layers hardly count, or nothing can be removed.
        return replace(self, fixed=dearest - first)


def observe(
    model: nn.Module, layers: Mapping[str, LoDLayer], batches: Sequence[Any], run: Run
) -> dict[str, Observed]:
    """Watch one forward pass over each batch."""
    seen: dict[str, Observed] = {name: Observed() for name in layers}
    counting = True

    def watch(name: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
            old = seen[name]
            x = args[0] if args else next(iter(kwargs.values()))
            kept = x.detach().clone() if old.x is None else old.x
            channels = max(y.shape[-3 if isinstance(module, LoDConv2d) else -1], 1)
            rows = y.numel() // channels * counting
            seen[name] = Observed(kept, old.calls + counting, old.positions + rows)

        return note

    handles = [
        layer.register_forward_hook(watch(name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        with calibrating(model):
            for batch in batches:
                run(model, batch)
                counting = False
    finally:
        for handle in handles:
            handle.remove()
    return seen


def measure_costs(
    model: nn.Module,
    layers: Mapping[str, LoDLayer],
    budget: type[Budget],
    seen: Mapping[str, Observed],
    ranks: Mapping[str, list[int]],
    forms: tuple[str, ...],
) -> Costs:
    """The levels of every layer under this kind of budget.

    Args:
        model: at full rank.
        layers: its LoD layers.
        budget: Params, MACs, Latency, Speedup or Memory.
        seen: see `observe`.
        ranks: ranks to consider per layer, the full one among them.
        forms: which of "factors", "pivoted" and "dense" may be used.
    """
    if budget in (Latency, Speedup):
        cost = _timed(layers, seen, ranks, forms)
        levels = {n: _levels(la, ranks[n], forms, cost[n]) for n, la in layers.items()}
        return Costs("ms", levels, 0.0)
    scale: dict[str, float] = dict.fromkeys(layers, 1.0)
    if budget is MACs:
        scale = {name: seen[name].positions for name in layers}
    elif budget is Memory:
        scale = {name: layer.u.element_size() for name, layer in layers.items()}
    weights = _macs if budget is MACs else _weights
    table = {}
    for name, layer in layers.items():
        costs = {(r, f): scale[name] * weights(layer, r, f) for r in ranks[name] for f in forms}
        table[name] = _levels(layer, ranks[name], forms, costs)
    dense = sum(scale[n] * math.prod(_matrix(layer)) for n, layer in layers.items())
    if budget is not Memory:
        return Costs("MACs" if budget is MACs else "weights", table, dense)
    own = sum(la.u.nbytes + la.v.nbytes for la in layers.values())
    stored = sum({id(t): t.nbytes for t in [*model.parameters(), *model.buffers()]}.values())
    return Costs("bytes", table, dense, stored - own)


def _matrix(layer: LoDLayer) -> tuple[int, int, int]:
    """(groups, N, K)."""
    return layer.groups, *layer.matrix_shape


def _macs(layer: LoDLayer, rank: int, form: str) -> int:
    groups, N, K = _matrix(layer)
    if form == "dense":
        return groups * N * K
    return groups * rank * (N + K - (rank if form == "pivoted" else 0))


def _weights(layer: LoDLayer, rank: int, form: str) -> float:
    """Stored numbers in units of one weight; the pivoted form also stores N int32."""
    extra = layer.matrix_shape[0] * 4 / layer.u.element_size() if form == "pivoted" else 0.0
    return _macs(layer, rank, form) + extra


def possible(layer: LoDLayer, rank: int, form: str) -> bool:
    """Whether a layer has this form: dense layers have no activation, pivoted ones are linear."""
    if form == "pivoted":
        return isinstance(layer, LoDLinear) and rank > 0
    return form == "factors" or (
        rank == full_rank(layer) and getattr(layer, "activation", None) is None
    )


def _levels(
    layer: LoDLayer, ranks: list[int], forms: tuple[str, ...], cost: Mapping[tuple[int, str], float]
) -> list[Level]:
    """Forms at each rank; ranks that cost as much as a larger one are left out."""
    found: list[Level] = []
    for rank in sorted(ranks, reverse=True):
        ways = [Way(f, cost[rank, f]) for f in forms if possible(layer, rank, f)]
        level = Level(rank, tuple(sorted(ways, key=lambda way: way.cost)))
        if not found or level.cost < found[-1].cost:
            found.append(level)
    return found


def deployed(layer: LoDLayer, rank: int, form: str) -> nn.Module:
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
    ranks: Mapping[str, list[int]],
    forms: tuple[str, ...],
) -> dict[str, dict[tuple[int, str], float]]:
    """Milliseconds of all calls of each layer; layers that look alike are timed once."""
    known: dict[Any, dict[tuple[int, str], float]] = {}
    found = {}
    for name, layer in layers.items():
        x, calls = seen[name].x, seen[name].calls
        ways = [(r, f) for r in ranks[name] for f in forms if possible(layer, r, f)]
        if x is None or not calls:
            found[name] = dict.fromkeys(ways, 0.0)
            continue
        key = (str(layer), layer.u.dtype, tuple(x.shape), x.stride(), tuple(ways))
        if key not in known:
            candidates = {
                f"{r} {f}": _call(deployed(copy.deepcopy(layer), r, f), x) for r, f in ways
            }
            stats = interleave(candidates, seconds=_SECONDS, min_rounds=6)
            times = [s.p50 * 1e3 for s in stats.values()]
            known[key] = dict(zip(ways, times, strict=True))
        found[name] = {way: calls * ms for way, ms in known[key].items()}
    return found


def _call(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    module.eval()

    @torch.no_grad()
    def call() -> Tensor:
        y: Tensor = module(x)
        return y

    return call


def milliseconds(models: Mapping[str, nn.Module], batch: Any, run: Run) -> dict[str, float]:
    """Median time of run(model, batch) in eval mode without gradients, the models in turns."""
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(calibrating(model))
        calls = {name: partial(run, model, batch) for name, model in models.items()}
        return {name: s.p50 * 1e3 for name, s in interleave(calls, seconds=2.0).items()}
