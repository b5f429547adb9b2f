"""LoDLinear: nn.Linear with its weight as two factors and an active rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from maestro_kernels.arguments import check_int
from maestro_kernels.dispatch import is_capturing
from maestro_kernels.functional import lod_linear
from maestro_kernels.nn.factorize import factorize, merge, random_factors
from maestro_kernels.nn.layer import LoDLayer, check_dtype
from maestro_kernels.problem import check_choices

if TYPE_CHECKING:
    from maestro_kernels.nn.grouping import LayerGroup
    from maestro_kernels.nn.packing import PackedLinear
    from maestro_kernels.nn.pivoted import PivotedLinear


class LoDLinear(LoDLayer):
    """y = act((scale · x @ v[:r].T) @ u[:, :r].T + bias + residual), r = `rank`, in one call.

    Args:
        in_features: K.
        out_features: N.
        max_rank: R, components stored, 0..min(N, K); None means min(N, K).
        bias: whether a bias is learned.
        activation: None, "relu", "gelu" (erf), "gelu_tanh" or "silu", applied after the bias.
        device: where the parameters live.
        dtype: float16, bfloat16, float32 or float64.

    Attributes:
        u: (N, R). v: (R, K). bias: (N,) or None.
        backend: passed to `lod_linear`; None chooses.
        group: set by `group`, asked first: the output, or None when the layer is to run alone.
        packed: set by `prepack`; `packed.choices` says which form runs at which M.

    The factors start with the variance that makes u @ v vary like nn.Linear's weight. A new layer
    runs at r = R.

    Example:
        >>> import torch, maestro_kernels as mk
        >>> layer = mk.LoDLinear(64, 96, max_rank=16)
        >>> layer.rank = 8
        >>> layer(torch.randn(4, 64)).shape
        torch.Size([4, 96])

    Source:
        Horvath et al., Maestro, ICML 2024 (arXiv 2308.14929).
    """

    kind = "lod_linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        max_rank: int | None = None,
        bias: bool = True,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        K = check_int("LoDLinear", "in_features", in_features, 0)
        N = check_int("LoDLinear", "out_features", out_features, 0)
        R = check_rank("LoDLinear", max_rank, min(N, K), "max_rank")
        check_choices("LoDLinear", activation, None)
        check_dtype("LoDLinear", dtype)
        self.in_features, self.out_features = K, N
        self.activation = activation
        self.backend: str | None = None
        # Set by nn.group: the siblings that may compute this layer's output with their own.
        self.group: LayerGroup | None = None
        # Set by nn.prepack: asked next, the output, or None where the factors have to serve.
        self.packed: PackedLinear | None = None
        self._install(
            torch.empty(N, R, device=device, dtype=dtype),
            torch.empty(R, K, device=device, dtype=dtype),
            torch.empty(N, device=device, dtype=dtype) if bias else None,
        )
        self.reset_parameters()

    def forward(self, x: Tensor, *, residual: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Y (..., N) for x (..., K), as `lod_linear` computes it.

        With a residual or a scale a layer of a group runs by itself, and a packed one from its
        packed factors where the fused kernel was chosen, else from its factors.
        """
        rank: int | Tensor
        is_plain = residual is None and scale == 1.0
        if is_compiling():
            rank = self.active_rank
            if self.group is not None and is_plain:
                y = self.group.trace(self, x)
                if y is not None:
                    return y
        else:
            # Read once: another thread may set it meanwhile.
            rank = now = self._rank if not self.training else self.forward_rank()
            if self.group is not None and is_plain:
                y = self.group(self, x, now)
                if y is not None:
                    return y
            if self.packed is not None:
                y = (
                    self.packed(self, x, now)
                    if is_plain
                    else self.packed.with_residual(self, x, now, residual, scale)
                )
                if y is not None:
                    return y
            if is_capturing(x):
                rank = self.active_rank
        return lod_linear(
            x,
            self.u,
            self.v,
            self.bias,
            rank=rank,
            activation=self.activation,
            residual=residual,
            scale=scale,
            backend=self.backend,
        )

    def changed(self) -> None:  # noqa: D102
        super().changed()
        for made in (self.group, self.packed):
            if made is not None:
                made.forget()

    @classmethod
    def from_factors(
        cls, u: Tensor, v: Tensor, bias: Tensor | None = None, activation: str | None = None
    ) -> LoDLinear:
        """A layer around u (N, R), v (R, K) and bias (N,) themselves; nothing is copied.

        Raises:
            ValueError: shapes, dtypes or devices do not fit together.
        """
        fn = "LoDLinear.from_factors"
        if u.dim() != 2:
            raise ValueError(f"{fn}: u: expected a matrix (N, R), got shape {tuple(u.shape)}")
        if v.dim() != 2 or v.shape[0] != u.shape[1]:
            raise ValueError(
                f"{fn}: v: expected shape ({u.shape[1]}, K) to match u {tuple(u.shape)}, "
                f"got {tuple(v.shape)}"
            )
        if bias is not None and bias.shape != u.shape[:1]:
            raise ValueError(f"{fn}: bias: expected shape ({u.shape[0]},), got {tuple(bias.shape)}")
        for name, value in (("v", v), ("bias", bias)):
            if value is not None and (value.dtype, value.device) != (u.dtype, u.device):
                raise ValueError(
                    f"{fn}: {name}: expected {u.dtype} on {u.device} like u, "
                    f"got {value.dtype} on {value.device}"
                )
        layer = cls(
            v.shape[1], u.shape[0], u.shape[1], bias is not None, activation, "meta", u.dtype
        )
        layer._install(u, v, bias)
        return layer

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: int | None = None, init: str = "svd"
    ) -> LoDLinear:
        """The factorised form of a dense layer, which shares nothing with it.

        Args:
            linear: nn.Linear with weight (N, K).
            rank: components kept, 0..min(N, K); None keeps all, which reproduces the layer.
            init: "svd" for the truncated SVD, "random" for fresh factors. Data-aware factors come
                from `convert(..., init="data", batches=batches)`.

        Raises:
            TypeError: linear is no nn.Linear.
            ValueError: rank or init does not fit, or the weight is not finite.
        """
        fn = "LoDLinear.from_linear"
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{fn}: linear: expected an nn.Linear, got {type(linear).__name__}")
        weight = linear.weight
        R = check_rank(fn, rank, min(weight.shape))
        u, v = initial_factors(fn, weight, R, init)
        bias = None if linear.bias is None else copied(linear.bias)
        layer = cls.from_factors(trainable(u, weight), trainable(v, weight), bias)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """An nn.Linear with the same function: the merged active prefix, rounded once.

        Raises:
            ValueError: the layer has an activation, which an nn.Linear has not.
        """
        merged = merge(self.u[:, : self.rank], self.v[: self.rank])
        return dense_linear(self, trainable(merged, self.u))

    to_dense = to_linear

    def extra_repr(self) -> str:  # noqa: D102
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}/{self.max_rank}, bias={self.bias is not None}"
            + (f", activation={self.activation}" if self.activation else "")
        )

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.out_features, self.in_features


def dense_linear(layer: LoDLinear | PivotedLinear, weight: nn.Parameter) -> nn.Linear:
    """An nn.Linear of this weight with the rest of a layer.

    Raises:
        ValueError: the layer has an activation, which an nn.Linear has not.
    """
    if layer.activation is not None:
        raise ValueError(
            f"{type(layer).__name__}.to_linear: activation: expected None, which is all an "
            f"nn.Linear can do, got {layer.activation!r}"
        )
    N, K = layer.matrix_shape
    linear = nn.Linear(K, N, layer.bias is not None, "meta", weight.dtype)
    linear.weight = weight
    if layer.bias is not None:
        linear.bias = copied(layer.bias)
    return linear.train(layer.training)


def check_rank(fn: str, rank: int | None, full: int, name: str = "rank") -> int:
    """The components to keep of a matrix with min(N, K) = full; None means all."""
    return full if rank is None else check_int(fn, name, rank, 0, full)


def initial_factors(fn: str, weight: Tensor, rank: int, init: str) -> tuple[Tensor, Tensor]:
    """Factors (u, v) of a finite matrix by the named initialisation."""
    if init not in ("svd", "random"):
        raise ValueError(f"{fn}: init: expected 'svd' or 'random', got {init!r}")
    if not weight.is_meta and not bool(weight.detach().isfinite().all()):
        raise ValueError(f"{fn}: weight: expected finite values, got NaN or infinity")
    if init == "random":
        return random_factors(weight, rank)
    if weight.is_meta:
        raise ValueError(f"{fn}: weight: expected values to factorise, got the meta device")
    return factorize(weight, rank)


def trainable(value: Tensor, like: Tensor) -> nn.Parameter:
    """A parameter that wants gradients where `like` does."""
    return nn.Parameter(value, requires_grad=like.requires_grad)


def copied(parameter: Tensor) -> nn.Parameter:
    """A parameter of its own with the same values."""
    return trainable(parameter.detach().clone(), parameter)
