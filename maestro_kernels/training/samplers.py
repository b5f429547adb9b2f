"""Which rank every layer runs at in a training step.

A sampler writes integers into `layer.rank`, nothing else: no factor is copied, no graph is
compiled again, no device is waited for. Every draw is a function of (seed, step), so all
data-parallel processes agree without talking, in whatever order the layers are called.
"""

from __future__ import annotations

import math
import numbers
import random
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from torch import nn

from maestro_kernels.arguments import check_int
from maestro_kernels.nn import LoDLayer
from maestro_kernels.training.layers import full_rank, require_layers, set_full_rank, unwrapped


class RankSampler(ABC):
    """Writes this step's active ranks into the LoD layers of a model.

    Args:
        model: holds LoD layers; wrappers of torch.compile and DDP are looked through.
        seed: draws are the same for the same seed and step.

    Layers are looked up again in every step, so the sampler follows what `shrink` did to them.
    A layer's full rank is what `shrink` left of it: max_rank, unless it zeroed a tail.

    Raises:
        TypeError: model is no module, or seed no int.
        ValueError: model has no LoD layer.
    """

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        self._name = type(self).__name__
        self.seed = check_int(self._name, "seed", seed, 0)
        require_layers(self._name, model)
        self._model = unwrapped(model)
        self._step = 0

    def step(self) -> dict[str, int]:
        """Draw and write the ranks of the next step; returns them by layer name."""
        layers = require_layers(f"{self._name}.step", self._model)
        ranks = self._draw(layers)
        self._step += 1
        _write(layers, ranks)
        return ranks

    def reset(self) -> None:
        """Every layer back to its full rank; the sequence of draws goes on where it was."""
        layers = require_layers(f"{self._name}.reset", self._model)
        _write(layers, {name: full_rank(layer) for name, layer in layers.items()})

    @abstractmethod
    def _draw(self, layers: Mapping[str, LoDLayer]) -> dict[str, int]:
        """A rank for every layer, 1..full rank (0 where that is 0)."""

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings; also what `shrink` left of each layer."""
        layers = require_layers(f"{self._name}.state_dict", self._model)
        return {
            "kind": self._name,
            "seed": self.seed,
            "step": self._step,
            "full_ranks": {name: full_rank(layer) for name, layer in layers.items()},
            "ranks": {name: layer.rank for name, layer in layers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the sampler that `state` came from; the layers get its ranks.

        Load the model first (`load_shrunken` where layers were shrunk).

        Raises:
            ValueError: another kind of sampler, other layers, or ranks that do not fit them.
        """
        fn = f"{self._name}.load_state_dict"
        layers = require_layers(fn, self._model)
        fields = self.state_dict()
        missing = [key for key in fields if key not in state]
        if missing:
            raise ValueError(
                f"{fn}: state: expected the keys {list(fields)}, got no {missing[0]!r}"
            )
        if state["kind"] != self._name:
            raise ValueError(f"{fn}: state: expected kind {self._name!r}, got {state['kind']!r}")
        for key in ("full_ranks", "ranks"):
            if list(state[key]) != list(layers):
                raise ValueError(
                    f"{fn}: {key}: expected the layers {_some(layers)}, got {_some(state[key])}"
                )
            for name, layer in layers.items():
                check_int(fn, f"{key}[{name!r}]", state[key][name], 0, layer.max_rank)
        self.seed = check_int(fn, "seed", state["seed"], 0)
        self._step = check_int(fn, "step", state["step"], 0)
        for name, layer in layers.items():
            set_full_rank(layer, state["full_ranks"][name])
            layer.rank = state["ranks"][name]


class SinglePairSampler(RankSampler):
    """One layer at rank b, all others at full rank, (layer, b) uniform over all pairs.

    Pairs are drawn without replacement: sum of the full ranks steps make one cycle, in which every
    pair comes once, and a layer is chosen in proportion to its rank. Pairs that `shrink` removes
    drop out of the cycle that runs; it does not start again.

    Source: Maestro (arXiv 2308.14929), with integers instead of fractions of the rank.
    """

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        super().__init__(model, seed)
        self._cycle = 0
        self._position = 0
        self._sizes: dict[str, int] = {}
        self._order: list[int] = []

    def _draw(self, layers: Mapping[str, LoDLayer]) -> dict[str, int]:
        ranks = {name: full_rank(layer) for name, layer in layers.items()}
        if not any(ranks.values()):
            raise ValueError(f"{self._name}.step: model: expected a layer of rank > 0, got none")
        while True:
            if self._position == len(self._order):
                self._shuffle(self._cycle + 1, ranks)
            name, rank = self._pair(self._order[self._position])
            self._position += 1
            if rank <= ranks.get(name, 0):
                ranks[name] = rank
                return ranks

    def _shuffle(self, cycle: int, sizes: Mapping[str, int]) -> None:
        self._cycle, self._position, self._sizes = cycle, 0, dict(sizes)
        self._names = list(sizes)
        self._ends = list(accumulate(sizes.values()))
        self._order = list(range(self._ends[-1]))
        _generator(self.seed, cycle).shuffle(self._order)

    def _pair(self, index: int) -> tuple[str, int]:
        layer = bisect_right(self._ends, index)
        return self._names[layer], index - (self._ends[layer - 1] if layer else 0) + 1

    def state_dict(self) -> dict[str, Any]:
        """As of every sampler, and the place in the cycle with the ranks it was made of."""
        place = {"cycle": self._cycle, "position": self._position, "sizes": dict(self._sizes)}
        return {**super().state_dict(), **place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        super().load_state_dict(state)
        fn = f"{self._name}.load_state_dict"
        sizes = dict(state["sizes"])
        for name, size in sizes.items():
            check_int(fn, f"sizes[{name!r}]", size, 0)
        position = check_int(fn, "position", state["position"], 0, sum(sizes.values()))
        cycle = check_int(fn, "cycle", state["cycle"], 0)
        if sizes:
            self._shuffle(cycle, sizes)
        else:
            self._cycle, self._sizes, self._order = cycle, {}, []
        self._position = position


class IndependentSampler(RankSampler):
    """Every layer at its own rank, uniform over 1..full rank, in every step."""

    def _draw(self, layers: Mapping[str, LoDLayer]) -> dict[str, int]:
        draw = _generator(self.seed, self._step).randint
        return {n: draw(1, r) if (r := full_rank(layer)) else 0 for n, layer in layers.items()}


class FixedSampler(RankSampler):
    """Every layer at floor(fraction * full rank), at least 1, in every step.

    Args:
        model: holds LoD layers.
        fraction: 0 < fraction <= 1.
        seed: unused; there is nothing to draw.

    Source: Wang et al., Pufferfish, MLSys 2021 (arXiv 2103.03936), where it is 0.25.
    """

    def __init__(self, model: nn.Module, fraction: float = 0.25, seed: int = 0) -> None:
        super().__init__(model, seed)
        self.fraction: float
        expected = f"{self._name}: fraction: expected a number, 0 < fraction <= 1"
        if isinstance(fraction, bool) or not isinstance(fraction, numbers.Real):
            raise TypeError(f"{expected}, got {type(fraction).__name__}")
        if not 0 < fraction <= 1:
            raise ValueError(f"{expected}, got {fraction}")
        self.fraction = float(fraction)

    def _draw(self, layers: Mapping[str, LoDLayer]) -> dict[str, int]:
        full = {name: full_rank(layer) for name, layer in layers.items()}
        # 0.3 * 10 may come out as 2.9999999999999996.
        return {n: max(math.floor(self.fraction * r + 1e-9), min(r, 1)) for n, r in full.items()}


class FullSampler(RankSampler):
    """Every layer at full rank: training without sampling, in the same loop."""

    def _draw(self, layers: Mapping[str, LoDLayer]) -> dict[str, int]:
        return {name: full_rank(layer) for name, layer in layers.items()}


def _write(layers: Mapping[str, LoDLayer], ranks: Mapping[str, int]) -> None:
    for name, layer in layers.items():
        # A write is a launch on the device; in single-pair training two layers of many change.
        if layer.rank != ranks[name]:
            layer.rank = ranks[name]


def _generator(seed: int, index: int) -> random.Random:
    # Text seeds go through SHA-512: neighbours are unrelated, on every platform.
    return random.Random(f"{seed}:{index}")


def _some(names: Mapping[str, Any]) -> str:
    return ", ".join(list(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
