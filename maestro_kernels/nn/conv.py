"""LoDConv1d, LoDConv2d: a convolution to R channels, then one of size 1 that expands them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestro_kernels.arguments import check_int
from maestro_kernels.functional import lod_linear
from maestro_kernels.nn.factorize import merge
from maestro_kernels.nn.layer import LoDLayer, check_dtype
from maestro_kernels.nn.linear import check_rank, copied, initial_factors, trainable
from maestro_kernels.ops.eager import autocast_dtype

if TYPE_CHECKING:
    from typing_extensions import Self

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
Sizes = int | Sequence[int]
Dense = nn.Conv1d | nn.Conv2d


class LoDConv(LoDLayer):
    """y = conv(conv(x, v[:r]), u[:, :r]) + bias, r = `rank`, over one or two dimensions.

    The first convolution carries kernel, stride, padding and dilation, the second has size 1. With
    groups every group g has its own factors v[g R : g R + r] and u rows, at the same r; their
    prefix is copied when r < R, because the groups lie between its parts.

    Attributes:
        dims: dimensions of an image, 1 or 2.
        dense: the library's layer.
    """

    dims: ClassVar[int]
    dense: ClassVar[type[nn.Conv1d] | type[nn.Conv2d]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_rank: int | None = None,
    ) -> None:
        super().__init__()
        fn = type(self).__name__
        self.groups = check_int(fn, "groups", groups, 1)
        self.in_channels = check_int(fn, "in_channels", in_channels, 1)
        self.out_channels = check_int(fn, "out_channels", out_channels, 1)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"{fn}: {name}: expected a multiple of {groups}, got {channels}")
        self.kernel_size = self._sizes("kernel_size", kernel_size, 1)
        self.stride = self._sizes("stride", stride, 1)
        self.dilation = self._sizes("dilation", dilation, 1)
        self.padding: tuple[int, ...] | str = self._check_padding(padding)
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
        """Y (B, C_out, H', W') for x (B, C_in, H, W), without W in 1-d; also without the batch."""
        u: Tensor = self.u
        v, groups = self.v, self.groups
        size = self._output_size(x)
        rank = self.call_rank(x)
        if is_pointwise(self) and _is_channels_last(x, self.dims):
            v2 = v.flatten(1)
            return lod_linear(x.movedim(1, -1), u, v2, self.bias, rank=rank).movedim(-1, 1)
        if isinstance(rank, Tensor):
            h = self._shrink(x, v)
            h = torch.where(self._per_channel(self._active(rank).repeat(groups)), h, 0)
        elif rank == 0:
            return self._bias_only(x, size)
        else:
            h = self._shrink(x, self._rows(v, rank))
            u = u[:, :rank]
        return self._convolve(h, u.reshape(*u.shape, *[1] * self.dims), self.bias, groups=groups)

    def _shrink(self, x: Tensor, v: Tensor) -> Tensor:
        """H = conv(x, v), with this layer's padding."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = self.padded(x), 0
        return self._convolve(x, v, None, self.stride, padding, self.dilation, self.groups)

    def _convolve(self, *args: Any, **options: Any) -> Tensor:
        convolve: Any = F.conv1d if self.dims == 1 else F.conv2d
        y: Tensor = convolve(*args, **options)
        return y

    def _per_channel(self, values: Tensor) -> Tensor:
        """Values (C,) in the shape that goes with an image."""
        return values.reshape(-1, *[1] * self.dims)

    def padded(self, x: Tensor) -> Tensor:
        """X with the border that the convolution sees, after which it needs no padding."""
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._borders(), mode=mode)

    def _borders(self) -> list[int]:
        """[left, right, top, bottom], the order F.pad wants: the last dimension first."""
        borders = []
        for i in reversed(range(self.dims)):
            if self.padding == "same":
                # As in nn.Conv2d, the odd one out goes to the far side.
                total = self.dilation[i] * (self.kernel_size[i] - 1)
                borders += [total // 2, total - total // 2]
            else:
                side = 0 if isinstance(self.padding, str) else self.padding[i]
                borders += [side, side]
        return borders

    def _output_size(self, x: Tensor) -> list[int]:
        """[H', W']; raises unless x fits, so that no library message has to explain it."""
        fn, dtype = type(self).__name__, self.u.dtype
        if not isinstance(x, Tensor):
            raise TypeError(f"{fn}: x: expected a Tensor, got {type(x).__name__}")
        if x.dtype != dtype and autocast_dtype(x) is None:
            raise TypeError(f"{fn}: x: expected {dtype} like u, got {x.dtype}")
        dims = self.dims
        if x.dim() not in (dims + 1, dims + 2) or x.shape[-dims - 1] != self.in_channels:
            image = f"{self.in_channels}, " + ("L" if dims == 1 else "H, W")
            raise ValueError(
                f"{fn}: x: expected shape (B, {image}) or ({image}), got {tuple(x.shape)}"
            )
        borders = self._borders()
        size = []
        for i in range(dims):
            border = sum(borders[2 * (dims - 1 - i) :][:2])
            reach = self.dilation[i] * (self.kernel_size[i] - 1) + 1
            length = x.shape[i - dims] + border
            if length < reach:
                raise ValueError(
                    f"{fn}: x: expected at least {reach - border} positions in dimension "
                    f"{i - dims} for kernel_size {self.kernel_size}, got {x.shape[i - dims]}"
                )
            size.append((length - reach) // self.stride[i] + 1)
        return size

    def _bias_only(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Rank 0: the bias at every position, or zeros."""
        # Sums over nothing: exactly zero, and x, u and v get zero gradients instead of none, which
        # is what DDP needs.
        y = self.u[:, :0].sum() + self.v[:0].sum() + x[..., :0].sum()
        if self.bias is not None:
            y = y + self._per_channel(self.bias)
        y = y.expand(*x.shape[: -self.dims - 1], self.out_channels, *size)
        return y.to(autocast_dtype(x) or x.dtype).contiguous()

    @classmethod
    def from_factors(
        cls, conv: Dense | LoDConv, u: Tensor, v: Tensor, bias: Tensor | None = None
    ) -> Self:
        """A layer with conv's geometry around u, v and bias themselves; nothing is copied.

        Args:
            conv: gives stride, padding, padding_mode, dilation and groups (a factorised one will
                do).
            u: (out_channels, R).
            v: (groups * R, in_channels / groups, *kernel_size).
            bias: (out_channels,) or None.
        """
        fn = f"{cls.__name__}.from_factors"
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
    def from_conv(cls, conv: Dense, rank: int | None = None, init: str = "svd") -> Self:
        """The factorised form of a dense convolution, which shares nothing with it.

        Args:
            conv: nn.Conv1d or nn.Conv2d, weight (C_out, C_in / groups, *kernel_size).
            rank: components kept per group; None keeps all, which reproduces the layer.
            init: "svd" for the truncated SVD of each group's (N, K), "random" for fresh factors.

        Raises:
            TypeError: conv is no convolution of as many dimensions.
            ValueError: rank or init does not fit, or the weight is not finite.
        """
        fn = f"{cls.__name__}.from_conv"
        if not isinstance(conv, cls.dense):
            raise TypeError(
                f"{fn}: conv: expected an nn.{cls.dense.__name__}, got {type(conv).__name__}"
            )
        weight, groups = conv.weight, conv.groups
        matrices = weight.reshape(groups, weight.shape[0] // groups, -1)
        R = check_rank(fn, rank, min(matrices.shape[1:]))
        pairs = [initial_factors(fn, matrix, R, init) for matrix in matrices]
        u, v = conv_factors(pairs, weight.shape)
        bias = None if conv.bias is None else copied(conv.bias)
        layer = cls.from_factors(conv, trainable(u, weight), trainable(v, weight), bias)
        return layer.train(conv.training)

    def to_conv(self) -> Any:
        """An nn.Conv1d or nn.Conv2d with the same function: the active prefix, rounded once."""
        has_bias = self.bias is not None
        conv = self.dense(**_geometry(self), bias=has_bias, device="meta", dtype=self.u.dtype)
        u = self.u.unflatten(0, (self.groups, -1))[:, :, : self.rank]
        v = self.v.reshape(self.groups, self.max_rank, self.matrix_shape[1])[:, : self.rank]
        conv.weight = trainable(merge(u, v).reshape(conv.weight.shape), self.u)
        if self.bias is not None:
            conv.bias = copied(self.bias)
        return conv.train(self.training)

    to_dense = to_conv

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(N, K) of one group: (C_out / groups, C_in / groups * k_h * k_w)."""
        K = self.in_channels // self.groups * math.prod(self.kernel_size)
        return self.out_channels // self.groups, K

    def extra_repr(self) -> str:  # noqa: D102
        parts = [
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}",
            f"stride={self.stride}, rank={self.rank}/{self.max_rank}",
        ]
        ones = (1,) * self.dims
        defaults = {"padding": (0,) * self.dims, "dilation": ones, "groups": 1}
        defaults["padding_mode"] = "zeros"
        parts += [f"{k}={getattr(self, k)!r}" for k, v in defaults.items() if getattr(self, k) != v]
        return ", ".join(parts) + ("" if self.bias is not None else ", bias=False")

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _check_padding(self, padding: Any) -> tuple[int, ...] | str:
        fn = type(self).__name__
        if not isinstance(padding, str):
            return self._sizes("padding", padding, 0)
        if padding not in ("same", "valid"):
            raise ValueError(
                f"{fn}: padding: expected {self._expected}, 'same' or 'valid', got {padding!r}"
            )
        if padding == "same" and set(self.stride) != {1}:
            raise ValueError(
                f"{fn}: padding: expected stride 1 with 'same', got stride {self.stride}"
            )
        return padding

    @property
    def _expected(self) -> str:
        return "an int" if self.dims == 1 else "an int, a pair"

    def _sizes(self, name: str, value: Any, low: int) -> tuple[int, ...]:
        """One number for every dimension."""
        fn, dims = type(self).__name__, self.dims
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != dims:
                expected = "an int or one in a tuple" if dims == 1 else "an int or a pair"
                raise ValueError(f"{fn}: {name}: expected {expected}, got {tuple(value)}")
            return tuple(check_int(fn, name, one, low) for one in value)
        return (check_int(fn, name, value, low),) * dims


class LoDConv1d(LoDConv):
    """y = conv1(conv1d(x, v[:r]), u[:, :r]) + bias, r = `rank`.

    The first convolution carries kernel, stride, padding and dilation. Groups are as in
    `LoDConv2d`.

    Args:
        in_channels: channels of x.
        out_channels: channels of y.
        kernel_size: k.
        max_rank: R per group, 0..min(N, K) where N = out_channels / groups and K = in_channels /
            groups * k; None means min(N, K).

    The other arguments are those of nn.Conv1d, padding "same" and "valid" and all padding modes
    among them.

    Attributes:
        u: (out_channels, R). v: (groups * R, in_channels / groups, k). bias: or None.

    Source:
        Horvath et al., Maestro, ICML 2024 (arXiv 2308.14929).
    """

    kind, dims, dense = "lod_conv1d", 1, nn.Conv1d


class LoDConv2d(LoDConv):
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

    kind, dims, dense = "lod_conv2d", 2, nn.Conv2d


def is_pointwise(conv: Dense | LoDConv) -> bool:
    """Whether a convolution multiplies the channels of each position by one matrix: 1 × 1."""
    return (
        math.prod(conv.kernel_size) == 1
        and math.prod(conv.stride) == 1
        and conv.groups == 1
        and (isinstance(conv.padding, str) or not any(conv.padding))
    )


def channels_dim(module: nn.Module) -> int:
    """The dimension of a layer's output, from the end, that its rows do not run over."""
    for kind in (LoDConv1d, LoDConv2d):
        if isinstance(module, kind | kind.dense):
            return -1 - kind.dims
    return -1


def conv_factors(
    pairs: Sequence[tuple[Tensor, Tensor]], weight_shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """One (u, v) per group as a layer keeps them: (C_out, R), (groups * R, C_in / groups, k, k)."""
    u = torch.cat([u for u, _ in pairs])
    v = torch.cat([v for _, v in pairs])
    return u, v.reshape(-1, *weight_shape[1:]) if v.numel() else v.new_empty(0, *weight_shape[1:])


def _geometry(conv: Dense | LoDConv) -> dict[str, Any]:
    names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode"
    return {name: getattr(conv, name) for name in names.split()}


def _is_channels_last(x: Tensor, dims: int) -> bool:
    if x.dim() != dims + 2:
        return False
    last = x.movedim(1, -1).is_contiguous()
    # Where both layouts describe x (one channel), the plain one must come out, as from the library.
    return last and (x.shape[2:].numel() == 1 or not x.is_contiguous())
