"""What each layer's rank costs in accuracy: error as a function of rank, per layer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from maestro_kernels.arguments import check_int
from maestro_kernels.files import check_file, write_text
from maestro_kernels.measure.progress import Advance, progress_bar, told
from maestro_kernels.nn.candidates import Selector
from maestro_kernels.nn.conversion import check_values
from maestro_kernels.nn.experts import idle_layers
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.nn.moments import check_batches, input_moments
from maestro_kernels.search.layers import (
    Layer,
    at_full_rank,
    considered,
    count_rows,
    on_open_model,
)
from maestro_kernels.search.spectra import (
    singular_values,
    tail_parts,
    tail_shares,
    truncation_shares,
)
from maestro_kernels.search.trial import Factors, Trial, factors_of, matrices
from maestro_kernels.search.whole_model import LossFn

_UNITS = {
    "svd": "share of ||W||^2",
    "data": "share of the layer's output energy",
    "loss": "loss",
    "importance": "share of importance squared",
}
_FN = "sensitivity"


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer's error at each rank.

    Attributes:
        layer: what it is.
        errors: (max_rank + 1,): errors[r] is what running at rank r adds to the error, against
            full rank, whose entry is 0.
        values: (max_rank,), non-increasing: singular values, whitened ones, or importance.
        rows: rows of x in each call for the first batch; empty where there was no batch.
        measured: (rank, increase of the loss) where method="loss" measured it.
        factors: of a dense layer that method="loss" measured, up to the largest rank there: what
            `allocate` goes on measuring with. As large as the weight; files do not hold it.
    """

    layer: Layer
    errors: NDArray[np.float64]
    values: NDArray[np.float64]
    rows: tuple[int, ...] = ()
    measured: tuple[tuple[int, float], ...] = ()
    factors: Factors | None = field(default=None, repr=False, compare=False)

    def error(self, rank: int | str) -> float:
        """What this rank adds to the error; "dense" adds nothing."""
        if isinstance(rank, str):
            return 0.0
        name = self.layer.name
        return float(self.errors[check_int(_FN, name, rank, 0, self.layer.max_rank)])


@dataclass(frozen=True)
class Sensitivity:
    """The error of a model's layers as a function of their ranks, taken to be additive.

    Attributes:
        method: how it was found.
        unit: of the errors.
        layers: in module order.
    """

    method: str
    unit: str
    layers: dict[str, LayerSensitivity]

    def error(self, ranks: Mapping[str, int | str]) -> float:
        """The predicted error of these ranks: the sum over the layers; others stay as they are.

        Raises:
            ValueError: a name that is not among the layers, or a rank outside 0..max_rank.
        """
        for name in ranks:
            if name not in self.layers:
                some = ", ".join(repr(n) for n in list(self.layers)[:4])
                raise ValueError(f"{_FN}: ranks: expected names of layers ({some}), got {name!r}")
        return sum(self.layers[name].error(rank) for name, rank in ranks.items())

    def save(self, path: str | Path) -> None:
        """Write JSON that `load` reads: complete, or not at all."""
        place = check_file("Sensitivity.save", "path", path)
        write_text(place, json.dumps(self.to_dict()) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        layers = [
            {
                "layer": asdict(s.layer),
                "errors": s.errors.tolist(),
                "values": s.values.tolist(),
                "rows": s.rows,
                "measured": s.measured,
            }
            for s in self.layers.values()
        ]
        return {"schema": 1, "method": self.method, "unit": self.unit, "layers": layers}

    @staticmethod
    def load(path: str | Path) -> Sensitivity:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is no sensitivity of this schema.
        """
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("schema") != 1 or "layers" not in data:
            raise ValueError(f"{_FN}: load: expected a sensitivity of schema 1, got {path}")
        layers = {}
        for entry in data["layers"]:
            layer = Layer(**entry["layer"])
            layers[layer.name] = LayerSensitivity(
                layer,
                np.array(entry["errors"]),
                np.array(entry["values"]),
                tuple(entry["rows"]),
                tuple((int(r), float(e)) for r, e in entry["measured"]),
            )
        return Sensitivity(data["method"], data["unit"], layers)


@on_open_model
def sensitivity(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    method: str = "data",
    *,
    include: Selector = None,
    exclude: Selector = None,
    points: int = 4,
    held_out: int = 0,
    progress: bool | Advance | None = None,
) -> Sensitivity:
    """Each layer's error as a function of its rank, all other layers untouched.

    - "svd": sum_{i >= r} s_i^2 / sum s_i^2 of the singular values of W: what the best factors lose
      of the weight. Needs no data.
    - "data": the same of the singular values of W S, S S^T the second moment of the layer's inputs:
      what the best factors lose of the layer's output on the batches.
    - "loss": the increase of the loss on the batches with this one layer at rank r, measured at
      `points` ranks per layer (break-even, half of it, ...), and between them a piecewise linear
      function of the "data" error, which the loss follows closely.
    - "importance": (||u[:, r:]|| ||v[r:]||)^2 over that of r = 0, of factorised layers alone: a
      bound on what the prefix loses of the weight.

    Of a factorised layer the error is that of its own prefixes (||u[:, r:] v[r:] S||^2 in place of
    the sums), against its full rank. The model is left as it was; it runs in eval mode.

    Args:
        model: dense, factorised or both.
        batches: tensors (model(x)), tuples (model(*t)) or dicts (model(**d)); read once. "data" and
            "loss" need them. With any method the first one tells the rows each layer sees.
        loss_fn: (model, batch) -> scalar, for "loss"; None is the squared error of the model's
            first output against its present one, relative to that output's squared norm.
        method: "data", "svd", "loss" or "importance".
        include: only these layers; as `classify`.
        exclude: not these layers; as `classify`.
        points: ranks per layer at which "loss" measures.
        held_out: "loss" measures on the first so many batches and makes factors by the others, so
            that factors that fit the batches too well are not taken for good ones; 0 does both by
            all batches. Worth it where rows are few (below ten times the layers' in_features).
        progress: show a bar; None does so on a terminal. A function gets (text, done, total).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value does not fit, no layer is left, a weight, an input or a loss is not
            finite, or a layer is not reached by the batches.

    Example:
        >>> import torch
        >>> from maestro_kernels import search
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> sens = search.sensitivity(model, [torch.randn(100, 64)])
        >>> sens.layers["0"].errors.shape
        (65,)

    Source:
        Whitening as in SVD-LLM (arXiv 2403.07378); importance from Maestro (arXiv 2308.14929).
    """
    _check_arguments(batches, loss_fn, method, points)
    check_int(_FN, "held_out", held_out, 0)
    layers = considered(model, include, exclude, fn=_FN)
    if method == "importance":
        layers = {name: layer for name, layer in layers.items() if layer.factorised}
        if not layers:
            raise ValueError(
                f"{_FN}: model: expected factorised layers with method='importance', got none"
            )
    modules = dict(model.named_modules())
    chosen = {name: modules[name] for name in layers}
    _check_weights(chosen)
    data = None if batches is None else list(batches)
    measured, fitted = _split(data or [], held_out, method)
    rows, moments = {}, {}
    with at_full_rank(model, layers):
        if data is not None:
            if method in ("data", "loss"):
                idle = idle_layers(model)
                moments = input_moments(
                    model, chosen, fitted, fn=_FN, argument="batches", idle=idle
                )
            if data:
                rows = count_rows(model, layers, data[0], fn=_FN)
        found = {}
        with ExitStack() as stack:
            advance = stack.enter_context(progress_bar(told(_FN, progress), _FN))
            trial, base, stage = None, 0.0, "errors of layers"
            if method == "loss":
                trial = stack.enter_context(Trial(model, layers, measured, loss_fn, fn=_FN))
                base, stage = trial.loss(), "losses of layers"
            for i, (name, layer) in enumerate(layers.items()):
                moment = moments.pop(name, None)
                one = _from_weights(layer, modules[name], moment, method)
                one = replace(one, rows=rows.get(name, ()))
                if trial is not None:
                    one = _measured(one, modules[name], moment, points, trial, base)
                found[name] = one
                advance(stage, i + 1, len(layers))
    unit = _UNITS[method]
    if method == "loss":
        unit = "loss" if loss_fn is not None else "relative squared error of the output"
    return Sensitivity(method, unit, found)


def _check_arguments(batches: Any, loss_fn: Any, method: str, points: Any) -> None:
    if method not in _UNITS:
        raise ValueError(f"{_FN}: method: expected one of {tuple(_UNITS)}, got {method!r}")
    check_int(_FN, "points", points, 1)
    if batches is not None:
        check_batches(_FN, "batches", batches)
    elif method in ("data", "loss"):
        raise ValueError(f"{_FN}: batches: expected batches with method={method!r}, got None")
    if loss_fn is not None and method != "loss":
        raise ValueError(f"{_FN}: loss_fn: expected None with method={method!r}, got a function")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"{_FN}: loss_fn: expected a function, got {type(loss_fn).__name__}")


def _split(data: list[Any], held_out: int, method: str) -> tuple[list[Any], list[Any]]:
    """Batches to measure the loss on, and batches whose moments make the factors."""
    if not held_out:
        return data, data
    if method != "loss" or held_out >= len(data):
        raise ValueError(
            f"{_FN}: held_out: expected 0, or with method='loss' fewer than the {len(data)} "
            f"batches, got {held_out} with method={method!r}"
        )
    return data[:held_out], data[held_out:]


def _check_weights(chosen: Mapping[str, nn.Module]) -> None:
    for name, module in chosen.items():
        parts = ("u", "v") if isinstance(module, LoDLayer) else ("weight",)
        for part in parts:
            check_values(_FN, f"{name}.{part}" if name else part, getattr(module, part))


def _from_weights(
    layer: Layer, module: nn.Module, moment: Tensor | None, method: str
) -> LayerSensitivity:
    """Errors and values from the weights and, where there is one, the inputs' moment."""
    if isinstance(module, LoDLayer):
        values = module.importance()
        if method == "importance":
            shares = tail_parts(values.square())
        else:
            u = module.u.unflatten(0, (layer.groups, layer.N))
            v = module.v.reshape(layer.groups, layer.max_rank, layer.K)
            shares = tail_shares(u, v, moment)
    else:
        groups = [
            singular_values(matrix, None if moment is None else moment[g])
            for g, matrix in enumerate(matrices(layer, module))
        ]
        together = torch.stack(groups)
        shares = truncation_shares(together)
        values = torch.linalg.vector_norm(together, dim=0)
    return LayerSensitivity(layer, shares.cpu().numpy(), values.cpu().numpy())


def _measured(
    one: LayerSensitivity,
    module: nn.Module,
    moment: Tensor | None,
    points: int,
    trial: Trial,
    base: float,
) -> LayerSensitivity:
    """With the increase of the loss at a few ranks of this layer alone, and what was run there."""
    layer = one.layer
    top = min(layer.max_rank - 1, math.ceil(layer.N * layer.K / (layer.N + layer.K)))
    ranks = sorted({max(top >> k, 1) for k in range(points)} & set(range(1, layer.max_rank)))
    if ranks and not layer.factorised:
        one = replace(one, factors=factors_of(layer, module, moment, ranks[-1]))
        assert one.factors is not None
        trial.know(layer.name, one.factors)
    measured = [(rank, trial.loss({layer.name: rank}) - base) for rank in ranks]
    trial.put(layer.name, "before")
    return replace(one, errors=_through(one.errors, measured), measured=tuple(measured))


def _through(shares: NDArray, measured: list[tuple[int, float]]) -> NDArray[np.float64]:
    """The loss at every rank: piecewise linear in the share lost, through the measured points.

    Below the lowest rank measured the loss grows in proportion to the share.
    """
    if not measured:
        return shares
    x, y = [0.0], [0.0]
    for rank, increase in sorted(measured, reverse=True):
        # More loss at a higher rank is noise of the measurement.
        x.append(max(float(shares[rank]), x[-1]))
        y.append(max(increase, y[-1]))
    if 0 < x[-1] < 1:
        y.append(y[-1] / x[-1])
        x.append(1.0)
    errors: NDArray[np.float64] = np.interp(shares, x, y)
    return errors
