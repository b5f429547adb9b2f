"""The row kernel: a program owns BLOCK_M rows, H stays in registers between the two products.

Only device code lives here; row_config.py plans, row.py launches.

Blocks of rows that would begin a wave without filling it are shared: several programs make the same
H, each writes a part of the columns of y. Such a wave then ends earlier by the time of the others'
parts.
"""

import triton
import triton.language as tl

from maestro_kernels.backends.triton.epilogue import apply_activation
from maestro_kernels.backends.triton.norm import inverse_root, weighted

__all__ = ["row_kernel"]


@triton.jit
def _shrink_rows(
    x, s, M, K, rank_read, stride_xm, stride_sr, stride_sk, i_m,
    TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One row block of x · Sᵀ, (BLOCK_M, BLOCK_R) in float32."""
    b_h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if DESCRIPTORS:
        # Without disable_licm Triton 3.6 makes ptxas serialise the wgmma of this loop (C7514) when
        # there are 8 warps and S is stored (R, K).
        for o_k in tl.range(0, K, BLOCK_K, disable_licm=True):
            b_x = x.load([i_m * BLOCK_M, o_k])
            if TRANSPOSED:
                b_s = s.load([o_k, 0])
            else:
                b_s = s.load([0, o_k]).T
            b_h = tl.dot(b_x, b_s, b_h, input_precision=INPUT_PRECISION)
    else:
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        o_r = tl.arange(0, BLOCK_R)
        o_k = tl.arange(0, BLOCK_K)
        p_x = x + o_m[:, None].to(tl.int64) * stride_xm + o_k[None, :]
        p_s = s + o_r[None, :].to(tl.int64) * stride_sr + o_k[:, None].to(tl.int64) * stride_sk
        for o_k0 in range(0, K, BLOCK_K):
            m_k = o_k0 + o_k < K
            b_x = tl.load(p_x, mask=(o_m < M)[:, None] & m_k[None, :], other=0.0)
            b_s = tl.load(p_s, mask=(o_r < rank_read)[None, :] & m_k[:, None], other=0.0)
            b_h = tl.dot(b_x, b_s, b_h, input_precision=INPUT_PRECISION)
            p_x += BLOCK_K
            p_s += BLOCK_K * stride_sk
    return b_h


@triton.jit
def _expand_rows(
    b_h, e, p_bias, p_residual, p_y, rank, rank_read, M, N, o_begin, o_end, stride_en, stride_er,
    o_m, o_r, CLEAR: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr, BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns o_begin .. o_end - 1 of rows of y = act(H · Eᵀ + bias + residual).

    CLEAR: what E holds from the rank on is set to zero.
    """
    # Counted from zero: from o_begin on, ptxas serialises the wgmma of dx (C7514).
    for i_n in range(0, o_end - o_begin, BLOCK_N):
        o_n0 = o_begin + i_n
        o_n = o_n0 + tl.arange(0, BLOCK_N)
        if DESCRIPTORS:
            if TRANSPOSED:
                b_e = e.load([0, o_n0])
            else:
                b_e = e.load([o_n0, 0]).T
        else:
            p_e = e + o_n[None, :].to(tl.int64) * stride_en + o_r[:, None].to(tl.int64) * stride_er
            m_e = (o_n < N)[None, :] & (o_r < rank_read)[:, None]
            b_e = tl.load(p_e, mask=m_e, other=0.0)
        if CLEAR:
            b_e = tl.where((o_r < rank)[:, None], b_e, 0.0)
        b_y = tl.dot(b_h, b_e, input_precision=INPUT_PRECISION)
        if HAS_BIAS:
            b_y += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
        m_y = (o_m < M)[:, None] & (o_n < N)[None, :]
        if p_residual is not None:
            b_y += tl.load(p_residual + o_n[None, :], mask=m_y, other=0.0).to(tl.float32)
        b_y = apply_activation(b_y, ACTIVATION)
        tl.store(p_y + o_n[None, :], b_y.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["rank", "M", "num_whole", "num_splits"])
def row_kernel(
    x, s, e, p_bias, p_y, p_h, rank, M, N, K, R, num_whole, num_splits,
    stride_xm, stride_sr, stride_sk, stride_en, stride_er, stride_ym, stride_hm, stride_resm,
    p_residual, scale, p_norm, norm_eps,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SAVE_H: tl.constexpr,
    TENSOR_RANK: tl.constexpr, ROUND_RANK: tl.constexpr, TRANSPOSED: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of y = act(H · E[:, :r]ᵀ + bias + residual) and of H = scale · x · S[:r]ᵀ.

    Reads x (M, K), S (R, K), E (N, R), bias (N,), residual (M, N); writes y (M, N) and H, (M, r) or
    (M, R). Without a residual p_residual and stride_resm are None, scale is where it is 1.
    With a norm, p_norm not None, rows of x · S[:r]ᵀ are normalised before scale; H is from before.
    S, E = v, u is the forward; S, E = uᵀ, vᵀ turns dy into dx, and H is then dH.

    The first num_whole blocks of rows have a program each, every other one has num_splits of them.
    rank is an int, or a pointer to int32 (TENSOR_RANK) that is clamped to 0..R.
    ROUND_RANK: factors are read up to the next multiple of 8 of the rank, which needs R % 8 == 0;
    a mask that ends anywhere in a contiguous dimension costs 2-byte loads.
    TRANSPOSED: S and E lie in memory as (K, R) and (R, N).
    DESCRIPTORS: x, s, e are host descriptors of the tensors as they lie in memory.
    """
    i_item = tl.program_id(0)
    i_split = tl.maximum(i_item - num_whole, 0) % num_splits
    i_m = tl.minimum(i_item, num_whole + tl.maximum(i_item - num_whole, 0) // num_splits)
    parts = tl.where(i_item < num_whole, 1, num_splits)
    num_n = tl.cdiv(N, BLOCK_N)
    o_begin = num_n * i_split // parts * BLOCK_N
    o_end = tl.minimum(num_n * (i_split + 1) // parts * BLOCK_N, N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = tl.arange(0, BLOCK_R)
    if TENSOR_RANK:
        rank = tl.minimum(tl.maximum(tl.load(rank), 0), R)
    rank_up = tl.cdiv(rank, 8) * 8
    rank_read = rank_up if ROUND_RANK else rank
    b_h = _shrink_rows(
        x, s, M, K, rank_read, stride_xm, stride_sr, stride_sk, i_m,
        TRANSPOSED, DESCRIPTORS, BLOCK_M, BLOCK_K, BLOCK_R, INPUT_PRECISION,
    )  # fmt: skip
    if scale is not None and p_norm is None:
        b_h *= scale
    # The same rounding as between two matmuls; the tile becomes the A operand of the next product.
    b_h = tl.where((o_r < rank)[None, :], b_h, 0.0).to(p_y.dtype.element_ty)
    if SAVE_H:
        width = tl.cdiv(R, 8) * 8 if TENSOR_RANK else rank_up
        p_h += o_m[:, None].to(tl.int64) * stride_hm + o_r[None, :]
        # The first of those who share a block stores H.
        width = tl.where(i_split == 0, width, 0)
        tl.store(p_h, b_h, mask=(o_m < M)[:, None] & (o_r < width)[None, :])
    if p_norm is not None:
        b_f, b_squares = weighted(b_h, p_norm, o_r, rank, True)
        b_factor = inverse_root(b_squares, rank, norm_eps)
        if scale is not None:
            b_factor *= scale
        b_h = (b_f * b_factor[:, None]).to(p_y.dtype.element_ty)
    p_y += o_m[:, None].to(tl.int64) * stride_ym
    if p_residual is not None:
        p_residual += o_m[:, None].to(tl.int64) * stride_resm
    # Descriptors end at the width, and u is read in eights: then what follows the rank comes along.
    # H is zero there, but zero times NaN is not. Clearing it takes u through registers, so there is
    # a loop without for those who need not. Exact products of float32 take it there anyway, and a
    # second loop would make them spill: they read u exactly.
    exact: tl.constexpr = TRANSPOSED or INPUT_PRECISION == "ieee"
    if DESCRIPTORS:
        clear = rank < R if TENSOR_RANK else False
    else:
        clear = rank < rank_read if ROUND_RANK and not exact else False
    rank_read = rank if exact else rank_read
    if clear:
        _expand_rows(
            b_h, e, p_bias, p_residual, p_y, rank, rank_read, M, N, o_begin, o_end, stride_en,
            stride_er, o_m, o_r, True, HAS_BIAS, ACTIVATION, TRANSPOSED, DESCRIPTORS, BLOCK_N,
            INPUT_PRECISION,
        )  # fmt: skip
    else:
        _expand_rows(
            b_h, e, p_bias, p_residual, p_y, rank, rank_read, M, N, o_begin, o_end, stride_en,
            stride_er, o_m, o_r, False, HAS_BIAS, ACTIVATION, TRANSPOSED, DESCRIPTORS, BLOCK_N,
            INPUT_PRECISION,
        )  # fmt: skip
