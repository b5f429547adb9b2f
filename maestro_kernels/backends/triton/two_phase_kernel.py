"""The two-phase persistent kernel: shrink tiles, then expand tiles, claimed by one ticket.

Only device code lives here; two_phase_config.py chooses tiles and grid, two_phase.py launches.

Phase 1 (shrink): a tile is (row block, layer, rank block, K split). Where K is split, a tile leaves
its float32 sum in its own slot of `partials`; the last tile to arrive adds the slots in the order
of the splits, so the result does not depend on timing, and stores H rounded to the dtype of x.
Phase 2 (expand): a tile is (layer, row block, block of N). It waits until every rank block of its
rows of H has been counted as ready, then loops over the active rank.

All tiles are numbered, phase 1 first, and claimed from one counter. A program therefore only waits
for tiles that running programs hold: no co-residency is needed, and any number of programs will do.
The last program to leave sets the counters back to zero for the next launch on the same stream.

Few rows (PREFETCH): what such a launch waits for is its factors. Every program asks for a share of
them before it does anything else, so that all of their bytes are on the way to L2 at once, also
those of the expand, while H is made. Which program asks for what is a hint and nothing more.
With programmatic dependent launch (PDL) that happens while the kernel before still runs: factors
are the only memory that may be looked at then.

Factors are read through pointers, not TMA: H is written by ordinary stores and read by other
programs in the same launch, which TMA would need a proxy fence for that Triton cannot express, and
the pointers of a group are chosen at run time, which host descriptors cannot be.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from maestro_kernels.backends.triton import two_phase_config
from maestro_kernels.backends.triton.epilogue import apply_activation
from maestro_kernels.backends.triton.layers import RANK_BITS, element, pick, vector
from maestro_kernels.backends.triton.norm import inverse_root, weighted

__all__ = ["expand_sum", "two_phase_kernel"]

_MAX_SPLIT = tl.constexpr(two_phase_config.MAX_SPLIT)
_MIN_STEPS = tl.constexpr(two_phase_config.MIN_STEPS)
_COUNTERS_BEFORE_ARRIVALS = tl.constexpr(two_phase_config.COUNTERS_BEFORE_ARRIVALS)
_PREFETCHED = tl.constexpr(two_phase_config.PREFETCHED)
_EXIT = tl.constexpr(two_phase_config.COUNTERS_BEFORE_ARRIVALS // 2)


@triton.jit
def _eights(value, KNOWN: tl.constexpr):
    """A size or stride that the host knows to be a multiple of 8.

    Triton notices multiples of 16 only, so that R = 200 would be read two bytes at a time.
    """
    if KNOWN:
        value = value // 8 * 8
    return value


@triton.jit
def _prefetch(p, rows, columns, stride_row):
    """Ask L2 for this program's share of a matrix of contiguous rows."""
    LINE: tl.constexpr = 1024 // p.dtype.element_ty.primitive_bitwidth
    per_row = tl.cdiv(columns, LINE)
    i_end = rows * per_row * (tl.program_id(0) + 1) // tl.num_programs(0)
    for i in range(rows * per_row * tl.program_id(0) // tl.num_programs(0), i_end, 128):
        o_line = tl.minimum(i + tl.arange(0, 128), i_end - 1)
        p_line = p + (o_line // per_row).to(tl.int64) * stride_row + o_line % per_row * LINE
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [p_line], tl.int32, False, 1
        )


@triton.jit
def _prefetch_factors(s, e, rank, K, N, stride_sr, stride_sk, stride_en, stride_er, ROWS):
    """Ask L2 for S[:r] and E[:, :r]; of E only as much as stays there beside the rest."""
    most = _PREFETCHED // (e.dtype.element_ty.primitive_bitwidth // 8)
    if ROWS:
        _prefetch(s, rank, K, stride_sr)
        _prefetch(e, tl.minimum(N, most // tl.maximum(rank, 1)), rank, stride_en)
    else:
        _prefetch(s, K, rank, stride_sk)
        _prefetch(e, tl.minimum(rank, most // tl.maximum(N, 1)), N, stride_er)


@triton.jit
def _shrink_sum(
    p_x, p_s, M, K, rank_read, stride_xm, stride_sr, stride_sk, i_m, i_r, i_first, i_end,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile of x · Sᵀ over the K steps i_first .. i_end - 1, in float32."""
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_k = tl.arange(0, BLOCK_K)
    o_k0 = i_first * BLOCK_K
    p_x = p_x + o_m[:, None].to(tl.int64) * stride_xm + (o_k0 + o_k)[None, :]
    p_s = (
        p_s + o_r[None, :].to(tl.int64) * stride_sr + (o_k0 + o_k)[:, None].to(tl.int64) * stride_sk
    )
    b_h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for i_step in range(i_first, i_end):
        m_k = i_step * BLOCK_K + o_k < K
        b_x = tl.load(p_x, mask=(o_m < M)[:, None] & m_k[None, :], other=0.0)
        b_s = tl.load(p_s, mask=(o_r < rank_read)[None, :] & m_k[:, None], other=0.0)
        b_h = tl.dot(b_x, b_s, b_h, input_precision=INPUT_PRECISION)
        p_x += BLOCK_K
        p_s += BLOCK_K * stride_sk
    return b_h


@triton.jit
def expand_sum(
    b_y, p_h, p_e, M, N, rank, stride_hm, stride_en, stride_er, i_m, i_n, EIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, TAIL_R: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """b_y + H · Eᵀ of one tile. EIGHTS: E is contiguous along r, and read 8 ranks at a time."""
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = tl.arange(0, BLOCK_R)
    p_h = p_h + o_m[:, None].to(tl.int64) * stride_hm
    p_e = p_e + o_n[None, :].to(tl.int64) * stride_en
    rank_stored = tl.cdiv(rank, 8) * 8
    # Eights that end beyond the rank bring in what is not ours: H is zero there, but zero times NaN
    # is not. Clearing it takes E through registers, which only the last TAIL_R ranks have to pay.
    rank_as_read = rank
    if EIGHTS:
        rank_as_read = tl.where(rank % 8 == 0, rank, rank // TAIL_R * TAIL_R) // 8 * 8
        rank_stored = rank_as_read
    p_hr = p_h + o_r[None, :]
    p_er = p_e + o_r[:, None].to(tl.int64) * stride_er
    for o_r0 in range(0, rank_as_read, BLOCK_R):
        m_h = (o_r0 + o_r < rank_stored)[None, :]
        m_e = (o_r0 + o_r < rank_as_read)[:, None]
        b_h = tl.load(p_hr, mask=(o_m < M)[:, None] & m_h, other=0.0)
        b_e = tl.load(p_er, mask=m_e & (o_n < N)[None, :], other=0.0)
        b_y = tl.dot(b_h, b_e, b_y, input_precision=INPUT_PRECISION)
        p_hr += BLOCK_R
        p_er += BLOCK_R * stride_er
    if EIGHTS:
        if rank_as_read < rank:
            o_t = rank_as_read + tl.arange(0, TAIL_R)
            m_t = o_t < tl.cdiv(rank, 8) * 8
            b_h = tl.load(p_h + o_t[None, :], mask=(o_m < M)[:, None] & m_t[None, :], other=0.0)
            p_et = p_e + o_t[:, None].to(tl.int64) * stride_er
            b_e = tl.load(p_et, mask=m_t[:, None] & (o_n < N)[None, :], other=0.0)
            b_e = tl.where((o_t < rank)[:, None], b_e, 0.0)
            b_y = tl.dot(b_h, b_e, b_y, input_precision=INPUT_PRECISION)
    return b_y


@triton.jit
def _store_h(b_h, p_h, M, rank, width, stride_hm, i_m, i_r, BLOCK_M, BLOCK_R):
    """H of one tile: exact zeros from `rank` to `width`."""
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    b_h = tl.where((o_r < rank)[None, :], b_h, 0.0)
    p_h = p_h + o_m[:, None].to(tl.int64) * stride_hm + o_r[None, :]
    tl.store(p_h, b_h.to(p_h.dtype.element_ty), mask=(o_m < M)[:, None] & (o_r < width)[None, :])


@triton.jit
def _squares_of(p_squares, rank, M, eps, scale, is_normed, i_m, BLOCK_M, BLOCK_R):
    """What the rows of a tile of y are multiplied by: scale / rms of H before the norm's weight."""
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    b_squares = tl.zeros((BLOCK_M,), tl.float32)
    p_squares += o_m
    for _ in range(tl.cdiv(rank, BLOCK_R)):
        b_squares += tl.load(p_squares, mask=o_m < M, other=0.0)
        p_squares += M
    return tl.where(is_normed, inverse_root(b_squares, rank, eps) * scale, 1.0)


@triton.jit
def _reduce_splits(b_h, p_slots, p_arrivals, i_split, num_splits, BLOCK_M, BLOCK_R):
    """(sum over splits, whether this tile was the last): slots are added in the order of splits."""
    SIZE: tl.constexpr = BLOCK_M * BLOCK_R
    o_slot = tl.arange(0, BLOCK_M)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    tl.store(p_slots + i_split * SIZE + o_slot, b_h)
    # Triton 3.6 puts no barrier of its own between the stores of a tile and an atomic: without
    # this one thread would publish what other warps have yet to store.
    tl.debug_barrier()
    is_last = tl.atomic_add(p_arrivals, 1, sem="acq_rel") == num_splits - 1
    if is_last:
        tl.store(p_arrivals, 0)
        b_h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        # Unrolled, because the loads of several slots must be in flight together; one large slot is
        # enough in flight, and several would not fit into the registers beside the sum.
        for i in tl.range(0, num_splits, loop_unroll_factor=4 if SIZE <= 4096 else 1):
            b_h += tl.load(p_slots + i * SIZE + o_slot)
    return b_h, is_last


@triton.jit
def _epilogue(
    b_y, p_bias, p_residual, M, N, stride_resm, i_layer, i_m, i_n, ACTIVATIONS: tl.constexpr,
    BIAS_BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """act(b_y + bias + residual) of one layer of the group."""
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if BIAS_BITS:
        N_bias = tl.where((BIAS_BITS >> i_layer) & 1 == 1, N, 0)
        b_y += tl.load(p_bias + o_n, mask=o_n < N_bias, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL_BITS:
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        p_residual = p_residual + o_m[:, None].to(tl.int64) * stride_resm + o_n[None, :]
        N_residual = tl.where((RESIDUAL_BITS >> i_layer) & 1 == 1, N, 0)
        m_y = (o_m < M)[:, None] & (o_n < N_residual)[None, :]
        b_y += tl.load(p_residual, mask=m_y, other=0.0).to(tl.float32)
    if len(ACTIVATIONS) == 1:
        b_y = apply_activation(b_y, tl.constexpr(ACTIVATIONS[0]))
    else:
        for i in tl.static_range(len(ACTIVATIONS)):
            if i_layer == i:
                b_y = apply_activation(b_y, tl.constexpr(ACTIVATIONS[i]))
    return b_y


@triton.jit
def _leave(p_ticket, p_ready, num_ready):
    """Count this program out; the last one sets the counters back to zero."""
    tl.debug_barrier()
    if tl.atomic_add(p_ticket + _EXIT, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(p_ticket, 0)
        tl.store(p_ticket + _EXIT, 0)
        o_ready = tl.arange(0, 256)
        for i in range(0, num_ready, 256):
            tl.store(p_ready + i + o_ready, 0, mask=i + o_ready < num_ready)


@triton.jit(do_not_specialize=["ranks", "M", "split_target"])
def two_phase_kernel(
    xs, ss, es, biases, ys, hs, Ns, Ks, Rs, ranks,
    strides_xm, strides_sr, strides_sk, strides_en, strides_er, strides_ym, strides_hm,
    residuals, strides_resm, scales, norms, raws, squares, norm_eps, partials, counters, M,
    split_target,
    BIAS_BITS: tl.constexpr, RESIDUAL_BITS: tl.constexpr, NORM_BITS: tl.constexpr,
    ACTIVATIONS: tl.constexpr,
    TENSOR_RANK: tl.constexpr, SUM_LAYERS: tl.constexpr, ZERO_TAIL: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    LAYERS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    STEP_R: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y_i = act_i(H_i · E_i[:, :r_i]ᵀ + bias_i + residual_i), or y = the sum of those (SUM_LAYERS).

    H_i = scale_i · x_i · S_i[:r_i]ᵀ. Where layer i has a norm, H_i = norm_i · x_i · S_i[:r_i]ᵀ and
    rows of H_i · E_i[:, :r_i]ᵀ are multiplied by scale_i / rms(x_i · S_i[:r_i]ᵀ). Reads, per layer,
    x (M, K), S (R, K), E (N, R), bias (N,) and residual (M, N); writes y (M, N) and H (M, r), whose
    row stride is a multiple of 16. Plural arguments are tuples with one entry per layer.
    S, E = v, u is the forward; S, E = uᵀ, vᵀ turns dy into dx, and H is then dH.

    Arguments that need a word:
        ranks: encode_rank of each rank, or a pointer to int32 (TENSOR_RANK); clamped to 0..R.
        residuals, strides_resm: None where no layer has one.
        scales: None where all are 1.
        norms, norm_eps: weights (R,) of the norms; None where no layer has one.
        raws: what is like hs, and gets x_i · S_i[:r_i]ᵀ where a layer has a norm, H_i elsewhere; or
            None. The gradient wants it.
        squares: float32 (layers, blocks of the largest R, M): sums over the ranks of a block.
        partials: float32 slots for split_target tiles of H.
        counters: zeros; ticket, leaving programs, arrivals (split_target), ready (layers, num_m).
        split_target: K is split as long as phase 1 has no more tiles than this.
        BIAS_BITS, RESIDUAL_BITS, NORM_BITS: bit i says that layer i has a bias, a residual, a norm.
        ACTIVATIONS: one name for all layers, or one each.
        ZERO_TAIL: H is (M, R) and its columns beyond r are set to zero.
        LAYOUT: "rows" or "columns": S and E have stride 1 along these, and all sizes and other
            strides are multiples of 8; factors are read 16 bytes at a time, up to the next
            multiple of 8 of the rank. "any": no promise, exact masks, narrow loads.
        LAYERS: number of layers rounded up to a power of two.
        STEP_R: ranks that a step of the expand reads.
        PREFETCH: factors are asked for before anything else; not with LAYOUT "any".
        PDL: the launch may begin before the kernel in front of it has ended.
    """
    NUM_LAYERS: tl.constexpr = len(xs)
    ROWS: tl.constexpr = LAYOUT == "rows"
    COLUMNS: tl.constexpr = LAYOUT == "columns"
    ALIGNED: tl.constexpr = LAYOUT != "any"
    o_l = tl.arange(0, LAYERS)
    b_R = vector(Rs, o_l, NUM_LAYERS)
    if TENSOR_RANK:
        if PDL:
            gdc_wait()
        b_rank = tl.load(ranks + o_l, mask=o_l < NUM_LAYERS, other=0)
    else:
        b_rank = vector(ranks, o_l, NUM_LAYERS) >> RANK_BITS
    b_rank = tl.minimum(tl.maximum(b_rank, 0), b_R)

    if PREFETCH:
        for j in tl.static_range(NUM_LAYERS):
            _prefetch_factors(
                ss[j], es[j], element(b_rank, o_l, j), Ks[j], Ns[j], strides_sr[j], strides_sk[j],
                strides_en[j], strides_er[j], ROWS,
            )  # fmt: skip
    if PDL and not TENSOR_RANK:
        gdc_wait()

    num_m = tl.cdiv(M, BLOCK_M)
    b_blocks = tl.cdiv(b_rank, BLOCK_R)
    num_unsplit = tl.maximum(num_m * tl.sum(b_blocks, 0), 1)
    b_steps = tl.cdiv(vector(Ks, o_l, NUM_LAYERS), BLOCK_K)
    b_split = tl.minimum(split_target // num_unsplit, tl.minimum(b_steps // _MIN_STEPS, _MAX_SPLIT))
    b_split = tl.maximum(b_split, 1)
    b_shrink = b_blocks * b_split
    b_shrink_end = tl.cumsum(b_shrink, 0)
    per_m = tl.sum(b_shrink, 0)

    p_arrivals = counters + _COUNTERS_BEFORE_ARRIVALS
    p_ready = p_arrivals + split_target
    i_tile = tl.atomic_add(counters, 1, sem="relaxed")

    while i_tile < num_m * per_m:
        i_m = i_tile // per_m
        i_in_row = i_tile % per_m
        i_layer = tl.sum((b_shrink_end <= i_in_row).to(tl.int32), 0)
        i_in_layer = i_in_row - element(b_shrink_end - b_shrink, o_l, i_layer)
        num_splits = element(b_split, o_l, i_layer)
        num_steps = element(b_steps, o_l, i_layer)
        rank = element(b_rank, o_l, i_layer)
        R = pick(Rs, i_layer, NUM_LAYERS)
        i_r = i_in_layer // num_splits
        i_split = i_in_layer % num_splits
        rank_read = tl.cdiv(rank, 8) * 8 if ALIGNED else rank
        b_h = _shrink_sum(
            pick(xs, i_layer, NUM_LAYERS), pick(ss, i_layer, NUM_LAYERS),
            M, _eights(pick(Ks, i_layer, NUM_LAYERS), ALIGNED), rank_read,
            _eights(pick(strides_xm, i_layer, NUM_LAYERS), ALIGNED),
            _eights(pick(strides_sr, i_layer, NUM_LAYERS), ROWS),
            _eights(pick(strides_sk, i_layer, NUM_LAYERS), COLUMNS), i_m, i_r,
            num_steps * i_split // num_splits, num_steps * (i_split + 1) // num_splits,
            BLOCK_M, BLOCK_K, BLOCK_R, INPUT_PRECISION,
        )  # fmt: skip
        is_last = i_split == 0
        if num_splits > 1:
            i_slot = i_tile - i_split
            b_h, is_last = _reduce_splits(
                b_h, partials + i_slot * (BLOCK_M * BLOCK_R), p_arrivals + i_slot, i_split,
                num_splits, BLOCK_M, BLOCK_R,
            )  # fmt: skip
        if is_last:
            is_normed = ((NORM_BITS >> i_layer) & 1) != 0
            if scales is not None:
                b_h *= tl.where(is_normed, 1.0, pick(scales, i_layer, NUM_LAYERS))
            width = tl.cdiv(R if ZERO_TAIL else rank, 8) * 8
            if NORM_BITS:
                if raws is not None:
                    _store_h(
                        b_h, pick(raws, i_layer, NUM_LAYERS), M, rank, width,
                        pick(strides_hm, i_layer, NUM_LAYERS), i_m, i_r, BLOCK_M, BLOCK_R,
                    )  # fmt: skip
                o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
                o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
                b_h, b_squares = weighted(
                    tl.where((o_r < rank)[None, :], b_h, 0.0), pick(norms, i_layer, NUM_LAYERS),
                    o_r, rank, is_normed,
                )  # fmt: skip
                i_block = (i_layer * tl.cdiv(tl.max(b_R, 0), BLOCK_R) + i_r).to(tl.int64)
                tl.store(squares + i_block * M + o_m, b_squares, mask=o_m < M)
            _store_h(
                b_h, pick(hs, i_layer, NUM_LAYERS), M, rank, width,
                pick(strides_hm, i_layer, NUM_LAYERS), i_m, i_r, BLOCK_M, BLOCK_R,
            )  # fmt: skip
            tl.debug_barrier()
            tl.atomic_add(p_ready + i_layer * num_m + i_m, 1, sem="release")
        i_tile = tl.atomic_add(counters, 1, sem="relaxed")
    num_claimed = num_m * per_m
    if PDL:
        # The next kernel fetches its own factors while this one waits for H and writes y.
        gdc_launch_dependents()

    if ZERO_TAIL:
        b_tail = num_m * (tl.cdiv(b_R, BLOCK_R) - b_blocks)
        b_tail_end = num_claimed + tl.cumsum(b_tail, 0)
        num_claimed += tl.sum(b_tail, 0)
        while i_tile < num_claimed:
            i_layer = tl.sum((b_tail_end <= i_tile).to(tl.int32), 0)
            i_in_layer = i_tile - element(b_tail_end - b_tail, o_l, i_layer)
            width = tl.cdiv(pick(Rs, i_layer, NUM_LAYERS), 8) * 8
            b_h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            _store_h(
                b_h, pick(hs if raws is None else raws, i_layer, NUM_LAYERS), M, 0, width,
                pick(strides_hm, i_layer, NUM_LAYERS), i_in_layer % num_m,
                element(b_blocks, o_l, i_layer) + i_in_layer // num_m, BLOCK_M, BLOCK_R,
            )  # fmt: skip
            i_tile = tl.atomic_add(counters, 1, sem="relaxed")

    # Longest rank first: the last tiles to finish should be short ones.
    b_expand = num_m * tl.cdiv(vector(Ns, o_l, NUM_LAYERS), BLOCK_N)
    if SUM_LAYERS:
        b_expand = tl.where(o_l == 0, b_expand, 0)
        b_expand_begin = tl.zeros_like(o_l)
    else:
        m_before = (b_rank[None, :] > b_rank[:, None]) | (
            (b_rank[None, :] == b_rank[:, None]) & (o_l[None, :] < o_l[:, None])
        )
        b_expand_begin = tl.sum(tl.where(m_before, b_expand[None, :], 0), 1)
    num_expand = tl.sum(b_expand, 0)
    while i_tile < num_claimed + num_expand:
        o_begin = i_tile - num_claimed - b_expand_begin
        i_layer = tl.sum(tl.where((o_begin >= 0) & (o_begin < b_expand), o_l, 0), 0)
        i_in_layer = i_tile - num_claimed - element(b_expand_begin, o_l, i_layer)
        N = _eights(pick(Ns, i_layer, NUM_LAYERS), ALIGNED)
        num_n = tl.cdiv(N, BLOCK_N)
        i_m = i_in_layer // num_n
        i_n = i_in_layer % num_n
        b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        i_end = NUM_LAYERS if SUM_LAYERS else i_layer + 1
        for i in range(i_layer, i_end):
            rank = element(b_rank, o_l, i)
            while tl.atomic_add(p_ready + i * num_m + i_m, 0, sem="acquire") < tl.cdiv(
                rank, BLOCK_R
            ):
                pass
            b_y = expand_sum(
                b_y, pick(hs, i, NUM_LAYERS), pick(es, i, NUM_LAYERS), M, N, rank,
                pick(strides_hm, i, NUM_LAYERS), _eights(pick(strides_en, i, NUM_LAYERS), ROWS),
                _eights(pick(strides_er, i, NUM_LAYERS), COLUMNS), i_m, i_n, ROWS, BLOCK_M,
                BLOCK_N, STEP_R, STEP_R if STEP_R < BLOCK_R else BLOCK_R, INPUT_PRECISION,
            )  # fmt: skip
        if NORM_BITS:
            scale = 1.0
            if scales is not None:
                scale = pick(scales, i_layer, NUM_LAYERS)
            i_block = (i_layer * tl.cdiv(tl.max(b_R, 0), BLOCK_R)).to(tl.int64)
            b_y *= _squares_of(
                squares + i_block * M, element(b_rank, o_l, i_layer), M, norm_eps, scale,
                ((NORM_BITS >> i_layer) & 1) != 0, i_m, BLOCK_M, BLOCK_R,
            )[:, None]  # fmt: skip
        p_residual, stride_resm = None, 0
        if RESIDUAL_BITS:
            p_residual = pick(residuals, i_layer, NUM_LAYERS)
            stride_resm = _eights(pick(strides_resm, i_layer, NUM_LAYERS), ALIGNED)
        b_y = _epilogue(
            b_y, pick(biases, i_layer, NUM_LAYERS), p_residual, M, N, stride_resm, i_layer, i_m,
            i_n, ACTIVATIONS, BIAS_BITS, RESIDUAL_BITS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        p_y = pick(ys, i_layer, NUM_LAYERS)
        stride_ym = _eights(pick(strides_ym, i_layer, NUM_LAYERS), ALIGNED)
        p_y = p_y + o_m[:, None].to(tl.int64) * stride_ym
        m_y = (o_m < M)[:, None] & (o_n < N)[None, :]
        tl.store(p_y + o_n[None, :], b_y.to(p_y.dtype.element_ty), mask=m_y)
        i_tile = tl.atomic_add(counters, 1, sem="relaxed")

    _leave(counters, p_ready, NUM_LAYERS * num_m)
