"""The expand kernel: y = act(H · u[:, :r]ᵀ + bias) of an H that a library's product has made.

Only device code lives here; expand_config.py has the tiles, expand.py launches.

H, u and y go through TMA: H lies in memory when the kernel in front has ended, so that no proxy
fence is missing here, as it would be where one launch both stores H and reads it. The descriptors
end at the rank: what follows it reads as zero, in H and in u, without a mask.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from maestro_kernels.backends.triton.epilogue import apply_activation

__all__ = ["expand_kernel"]


@triton.jit
def _store(y, p_bias, b_y, num_bias, o_m, o_n, ACTIVATION: tl.constexpr):
    """Store act(b_y + bias) as columns o_n, o_n + 1, ... of y.

    The bias is loaded where there is none, too, masked: between two parts of a tile the load keeps
    ptxas from computing the activations of both at once, for which it has no registers.
    """
    o_bias = o_n + tl.arange(0, b_y.shape[1])
    b_bias = tl.load(p_bias + o_bias, mask=o_bias < num_bias, other=0.0).to(tl.float32)
    b_y = apply_activation(b_y + b_bias[None, :], ACTIVATION)
    y.store([o_m, o_n], b_y.to(y.dtype))


@triton.jit(do_not_specialize=["rank", "num_bias"])
def expand_kernel(
    h, u, y, p_bias, rank, N, num_bias,
    ACTIVATION: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, STORE_N: tl.constexpr,
):  # fmt: skip
    """One tile of y = act(H · u[:, :r]ᵀ + bias); h, u and y are host descriptors, h and u end at r.

    num_bias: elements of the bias, N or 0.
    PDL: the launch may begin before the kernel in front of it, which makes H, has ended.
    STORE_N: columns that a store takes, all or half of them.
    """
    num_n = tl.cdiv(N, BLOCK_N)
    o_m = tl.program_id(0) // num_n * BLOCK_M
    o_n = tl.program_id(0) % num_n * BLOCK_N
    if PDL:
        gdc_wait()
    b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Without disable_licm Triton 3.6 makes ptxas serialise the wgmma of this loop (C7515) where
    # there are 8 warps.
    for o_r in tl.range(0, rank, BLOCK_R, disable_licm=True):
        b_y = tl.dot(h.load([o_m, o_r]), u.load([o_n, o_r]).T, b_y)
    if PDL:
        gdc_launch_dependents()
    if STORE_N == BLOCK_N:
        _store(y, p_bias, b_y, num_bias, o_m, o_n, ACTIVATION)
    else:
        # Columns of a thread's own registers: nothing changes hands.
        b_halves = tl.permute(tl.reshape(b_y, (BLOCK_M, 2, STORE_N)), (0, 2, 1))
        b_left, b_right = tl.split(b_halves)
        _store(y, p_bias, b_left, num_bias, o_m, o_n, ACTIVATION)
        _store(y, p_bias, b_right, num_bias, o_m, o_n + STORE_N, ACTIVATION)
