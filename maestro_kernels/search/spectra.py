"""How much of a matrix, or of its outputs, a prefix of its factors loses: pure tensor functions.

Everything is computed in float64. Shares are of squared norms, so 0 is exact and 1 is rank 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def singular_values(weight: Tensor, moment: Tensor | None = None) -> Tensor:
    """Singular values of W S, float64 (min(N, K),), non-increasing; S S^T = moment or identity.

    Their squares are the eigenvalues of W (S S^T) W^T, so S is never formed and a singular moment
    is safe. The best rank-r approximation of W on inputs with this moment loses the sum of the
    squares from r on: the factors of `convert(init="data")` do, of init="svd" without a moment.

    Args:
        weight: (N, K).
        moment: (K, K) sum of x x^T over the layer's inputs.
    """
    w = weight.detach().double()
    if moment is None:
        values: Tensor = torch.linalg.svdvals(w)
        return values
    N, K = w.shape
    # The Gram matrix need not be larger than K x K: rows of W lie in the span of its R factor.
    core = torch.linalg.qr(w, mode="r").R if N > K else w
    # Squares of huge and tiny values would leave the range of float64.
    peak, scale = _peak(core), _peak(moment.double())
    core = core / peak
    gram = core @ (moment.double() / scale) @ core.mT
    energies = torch.linalg.eigvalsh((gram + gram.mT) / 2).flip(0).clamp_min(0)
    found: Tensor = energies.sqrt() * peak * scale.sqrt()
    return found


def truncation_shares(values: Tensor) -> Tensor:
    """sum_{i >= r} s_i^2 / sum s_i^2 for r = 0..R, (R + 1,): what rank r loses of W S.

    Args:
        values: singular values (R,) or, of several groups, (groups, R).
    """
    values = values / _peak(values)
    energies = values.square().reshape(-1, values.shape[-1]).sum(0)
    return tail_parts(energies.flip(0).cumsum(0).flip(0))


def tail_shares(u: Tensor, v: Tensor, moments: Tensor | None = None) -> Tensor:
    """||u[:, r:] v[r:] S||^2 / ||u v S||^2 for r = 0..R, (R + 1,): what a prefix loses.

    With G = (u^T u) * (v S S^T v^T), elementwise, the squared norm of a tail is the sum of
    G[r:, r:]. Trained components need not be orthogonal, so their own norms do not tell.

    Args:
        u: (groups, N, R).
        v: (groups, R, K).
        moments: (groups, K, K), or None for the identity.
    """
    u, v = u.detach().double(), v.detach().double()
    u, v = u / _peak(u), v / _peak(v)
    weighted = v if moments is None else v @ (moments.double() / _peak(moments))
    gram = ((u.mT @ u) * (weighted @ v.mT)).sum(0)
    blocks = gram.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return tail_parts(blocks.clamp_min(0))


def tail_parts(tails: Tensor) -> Tensor:
    """Divide by the first entry, which is the whole, and append the 0 of full rank."""
    whole = tails[:1]
    shares = tails / torch.where(whole > 0, whole, 1.0)
    return torch.cat((shares, shares.new_zeros(1)))


def _peak(values: Tensor) -> Tensor:
    peak = values.abs().max() if values.numel() else values.new_ones(())
    return torch.where(peak > 0, peak, 1.0)
