"""The one reference: formula and gradient in plain torch, differentiable to any order, any dtype.

Every test and every accuracy gate compares with this file; nothing here is tuned. The gradient is
written as torch algebra, so that differentiating it again is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from maestro_kernels.call import Call, Grads, Needs
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
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Y = act((scale · x @ v[:r].T) @ u[:, :r].T + bias + residual), in the dtype of x.

    Args:
        x: input (..., K).
        u: output factor (N, R).
        v: input factor (R, K).
        bias: (N,) or None.
        rank: active rank r; None means R; a 0-d integer tensor is clamped to 0..R without
            being read by the host.
        activation: a key of ACTIVATIONS.
        residual: (..., N) or None.
        scale: what H is multiplied by.

    Returns:
        Tensor (..., N).
    """
    if isinstance(rank, Tensor):  # so that the gradient of x is free of it, too
        v = zero_beyond(v.mT, rank).mT
    return ACTIVATIONS[activation](expand(shrink(x, v, rank, scale), u, bias, rank, residual))


def shrink(x: Tensor, v: Tensor, rank: int | Tensor | None, scale: float = 1.0) -> Tensor:
    """H = scale · x @ v[:r].T, (..., r); for a tensor rank (..., R) with zeros beyond it."""
    if isinstance(rank, Tensor):
        return scaled(zero_beyond(x @ v.mT, rank), scale)
    return scaled(x @ v[:rank].mT, scale)


def scaled(h: Tensor, scale: float) -> Tensor:
    """Scale · h; h itself where that changes nothing."""
    return h if scale == 1 else h * scale


def expand(
    h: Tensor,
    u: Tensor,
    bias: Tensor | None,
    rank: int | Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Z = H @ u[:, :r].T + bias + residual, (..., N); r is a tensor rank or else the width of H."""
    # Zeros in H are not enough: zero times NaN is NaN.
    u = zero_beyond(u, rank) if isinstance(rank, Tensor) else u[:, : h.shape[-1]]
    z = h @ u.mT
    z = z if bias is None else z + bias
    return z if residual is None else z + residual


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
    call: Call, *, save_h: bool, strategy: str
) -> tuple[list[Tensor], Sequence[Tensor | None]]:
    """The formula, and H."""
    ys, hs = [], []
    for i in range(call.n):
        x, u, v, bias, rank, activation = call.layer(i)
        h = shrink(x, v, rank, call.scale(i))
        ys.append(ACTIVATIONS[activation](expand(h, u, bias, rank, call.residual(i))))
        hs.append(h)
    return ys, hs


def input_grads(
    call: Call,
    dys: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    ys: Sequence[Tensor | None],
    *,
    needs: Needs,
    strategy: str,
) -> tuple[Grads, Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor | None]]:
    """(dxs, dzs, hs, dhs): the gradients of x, and what `weight_grads` makes the others of.

    With dz = dy * act'(z): dH = dz @ u[:, :r] and dx = dH @ v[:r]. An x that the layers share has
    the sum of its gradients.

    Args:
        call: of the forward, each x (M, K).
        dys: gradients of y (M, N).
        hs: H of the forward, or None to compute it again (which also keeps it differentiable).
        ys: outputs of the forward; only looked at for relu, where they save computing z.
        needs: which of x, u, v, bias want a gradient; what nobody needs is None.
        strategy: not used here; every backend takes it.
    """
    dxs: Grads = [None] * len(call.xs)
    kept = []
    for i in range(call.n):
        dx, *rest = _input_grad(call, i, dys[i], hs[i], ys[i], needs)
        i_x = 0 if len(dxs) == 1 else i
        before = dxs[i_x]
        dxs[i_x] = dx if before is None or dx is None else before + dx
        kept.append(rest)
    dzs, hs, dhs = zip(*kept, strict=True)
    return dxs, dzs, hs, dhs


def weight_grads(
    call: Call,
    dzs: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    dhs: Sequence[Tensor | None],
    *,
    needs: Needs,
    strategy: str,
) -> tuple[Grads, Grads, Grads]:
    """(dus, dvs, dbiases) of the layers; what `needs` does not ask for is None.

    du[:, :r] = dz.T @ H, dv[:r] = dH.T @ x, dbias = sum of dz over rows; du and dv are exactly zero
    beyond r.

    Args:
        call: of the forward, each x (M, K).
        dzs: gradients before the activation (M, N).
        hs: H, (M, r), or (M, R) with zeros beyond a tensor rank; needed for du.
        dhs: the gradient of x @ v[:r].T, of the same shape; needed for dv.
        needs: which of x, u, v, bias want a gradient.
        strategy: not used here; every backend takes it.
    """
    _, needs_u, needs_v, needs_bias = needs
    dus: Grads = []
    dvs: Grads = []
    dbiases: Grads = []
    for i in range(call.n):
        x, _, v, bias, _, _ = call.layer(i)
        du = dv = None
        if needs_u:
            du = dzs[i].mT @ _present(hs[i])
            beyond = v.shape[0] - du.shape[1]
            du = F.pad(du, (0, beyond)) if beyond else du
        if needs_v:
            dv = _present(dhs[i]).mT @ x
            beyond = v.shape[0] - dv.shape[0]
            dv = F.pad(dv, (0, 0, 0, beyond)) if beyond else dv
        dus.append(du)
        dvs.append(dv)
        dbiases.append(dzs[i].sum(0) if needs_bias and bias is not None else None)
    return dus, dvs, dbiases


def _input_grad(
    call: Call,
    i: int,
    dy: Tensor,
    h: Tensor | None,
    y: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    """(dx, dz, H, dH) of layer i, None for what nothing needs."""
    x, u, v, bias, rank, activation = call.layer(i)
    needs_x, needs_u, needs_v, _ = needs
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
        h = shrink(x, v_r, rank, call.scale(i))
    if activation is None:
        dz = dy
    else:
        z = expand(_present(h), u_r, bias, residual=call.residual(i)) if needs_z else y
        dz = activation_backward(dy, _present(z), activation)
    dh = dx = None
    if needs_x or needs_v:
        dh = scaled(dz @ u_r, call.scale(i))
        if isinstance(rank, Tensor):
            dh = zero_beyond(dh, rank)
        if needs_x:
            dx = dh @ v_r
    return dx, dz, h, dh


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def zero_beyond(matrix: Tensor, rank: Tensor) -> Tensor:
    """Zero the columns from `rank` on, whatever they hold, without asking the device for it."""
    active = torch.arange(matrix.shape[-1], device=matrix.device) < rank
    return torch.where(active, matrix, 0)
