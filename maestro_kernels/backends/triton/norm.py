"""RMSNorm of H between the two products: norm[:r] · h / sqrt(mean(h²) + eps) of every row h."""

import triton
import triton.language as tl

__all__ = ["inverse_root", "weighted"]


@triton.jit
def weighted(b_h, p_norm, o_r, rank, is_normed):
    """(norm · h, the sum of h² of each row), float32, of the ranks o_r; H itself if not normed.

    H is zero beyond the rank.
    """
    b_h = b_h.to(tl.float32)
    num_read = tl.where(is_normed, rank, 0)
    b_norm = tl.load(p_norm + o_r, mask=o_r < num_read, other=0.0).to(tl.float32)
    b_norm = tl.where(is_normed, b_norm, 1.0)
    return b_h * b_norm[None, :], tl.sum(b_h * b_h, 1)


@triton.jit
def inverse_root(b_squares, rank, eps):
    """1 / sqrt(squares / r + eps); a row without components has the root of eps."""
    return 1.0 / tl.sqrt(b_squares / tl.maximum(rank, 1) + eps)
