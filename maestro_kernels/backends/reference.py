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
    from maestro_kernels.call import Call, Grads, InputGrads, Needs
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
    norm: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Tensor:
    """Y = act((scale · x @ v[:r].T) @ u[:, :r].T + bias + residual), in the dtype of x.

    With a norm, scale · RMSNorm(x @ v[:r].T) stands for the first product; see `normed`.

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
        norm: (R,) or None.
        norm_eps: what is added to the mean of squares.

    Returns:
        Tensor (..., N).
    """
    if isinstance(rank, Tensor):  # so that the gradient of x is free of it, too
        v = zero_beyond(v.mT, rank).mT
    h = shrink(x, v, rank, 1.0 if norm is not None else scale)
    h = h if norm is None else normed(h, norm, norm_eps, rank, scale)
    return ACTIVATIONS[activation](expand(h, u, bias, rank, residual))


def shrink(x: Tensor, v: Tensor, rank: int | Tensor | None, scale: float = 1.0) -> Tensor:
    """H = scale · x @ v[:r].T, (..., r); for a tensor rank (..., R) with zeros beyond it."""
    if isinstance(rank, Tensor):
        return scaled(zero_beyond(x @ v.mT, rank), scale)
    return scaled(x @ v[:rank].mT, scale)


def scaled(h: Tensor, scale: float) -> Tensor:
    """Scale · h; h itself where that changes nothing."""
    return h if scale == 1 else h * scale


def normed(
    h: Tensor, norm: Tensor, eps: float, rank: int | Tensor | None, scale: float = 1.0
) -> Tensor:
    """G = scale · norm[:r] · h / sqrt(mean(h²) + eps), in float32 or better, rounded once.

    Args:
        h: (..., r), or (..., R) with zeros beyond a tensor rank.
        norm: (R,).
        eps: what is added to the mean of squares over the r components.
        rank: a tensor rank, or r is the width of h.
        scale: what the norm is multiplied by.
    """
    unit, _, weight = _normed_parts(h, norm, eps, rank)
    return (unit * (weight * scale)).to(h.dtype)


def _normed_parts(
    h: Tensor, norm: Tensor, eps: float, rank: int | Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(h / rms, 1 / rms (..., 1), norm[:r]), in float32 or better; zero beyond a tensor rank."""
    wide = torch.promote_types(h.dtype, torch.float32)
    h, norm = h.to(wide), norm.to(wide)
    count: int | Tensor
    if isinstance(rank, Tensor):
        weight, count = zero_beyond(norm, rank), _clamped(rank, norm.shape[0])
    else:
        weight, count = norm[: h.shape[-1]], h.shape[-1]
    inverse = torch.rsqrt(h.square().sum(-1, keepdim=True) / count + eps)
    return h * inverse, inverse, weight


def _clamped(rank: Tensor, R: int) -> Tensor:
    """The number of components that count, never 0."""
    return rank.clamp(1, max(R, 1))


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
    """The formula, and H (before a norm)."""
    ys, hs = [], []
    for i in range(call.n):
        x, u, v, bias, rank, activation = call.layer(i)
        norm, scale = call.norm(i), call.scale(i)
        h = shrink(x, v, rank, 1.0 if norm is not None else scale)
        g = h if norm is None else normed(h, norm, call.norm_eps, rank, scale)
        ys.append(ACTIVATIONS[activation](expand(g, u, bias, rank, call.residual(i))))
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
) -> InputGrads:
    """(dxs, dnorms, dzs, hs, dhs): gradients of x and norm, and what `weight_grads` needs.

    With dz = dy * act'(z): dH = dz @ u[:, :r] and dx = dH @ v[:r]. An x that the layers share has
    the sum of its gradients. With a norm, n = h / rms and G = scale · norm · n between the factors:
    dG = dz @ u[:, :r], dnorm = scale · the sum of dG · n over rows, dn = scale · norm · dG, and
    dh = (dn - n · mean(dn · n)) / rms; `hs` then are the Gs that u was multiplied with.

    Args:
        call: of the forward, each x (M, K).
        dys: gradients of y (M, N).
        hs: H of the forward, or None to compute it again (which also keeps it differentiable).
        ys: outputs of the forward; only looked at for relu, where they save computing z.
        needs: which of x, u, v, bias want a gradient; what nobody needs is None.
        strategy: not used here; every backend takes it.
    """
    dxs: Grads = [None] * len(call.xs)
    dnorms: Grads = []
    kept = []
    for i in range(call.n):
        dx, dnorm, *rest = _input_grad(call, i, dys[i], hs[i], ys[i], needs)
        dnorms.append(dnorm)
        i_x = 0 if len(dxs) == 1 else i
        before = dxs[i_x]
        dxs[i_x] = dx if before is None or dx is None else before + dx
        kept.append(rest)
    dzs: Sequence[Tensor]
    dzs, hs, dhs = zip(*kept, strict=True)  # type: ignore[assignment]
    return dxs, dnorms, dzs, hs, dhs


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
    """(dx, dnorm, dz, H or G, dH) of layer i, None for what nothing needs."""
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
    norm, scale = call.norm(i), call.scale(i)
    if h is None and (needs_u or needs_z or norm is not None):
        h = shrink(x, v_r, rank, 1.0 if norm is not None else scale)
    if norm is not None:
        parts = _normed_parts(_present(h), norm, call.norm_eps, rank)
        h = (parts[0] * (parts[2] * scale)).to(x.dtype)
    if activation is None:
        dz = dy
    else:
        z = expand(_present(h), u_r, bias, residual=call.residual(i)) if needs_z else y
        dz = activation_backward(dy, _present(z), activation)
    dh = dx = dnorm = None
    if needs_x or needs_v or norm is not None:
        dh = scaled(dz @ u_r, scale)
        if isinstance(rank, Tensor):
            dh = zero_beyond(dh, rank)
        if norm is not None:
            dnorm, dh = _norm_grads(dh, *parts, norm, rank)
        if needs_x:
            dx = dh @ v_r
    return dx, dnorm, dz, h, dh


def _norm_grads(
    dg: Tensor, unit: Tensor, inverse: Tensor, weight: Tensor, norm: Tensor, rank: int | Tensor
) -> tuple[Tensor, Tensor]:
    """(dnorm (R,), dh) of what `_normed_parts` returned, dg being the gradient of norm · unit."""
    wide = dg.to(unit.dtype)
    R = norm.shape[0]
    dnorm = (wide * unit).sum(0)
    dnorm = F.pad(dnorm, (0, R - dnorm.shape[0])).to(norm.dtype)
    count = _clamped(rank, R) if isinstance(rank, Tensor) else unit.shape[-1]
    dn = wide * weight
    dh = inverse * (dn - unit * ((dn * unit).sum(-1, keepdim=True) / count))
    return dnorm, dh.to(dg.dtype)


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def zero_beyond(matrix: Tensor, rank: Tensor) -> Tensor:
    """Zero the columns from `rank` on, whatever they hold, without asking the device for it."""
    active = torch.arange(matrix.shape[-1], device=matrix.device) < rank
    return torch.where(active, matrix, 0)
