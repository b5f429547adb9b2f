"""Which matrices TMA can read."""

from __future__ import annotations

from torch import Tensor

__all__ = ["can_describe"]


def can_describe(tensor: Tensor) -> bool:
    """Whether TMA can read a matrix: 16-byte aligned rows, one after another."""
    rows, columns = tensor.stride()
    aligned = rows * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0
    return aligned and columns == 1 and rows >= tensor.shape[1]
