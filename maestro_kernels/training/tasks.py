"""What `maestro-kernels train` trains: a model, its data, a loss and a measure of success.

`digits` is built in and needs no network; everything else is a function of the user's own, named
"module:function" in the configuration.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

__all__ = ["Task", "digits", "digits_model", "make_task"]

Loss = Callable[[nn.Module, Any], Tensor]
Evaluate = Callable[[nn.Module, Iterable[Any]], Mapping[str, float]]


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
    loss: Loss
    test: Dataset | None = None
    evaluate: Evaluate | None = None


def make_task(name: str, options: Mapping[str, Any], beside: Path | None = None) -> Task:
    """The built-in task of that name, or the result of the user's "module:function".

    Args:
        name: "digits" or "module:function".
        options: keyword arguments of the function.
        beside: a folder whose modules are found before installed ones.

    Raises:
        TypeError: the function does not take the options, or returns no Task.
        ValueError: no such task, module or function.
        NotImplementedError: the built-in task lacks a package.
    """
    fn = "make_task"
    if ":" not in name:
        if name not in _BUILT_IN:
            raise ValueError(
                f"{fn}: name: expected {', '.join(map(repr, _BUILT_IN))} or 'module:function', "
                f"got {name!r}"
            )
        function: Any = _BUILT_IN[name]
    else:
        function = _imported(fn, name, beside)
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise TypeError(f"{fn}: options: expected arguments of {name!r}, got {error}") from None
    task = function(**options)
    if not isinstance(task, Task):
        raise TypeError(
            f"{fn}: name: expected {name!r} to return a training.Task, got {type(task).__name__}"
        )
    return task


def _imported(fn: str, name: str, beside: Path | None) -> Any:
    module_name, _, attribute = name.partition(":")
    with _searched_first(beside):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            # A module that is there but lacks a dependency of its own is another mistake.
            missing = error.name or module_name
            raise ValueError(
                f"{fn}: name: expected an importable module in {name!r}, got no module {missing!r}"
            ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(
            f"{fn}: name: expected a function {attribute!r} in {module_name!r}, "
            f"got {type(function).__name__}"
        )
    return function


@contextlib.contextmanager
def _searched_first(folder: Path | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def digits(model: str = "mlp", seed: int = 0) -> Task:
    """scikit-learn's 1,797 bundled digits (8 × 8): 70 % train, 30 % test, split by class.

    Args:
        model: "mlp" (64-128-128-10, ReLU) or "cnn" (three 3 × 3 convolutions with BatchNorm).
        seed: of the split.

    Raises:
        ValueError: an unknown model.
        NotImplementedError: scikit-learn is not installed.
    """
    net = digits_model(model)
    try:
        datasets = importlib.import_module("sklearn.datasets")
        selection = importlib.import_module("sklearn.model_selection")
    except ModuleNotFoundError:
        raise NotImplementedError(
            "digits: expected the package scikit-learn, got none; pip install scikit-learn"
        ) from None
    images, labels = datasets.load_digits(return_X_y=True)
    parts = selection.train_test_split(
        images / 16, labels, test_size=0.3, stratify=labels, random_state=seed
    )
    x_train, x_test = (torch.as_tensor(part, dtype=torch.float32) for part in parts[:2])
    y_train, y_test = (torch.as_tensor(part, dtype=torch.int64) for part in parts[2:])
    if model == "cnn":
        x_train, x_test = (x.unflatten(1, (1, 8, 8)) for x in (x_train, x_test))
    return Task(
        net,
        TensorDataset(x_train, y_train),
        cross_entropy,
        TensorDataset(x_test, y_test),
        accuracy,
    )


def digits_model(name: str) -> nn.Module:
    """The dense model of the digits task: "mlp" or "cnn"."""
    if name == "mlp":
        return nn.Sequential(
            *(nn.Linear(64, 128), nn.ReLU()),
            *(nn.Linear(128, 128), nn.ReLU()),
            nn.Linear(128, 10),
        )
    if name == "cnn":
        return nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(64)),
            *(nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1, stride=2, bias=False)),
            *(nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)),
        )
    raise ValueError(f"digits: model: expected 'mlp' or 'cnn', got {name!r}")


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross entropy of model(x) for a batch (x, labels)."""
    x, labels = batch
    return F.cross_entropy(model(x), labels)


def accuracy(model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    """Share of correct labels and mean cross entropy over batches (x, labels)."""
    right, loss, count = 0, 0.0, 0
    for x, labels in batches:
        scores = model(x)
        right += int((scores.argmax(-1) == labels).sum())
        loss += float(F.cross_entropy(scores, labels, reduction="sum"))
        count += len(labels)
    return {"accuracy": right / count, "loss": loss / count}


_BUILT_IN = {"digits": digits}
