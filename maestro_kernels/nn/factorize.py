"""From a matrix to its two ordered factors: pure functions on tensors, no modules.

Everything is computed in float64 and rounded once, to the dtype of the matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Share of the mean input energy added to every direction, so that directions the data never showed
# are ordered by the weight itself. It cannot make the result worse on the data than a plain SVD:
# the plain SVD already minimises the term that is added.
_RIDGE = 1e-6


def factorize(weight: Tensor, rank: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors u, v of which every prefix is the best approximation of the weight at that rank.

    For each r, u[:, :r] @ v[:r] minimises ||(weight - W_r) S||_F over all W_r of rank r, where
    S @ S.T is `moment`, or the identity without one (the truncated SVD). The minimum is Q Q^T W, Q
    the first eigenvectors of W (S S^T) W^T, so S is never formed or inverted: a singular moment is
    safe. Both factors carry the same norm in each component.

    Args:
        weight: (N, K), any floating-point dtype, finite.
        rank: components kept, 0 <= rank <= min(N, K).
        moment: (K, K) sum of x x^T over the layer's inputs, finite, symmetric; its scale does not
            matter.

    Returns:
        u (N, rank) and v (rank, K), contiguous, dtype and device of weight.

    Raises:
        ValueError: a shape or the rank does not fit.

    Source:
        Maestro (arXiv 2308.14929) for the balanced SVD; Eckart and Young, 1936; weighting by second
        moments as in SVD-LLM (arXiv 2403.07378), without its Cholesky factor.
    """
    N, K = _check(weight, rank)
    w = weight.detach().double()
    # Squares of huge and tiny weights would leave the range of float64.
    peak = w.abs().max() if w.numel() else w.new_ones(())
    peak = torch.where(peak > 0, peak, 1.0)
    w = w / peak
    # Left directions live in the span of the columns: with N > K a QR makes them K-dimensional.
    basis, core = torch.linalg.qr(w) if N > K else (None, w)
    q = _top_directions(core, rank, None if moment is None else _regular(moment, K))
    p = q.mT @ core
    q = q if basis is None else basis @ q
    norms = torch.linalg.vector_norm(p, dim=1)
    # A component of norm zero keeps its direction in u: two zero factors could never be trained.
    top = norms.max() if rank else norms.new_ones(())
    floor = torch.where(top > 0, top * torch.finfo(torch.float64).eps, 1.0)
    scale = norms.clamp_min(floor).sqrt()
    u, v = q * (scale * peak.sqrt()), p / scale[:, None] * peak.sqrt()
    return u.to(weight.dtype).contiguous(), v.to(weight.dtype).contiguous()


def recompress(u: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of which every prefix is the best approximation of u @ v, which is not formed.

    Args:
        u: (N, R), any floating-point dtype, finite.
        v: (R, K).
        rank: components kept, 0 <= rank <= R; at most min(N, K) come out.

    Returns:
        u (N, rank) and v (rank, K), contiguous, dtype and device of u, of equal norms in each
        component.
    """
    basis_u, core_u = torch.linalg.qr(u.detach().double())
    basis_v, core_v = torch.linalg.qr(v.detach().double().mT)
    left, values, right = torch.linalg.svd(core_u @ core_v.mT, full_matrices=False)
    scale = values[:rank].sqrt()
    new_u = basis_u @ (left[:, :rank] * scale)
    new_v = (scale[:, None] * right[:rank]) @ basis_v.mT
    return new_u.to(u.dtype).contiguous(), new_v.to(u.dtype).contiguous()


def _top_directions(core: Tensor, rank: int, moment: Tensor | None) -> Tensor:
    """The first `rank` eigenvectors of core @ moment @ core.T as columns, largest value first."""
    gram = core @ (core.mT if moment is None else moment @ core.mT)
    vectors: Tensor = torch.linalg.eigh((gram + gram.mT) / 2).eigenvectors
    return vectors.flip(1)[:, :rank]


def _regular(moment: Tensor, K: int) -> Tensor:
    if moment.shape != (K, K):
        raise ValueError(f"factorize: moment: expected shape ({K}, {K}), got {tuple(moment.shape)}")
    moment = moment.detach().double()
    mean = moment.diagonal().mean()
    # Inputs that were always zero say nothing: fall back to the identity, which is the plain SVD.
    moment = moment / torch.where(mean > 0, mean, 1.0)
    return moment + torch.eye(K, dtype=moment.dtype, device=moment.device) * _RIDGE


def _check(weight: Tensor, rank: int) -> tuple[int, int]:
    if weight.dim() != 2:
        raise ValueError(
            f"factorize: weight: expected a matrix (N, K), got shape {tuple(weight.shape)}"
        )
    N, K = weight.shape
    if not 0 <= rank <= min(N, K):
        raise ValueError(f"factorize: rank: expected 0 <= rank <= {min(N, K)}, got {rank}")
    return N, K


def factor_bounds(N: int, K: int, R: int) -> tuple[float, float]:
    """Bounds (for u, for v) of uniform draws whose product varies like nn.Linear's weight.

    An entry of u @ v then has variance 1 / (3 K), that of nn.Linear (N, K) and of nn.Conv2d with K
    inputs per output, and each component has the same expected norm in u and in v, as after an SVD.
    """
    N, K, R = max(N, 1), max(K, 1), max(R, 1)
    variance_u = 1 / math.sqrt(3 * R * N)
    variance_v = math.sqrt(N / (3 * R)) / K
    return math.sqrt(3 * variance_u), math.sqrt(3 * variance_v)


def random_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Fresh factors u (N, rank), v (rank, K) with the variance nn.Linear starts at.

    Args:
        weight: (N, K); only its shape, dtype and device are used.
        rank: 0 <= rank <= min(N, K).
    """
    N, K = _check(weight, rank)
    bound_u, bound_v = factor_bounds(N, K, rank)
    u = weight.detach().new_empty(N, rank).uniform_(-bound_u, bound_u)
    v = weight.detach().new_empty(rank, K).uniform_(-bound_v, bound_v)
    return u, v


def merge(u: Tensor, v: Tensor) -> Tensor:
    """W = u @ v, summed in float64 and rounded once to the dtype of u; (..., N, r), (..., r, K)."""
    return (u.detach().double() @ v.detach().double()).to(u.dtype)
