"""Fused low-rank linear layers for PyTorch."""

from maestro_kernels.functional import lod_linear

__version__ = "0.1.0"
__all__ = ["lod_linear"]
