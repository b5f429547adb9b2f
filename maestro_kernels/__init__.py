"""Fused low-rank linear layers for PyTorch.

    act(x @ v[:r].T @ u[:, :r].T + bias)

in one call, for one layer or a group with different ranks. Importing this starts no GPU, reads no
file beyond Python's own and compiles nothing.
"""

__version__ = "0.1.0"

from maestro_kernels import nn
from maestro_kernels.functional import explain, lod_linear, lod_linear_grouped
from maestro_kernels.nn import (
    LoDConv2d,
    LoDLinear,
    convert,
    group,
    load_pretrained,
    prepack,
    ranks,
    refresh,
    save_pretrained,
    set_ranks,
    summary,
    to_dense,
    truncate,
    ungroup,
)

__all__ = [
    "LoDConv2d",
    "LoDLinear",
    "convert",
    "explain",
    "group",
    "load_pretrained",
    "lod_linear",
    "lod_linear_grouped",
    "nn",
    "prepack",
    "ranks",
    "refresh",
    "save_pretrained",
    "set_ranks",
    "summary",
    "to_dense",
    "truncate",
    "ungroup",
]
