"""LoDConv2d: nn.Conv2d as a convolution to R channels, then a 1 × 1 expansion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestro_kernels.arguments import check_int
from maestro_kernels.functional import lod_linear
from maestro_kernels.nn.factorize import merge
from maestro_kernels.nn.layer import LoDLayer, check_dtype
from maestro_kernels.nn.linear import check_rank, copied, initial_factors, trainable
from maestro_kernels.ops.eager import autocast_dtype

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
Pair = int | Sequence[int]


class LoDConv2d(LoDLayer):
    """y = conv1x1(conv2d(x, v[:r]), u[:, :r]) + bias, r = `rank`.

    The first convolution carries kernel, stride, padding and dilation. With groups every group g
    has its own factors v[g R : g R + r] and u rows, at the same r; their prefix is copied when
    r < R, because the groups lie between its parts.

    Args:
        in_channels: channels of x.
        out_channels: channels of y.
        kernel_size: k or (k_h, k_w).
        max_rank: R per group, 0..min(N, K) where N = out_channels / groups and K = in_channels /
            groups * k_h * k_w; None means min(N, K).

    The other arguments are those of nn.Conv2d, padding "same" and "valid" and all padding modes
    among them.

    Attributes:
        u: (out_channels, R). v: (groups * R, in_channels / groups, k_h, k_w). bias: or None.

    A 1 × 1 convolution without stride, padding and groups runs as one `lod_linear` call on
    channels-last input; everything else as two library convolutions.

    Source:
        Horvath et al., Maestro, ICML 2024 (arXiv 2308.14929).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_rank: int | None = None,
    ) -> None:
        super().__init__()
        fn = "LoDConv2d"
        self.groups = check_int(fn, "groups", groups, 1)
        self.in_channels = check_int(fn, "in_channels", in_channels, 1)
        self.out_channels = check_int(fn, "out_channels", out_channels, 1)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"{fn}: {name}: expected a multiple of {groups}, got {channels}")
        self.kernel_size = _pair(fn, "kernel_size", kernel_size, 1)
        self.stride = _pair(fn, "stride", stride, 1)
        self.dilation = _pair(fn, "dilation", dilation, 1)
        self.padding: tuple[int, int] | str = self._check_padding(padding)
        if padding_mode not in _PADDING_MODES:
            raise ValueError(
                f"{fn}: padding_mode: expected one of {_PADDING_MODES}, got {padding_mode!r}"
            )
        check_dtype(fn, dtype)
        self.padding_mode = padding_mode
        N, K = self.matrix_shape
        R = check_rank(fn, max_rank, min(N, K), "max_rank")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._install(
            torch.empty(out_channels, R, **factory),
            torch.empty(groups * R, in_channels // groups, *self.kernel_size, **factory),
            torch.empty(out_channels, **factory) if bias else None,
        )
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Y (B, C_out, H', W') for x (B, C_in, H, W); also without the batch."""
        u: Tensor = self.u
        v, groups = self.v, self.groups
        size = self._output_size(x)
        rank = self.call_rank(x)
        if self._pointwise and _is_channels_last(x):
            v2 = v.flatten(1)
            return lod_linear(x.movedim(1, -1), u, v2, self.bias, rank=rank).movedim(-1, 1)
        if isinstance(rank, Tensor):
            h = self._shrink(x, v)
            active = self._active(rank).repeat(groups)[:, None, None]
            h = torch.where(active, h, 0)
        elif rank == 0:
            return self._bias_only(x, size)
        else:
            h = self._shrink(x, self._rows(v, rank))
            u = u[:, :rank]
        return F.conv2d(h, u[:, :, None, None], self.bias, groups=groups)

    def _shrink(self, x: Tensor, v: Tensor) -> Tensor:
        """H = conv2d(x, v), with this layer's padding."""
        if self.padding_mode == "zeros":
            return F.conv2d(x, v, None, self.stride, self.padding, self.dilation, self.groups)
        x = self.padded(x)
        return F.conv2d(x, v, None, self.stride, 0, self.dilation, self.groups)

    def padded(self, x: Tensor) -> Tensor:
        """X with the border that the convolution sees, after which it needs no padding."""
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._borders(), mode=mode)

    def _borders(self) -> list[int]:
        """[left, right, top, bottom], the order F.pad wants."""
        borders = []
        for i in (1, 0):
            if self.padding == "same":
                # As in nn.Conv2d, the odd one out goes to the far side.
                total = self.dilation[i] * (self.kernel_size[i] - 1)
                borders += [total // 2, total - total // 2]
            else:
                side = 0 if isinstance(self.padding, str) else self.padding[i]
                borders += [side, side]
        return borders

    def _output_size(self, x: Tensor) -> tuple[int, int]:
        """(H', W'); raises unless x fits, so that no library message has to explain it."""
        dtype = self.u.dtype
        if not isinstance(x, Tensor):
            raise TypeError(f"LoDConv2d: x: expected a Tensor, got {type(x).__name__}")
        if x.dtype != dtype and autocast_dtype(x) is None:
            raise TypeError(f"LoDConv2d: x: expected {dtype} like u, got {x.dtype}")
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"LoDConv2d: x: expected shape (B, {self.in_channels}, H, W) or "
                f"({self.in_channels}, H, W), got {tuple(x.shape)}"
            )
        left, right, top, bottom = self._borders()
        size = []
        for i, border in ((0, top + bottom), (1, left + right)):
            reach = self.dilation[i] * (self.kernel_size[i] - 1) + 1
            length = x.shape[i - 2] + border
            if length < reach:
                raise ValueError(
                    f"LoDConv2d: x: expected at least {reach - border} positions in dimension "
                    f"{i - 2} for kernel_size {self.kernel_size}, got {x.shape[i - 2]}"
                )
            size.append((length - reach) // self.stride[i] + 1)
        return size[0], size[1]

    def _bias_only(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Rank 0: the bias at every position, or zeros."""
        # Sums over nothing: exactly zero, and x, u and v get zero gradients instead of none, which
        # is what DDP needs.
        y = self.u[:, :0].sum() + self.v[:0].sum() + x[..., :0].sum()
        if self.bias is not None:
            y = y + self.bias[:, None, None]
        y = y.expand(*x.shape[:-3], self.out_channels, *size)
        return y.to(autocast_dtype(x) or x.dtype).contiguous()

    @property
    def _pointwise(self) -> bool:
        return is_pointwise(self)

    @classmethod
    def from_factors(
        cls, conv: nn.Conv2d, u: Tensor, v: Tensor, bias: Tensor | None = None
    ) -> LoDConv2d:
        """A layer with conv's geometry around u, v and bias themselves; nothing is copied.

        Args:
            conv: gives stride, padding, padding_mode, dilation and groups (a LoDConv2d will do).
            u: (out_channels, R).
            v: (groups * R, in_channels / groups, k_h, k_w).
            bias: (out_channels,) or None.
        """
        fn = "LoDConv2d.from_factors"
        R = u.shape[1] if u.dim() == 2 else 0
        expected = (conv.groups * R, conv.in_channels // conv.groups, *conv.kernel_size)
        if u.dim() != 2 or u.shape[0] != conv.out_channels:
            raise ValueError(
                f"{fn}: u: expected shape ({conv.out_channels}, R), got {tuple(u.shape)}"
            )
        if tuple(v.shape) != expected:
            raise ValueError(f"{fn}: v: expected shape {expected}, got {tuple(v.shape)}")
        if bias is not None and bias.shape != u.shape[:1]:
            raise ValueError(f"{fn}: bias: expected shape ({len(u)},), got {tuple(bias.shape)}")
        layer = cls(**_geometry(conv), bias=False, device="meta", dtype=u.dtype, max_rank=R)
        layer._install(u, v, bias)
        return layer

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, rank: int | None = None, init: str = "svd") -> LoDConv2d:
        """The factorised form of a dense convolution, which shares nothing with it.

        Args:
            conv: nn.Conv2d with weight (C_out, C_in / groups, k_h, k_w).
            rank: components kept per group; None keeps all, which reproduces the layer.
            init: "svd" for the truncated SVD of each group's (N, K), "random" for fresh factors.

        Raises:
            TypeError: conv is no nn.Conv2d.
            ValueError: rank or init does not fit, or the weight is not finite.
        """
        fn = "LoDConv2d.from_conv"
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"{fn}: conv: expected an nn.Conv2d, got {type(conv).__name__}")
        weight, groups = conv.weight, conv.groups
        matrices = weight.reshape(groups, weight.shape[0] // groups, -1)
        R = check_rank(fn, rank, min(matrices.shape[1:]))
        pairs = [initial_factors(fn, matrix, R, init) for matrix in matrices]
        u, v = conv_factors(pairs, weight.shape)
        bias = None if conv.bias is None else copied(conv.bias)
        layer = cls.from_factors(conv, trainable(u, weight), trainable(v, weight), bias)
        return layer.train(conv.training)

    def to_conv(self) -> nn.Conv2d:
        """An nn.Conv2d with the same function: the merged active prefix, rounded once."""
        has_bias = self.bias is not None
        conv = nn.Conv2d(**_geometry(self), bias=has_bias, device="meta", dtype=self.u.dtype)
        u = self.u.unflatten(0, (self.groups, -1))[:, :, : self.rank]
        v = self.v.reshape(self.groups, self.max_rank, self.matrix_shape[1])[:, : self.rank]
        conv.weight = trainable(merge(u, v).reshape(conv.weight.shape), self.u)
        if self.bias is not None:
            conv.bias = copied(self.bias)
        return conv.train(self.training)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(N, K) of one group: (C_out / groups, C_in / groups * k_h * k_w)."""
        height, width = self.kernel_size
        K = self.in_channels // self.groups * height * width
        return self.out_channels // self.groups, K

    def extra_repr(self) -> str:  # noqa: D102
        parts = [
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}",
            f"stride={self.stride}, rank={self.rank}/{self.max_rank}",
        ]
        defaults = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        parts += [f"{k}={getattr(self, k)!r}" for k, v in defaults.items() if getattr(self, k) != v]
        return ", ".join(parts) + ("" if self.bias is not None else ", bias=False")

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _check_padding(self, padding: Any) -> tuple[int, int] | str:
        if not isinstance(padding, str):
            return _pair("LoDConv2d", "padding", padding, 0)
        if padding not in ("same", "valid"):
            raise ValueError(
                f"LoDConv2d: padding: expected an int, a pair, 'same' or 'valid', got {padding!r}"
            )
        if padding == "same" and self.stride != (1, 1):
            raise ValueError(
                f"LoDConv2d: padding: expected stride 1 with 'same', got stride {self.stride}"
            )
        return padding


def is_pointwise(conv: nn.Conv2d | LoDConv2d) -> bool:
    """Whether a convolution multiplies the channels of each position by one matrix: 1 × 1."""
    return (
        tuple(conv.kernel_size) == (1, 1)
        and tuple(conv.stride) == (1, 1)
        and conv.groups == 1
        and (isinstance(conv.padding, str) or tuple(conv.padding) == (0, 0))
    )


def conv_factors(
    pairs: Sequence[tuple[Tensor, Tensor]], weight_shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """One (u, v) per group as a layer keeps them: (C_out, R), (groups * R, C_in / groups, k, k)."""
    u = torch.cat([u for u, _ in pairs])
    v = torch.cat([v for _, v in pairs])
    return u, v.reshape(-1, *weight_shape[1:]) if v.numel() else v.new_empty(0, *weight_shape[1:])


def _geometry(conv: nn.Conv2d | LoDConv2d) -> dict[str, Any]:
    names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode"
    return {name: getattr(conv, name) for name in names.split()}


def _pair(fn: str, name: str, value: Any, low: int) -> tuple[int, int]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2:
            raise ValueError(f"{fn}: {name}: expected an int or a pair, got {tuple(value)}")
        return check_int(fn, name, value[0], low), check_int(fn, name, value[1], low)
    number = check_int(fn, name, value, low)
    return number, number


def _is_channels_last(x: Tensor) -> bool:
    # Where both layouts describe x (one channel), the plain one must come out, as from nn.Conv2d.
    return (
        x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and (x.shape[2] * x.shape[3] == 1 or not x.is_contiguous())
    )
