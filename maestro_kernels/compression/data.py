"""What a model is run on, and how inputs are divided: some calibrate, the others judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

_FN = "compress"
Batch = dict[str, Tensor]
Item = TypeVar("Item")

# One of so many is kept for the evaluation, where the user gives nothing else for it.
KEPT = 5


@dataclass(frozen=True)
class Data:
    """What a model is run on.

    Attributes:
        batches: to calibrate with.
        held_out: to judge with; none of them is among `batches` where both are from one file.
        noun: what one input is.
        inputs: how many there are in `batches`.
        judged: how many there are in `held_out`.
        training: to distil with; may hold more than `batches`.
        labels: the class of each input in `held_out`, where folders name them.
    """

    batches: list[Batch]
    held_out: list[Batch]
    noun: str
    inputs: int
    judged: int
    training: list[Batch]
    labels: Tensor | None = None


def split(
    items: Sequence[Item], others: Sequence[Item] | None, most: int
) -> tuple[list[Item], list[Item]]:
    """To calibrate and to judge with; every fifth is for the second where nothing else is."""
    if others is None:
        judge = [item for i, item in enumerate(items) if i % KEPT == KEPT - 1]
        items = [item for i, item in enumerate(items) if i % KEPT != KEPT - 1]
        # Fewer than five: the last one.
        if not judge:
            *items, last = items
            judge = [last]
        others = judge
    if not items:
        raise ValueError(
            f"{_FN}: --data: expected at least 2 inputs, one of them to judge with, got 1"
        )
    return spread(items, most), spread(others, most)


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many, evenly from all."""
    if len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


def in_dtype(model: Any, batch: Batch) -> Batch:
    """Pictures and sound in the dtype of the model."""
    return {
        key: value.to(model.dtype) if value.is_floating_point() else value
        for key, value in batch.items()
    }
