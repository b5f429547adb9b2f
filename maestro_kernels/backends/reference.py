"""The one reference: formula and gradient in plain torch, differentiable to any order, any dtype.

Every test and every accuracy gate compares with this file; nothing here is tuned. The gradient is
written as torch algebra, so that differentiating it again is right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from maestro_kernels.problem import LoDProblem

ACTIVATIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


def unsupported(problem: LoDProblem) -> str | None:
    """Why this backend cannot serve the problem: it always can."""
    return None


def lod_linear_ref(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    rank: int | Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Y = act(x @ v[:r].T @ u[:, :r].T + bias), in the dtype of x.

    Args:
        x: input (..., K).
        u: output factor (N, R).
        v: input factor (R, K).
        bias: (N,) or None.
        rank: active rank r; None means R; a 0-d integer tensor is clamped to 0..R without
            being read by the host.
        activation: a key of ACTIVATIONS.

    Returns:
        Tensor (..., N).
    """
    if isinstance(rank, Tensor):  # so that the gradient of x is free of it, too
        v = zero_beyond(v.mT, rank).mT
    return ACTIVATIONS[activation](expand(shrink(x, v, rank), u, bias, rank))


def shrink(x: Tensor, v: Tensor, rank: int | Tensor | None) -> Tensor:
    """H = x @ v[:r].T, (..., r); for a tensor rank (..., R) with zeros beyond it."""
    if isinstance(rank, Tensor):
        return zero_beyond(x @ v.mT, rank)
    return x @ v[:rank].mT


def expand(h: Tensor, u: Tensor, bias: Tensor | None, rank: int | Tensor | None = None) -> Tensor:
    """Z = H @ u[:, :r].T + bias, (..., N), where r is a tensor rank or else the width of H."""
    # Zeros in H are not enough: zero times NaN is NaN.
    u = zero_beyond(u, rank) if isinstance(rank, Tensor) else u[:, : h.shape[-1]]
    z = h @ u.mT
    return z if bias is None else z + bias


def activation_backward(dy: Tensor, z: Tensor, activation: str | None) -> Tensor:
    """Dz = dy * act'(z). For relu the output may stand in for z: both have the same sign."""
    if activation is None:
        return dy
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, z, 0)
    if activation == "silu":
        if torch.is_grad_enabled():  # aten::silu_backward has no derivative of its own
            s = torch.sigmoid(z)
            return dy * s * (1 + z * (1 - s))
        return torch.ops.aten.silu_backward(dy, z)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(dy, z, approximate=approximate)


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
    """The formula, and H."""
    h = shrink(x, v, rank)
    return ACTIVATIONS[activation](expand(h, u, bias, rank)), h


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
    """(dx, du, dv, dbias) of the formula for 2-d x; what `needs` does not ask for is None.

    With dz = dy * act'(z): dH = dz @ u[:, :r], dx = dH @ v[:r], du[:, :r] = dz.T @ H,
    dv[:r] = dH.T @ x, dbias = sum of dz over rows; du and dv are exactly zero beyond r.

    Args:
        dy: gradient of y (M, N).
        x: (M, K).
        u: (N, R).
        v: (R, K).
        bias: (N,) or None.
        h: H of the forward, or None to compute it again (which also keeps it differentiable).
        y: output of the forward; only looked at for relu, where it saves computing z.
        rank: active rank.
        activation: as in the forward.
        needs: which of x, u, v, bias want a gradient.
        strategy: not used here; every backend takes it.
    """
    needs_x, needs_u, needs_v, needs_bias = needs
    R = v.shape[0]
    needs_z = activation is not None and not (activation == "relu" and y is not None)
    width = R if isinstance(rank, Tensor) else rank
    if isinstance(rank, Tensor):
        # Only where a product with zeros would not be zero; dz @ u is cut to the rank afterwards.
        # Differentiated again, each factor is multiplied with such zeros.
        again = torch.is_grad_enabled()
        u_r = zero_beyond(u, rank) if needs_z or again else u
        v_r = zero_beyond(v.mT, rank).mT if needs_x or again else v
    else:
        u_r, v_r = (u, v) if width == R else (u[:, :width], v[:width])
    if h is None and (needs_u or needs_z):
        h = shrink(x, v_r, rank)
    if activation is None:
        dz = dy
    else:
        z = F.linear(_present(h), u_r, bias) if needs_z else y
        dz = activation_backward(dy, _present(z), activation)
    dx = du = dv = None
    if needs_x or needs_v:
        dh = dz @ u_r
        if isinstance(rank, Tensor):
            dh = zero_beyond(dh, rank)
        if needs_x:
            dx = dh @ v_r
        if needs_v:
            dv = dh.mT @ x
            dv = dv if width == R else F.pad(dv, (0, 0, 0, R - width))
    if needs_u:
        du = dz.mT @ _present(h)
        du = du if width == R else F.pad(du, (0, R - width))
    return dx, du, dv, (dz.sum(0) if needs_bias else None)


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def zero_beyond(matrix: Tensor, rank: Tensor) -> Tensor:
    """Zero the columns from `rank` on, whatever they hold, without asking the device for it."""
    active = torch.arange(matrix.shape[-1], device=matrix.device) < rank
    return torch.where(active, matrix, 0)
