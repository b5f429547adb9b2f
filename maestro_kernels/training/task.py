"""What `maestro-kernels train` trains: a model, its data, a loss and a measure of success."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

__all__ = ["Task"]


@dataclass
class Task:
    """A model with data; what a user's `module:function` returns.

    Attributes:
        model: dense, or already factorised; `maestro-kernels train` converts a dense one. Built
            after torch.manual_seed(seed), so ordinary initialisation is repeatable.
        train: a map-style dataset (`len` and `[i]`).
        loss: loss(model, batch) -> scalar tensor; a batch is what torch's default collate makes of
            samples, on the training device.
        test: the dataset that `evaluate` sees, or None.
        evaluate: evaluate(model, batches) -> {name: figure}, after every epoch, in eval mode and
            without gradients; None reports the mean of `loss` over `test`.
    """

    model: nn.Module
    train: Dataset
    loss: Callable[[nn.Module, Any], Tensor]
    test: Dataset | None = None
    evaluate: Callable[[nn.Module, Iterable[Any]], Mapping[str, float]] | None = None
