"""Two library matmuls on prefix views of the factors: cuBLAS on a GPU, oneDNN or MKL on a CPU.

No factor is copied for a rank. The gradient is the reference's: it is already library matmuls.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maestro_kernels.backends import reference, workspace

if TYPE_CHECKING:
    from maestro_kernels.call import Call, Grads, InputGrads, Needs
    from maestro_kernels.problem import LoDProblem


TWO = "two matmuls"
# Of a group that reads one x: the products with all v as one, then one product per layer.
ONE_SHRINK = "one shrink"


def unsupported(problem: LoDProblem) -> str | None:
    """Why this backend cannot serve the problem: it always can."""
    return None


def forward(
    call: Call, *, save_h: bool, strategy: str
) -> tuple[list[Tensor], Sequence[Tensor | None]]:
    """Ys = act((scale · x @ v[:r].T) @ u[:, :r].T + bias + residual), and Hs (before a norm)."""
    if strategy == ONE_SHRINK:
        return _one_shrink(call)
    ys, hs = [], []
    for i in range(call.n):
        added = call.residual(i), call.scale(i), call.norm(i), call.norm_eps
        y, h = layer(*call.layer(i), *added, save_h=save_h)
        ys.append(y)
        hs.append(h)
    return ys, hs


def layer(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rank: int | Tensor,
    activation: str | None,
    residual: Tensor | None = None,
    scale: float = 1.0,
    norm: Tensor | None = None,
    norm_eps: float = 0.0,
    *,
    save_h: bool = False,
) -> tuple[Tensor, Tensor]:
    """Y and H of one layer, for x (..., K); with a residual, both of two dimensions."""
    R = v.shape[0]
    pad = R if isinstance(rank, Tensor) else 0
    rank = host_rank(rank, R)
    if isinstance(rank, Tensor):
        # What lies beyond a rank that only the device knows is multiplied too, and zero times NaN
        # is NaN: both H and u are selected, by a mask of R elements.
        index, zero = workspace.ramp(v.device, R, v.dtype)
        beyond = index >= rank
        h, pad = F.linear(x, v).masked_fill_(beyond, 0), 0
        u = torch.where(beyond, zero, u)
    elif rank == R:
        h, pad = F.linear(x, v), 0
    else:
        h = F.linear(x, v[:rank])
        u = u[:, :rank]
    g = h
    if norm is not None:
        g, scale = _normed(h, norm, norm_eps, rank, scale), 1.0
    elif residual is None or save_h:
        g, scale = reference.scaled(h, scale), 1.0
        h = g
    if residual is None:
        y = F.linear(g, u, bias)
    else:
        # All in the pass over y; a library has a place for one matrix, not for a bias beside it.
        y = torch.addmm(residual, g, u.mT, alpha=scale)
        y = y if bias is None else y + bias
    if activation is not None:
        y = reference.ACTIVATIONS[activation](y)
    if pad and save_h:  # H of a tensor rank is as wide as the factors
        h = F.pad(h, (0, pad - h.shape[-1]))
    return y, h


@functools.cache
def _native_for(dtype: torch.dtype) -> Any:
    """The module of the compiled library, None where it has nothing for tensors of a dtype."""
    native = importlib.import_module("maestro_kernels.backends.native")  # which imports this one
    return native if native.serves(dtype) else None


def _normed(h: Tensor, norm: Tensor, eps: float, rank: int | Tensor, scale: float) -> Tensor:
    """`reference.normed`, by torch's own RMSNorm where the host knows the rank."""
    if isinstance(rank, Tensor) or not h.numel():
        return reference.normed(h, norm, eps, rank, scale)
    if h.is_cpu and not (torch.is_grad_enabled() and (h.requires_grad or norm.requires_grad)):
        native = _native_for(h.dtype)
        if native is not None:
            return native.rms_norm(h, norm, eps, scale)
    return reference.scaled(F.rms_norm(h, h.shape[-1:], norm[: h.shape[-1]], eps), scale)


def input_grads(
    call: Call,
    dys: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    ys: Sequence[Tensor | None],
    *,
    needs: Needs,
    strategy: str,
) -> InputGrads:
    """(dxs, dnorms, dzs, Hs, dHs) by library matmuls, all dH as one for those of ONE_SHRINK."""
    if strategy == ONE_SHRINK:
        return _one_shrink_input_grads(call, dys, hs, ys, needs)
    call, hs = _on_host(call, hs)
    return reference.input_grads(call, dys, hs, ys, needs=needs, strategy=strategy)


def weight_grads(
    call: Call,
    dzs: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    dhs: Sequence[Tensor | None],
    *,
    needs: Needs,
    strategy: str,
) -> tuple[Grads, Grads, Grads]:
    """(dus, dvs, dbiases) by library matmuls; what `needs` does not ask for is None."""
    if strategy != ONE_SHRINK:
        return reference.weight_grads(call, dzs, hs, dhs, needs=needs, strategy=strategy)
    _, needs_u, needs_v, needs_bias = needs
    others = (False, needs_u, False, needs_bias)
    dus, dvs, dbiases = reference.weight_grads(
        call, dzs, hs, [None] * call.n, needs=others, strategy=TWO
    )
    (dh,) = dhs
    if needs_v and dh is not None:
        ranks: list[Any] = list(call.ranks)
        parts = (dh.mT @ call.xs[0]).split(ranks)
        beyond = [v.shape[0] - r for r, v in zip(ranks, call.vs, strict=True)]
        dvs = [F.pad(part, (0, 0, 0, rest)) for part, rest in zip(parts, beyond, strict=True)]
    return dus, dvs, dbiases


def _on_host(call: Call, hs: Sequence[Tensor | None]) -> tuple[Call, Sequence[Tensor | None]]:
    """The call, and what it saved, with ranks that the host can read as ints."""
    if not (isinstance(call.ranks, Tensor) and call.ranks.is_cpu):
        return call, hs
    given = call.ranks.reshape(-1)
    ranks: list[Any] = [host_rank(r, v.shape[0]) for r, v in zip(given, call.vs, strict=True)]
    hs = [h if h is None else h[:, :r] for h, r in zip(hs, ranks, strict=True)]
    return call._replace(ranks=ranks), hs


# --- groups that read one x --------------------------------------------------------------------


def takes_one_shrink(problems: Sequence[LoDProblem], *, shared_x: bool) -> bool:
    """Whether the layers can share the product with their v."""
    return shared_x and len(problems) > 1 and all(p.rank and p.is_plain for p in problems)


def _concatenated(vs: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """All v_i[:r_i] as one (r_1 + r_2 + ..., K).

    Copied for each call: parameters that share memory are refused by safetensors.save_model.
    """
    return torch.cat([v[:r] for r, v in zip(ranks, vs, strict=True)])


def _one_shrink(call: Call) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Hs = x @ cat(v_i[:r_i]).T cut apart, then y_i = act_i(H_i @ u_i[:, :r_i].T + bias_i)."""
    ranks = list(call.ranks)
    hs = F.linear(call.xs[0], _concatenated(call.vs, ranks)).split(ranks, dim=1)
    ys = []
    for i, (h, r) in enumerate(zip(hs, ranks, strict=True)):
        y = F.linear(h, call.us[i][:, :r], call.biases[i])
        activation = call.activations[i]
        ys.append(y if activation is None else reference.ACTIVATIONS[activation](y))
    return ys, hs


def _one_shrink_input_grads(
    call: Call,
    dys: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    ys: Sequence[Tensor | None],
    needs: Needs,
) -> InputGrads:
    """dH_i = dz_i @ u_i[:, :r_i], dx = cat(dH_i) @ cat(v_i[:r_i]); returns (cat(dH_i),) as dHs."""
    needs_x, needs_u, needs_v, needs_bias = needs
    _, norms, dzs, hs, dhs = reference.input_grads(
        call, dys, hs, ys, needs=(False, needs_u, needs_x or needs_v, needs_bias), strategy=TWO
    )
    if not (needs_x or needs_v):
        return [None], norms, dzs, hs, [None]
    dh = torch.cat([part for part in dhs if part is not None], dim=1)
    ranks: list[Any] = list(call.ranks)
    dx = dh @ _concatenated(call.vs, ranks) if needs_x else None
    return [dx], norms, dzs, hs, [dh]


def host_rank(rank: int | Tensor, R: int) -> int | Tensor:
    """A tensor rank in the host's own memory as an int 0..R: prefix views are then exact and less.

    On a GPU nobody waits for it: R columns are multiplied, those beyond the rank zero.
    """
    return min(max(int(rank), 0), R) if isinstance(rank, Tensor) and rank.is_cpu else rank
