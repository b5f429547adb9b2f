"""Wrong calls: profiles, sensitivity, allocation, ranks for hardware."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import maestro_kernels as mk
from maestro_kernels import search, training
from messages import Row


def convolution(folder: Path) -> object:
    return search.profile(nn.Conv2d(8, 16, 3))


def pointwise_with_stride(folder: Path) -> object:
    return search.profile(mk.LoDConv2d(8, 16, 1, stride=2, max_rank=4))


def cliff_without_latencies(folder: Path) -> object:
    return training.below_cliff({16: 1.0})  # type: ignore[arg-type]


def allocate(**arguments: object) -> Callable[[Path], object]:
    model = nn.Sequential(nn.Linear(32, 32))
    return lambda folder: search.allocate(model, search.Params(0.5), **arguments)  # type: ignore[arg-type]


BATCH = torch.randn(4, 32)

ROWS: list[Row] = [
    Row(
        "profile of a 3 x 3 convolution",
        convolution,
        NotImplementedError,
        "profile: target: expected linear layers or 1 × 1 convolutions without stride, padding and "
        "groups, whose time follows from N, K and rows, got only convolutions such as 3 × 3, whose "
        "time depends on the image; search.profile_model(model, batch) measures these",
    ),
    Row(
        "profile of a convolution with a stride",
        pointwise_with_stride,
        NotImplementedError,
        "profile: target: expected linear layers or 1 × 1 convolutions",
    ),
    Row(
        "a cliff without latencies",
        cliff_without_latencies,
        TypeError,
        "below_cliff: latency: expected a function, got dict",
    ),
    Row(
        "passes without batches",
        allocate(passes=4),
        ValueError,
        "allocate: passes: expected None without batches to measure a loss on",
    ),
    Row(
        "a loss without batches",
        allocate(loss_fn=max),
        ValueError,
        "allocate: loss_fn: expected None without batches to measure a loss on",
    ),
    Row(
        "a batch for batches",
        allocate(batches=BATCH),
        TypeError,
        "allocate: batches: expected an iterable of batches (tensors, tuples or dicts), got Tensor",
    ),
    Row(
        "no batches to refine on",
        allocate(batches=[]),
        ValueError,
        "allocate: batches: expected at least one batch, got none",
    ),
    Row(
        "uniform ranks refined",
        allocate(batches=[BATCH], method="uniform"),
        ValueError,
        "allocate: batches: expected None with method='uniform', whose ranks follow from one "
        "number and are not refined, got batches",
    ),
    Row(
        "a loss that is no function",
        allocate(batches=[BATCH], loss_fn=1.0),
        TypeError,
        "allocate: loss_fn: expected a function, got float",
    ),
    Row(
        "a loss of NaN",
        allocate(batches=[BATCH], loss_fn=lambda model, batch: float("nan")),
        ValueError,
        "allocate: loss_fn: expected a finite loss, got nan with",
    ),
    Row(
        "passes below zero",
        allocate(batches=[BATCH], passes=-1),
        ValueError,
        "allocate: passes: expected an int >= 0, got -1",
    ),
]
