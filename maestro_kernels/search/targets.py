"""What a profile is asked about: sizes (N, K), one layer, or a model's layers that are matmuls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from maestro_kernels.nn.candidates import find_candidates
from maestro_kernels.nn.conv import is_pointwise
from maestro_kernels.nn.kinds import CONVOLUTIONS, LINEAR
from maestro_kernels.nn.swapping import named_layers

_FN = "profile"


@dataclass(frozen=True)
class Shape:
    """One layer size.

    Attributes:
        N: out_features.
        K: in_features.
        bias: whether a layer of this size adds one.
        names: dotted names of the model's layers of this size; empty for a bare size.
    """

    N: int
    K: int
    bias: bool = False
    names: tuple[str, ...] = ()


def shapes_of(target: Any) -> list[Shape]:
    """The different sizes in a target, largest first.

    Args:
        target: (N, K), a sequence of them, a layer or a model: its linear layers and 1 × 1
            convolutions; other convolutions are left out.

    Raises:
        TypeError: none of these.
        ValueError: sizes below 1, or no such layer.
        NotImplementedError: only convolutions whose time depends on the image.
    """
    if isinstance(target, nn.Module):
        found = _of_module(target)
    else:
        found = [Shape(*pair) for pair in _pairs(target)]
    unique: dict[tuple[int, int], Shape] = {}
    for shape in found:
        known = unique.get((shape.N, shape.K), replace(shape, names=()))
        unique[shape.N, shape.K] = replace(
            known, bias=known.bias or shape.bias, names=(*known.names, *shape.names)
        )
    return sorted(unique.values(), key=lambda s: (-s.N * s.K, -s.N))


def _of_module(module: nn.Module) -> list[Shape]:
    modules = named_layers(module)
    found, others = [], []
    for name, c in find_candidates(_FN, module).items():
        can_be = c.reason is None or c.kind.startswith("lod_")
        if not can_be or min(c.N, c.K) < 2:
            continue
        layer = modules[name]
        if c.kind in LINEAR or (c.kind in CONVOLUTIONS and is_pointwise(layer)):  # type: ignore[arg-type]
            found.append(Shape(c.N, c.K, getattr(layer, "bias", None) is not None, (name,)))
        elif c.kind in CONVOLUTIONS:
            others.append(layer)
    if not found and others:
        kernel = " × ".join(map(str, others[0].kernel_size))  # type: ignore[arg-type]
        raise NotImplementedError(
            f"{_FN}: target: expected linear layers or 1 × 1 convolutions without stride, padding "
            f"and groups, whose time follows from N, K and rows, got only convolutions such as "
            f"{kernel}, whose time depends on the image; search.profile_model(model, batch) "
            f"measures these"
        )
    if not found:
        raise ValueError(
            f"{_FN}: target: expected a model with linear layers that can be factorised, got none"
        )
    return found


def _pairs(target: Any) -> list[tuple[int, int]]:
    if not isinstance(target, Sequence) or isinstance(target, str):
        raise TypeError(
            f"{_FN}: target: expected (N, K), a list of them, a layer or a model, "
            f"got {type(target).__name__}"
        )
    pairs = [target] if target and isinstance(target[0], int) else list(target)
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise TypeError(f"{_FN}: target: expected (N, K), got {pair!r}")
        if not all(isinstance(size, int) and not isinstance(size, bool) for size in pair):
            raise TypeError(f"{_FN}: target: expected (N, K) as integers, got {pair!r}")
        if min(pair) < 2:
            raise ValueError(f"{_FN}: target: expected N, K >= 2, got {tuple(pair)}")
    if not pairs:
        raise ValueError(f"{_FN}: target: expected at least one (N, K), got none")
    return [(pair[0], pair[1]) for pair in pairs]


def default_dtype(target: Any) -> torch.dtype:
    """The dtype of a module's first floating-point parameter; float32 for bare sizes."""
    if isinstance(target, nn.Module):
        for parameter in target.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.float32


def default_device(target: Any) -> torch.device:
    """Where a module lives; the CPU for bare sizes and for the meta device."""
    if isinstance(target, nn.Module):
        for parameter in target.parameters():
            if parameter.device.type != "meta":
                return parameter.device
    return torch.device("cpu")
