"""The whole model at any ranks, for as long as it takes to measure its loss there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from maestro_kernels.nn.conversion import matrices_of
from maestro_kernels.nn.factorize import factorize
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.nn.moments import calibrating
from maestro_kernels.search.layers import Layer
from maestro_kernels.search.whole_model import LossFn, MeanLoss

# u and v of each group, every prefix of which is the best at its rank.
Factors = tuple[tuple[Tensor, Tensor], ...]


class Trial:
    """A model whose layers can be put at any rank; left as it was when the context ends.

    A dense layer runs with the merged product of the prefix of its factors written into its weight,
    a factorised one at its rank; "dense" is the weight as it was, or the full rank.

    Args:
        model: its layers are changed in place and come back bit for bit.
        layers: those that may be put at a rank.
        batches: tensors, tuples or dicts.
        loss_fn: (model, batch) -> scalar; None is the relative squared error of the first output
            against the model's as it is now.
        fn: the public function that errors name.
        factors: of the dense layers among them; see `factors_of`.
        modules: the layers by name, where that is not their name in the model.
        mode: context in which the loss is measured: eval, or what else the model will run in.

    Attributes:
        mean: the loss of a model.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        batches: Sequence[Any],
        loss_fn: LossFn | None,
        *,
        fn: str,
        factors: Mapping[str, Factors] | None = None,
        modules: Mapping[str, nn.Module] | None = None,
        mode: Callable[[nn.Module], AbstractContextManager[None]] = calibrating,
    ) -> None:
        self._model, self._layers, self._factors = model, layers, dict(factors or {})
        self._fn, self._mode = fn, mode
        self._modules = dict(model.named_modules()) if modules is None else modules
        self.mean = MeanLoss(model, batches, loss_fn, fn=fn)
        self._before: dict[str, Tensor | int] = {}
        self._now: dict[str, int | str] = {}

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *error: object) -> None:
        for name in list(self._before):
            self.put(name, "before")

    def know(self, name: str, factors: Factors) -> None:
        """Give a dense layer its factors."""
        self._factors[name] = factors

    def put(self, name: str, rank: int | str) -> None:
        """Run a layer at a rank, "dense", or as it was "before"."""
        if self._now.get(name) == rank or (rank == "before" and name not in self._before):
            return
        module = self._modules[name]
        if isinstance(module, LoDLayer):
            before = self._before.setdefault(name, module.rank)
            assert isinstance(before, int)
            named = {"before": before, "dense": module.max_rank}
            module.rank = named[rank] if isinstance(rank, str) else rank
        elif rank in ("dense", "before"):
            if name in self._before:
                self._write(module, self._before[name])
        else:
            if name not in self._before:
                weight = module.weight
                assert isinstance(weight, Tensor)
                self._before[name] = weight.detach().clone()
            self._write(module, self._merged(name, int(rank)))
        if rank == "before":
            del self._before[name]
            self._now.pop(name, None)
        else:
            self._now[name] = rank

    def measure(self, ranks: Mapping[str, int | str] | None = None) -> float:
        """Mean over the batches at these ranks; layers that are not named stay where they are."""
        for name, rank in (ranks or {}).items():
            self.put(name, rank)
        with self._mode(self._model):
            return self.mean(self._model)

    def loss(self, ranks: Mapping[str, int | str] | None = None) -> float:
        """As `measure`.

        Raises:
            ValueError: the loss is not finite.
        """
        mean = self.measure(ranks)
        if not math.isfinite(mean):
            at = {name: rank for name, rank in self._now.items() if rank != "dense"}
            some = ", ".join(f"{name} at rank {rank}" for name, rank in list(at.items())[:3])
            raise ValueError(
                f"{self._fn}: loss_fn: expected a finite loss, got {mean} with "
                f"{some or 'the model as it is'}"
            )
        return mean

    def _merged(self, name: str, rank: int) -> Tensor:
        layer, module = self._layers[name], self._modules[name]
        merged = torch.stack([u[:, :rank] @ v[:rank] for u, v in self._factors[name]])
        weight = module.weight
        assert isinstance(weight, Tensor)
        transposed = layer.kind == "hf_conv1d"
        value = merged.reshape(weight.mT.shape if transposed else weight.shape)
        return value.mT if transposed else value

    def _write(self, module: nn.Module, value: Tensor | int) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        assert isinstance(value, Tensor)
        with torch.no_grad():
            weight.copy_(value)


def factors_of(layer: Layer, module: nn.Module, moment: Tensor | None, top: int) -> Factors:
    """Factors of a dense layer's matrices up to rank `top`, in float32 or better.

    Args:
        layer: what it is.
        module: dense.
        moment: (groups, K, K) of its inputs; None is the plain SVD.
        top: largest rank that will be asked for.
    """
    dtype = torch.promote_types(matrices(layer, module).dtype, torch.float32)
    return tuple(
        factorize(matrix.to(dtype), top, None if moment is None else moment[g])
        for g, matrix in enumerate(matrices(layer, module))
    )


def matrices(layer: Layer, module: nn.Module) -> Tensor:
    """The dense layer's matrices, (groups, N, K)."""
    return matrices_of(module, layer.kind, layer.groups, layer.N, layer.K).detach()
