"""Fused low-rank linear layers for PyTorch.

    act(x @ v[:r].T @ u[:, :r].T + bias)

in one call, for one layer or a group with different ranks. Importing this starts no GPU, reads no
file beyond Python's own and compiles nothing.
"""

from maestro_kernels.functional import explain, lod_linear, lod_linear_grouped

__version__ = "0.1.0"
__all__ = ["explain", "lod_linear", "lod_linear_grouped"]
