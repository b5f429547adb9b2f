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
    R = v.shape[0]
    pad = R if isinstance(rank, Tensor) else 0
    rank = host_rank(rank, R)
    if isinstance(rank, Tensor):
        h, pad = reference.shrink(x, v, rank), 0
        u = reference.zero_beyond(u, rank)
    elif rank == R:
        h, pad = F.linear(x, v), 0
    else:
        h = F.linear(x, v[:rank])
        u = u[:, :rank]
    y = F.linear(h, u, bias)
    if activation is not None:
        y = reference.ACTIVATIONS[activation](y)
    if pad and save_h:  # H of a tensor rank is as wide as the factors
        h = F.pad(h, (0, pad - h.shape[-1]))
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
    rank = host_rank(rank, v.shape[0])
    if h is not None and not isinstance(rank, Tensor):
        h = h[:, :rank]
    return reference.backward(
        dy, x, u, v, bias, h, y, rank, activation, needs=needs, strategy=strategy
    )


def host_rank(rank: int | Tensor, R: int) -> int | Tensor:
    """A tensor rank in the host's own memory as an int 0..R: prefix views are then exact and less.

    On a GPU nobody waits for it: R columns are multiplied, those beyond the rank zero.
    """
    return min(max(int(rank), 0), R) if isinstance(rank, Tensor) and rank.is_cpu else rank
