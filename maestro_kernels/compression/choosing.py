"""Which layers of a model get factors, and the ranks that a budget leaves them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from maestro_kernels import search
from maestro_kernels.compression import calibration
from maestro_kernels.compression.architectures import Architecture, heads
from maestro_kernels.search.costs import multiples
from maestro_kernels.search.layers import Layer, considered, count_rows
from maestro_kernels.search.sensitivities import LayerSensitivity, Sensitivity

_FN = "compress"
# What factors can be put in the place of.
_KINDS = ("linear", "hf_conv1d", "conv1d", "conv2d")
_MULTIPLE = 8
# How a user of the command says them.
OPTIONS = {
    search.Params: "--params",
    search.MACs: "--macs",
    search.Memory: "--memory",
    search.Latency: "--latency",
    search.Speedup: "--speedup",
}


def candidates(model: nn.Module) -> dict[str, Layer]:
    """The layers to factorise; heads stay as they are."""
    left_out = heads(model)
    found = considered(model, exclude=lambda name, _: name in left_out, fn=_FN)
    return {name: layer for name, layer in found.items() if layer.kind in _KINDS}


class Chooser:
    """Which ranks a budget leaves, and which of them are best.

    Raises:
        ValueError: the budget cannot be met.
    """

    def __init__(
        self,
        architecture: Architecture,
        model: nn.Module,
        layers: Mapping[str, Layer],
        budget: search.Budget | float,
    ) -> None:
        self.budget = budget
        self.rows: dict[str, tuple[int, ...]] = {}
        self._profile: Any = None
        self.uniform = isinstance(budget, int | float)
        tops = {name: _top(layer, budget) for name, layer in layers.items()}
        self.tops = {name: top for name, top in tops.items() if top > 0}
        self.layers = layers = {name: layers[name] for name in self.tops}
        if not layers:
            raise ValueError(
                f"{_FN}: MODEL: expected a layer that factors make smaller, got none in a "
                f"{architecture.name}"
            )
        if self.uniform:
            return
        if isinstance(budget, search.MACs | search.Latency | search.Speedup):
            batch = calibration.example(architecture, model)
            self.rows = count_rows(model, layers, batch, fn=_FN)
            if not isinstance(budget, search.MACs):
                self._profile = search.profile_model(
                    model, batch, include=lambda name, _: name in layers
                )
        # Whatever the errors will be, the costs are known.
        flat = {
            name: LayerSensitivity(
                layer,
                np.linspace(1, 0, layer.max_rank + 1),
                np.ones(layer.max_rank),
                self.rows.get(name, ()),
            )
            for name, layer in layers.items()
        }
        self._allocate(model, Sensitivity("svd", "", flat))

    def ranks(
        self, model: nn.Module, sensitivity: Sensitivity, more: Mapping[str, Any]
    ) -> dict[str, int | str]:
        """The best ranks within the budget."""
        return dict(self._allocate(model, sensitivity, **more))

    def _allocate(
        self, model: nn.Module, sensitivity: Sensitivity, **more: Any
    ) -> search.Allocation:
        assert not isinstance(self.budget, int | float)
        try:
            return search.allocate(
                model, self.budget, sensitivity, self._profile, multiple_of=_MULTIPLE, **more
            )
        except ValueError as error:
            text = str(error)
            if not text.startswith("allocate: budget: "):
                raise
            # As a user of the command would say it: the number alone.
            text = re.sub(r"\b[A-Z]\w+\(\w+=([^)]*)\)", r"\1", text)
            text = re.sub(r"best that method='\w+' reaches is", "best within reach is", text)
            option = OPTIONS[type(self.budget)]
            raise ValueError(text.replace("allocate: budget", f"{_FN}: {option}", 1)) from None


def _top(layer: Layer, budget: search.Budget | float) -> int:
    """The largest rank that a layer may get; 0 to leave it as it is."""
    if isinstance(budget, int | float):
        # As `convert` does with a fraction.
        rank = max(math.floor(budget * layer.N * layer.K / (layer.N + layer.K) + 1e-9), 1)
        return rank if layer.weights(rank) < layer.dense_weights else 0
    ranks = [r for r in multiples(layer, _MULTIPLE, 1) if not isinstance(r, str)]
    return max(ranks, default=0)
