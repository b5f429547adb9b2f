"""summary: what each layer of a model is, costs and runs on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from maestro_kernels.arguments import check_int
from maestro_kernels.functional import explain
from maestro_kernels.nn.candidates import Candidate, find_candidates
from maestro_kernels.nn.conversion import conversion_report
from maestro_kernels.nn.kinds import PRODUCTS
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.nn.linear import LoDLinear
from maestro_kernels.nn.packing import ALONE
from maestro_kernels.nn.pivoted import PivotedLinear
from maestro_kernels.nn.swapping import named_layers


@dataclass(frozen=True)
class LayerSummary:
    """One layer that holds a matrix.

    Attributes:
        name: dotted name.
        kind: as classify names it: "linear", "conv2d", "lod_linear", ...
        N: rows of the matrix, per group.
        K: columns of the matrix, per group.
        rank: active rank, None for a dense layer.
        max_rank: stored rank, None for a dense layer.
        break_even_rank: N K / (N + K).
        dense_parameters: weights of the dense matrix.
        parameters: weights stored now.
        macs: multiply-adds per row of x (per output position of a convolution) at the active rank.
        backend: what a call runs on, None for a dense layer.
        note: why a dense layer is dense, or empty.
    """

    name: str
    kind: str
    N: int
    K: int
    rank: int | None
    max_rank: int | None
    break_even_rank: float
    dense_parameters: int
    parameters: int
    macs: int
    backend: str | None
    note: str


@dataclass(frozen=True)
class ModelSummary:
    """A model's layers and totals; printing it gives a table.

    Attributes:
        layers: every layer that holds a matrix, also those that no matrix product runs on.
        parameters: all parameters of the model, each once; biases, norms and embeddings included.
        rows: M of the calls that `backend` speaks of.
        vectors: those of the parameters that are no matrices: biases, norms.
    """

    layers: tuple[LayerSummary, ...]
    parameters: int
    rows: int = 1
    vectors: int = 0

    @property
    def _counted(self) -> list[LayerSummary]:
        return [layer for layer in self.layers if layer.kind in PRODUCTS]

    @property
    def dense_parameters(self) -> int:
        """All parameters that the model would have with dense matrices."""
        factorised = [layer for layer in self.layers if layer.rank is not None]
        saved = sum(layer.dense_parameters - layer.parameters for layer in factorised)
        return self.parameters + saved

    @property
    def dense_weights(self) -> int:
        """Weights that the linear and convolution layers have or would have as dense matrices."""
        return sum(layer.dense_parameters for layer in self._counted)

    @property
    def weights(self) -> int:
        """Weights that the linear and convolution layers store."""
        return sum(layer.parameters for layer in self._counted)

    @property
    def deployed_weights(self) -> int:
        """Those weights with each factorised layer in its smaller form: min(r (N + K), N K)."""
        return sum(
            layer.parameters if layer.rank is None else min(layer.macs, layer.dense_parameters)
            for layer in self._counted
        )

    @property
    def dense_macs(self) -> int:
        """Multiply-adds per row were every one of those layers dense."""
        return self.dense_weights

    @property
    def macs(self) -> int:
        """Multiply-adds per row of those layers at the active ranks."""
        return sum(layer.macs for layer in self._counted)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        totals = {
            name: getattr(self, name)
            for name in (
                "dense_weights",
                "weights",
                "dense_macs",
                "macs",
                "dense_parameters",
                "parameters",
            )
        }
        return {"layers": [asdict(layer) for layer in self.layers], **totals}

    def __str__(self) -> str:
        runs = f"runs on (M = {self.rows})"
        header = ("layer", "kind", "N x K", "rank", "break-even", "weights", "MACs/row", runs)
        rows = [header]
        for alike in _runs_of_alike(self.layers):
            layer = alike[0]
            macs = sum(one.macs for one in alike)
            rows.append(
                (
                    _name_of(alike),
                    layer.kind,
                    f"{layer.N} x {layer.K}",
                    _rank_of(alike),
                    f"{layer.break_even_rank:.0f}",
                    f"{sum(one.parameters for one in alike):,}",
                    f"{macs:,}" if layer.kind in PRODUCTS else "",
                    layer.backend or layer.note,
                )
            )
        if self.vectors:
            rows.append(("biases, norms", "vectors", "", "", "", f"{self.vectors:,}", "", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
        lines = []
        for row in rows:
            cells = [
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=False))
            ]
            lines.append("  ".join([*cells, row[-1]]).rstrip())
        lines.insert(1, "-" * max(len(line) for line in lines))
        share = self.weights / self.dense_weights if self.dense_weights else 1.0
        cost = self.macs / self.dense_macs if self.dense_macs else 1.0
        lines.append(
            f"linear and convolution layers: {self.weights:,} of {self.dense_weights:,} weights "
            f"({share:.0%}), "
            f"{self.macs:,} of {self.dense_macs:,} MACs per row ({cost:.0%})"
        )
        whole, dense = self.parameters, self.dense_parameters
        share = whole / dense if dense else 1.0
        lines.append(f"whole model: {whole:,} parameters of {dense:,} ({share:.0%})")
        return "\n".join(lines)


def _runs_of_alike(layers: Iterable[LayerSummary]) -> Iterator[list[LayerSummary]]:
    """The layers, those together that differ in the number at the end of their names only."""

    def key(layer: LayerSummary) -> Any:
        stem = re.sub(r"\.\d+$", ".", layer.name)
        numbered = stem if stem != layer.name and not stem.isdigit() else layer.name
        rank = layer.rank is None
        return numbered, layer.kind, layer.N, layer.K, rank, layer.backend, layer.note

    for _, alike in groupby(layers, key):
        yield list(alike)


def _name_of(alike: list[LayerSummary]) -> str:
    first, last = alike[0].name, alike[-1].name
    return first + (f"-{last.rpartition('.')[2]}" if first != last else "") or "(model)"


def _rank_of(alike: list[LayerSummary]) -> str:
    ranks = [layer.rank for layer in alike if layer.rank is not None]
    most = [layer.max_rank for layer in alike if layer.max_rank is not None]
    if not ranks:
        return "dense"
    spans = [f"{min(r)}-{max(r)}" if min(r) < max(r) else str(r[0]) for r in (ranks, most)]
    return "/".join(spans)


def summary(model: nn.Module, *, rows: int = 1) -> ModelSummary:
    """Describe every layer of a model that holds a matrix.

    Args:
        model: any module.
        rows: M, the rows of x, for which the dispatcher is asked with each layer's own factors; a
            call that wants gradients or runs under autocast may be planned otherwise.

    Raises:
        TypeError: model is no module, or rows no int.
        ValueError: rows < 1.
    """
    rows = check_int("summary", "rows", rows, 1)
    candidates = find_candidates("summary", model)
    modules = named_layers(model)
    report = conversion_report(model)
    kept = {} if report is None else report.kept
    layers = []
    for name, candidate in candidates.items():
        note = kept.get(name) or candidate.reason or ""
        layers.append(_summarised(candidate, modules[name], rows, note))
    known = [p for p in model.parameters() if not nn.parameter.is_lazy(p)]
    vectors = sum(p.numel() for p in known if p.dim() < 2)
    return ModelSummary(tuple(layers), sum(p.numel() for p in known), rows, vectors)


def _summarised(candidate: Candidate, module: nn.Module, rows: int, note: str) -> LayerSummary:
    """One layer; `note` is why it is dense, if it is."""
    rank = max_rank = backend = None
    weights = macs = candidate.dense_weights
    if candidate.kind not in PRODUCTS:
        # All that it owns, where a matrix is only the largest part.
        held = (p for p in module._parameters.values() if p is not None)
        weights = sum(p.numel() for p in held if not nn.parameter.is_lazy(p) and p.dim() > 1)
    if isinstance(module, LoDLayer | PivotedLinear):
        rank, max_rank, note = module.rank, module.max_rank, ""
        weights = module.u.numel() + module.v.numel()
    if isinstance(module, PivotedLinear):
        macs, backend = weights, "two matmuls and a permutation"
    elif isinstance(module, LoDLayer):
        macs = candidate.factor_weights(module.rank)
        backend = _runs_on(module, rows) if isinstance(module, LoDLinear) else "convolutions"
    return LayerSummary(
        name=candidate.name,
        kind=candidate.kind,
        N=candidate.N,
        K=candidate.K,
        rank=rank,
        max_rank=max_rank,
        break_even_rank=candidate.break_even_rank,
        dense_parameters=candidate.dense_weights,
        parameters=weights,
        macs=macs,
        backend=backend,
        note=note,
    )


@torch.no_grad()
def _runs_on(layer: LoDLinear, rows: int) -> str:
    """What a call on (rows, K) without gradients or autocast runs on, as the dispatcher says."""
    shared = layer.group if layer.group is not None and layer.group.active else None
    plain = layer.backend is None and layer.u.is_cpu and layer.u.dtype == layer.v.dtype
    chosen: str | None = ALONE
    if plain and shared is not None and shared.packed is not None:
        chosen = shared.packed.choice(rows)
    if plain and layer.packed is not None:
        together = ""
        if chosen == ALONE:
            chosen = layer.packed.choice(rows)
        elif chosen is not None:
            together = ", as a group"
        if chosen != "unpacked":
            return f"prepacked: {chosen or 'chosen at the first call'}{together}"
    x = layer.u.new_empty(rows, layer.in_features)
    u, v, bias, rank, activation = layer.u, layer.v, layer.bias, layer.rank, layer.activation
    if shared is None or chosen == "unpacked":
        plan = explain(x, u, v, bias, rank=rank, activation=activation, backend=layer.backend).plan
        return f"prepacked: unpacked, {plan.backend}" if chosen == "unpacked" else plan.backend
    members = shared.layers
    plan = explain(
        x,
        [m.u for m in members],
        [m.v for m in members],
        [m.bias for m in members],
        rank=[m.rank for m in members],
        activation=[m.activation for m in members],
        backend=layer.backend,
    ).plan
    return f"{plan.backend}, as a group"
