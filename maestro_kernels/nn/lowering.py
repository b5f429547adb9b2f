"""lower: factorised layers as layers and operations that every tool for PyTorch models knows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestro_kernels.arguments import check_model
from maestro_kernels.backends.reference import ACTIVATIONS
from maestro_kernels.nn.conv import LoDConv
from maestro_kernels.nn.conversion import forget_report, with_hooks_of
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.nn.linear import LoDLinear, copied, trainable
from maestro_kernels.nn.pivoted import PivotedLinear
from maestro_kernels.nn.swapping import swap_layers
from maestro_kernels.nn.weight import MergedWeight

_FORMS = ("linear", "aten")
_MARK = "_maestro_lowered"
_MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
}


def lower(model: nn.Module, *, form: str = "linear", inplace: bool = True) -> nn.Module:
    """Write y = act(x @ v[:r].T @ u[:, :r].T + bias) in layers that any tool knows, at r = `rank`.

    For `torch.onnx.export`, `torch.jit.trace`, quantisers and runtimes that know nothing of this
    package. The model computes what it did with two matmuls per layer, without fused calls, packed
    copies and groups; ranks are fixed from here on. Mode, call hooks, requires_grad and tied
    factors are kept. It is the last step: save the factorised model, and lower what was loaded; a
    lowered model of transformers refuses to save itself, since nothing could load it.

    Args:
        model: any module; a single layer comes back as a new layer.
        form: "linear" makes each layer an nn.Sequential(nn.Linear(K, r, bias=False),
            nn.Linear(r, N), activation if it has one), and a convolution a pair of its kind, the
            second of size 1. "aten" makes a linear layer an `AtenLinear` of plain torch operations,
            for code that reads `layer.weight` or passes a residual (T5 does the first), leaves a
            PivotedLinear, which is made of such, and makes a convolution the same pair.
        inplace: False leaves the model alone and returns a lowered copy.

    Returns:
        The model without factorised layers; one that had none comes back as it is. A layer at rank
        0 becomes a pair of rank 1 that holds zeros, because many tools refuse empty matrices.

    Raises:
        TypeError: model is no module.
        ValueError: an unknown form.
        NotImplementedError: a factorised layer of another class. Nothing has changed then.

    Example:
        >>> import torch, maestro_kernels as mk
        >>> model = mk.convert(torch.nn.Sequential(torch.nn.Linear(64, 64)), rank=8)
        >>> mk.nn.lower(model)[0]
        Sequential(
          (0): Linear(in_features=64, out_features=8, bias=False)
          (1): Linear(in_features=8, out_features=64, bias=True)
        )
    """
    fn = "lower"
    check_model(fn, model)
    if form not in _FORMS:
        raise ValueError(f"{fn}: form: expected one of {_FORMS}, got {form!r}")
    lowering = _Lowering(form, share=inplace)
    layers: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoDLayer | PivotedLinear):
            continue
        if form == "aten" and isinstance(module, PivotedLinear):
            continue
        new = lowering.layer(name, module)
        layers[module] = with_hooks_of(module, new, share=inplace)
    lowered = forget_report(swap_layers(model, layers, inplace=inplace))
    for module in lowered.modules() if layers else ():
        if hasattr(module, "save_pretrained"):
            vars(module)[_MARK] = True
    return lowered


def is_lowered(model: nn.Module) -> bool:
    """Whether a model that saves itself has other layers than its configuration says."""
    return _MARK in vars(model)


class AtenLinear(nn.Module):
    """y = act((scale · x @ v.T) @ u.T + bias + residual), by plain torch operations.

    Attributes:
        u: (N, r). v: (r, K). bias: (N,) or None.
        in_features: K. out_features: N.
        activation: None, "relu", "gelu" (erf), "gelu_tanh" or "silu", applied last.
    """

    u: nn.Parameter
    v: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        u: nn.Parameter,
        v: nn.Parameter,
        bias: nn.Parameter | None = None,
        activation: str | None = None,
    ) -> None:
        """Take the parameters themselves; nothing is copied."""
        super().__init__()
        self.u, self.v, self.activation = u, v, activation
        self.register_parameter("bias", bias)
        self.in_features, self.out_features = v.shape[1], u.shape[0]

    @property
    def weight(self) -> Tensor:
        """The matrix u @ v, (N, K), computed when its values are used; see LoDLayer.weight."""
        u, v = self.u, self.v
        if torch.compiler.is_compiling():
            return u @ v
        requires_grad = torch.is_grad_enabled() and (u.requires_grad or v.requires_grad)
        shape = self.out_features, self.in_features
        return MergedWeight.of(lambda: u @ v, shape, u, requires_grad)

    def forward(self, x: Tensor, *, residual: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Y (..., N) for x (..., K)."""
        h = F.linear(x, self.v)
        y = F.linear(h if scale == 1.0 else h * scale, self.u, self.bias)
        if residual is not None:
            y = y + residual
        activated: Tensor = ACTIVATIONS[self.activation](y)
        return activated

    def extra_repr(self) -> str:  # noqa: D102
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.v.shape[0]}, bias={self.bias is not None}"
            + (f", activation={self.activation}" if self.activation else "")
        )


class _Lowering:
    """One call of `lower`: what factorised layers become."""

    def __init__(self, form: str, *, share: bool) -> None:
        self.form, self.share = form, share
        self._made: dict[tuple[Tensor, torch.Size], nn.Parameter] = {}

    def layer(self, name: str, module: LoDLayer | PivotedLinear) -> nn.Module:
        if isinstance(module, PivotedLinear):
            return self._pivoted(module)
        if isinstance(module, LoDConv):
            return self._conv(module)
        if isinstance(module, LoDLinear):
            return self._linear(module)
        raise NotImplementedError(
            "lower: model: expected factorised layers of the classes LoDLinear, LoDConv1d, "
            f"LoDConv2d and PivotedLinear, got {type(module).__name__} at {name!r}"
        )

    def _linear(self, layer: LoDLinear) -> nn.Module:
        r = layer.rank
        u = self._factor(layer.u, layer.u[:, :r] if r else layer.u.new_zeros(len(layer.u), 1))
        v = self._factor(layer.v, layer.v[:r] if r else layer.v.new_zeros(1, layer.v.shape[1]))
        bias = self._bias(layer)
        if self.form == "aten":
            return AtenLinear(u, v, bias, layer.activation)
        return _pair(u, v, bias, layer.activation)

    def _pivoted(self, layer: PivotedLinear) -> nn.Module:
        """Its identity rows written out: the same products, without the permutation."""
        eye = torch.eye(layer.rank, dtype=layer.u.dtype, device=layer.u.device)
        u = torch.cat((eye, layer.u.detach())).index_select(0, layer.order)
        v = self._factor(layer.v, layer.v)
        return _pair(trainable(u, layer.u), v, self._bias(layer), layer.activation)

    def _conv(self, layer: LoDConv) -> nn.Module:
        r, groups = layer.rank, layer.groups
        dense: Any = layer.dense
        u, v = layer.u[:, :r], layer._rows(layer.v, r)
        if r == 0:
            u = u.new_zeros(len(u), 1)
            v = v.new_zeros(groups, *v.shape[1:])
        dtype, bias = u.dtype, self._bias(layer)
        first = dense(
            layer.in_channels,
            len(v),
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            groups,
            False,
            layer.padding_mode,
            "meta",
            dtype,
        )
        second = dense(
            len(v), len(u), 1, groups=groups, bias=bias is not None, device="meta", dtype=dtype
        )
        first.weight = self._factor(layer.v, v)
        second.weight = self._factor(layer.u, u.reshape(*u.shape, *[1] * layer.dims))
        if bias is not None:
            second.bias = bias
        return nn.Sequential(first, second)

    def _factor(self, old: Tensor, part: Tensor) -> nn.Parameter:
        """The parameter of a part of a factor: the factor itself where that is all of it."""
        if self.share and isinstance(old, nn.Parameter) and part.shape == old.shape:
            return old
        # Layers that share a factor share what it becomes.
        key = old, part.shape
        if key not in self._made:
            value = part.detach().clone(memory_format=torch.contiguous_format)
            self._made[key] = trainable(value, old)
        return self._made[key]

    def _bias(self, layer: LoDLayer | PivotedLinear) -> nn.Parameter | None:
        bias = layer.bias
        return bias if bias is None or self.share else copied(bias)


def _pair(
    u: nn.Parameter, v: nn.Parameter, bias: nn.Parameter | None, activation: str | None
) -> nn.Sequential:
    (N, r), K = u.shape, v.shape[1]
    first = nn.Linear(K, r, False, "meta", u.dtype)
    second = nn.Linear(r, N, bias is not None, "meta", u.dtype)
    first.weight, second.weight = v, u
    if bias is not None:
        second.bias = bias
    last = [] if activation is None else [_MODULES[activation]()]
    return nn.Sequential(first, second, *last)
