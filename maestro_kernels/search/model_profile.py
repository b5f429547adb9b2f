"""How long each layer takes inside its model: the model is run as it would be deployed, and timed.

A layer timed by itself has other things in the caches than it has in its model. Here every layer is
timed where it stands, in copies of the model whose layers run at one of a few ranks.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from maestro_kernels.arguments import check_int
from maestro_kernels.files import check_file, write_text
from maestro_kernels.measure import records
from maestro_kernels.measure.cost import break_even_rank
from maestro_kernels.measure.heap import keeping_memory
from maestro_kernels.measure.timing import rounds
from maestro_kernels.nn.candidates import Selector
from maestro_kernels.nn.conversion import convert, dense_form
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.nn.moments import calibrating, run_batch
from maestro_kernels.search.curves import on_lines
from maestro_kernels.search.layers import Layer, considered, count_rows, on_open_model
from maestro_kernels.search.whole_model import present

_FN = "profile_model"
_SCHEMA = 1
Deploy = Callable[[nn.Module], nn.Module]
# Fractions of the largest rank worth choosing at which copies of the model run: closer together
# where a budget that pays usually lies.
_FRACTIONS = (0.08, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)
_MIN_ROUNDS, _MAX_ROUNDS = 5, 60


@dataclass(frozen=True)
class ModelProfile:
    """Milliseconds of each layer, and of everything else, for one batch on one machine.

    Attributes:
        total: of the model as it was given.
        rest: of a forward pass outside the layers: the model's time less that of its layers, the
            median over all copies that were timed.
        rows: rows of x in each call of each layer.
        layers: name -> {rank or "dense": milliseconds of all calls for the batch}.
        ranks: what the layers ran at in the model as it was given.
    """

    total: float
    rest: float
    rows: dict[str, tuple[int, ...]]
    layers: dict[str, dict[int | str, float]]
    ranks: dict[str, int | str]

    def layer(self, name: str, rank: int | str) -> float:
        """Milliseconds of a layer at a rank, or "dense": straight lines between the measured ranks.

        Below the lowest rank measured it is that one's time, above the highest the line goes on.

        Raises:
            ValueError: no such layer, or it was not measured dense.
        """
        if name not in self.layers:
            raise ValueError(f"ModelProfile.layer: name: expected a layer, got {name!r}")
        known = self.layers[name]
        if isinstance(rank, str) or rank in known:
            if rank not in known:
                raise ValueError(
                    f"ModelProfile.layer: rank: expected one of {list(known)}, got {rank!r}"
                )
            return known[rank]
        return on_lines({r: ms for r, ms in known.items() if not isinstance(r, str)}, rank)

    def model(self, ranks: Mapping[str, int | str]) -> float:
        """Milliseconds of the whole model at these ranks; other layers stay as they were.

        Raises:
            ValueError: as `layer`.
        """
        chosen = {**self.ranks, **ranks}
        return self.rest + sum(self.layer(name, rank) for name, rank in chosen.items())

    def save(self, path: str | Path) -> None:
        """Write JSON that `load` reads: complete, or not at all."""
        place = check_file("ModelProfile.save", "path", path)
        layers = {n: [[rank, ms] for rank, ms in known.items()] for n, known in self.layers.items()}
        record = {**vars(self), "schema": _SCHEMA, "layers": layers}
        write_text(place, json.dumps(record) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> ModelProfile:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is no model profile of this schema.
        """
        fields = ("total", "rest", "rows", "layers", "ranks")
        record = records.load_document(
            path, fields, schema=_SCHEMA, what="model profile", fn="ModelProfile.load"
        )
        record["rows"] = {name: tuple(rows) for name, rows in record["rows"].items()}
        record["layers"] = {
            name: dict(map(tuple, known)) for name, known in record["layers"].items()
        }
        return cls(**record)


@on_open_model
def profile_model(
    model: nn.Module,
    batch: Any,
    *,
    deploy: Deploy | None = None,
    include: Selector = None,
    exclude: Selector = None,
    multiple_of: int = 8,
    seconds: float = 20.0,
) -> ModelProfile:
    """Time every layer of a CPU model at several ranks, inside the model.

    ms(model at ranks r) = rest + sum over layers of ms(layer at r)

    The model, and copies of it whose layers all run at 0.08, 0.2, ... 1 of the largest rank worth
    choosing, take turns: one pass that is not timed, one that times the layers by hooks, one that
    times the whole. Layers of one kind, size and number of rows share their times. The factors of
    the copies are random; everything else is shared with the model, so the copies together take
    about four times the memory of the layers. Freed memory stays in the process meanwhile: set
    MALLOC_TRIM_THRESHOLD_ (or use jemalloc) to serve the model as fast as it is timed here.

    Args:
        model: on the CPU; dense, factorised or both. Left as it was.
        batch: what to run it on: a tensor (model(x)), tuple (model(*t)) or dict (model(**d)).
        deploy: what is done to the model before it serves, for instance `mk.prepack`: called with
            each copy, returns what is timed. It must leave the parameters alone.
        include: only these layers; as `classify`.
        exclude: not these layers; as `classify`.
        multiple_of: ranks are timed at multiples of this.
        seconds: for all copies together; at least five rounds.

    Raises:
        TypeError: model is no module, or batch no batch.
        ValueError: no layer is left.
        NotImplementedError: a layer is not on the CPU.

    Example:
        >>> import torch
        >>> from maestro_kernels import search
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> profile = search.profile_model(model, torch.randn(16, 64), seconds=0.1)
        >>> profile.model({"0": 16, "1": "dense"}) > 0
        True
    """
    step = check_int(_FN, "multiple_of", multiple_of, 1)
    layers = considered(model, include, exclude, fn=_FN)
    _check_on_cpu(model, layers)
    rows = count_rows(model, layers, batch, fn=_FN)
    given = present(model, layers)
    copies = {"as given": (_shell(model), given)}
    for k, fraction in enumerate(_FRACTIONS):
        ranks: dict[str, int | str] = {
            name: _timed_rank(layer, fraction, step) for name, layer in layers.items()
        }
        if any(ranks == known for _, known in copies.values()):
            continue
        copies[str(k)] = (_at(_shell(model), layers, ranks), ranks)
    if any(layer.can_be_dense and given[name] != "dense" for name, layer in layers.items()):
        dense: dict[str, int | str] = {
            n: "dense" if layer.can_be_dense else given[n] for n, layer in layers.items()
        }
        copies["dense"] = (_at(_shell(model), layers, dense), dense)
    deployed = {
        name: (one if deploy is None else deploy(one), ranks)
        for name, (one, ranks) in copies.items()
    }
    with keeping_memory():
        times = _interleaved({name: m for name, (m, _) in deployed.items()}, layers, batch, seconds)
    return _combined(model, layers, rows, {n: r for n, (_, r) in deployed.items()}, times)


def _check_on_cpu(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    modules = dict(model.named_modules())
    for name in layers:
        for parameter in modules[name].parameters():
            if parameter.device.type != "cpu":
                raise NotImplementedError(
                    f"{_FN}: model: expected layers on the CPU, whose calls end when they return, "
                    f"got {name!r} on {parameter.device}; search.profile measures other devices"
                )


def _shell(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters and buffers."""
    memo: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


def _timed_rank(layer: Layer, fraction: float, step: int) -> int:
    top = layer.max_rank
    if layer.can_be_dense:
        top = min(top, int(break_even_rank(layer.N, layer.K)))
    rank = max(round(fraction * top / step) * step, step)
    return max(1, min(rank, layer.max_rank))


def _at(model: nn.Module, layers: Mapping[str, Layer], ranks: Mapping[str, int | str]) -> nn.Module:
    """The model with layers of these ranks and random factors; dense layers of random weights."""
    modules = dict(model.named_modules())
    for name in layers:
        module, rank = modules[name], ranks[name]
        if not isinstance(module, LoDLayer):
            continue
        if isinstance(rank, str):
            model = _replace(model, name, dense_form(module, share=True))
        else:
            # The buffer of the active rank is the model's own, which keeps its value.
            module.active_rank = module.active_rank.clone()
            module.truncate(rank)
            module.rank = min(rank, module.max_rank)
    wanted = {n for n in layers if not isinstance(modules[n], LoDLayer) and ranks[n] != "dense"}
    if not wanted:
        return model
    return convert(
        model,
        lambda name, _: ranks[name],
        include=lambda name, _: name in wanted,
        init="random",
        allow_larger=True,
    )


def _replace(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    if not name:
        return module
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
    return model


@dataclass
class _Times:
    """Milliseconds per pass, one entry per round."""

    whole: list[float]
    layers: dict[str, list[float]]


def _interleaved(
    models: Mapping[str, nn.Module], layers: Mapping[str, Layer], batch: Any, seconds: float
) -> dict[str, _Times]:
    times = {name: _Times([], {layer: [] for layer in layers}) for name in models}
    for model in models.values():
        # What is compiled, packed or chosen at the first call is not timed.
        with calibrating(model):
            run_batch(model, batch, fn=_FN, argument="batch")
    deadline = time.perf_counter() + seconds
    for k, order in enumerate(rounds(list(models))):
        if k == _MAX_ROUNDS or (k >= _MIN_ROUNDS and time.perf_counter() > deadline):
            break
        for name in order:
            model, found = models[name], times[name]
            with calibrating(model):
                run_batch(model, batch, fn=_FN, argument="batch")
                with _stopwatch(model, layers) as spent:
                    run_batch(model, batch, fn=_FN, argument="batch")
                start = time.perf_counter_ns()
                run_batch(model, batch, fn=_FN, argument="batch")
                found.whole.append((time.perf_counter_ns() - start) * 1e-6)
            for layer, ms in spent.items():
                found.layers[layer].append(ms)
    return times


@contextmanager
def _stopwatch(model: nn.Module, names: Mapping[str, Layer]) -> Iterator[dict[str, float]]:
    """Milliseconds spent in each named layer, over all its calls."""
    spent = dict.fromkeys(names, 0.0)
    modules = dict(model.named_modules())
    started: list[int] = []

    def before(module: nn.Module, args: Any) -> None:
        started.append(time.perf_counter_ns())

    def after(name: str) -> Any:
        def add(module: nn.Module, args: Any, y: Tensor) -> None:
            spent[name] += (time.perf_counter_ns() - started.pop()) * 1e-6

        return add

    handles = []
    for name in names:
        handles.append(modules[name].register_forward_pre_hook(before))
        handles.append(modules[name].register_forward_hook(after(name), prepend=True))
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def _combined(
    model: nn.Module,
    layers: Mapping[str, Layer],
    rows: dict[str, tuple[int, ...]],
    ranks: Mapping[str, Mapping[str, int | str]],
    times: Mapping[str, _Times],
) -> ModelProfile:
    """One time per kind of layer and rank: the mean over such layers of the median over rounds."""
    modules = dict(model.named_modules())
    kinds = {n: (_described(modules[n], layers[n]), rows[n]) for n in layers}
    samples: dict[Any, dict[int | str, list[float]]] = {}
    rests = []
    for one, found in times.items():
        medians = {name: statistics.median(ms) for name, ms in found.layers.items()}
        rests.append(statistics.median(found.whole) - sum(medians.values()))
        for name, ms in medians.items():
            samples.setdefault(kinds[name], {}).setdefault(ranks[one][name], []).append(ms)
    table = {
        kind: {rank: statistics.fmean(found) for rank, found in sorted(known.items(), key=_order)}
        for kind, known in samples.items()
    }
    return ModelProfile(
        total=statistics.median(times["as given"].whole),
        rest=max(statistics.median(rests), 0.0),
        rows=rows,
        layers={name: dict(table[kinds[name]]) for name in layers},
        ranks=present(model, layers),
    )


def _described(module: nn.Module, layer: Layer) -> str:
    """Kind, size, kernel, stride and the like, without the rank."""
    parts: Sequence[Any] = (layer.kind, layer.N, layer.K, layer.groups, layer.max_rank)
    extras = [getattr(module, name, None) for name in ("kernel_size", "stride", "dilation")]
    activation = getattr(module, "activation", None)
    return repr((*parts, *extras, activation, getattr(module, "bias", None) is not None))


def _order(item: tuple[int | str, Any]) -> float:
    return float("inf") if isinstance(item[0], str) else item[0]
