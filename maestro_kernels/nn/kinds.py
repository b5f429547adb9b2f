"""All kinds of layers, one line each: factorised ones, dense ones, and modules that are opened."""

from __future__ import annotations

from torch import nn

from maestro_kernels.nn.attention import LoDMultiheadAttention
from maestro_kernels.nn.conv import LoDConv1d, LoDConv2d
from maestro_kernels.nn.experts import LoDExperts
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.nn.linear import LoDLinear
from maestro_kernels.nn.opened import Opened
from maestro_kernels.nn.pivoted import PivotedLinear

FACTORISED: dict[str, type[LoDLayer] | type[PivotedLinear]] = {
    layer.kind: layer for layer in (LoDLinear, PivotedLinear, LoDConv1d, LoDConv2d)
}
# Hugging Face's Conv1D, "hf_conv1d", is a linear layer of a class that is not imported here.
DENSE: dict[str, type[nn.Module]] = {
    "linear": nn.Linear,
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
}
OPENED: tuple[type[Opened], ...] = (LoDExperts, LoDMultiheadAttention)

LINEAR = ("linear", "hf_conv1d", "lod_linear")
CONVOLUTIONS = ("conv1d", "conv2d", "lod_conv1d", "lod_conv2d")
# Their matrix multiplies x. A table that is looked up (an embedding) is listed, not counted.
PRODUCTS = frozenset({*LINEAR, *CONVOLUTIONS, *FACTORISED})


def open_form(module: nn.Module) -> Opened | None:
    """What stands for a module with its matrices as linear layers; None if it is no such module."""
    if isinstance(module, Opened):
        return None
    return next((kind.of(module) for kind in OPENED if kind.recognises(module)), None)
