"""Wrong calls: profiles, sensitivity, allocation, ranks for hardware."""

from pathlib import Path

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
]
