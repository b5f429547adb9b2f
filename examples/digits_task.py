"""The task of digits.toml and digits.py: scikit-learn's 1,797 bundled digits, 8 × 8."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from maestro_kernels.training import Task


def make(model: str = "mlp", seed: int = 0) -> Task:
    """70 % of the digits to train on, 30 % to test, split by class.

    Args:
        model: "mlp" (64-128-128-10, ReLU) or "cnn" (three 3 × 3 convolutions with BatchNorm).
        seed: of the split.

    Raises:
        ValueError: an unknown model.
    """
    net = dense_model(model)
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.3, stratify=labels, random_state=seed)
    x_train, x_test = (torch.as_tensor(part, dtype=torch.float32) for part in parts[:2])
    y_train, y_test = (torch.as_tensor(part, dtype=torch.int64) for part in parts[2:])
    if model == "cnn":
        x_train, x_test = (x.unflatten(1, (1, 8, 8)) for x in (x_train, x_test))
    train, test = TensorDataset(x_train, y_train), TensorDataset(x_test, y_test)
    return Task(net, train, cross_entropy, test, accuracy)


def dense_model(name: str) -> nn.Module:
    """The dense model: "mlp" or "cnn"."""
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
    raise ValueError(f"digits_task: model: expected 'mlp' or 'cnn', got {name!r}")


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
