"""Weight gradients of one layer or a group in one launch: sums over M, split and deterministic.

Both products have the form Lᵀ · B with L = H or dH (M, r) and B = dz or x (M, W); du stores the
transpose of it. A tile of du also adds up the columns of dz that it reads, which are dbias.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from maestro_kernels.backends import workspace
from maestro_kernels.backends.triton import interpreter
from maestro_kernels.backends.triton.launch import (
    device_of,
    is_aligned,
    layer_runs,
    readable_h,
    record_of,
    table_arch,
)
from maestro_kernels.backends.triton.layers import (
    RANK_BITS,
    element,
    encode_rank,
    pick,
    vector,
)
from maestro_kernels.backends.triton.wgrad_config import (
    SHIPPED,
    UNALIGNED,
    WgradConfig,
    WgradPlan,
    choose_config,
    plan_wgrad,
)

__all__ = [
    "SHIPPED",
    "WgradConfig",
    "WgradPlan",
    "aot_spec",
    "choose_config",
    "plan_wgrad",
    "weight_grads",
    "wgrad_kernel",
]


@triton.jit
def _product(
    p_l, p_b, M, W, width, stride_l, stride_b, i_r, i_w, i_first, i_end, SUM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Lᵀ · B of one tile over the row blocks i_first .. i_end - 1, and the column sums of B."""
    o_m = tl.arange(0, BLOCK_M)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_w = i_w * BLOCK_W + tl.arange(0, BLOCK_W)
    o_m0 = i_first * BLOCK_M
    p_l = p_l + (o_m0 + o_m)[None, :].to(tl.int64) * stride_l + o_r[:, None]
    p_b = p_b + (o_m0 + o_m)[:, None].to(tl.int64) * stride_b + o_w[None, :]
    b_g = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    b_columns = tl.zeros((BLOCK_M if SUM else 1, BLOCK_W), tl.float32)
    for i in range(i_first, i_end):
        m_m = i * BLOCK_M + o_m < M
        b_l = tl.load(p_l, mask=(o_r < width)[:, None] & m_m[None, :], other=0.0)
        b_b = tl.load(p_b, mask=m_m[:, None] & (o_w < W)[None, :], other=0.0)
        b_g = tl.dot(b_l, b_b, b_g, input_precision=INPUT_PRECISION)
        if SUM:
            # Summed over rows after the loop: across warps it would cost a barrier at each step.
            b_columns += b_b.to(tl.float32)
        p_l += BLOCK_M * stride_l
        p_b += BLOCK_M * stride_b
    return b_g, tl.sum(b_columns, 0)


@triton.jit
def _reduce_splits(
    b_g, b_columns, p_slots, p_column_slots, p_arrivals, i_split, num_splits, SUM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """(tile, column sums, whether this split was the last): slots are added in their order."""
    SLOT: tl.constexpr = BLOCK_R * BLOCK_W
    o_w = tl.arange(0, BLOCK_W)
    o_slot = tl.arange(0, BLOCK_R)[:, None] * BLOCK_W + o_w[None, :]
    tl.store(p_slots + i_split * SLOT + o_slot, b_g)
    if SUM:
        tl.store(p_column_slots + i_split * BLOCK_W + o_w, b_columns)
    # Triton 3.6 puts no barrier of its own between the stores of a tile and an atomic: without
    # this one thread would publish what other warps have yet to store.
    tl.debug_barrier()
    is_last = tl.atomic_add(p_arrivals, 1, sem="acq_rel") == num_splits - 1
    if is_last:
        tl.store(p_arrivals, 0)
        b_g = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
        b_columns = tl.zeros((BLOCK_W,), tl.float32)
        # Not unrolled: one tile is all that fits into the registers beside the sum.
        for i in range(0, num_splits):
            b_g += tl.load(p_slots + i * SLOT + o_slot)
            if SUM:
                b_columns += tl.load(p_column_slots + i * BLOCK_W + o_w)
    return b_g, b_columns, is_last


@triton.jit
def _store_gradient(
    b_g, p_out, rank, R, W, pitch, i_r, i_w, is_du, KINDS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One tile of du (W, R) or dv (R, W), exact zeros from `rank` on."""
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_w = i_w * BLOCK_W + tl.arange(0, BLOCK_W)
    b_g = tl.where((o_r < rank)[:, None], b_g, 0.0).to(p_out.dtype.element_ty)
    # Two stores and not one with run-time strides: each has a contiguous dimension of its own.
    if KINDS != "dv" and is_du:
        p_du = p_out + o_w[:, None].to(tl.int64) * pitch + o_r[None, :]
        tl.store(p_du, tl.trans(b_g), mask=(o_w < W)[:, None] & (o_r < R)[None, :])
    elif KINDS != "du":
        p_dv = p_out + o_r[:, None].to(tl.int64) * pitch + o_w[None, :]
        tl.store(p_dv, b_g, mask=(o_r < R)[:, None] & (o_w < W)[None, :])


@triton.jit(do_not_specialize=["ranks", "M", "split_target", "max_split"])
def wgrad_kernel(
    ls, bs, outs, dbiases, Ws, Rs, ranks, strides_l, strides_b, pitches,
    partials, counters, M, split_target, max_split,
    KINDS: tl.constexpr, BIAS_BITS: tl.constexpr, TENSOR_RANK: tl.constexpr,
    PRODUCTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """du_i = dz_iᵀ · H_i, dv_i = dH_iᵀ · x_i, dbias_i = sum of the rows of dz_i.

    The products of all layers are listed in tuples, those for du before those for dv: L (M, r) and
    B (M, W), W = N_i or K_i, make du (N_i, R_i) or dv (R_i, K_i), zero from the rank on.

    Work items are tiles times splits of M, with as many splits as keep the items below
    split_target, then the tiles that are only zeros. A split leaves its sum in a slot of its own,
    and the last to arrive adds the slots in their order. No item waits for another, so any number
    of programs will do, and the hardware hands them out in this order.

    ranks: encode_rank of each product's rank, or a pointer to int32 of each layer (TENSOR_RANK).
    partials: split_target slots of float32 tiles, then as many of BLOCK_W column sums.
    counters: split_target zeros, zero again at the end.
    KINDS: "du", "dv" or "both". BIAS_BITS: bit i says that layer i wants dbias.
    PRODUCTS: number of products rounded up to a power of two.
    """
    NUM_PRODUCTS: tl.constexpr = len(ls)
    NUM_LAYERS: tl.constexpr = NUM_PRODUCTS // 2 if KINDS == "both" else NUM_PRODUCTS
    NUM_DU: tl.constexpr = 0 if KINDS == "dv" else NUM_LAYERS
    SLOT: tl.constexpr = BLOCK_R * BLOCK_W
    o_p = tl.arange(0, PRODUCTS)
    b_R = vector(Rs, o_p, NUM_PRODUCTS)
    if TENSOR_RANK:
        b_rank = tl.load(ranks + o_p % NUM_LAYERS)
    else:
        b_rank = vector(ranks, o_p, NUM_PRODUCTS) >> RANK_BITS
    b_rank = tl.minimum(tl.maximum(b_rank, 0), b_R)

    # A tile whose columns of dz are summed has work even if the rank is zero.
    m_bias = (o_p < NUM_DU) & ((BIAS_BITS >> (o_p % NUM_LAYERS)) & 1 == 1)
    b_active_r = tl.maximum(tl.cdiv(b_rank, BLOCK_R), m_bias.to(tl.int32))
    b_blocks_w = tl.cdiv(vector(Ws, o_p, NUM_PRODUCTS), BLOCK_W)
    b_active = b_blocks_w * b_active_r
    b_active_end = tl.cumsum(b_active, 0)
    num_active = tl.sum(b_active, 0)
    b_zero = b_blocks_w * (tl.maximum(tl.cdiv(b_R, BLOCK_R), b_active_r) - b_active_r)
    b_zero_end = tl.cumsum(b_zero, 0)

    num_steps = tl.cdiv(M, BLOCK_M)
    num_splits = tl.minimum(split_target // tl.maximum(num_active, 1), max_split)
    num_splits = tl.maximum(num_splits, 1)
    num_working = num_active * num_splits
    p_column_slots = partials + split_target.to(tl.int64) * SLOT

    num_items = num_working + tl.sum(b_zero, 0)
    # Hoisted out of this loop, the offsets of all tiles would be kept in registers and spilled.
    for i_item in tl.range(tl.program_id(0), num_items, tl.num_programs(0), disable_licm=True):
        is_zero = i_item >= num_working
        i_tile = i_item - num_working if is_zero else i_item // num_splits
        i_split = 0 if is_zero else i_item % num_splits
        b_end = tl.where(is_zero, b_zero_end, b_active_end)
        i_product = tl.sum((b_end <= i_tile).to(tl.int32), 0)
        i_in_product = i_tile - element(
            tl.where(is_zero, b_zero_end - b_zero, b_active_end - b_active), o_p, i_product
        )
        W = pick(Ws, i_product, NUM_PRODUCTS)
        num_w = tl.cdiv(W, BLOCK_W)
        # Rank blocks of one block of W are neighbours: they read the same columns of B.
        blocks_r = tl.where(is_zero, 1, element(b_active_r, o_p, i_product))
        i_w = tl.where(is_zero, i_in_product % num_w, i_in_product // blocks_r)
        i_r = i_in_product % blocks_r
        if is_zero:
            i_r = element(b_active_r, o_p, i_product) + i_in_product // num_w
        rank = element(b_rank, o_p, i_product)
        width = tl.cdiv(rank, 8) * 8
        i_first = 0 if is_zero else num_steps * i_split // num_splits
        i_end = 0 if is_zero else num_steps * (i_split + 1) // num_splits
        p_l = pick(ls, i_product, NUM_PRODUCTS)
        p_b = pick(bs, i_product, NUM_PRODUCTS)
        stride_l = pick(strides_l, i_product, NUM_PRODUCTS)
        stride_b = pick(strides_b, i_product, NUM_PRODUCTS)
        sums_columns = (i_product < NUM_DU) & (i_r == 0) & ((BIAS_BITS >> i_product) & 1 == 1)
        if BIAS_BITS and sums_columns:
            b_g, b_columns = _product(
                p_l, p_b, M, W, width, stride_l, stride_b, i_r, i_w, i_first, i_end, True,
                BLOCK_M, BLOCK_R, BLOCK_W, INPUT_PRECISION,
            )  # fmt: skip
        else:
            b_g, b_columns = _product(
                p_l, p_b, M, W, width, stride_l, stride_b, i_r, i_w, i_first, i_end, False,
                BLOCK_M, BLOCK_R, BLOCK_W, INPUT_PRECISION,
            )  # fmt: skip
        is_last = True
        if (num_splits > 1) & (not is_zero):
            i_slot = i_item - i_split
            b_g, b_columns, is_last = _reduce_splits(
                b_g, b_columns, partials + i_slot.to(tl.int64) * SLOT,
                p_column_slots + i_slot * BLOCK_W, counters + i_slot, i_split, num_splits,
                BIAS_BITS != 0, BLOCK_R, BLOCK_W,
            )  # fmt: skip
        if is_last:
            _store_gradient(
                b_g, pick(outs, i_product, NUM_PRODUCTS), rank, element(b_R, o_p, i_product), W,
                pick(pitches, i_product, NUM_PRODUCTS), i_r, i_w, i_product < NUM_DU, KINDS,
                BLOCK_R, BLOCK_W,
            )  # fmt: skip
            if BIAS_BITS and sums_columns:
                o_w = i_w * BLOCK_W + tl.arange(0, BLOCK_W)
                p_dbias = pick(dbiases, i_product, NUM_LAYERS)
                tl.store(p_dbias + o_w, b_columns.to(p_dbias.dtype.element_ty), mask=o_w < W)


def weight_grads(
    dzs: Sequence[Tensor],
    hs: Sequence[Tensor] | None,
    dhs: Sequence[Tensor] | None,
    xs: Sequence[Tensor],
    Rs: Sequence[int],
    ranks: Sequence[int] | Tensor,
    *,
    needs_u: bool,
    needs_v: bool,
    needs_bias: Sequence[bool],
    config: WgradConfig | None = None,
    num_programs: int | None = None,
    input_precision: str = "ieee",
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Compute du = dz.T @ H, dv = dH.T @ x and dbias = dz.sum(0) of each layer in one launch.

    Sums are kept in float32 and added in an order that does not depend on timing. Columns of du
    and rows of dv from the rank on are exact zeros.

    Args:
        dzs: gradients before the activation (M_i, N_i), last stride 1.
        hs: H_i (M_i, r_i or R_i); None unless needs_u.
        dhs: dH_i = dz_i @ u_i[:, :r_i], like H_i; None unless needs_v.
        xs: one x (M, K) that all layers share, or one for each; last stride 1.
        Rs: widths of the factors.
        ranks: r_i, or an int32 tensor (n,) on the device, clamped to 0..R_i.
        needs_u: compute du.
        needs_v: compute dv.
        needs_bias: for each layer, compute dbias.
        config: tiles; None chooses.
        num_programs: programs of the grid; None plans.
        input_precision: "ieee" or "tf32"; says how float32 is multiplied.

    Returns:
        du_i (N_i, R_i), dv_i (R_i, K_i), dbias_i (N_i,) in the dtype of dz; None where not asked.
    """
    n = len(dzs)
    xs = list(xs) * n if len(xs) == 1 else xs
    dus: list[Tensor | None] = [None] * n
    dvs: list[Tensor | None] = [None] * n
    if needs_u:
        dus = [dz.new_empty(dz.shape[1], R) for dz, R in zip(dzs, Rs, strict=True)]
        hs = [readable_h(h) for h in hs or ()]
    if needs_v:
        dvs = [x.new_empty(R, x.shape[1]) for x, R in zip(xs, Rs, strict=True)]
        dhs = [readable_h(dh) for dh in dhs or ()]
    dbiases: list[Tensor | None]
    if needs_u:
        pairs = zip(dzs, needs_bias, strict=True)
        dbiases = [dz.new_empty(dz.shape[1]) if need else None for dz, need in pairs]
    else:
        # No tile of du passes over dz that could add up its columns on the way.
        dbiases = [dz.sum(0) if need else None for dz, need in zip(dzs, needs_bias, strict=True)]
    for run in layer_runs(dzs) if needs_u or needs_v else ():
        du_products = zip(hs[run], dzs[run], dus[run], strict=True) if needs_u and hs else ()
        dv_products = zip(dhs[run], xs[run], dvs[run], strict=True) if needs_v and dhs else ()
        _launch(
            list(du_products), list(dv_products), dbiases[run] if needs_u else [], Rs[run],
            ranks[run], config=config, num_programs=num_programs, input_precision=input_precision,
        )  # fmt: skip
    return dus, dvs, dbiases


_Product = tuple[Tensor, Tensor, Tensor]


def _launch(
    du_products: list[_Product],
    dv_products: list[_Product],
    dbiases: Sequence[Tensor | None],
    Rs: Sequence[int],
    ranks: Sequence[int] | Tensor,
    *,
    config: WgradConfig | None,
    num_programs: int | None,
    input_precision: str,
) -> None:
    """Launch once for (L, B, out) of every product."""
    interpreter.ensure()
    products = [*du_products, *dv_products]
    ls, bs, outs = zip(*products, strict=True)
    first, kinds = bs[0], bool(du_products) + bool(dv_products)
    M, Ws, Rs = first.shape[0], [b.shape[1] for b in bs], [*Rs] * kinds
    device = record_of(first)
    tensor_rank = isinstance(ranks, Tensor)
    known: Sequence[int | None] = [None] * len(bs) if tensor_rank else [*ranks] * kinds
    if config is None:
        precision = input_precision if first.element_size() == 4 else "half"
        aligned = is_aligned(*bs, *outs)
        config = choose_config(max(Rs), precision, table_arch(device.arch), aligned=aligned)
    plan = plan_wgrad(device, config, M, list(zip(Ws, Rs, known, strict=True)))
    if num_programs is None:
        # Interpreted programs run one after another: after the first they have nothing to do.
        num_programs = 1 if interpreter.active() else plan.num_programs
    with device_of(first):
        wgrad_kernel[(num_programs,)](
            ls, bs, outs,
            # Any pointer of the type serves where no dbias is asked for.
            tuple(out if d is None else d for d, out in zip(dbiases, outs, strict=False))
            or outs[:1],
            tuple(Ws),
            tuple(Rs),
            ranks.contiguous() if tensor_rank else tuple(encode_rank(r) for r in known),
            tuple(t.stride(0) for t in ls),
            tuple(t.stride(0) for t in bs),
            tuple(t.stride(0) for t in outs),
            torch.empty(plan.partials, dtype=torch.float32, device=first.device),
            workspace.counters(first.device, plan.split_target),
            M, plan.split_target, plan.max_split,
            KINDS="both" if kinds == 2 else "du" if du_products else "dv",
            BIAS_BITS=sum(1 << i for i, d in enumerate(dbiases) if d is not None),
            TENSOR_RANK=tensor_rank, PRODUCTS=1 << (len(ls) - 1).bit_length(),
            BLOCK_M=config.BLOCK_M, BLOCK_R=config.BLOCK_R, BLOCK_W=config.BLOCK_W,
            INPUT_PRECISION=input_precision, num_warps=config.num_warps,
            num_stages=config.num_stages, maxnreg=config.max_registers,
        )  # fmt: skip


def aot_spec(config: WgradConfig, dtype: str, arch: str) -> Iterator[dict[str, Any]]:
    """What tools/triton_report.py compiles for a configuration and "bf16", "fp16" or "fp32".

    single: one layer, everything asked for; frozen u: no du; grouped: three layers, two with a
    bias, ranks on the device; odd: nothing is divisible by 8.
    """
    if (dtype == "fp32") == (config.precision == "half"):
        return
    forms = ("single", "frozen u", "grouped")
    odd = ("single odd", "frozen u odd", "grouped odd")
    if config == UNALIGNED:
        forms = odd
    elif config.precision != "half":
        forms += odd
    for form in forms:
        yield {
            "kernel": wgrad_kernel,
            "label": f"{config} {form}",
            "signature": _signature(config, dtype, form),
            "options": {
                "num_warps": config.num_warps,
                "num_stages": config.num_stages,
                "maxnreg": config.max_registers,
            },
            "dot_rows": config.BLOCK_R,
        }


def _signature(config: WgradConfig, dtype: str, form: str) -> dict[str, Any]:
    """Arguments as Triton specialises them for contiguous tensors with sizes divisible by 16."""
    odd, form = form.endswith("odd"), form.removesuffix(" odd")
    layers = 3 if form == "grouped" else 1
    count = layers * (1 if form == "frozen u" else 2)
    pointer, size = (f"*{dtype}", "i32") if odd else (f"*{dtype}:16", "i32:16")
    return (
        dict.fromkeys(("bs", "outs"), (pointer,) * count)
        | dict.fromkeys(("Ws", "Rs", "strides_b", "pitches"), (size,) * count)
        | dict.fromkeys(("M", "split_target", "max_split"), "i32")
        | {
            "ls": (f"*{dtype}:16",) * count,
            "strides_l": ("i32:16",) * count,
            "dbiases": (pointer,) * layers,
            "ranks": "*i32" if form == "grouped" else ("i32",) * count,
            "partials": "*fp32:16",
            "counters": "*i32:16",
            "KINDS": "dv" if form == "frozen u" else "both",
            "BIAS_BITS": {"single": 1, "frozen u": 0, "grouped": 5}[form],
            "TENSOR_RANK": form == "grouped",
            "PRODUCTS": 1 << (count - 1).bit_length(),
            "BLOCK_M": config.BLOCK_M,
            "BLOCK_R": config.BLOCK_R,
            "BLOCK_W": config.BLOCK_W,
            "INPUT_PRECISION": "tf32" if config.precision == "tf32" else "ieee",
        }
    )
