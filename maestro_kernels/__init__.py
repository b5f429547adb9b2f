"""Fused low-rank linear layers for PyTorch.

    act(x @ v[:r].T @ u[:, :r].T + bias)

in one call, for one layer or a group with different ranks. Importing this starts no GPU, reads no
file beyond Python's own and compiles nothing.
"""

from maestro_kernels import nn
from maestro_kernels.functional import explain, lod_linear, lod_linear_grouped
from maestro_kernels.nn import LoDConv2d, LoDLinear, convert, to_dense

__version__ = "0.1.0"
__all__ = [
    "LoDConv2d",
    "LoDLinear",
    "convert",
    "explain",
    "lod_linear",
    "lod_linear_grouped",
    "nn",
    "to_dense",
]
