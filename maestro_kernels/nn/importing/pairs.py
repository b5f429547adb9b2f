"""Two factors as somebody else stored them, and the layer that they become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maestro_kernels.nn.conversion import in_place_of
from maestro_kernels.nn.factorize import merge
from maestro_kernels.nn.linear import LoDLinear
from maestro_kernels.problem import DTYPES

FN = "import_factors"


@dataclass(frozen=True)
class Pair:
    """The factors of one layer as they were found.

    Attributes:
        name: of the layer.
        u: (N, R).
        v: (R, K).
        first_bias: (R,), added between the two, or None.
        bias: (N,), added at the end, or None.
    """

    name: str
    u: Tensor
    v: Tensor
    first_bias: Tensor | None
    bias: Tensor | None

    def folded_bias(self) -> Tensor | None:
        """The bias of both in one, u · first_bias + bias, rounded once."""
        if self.first_bias is None:
            return self.bias
        total = self.u.double() @ self.first_bias.double()
        return (total if self.bias is None else total + self.bias.double()).to(self.u.dtype)


def checked(pair: Pair, shape: tuple[int, int] | None) -> Pair:
    """The pair.

    Raises:
        ValueError: its sizes or dtypes do not fit together or to the layer.
    """
    u, v = pair.u, pair.v
    shapes = f"u {tuple(u.shape)} and v {tuple(v.shape)}"
    if u.dim() != 2 or v.dim() != 2 or u.shape[1] != v.shape[0]:
        raise ValueError(
            f"{FN}: source: expected factors u (N, R) and v (R, K) of {pair.name!r}, got {shapes}"
        )
    if shape is not None and (u.shape[0], v.shape[1]) != shape:
        raise ValueError(
            f"{FN}: source: expected factors of {pair.name!r} for a weight {shape}, got {shapes}"
        )
    if u.dtype not in DTYPES or v.dtype != u.dtype:
        raise ValueError(
            f"{FN}: source: expected factors of {pair.name!r} in one floating dtype, "
            f"got {u.dtype} and {v.dtype}"
        )
    for what, bias, size in (
        ("between the factors", pair.first_bias, v.shape[0]),
        ("at the end", pair.bias, u.shape[0]),
    ):
        if bias is not None and bias.shape != (size,):
            raise ValueError(
                f"{FN}: source: expected a bias ({size},) {what} of {pair.name!r}, "
                f"got {tuple(bias.shape)}"
            )
    return pair


def layers(found: Mapping[str, tuple[Pair, nn.Module]]) -> dict[nn.Module, nn.Module]:
    """A layer for each pair, in the place of a module whose device, dtype and mode it takes."""
    made: dict[nn.Module, nn.Module] = {}
    shared: dict[tuple[Any, ...], nn.Parameter] = {}

    def own(value: Tensor, like: Tensor) -> nn.Parameter:
        moved = value.detach().to(like.device, like.dtype)
        # A view of a file or of a larger tensor would keep all of that alive.
        moved = moved.clone(memory_format=torch.contiguous_format)
        return nn.Parameter(moved, requires_grad=like.requires_grad)

    for pair, old in found.values():
        weight = getattr(old, "weight", None)
        like = weight if isinstance(weight, Tensor) else pair.u
        if like.is_meta:
            raise ValueError(
                f"{FN}: dense_model: expected values, got {pair.name!r} on the meta device"
            )
        bias = pair.folded_bias()
        new: LoDLinear | nn.Linear
        if pair.u.shape[1] > min(pair.u.shape[0], pair.v.shape[1]):
            new = nn.Linear(pair.v.shape[1], pair.u.shape[0], device="meta")
            new.weight = own(merge(pair.u.detach(), pair.v.detach()), like)
        else:
            key = (address(pair.v), like.device, like.dtype)
            shared.setdefault(key, own(pair.v, like))
            new = LoDLinear.from_factors(own(pair.u, like), shared[key])
        in_place_of(old, new, share=True)
        new.register_parameter("bias", None if bias is None else own(bias, like))
        made[old] = new
    return made


def address(value: Tensor) -> tuple[Any, ...]:
    """Equal for two names of one tensor; empty ones have no address."""
    place = value.data_ptr() if value.numel() else id(value)
    return place, tuple(value.shape), value.stride()
