"""Two library matmuls on prefix views of the factors: cuBLAS on a GPU, oneDNN or MKL on a CPU.

No factor is copied for a rank. The gradient is the reference's: it is already library matmuls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from maestro_kernels.backends import reference

if TYPE_CHECKING:
    from maestro_kernels.problem import LoDProblem


def unsupported(problem: LoDProblem) -> str | None:
    """Why this backend cannot serve the problem: it always can."""
    return None


def forward(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rank: int | Tensor,
    activation: str | None,
    *,
    save_h: bool,
    strategy: str,
) -> tuple[Tensor, Tensor | None]:
    """Y = act(x @ v[:r].T @ u[:, :r].T + bias), and H; x is (M, K) or (..., K)."""
    if isinstance(rank, Tensor):
        h = reference.shrink(x, v, rank)
    elif rank == v.shape[0]:
        h = F.linear(x, v)
    else:
        h = F.linear(x, v[:rank])
        u = u[:, :rank]
    y = F.linear(h, u, bias)
    if activation is not None:
        y = reference.ACTIVATIONS[activation](y)
    return y, h


def backward(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    y: Tensor | None,
    rank: int | Tensor,
    activation: str | None,
    *,
    needs: tuple[bool, bool, bool, bool],
    strategy: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, du, dv, dbias) by library matmuls; entries that `needs` does not ask for are None."""
    return reference.backward(
        dy, x, u, v, bias, h, y, rank, activation, needs=needs, strategy=strategy
    )
