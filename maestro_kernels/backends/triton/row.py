"""The row kernel: a program owns BLOCK_M rows, H stays in registers between the two products.

It pays where there are enough rows to occupy the device and H fits into the registers: r <= 256.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from maestro_kernels.backends.triton import interpreter
from maestro_kernels.backends.triton.epilogue import activation_name, apply_activation
from maestro_kernels.backends.triton.launch import device_of, empty_h, record_of, table_arch

__all__ = [
    "MAX_WIDTH",
    "SHIPPED",
    "RowConfig",
    "aot_spec",
    "choose_config",
    "row",
    "row_dx",
    "row_kernel",
    "width_bucket",
]

# Wider accumulators do not fit into the registers of a program.
MAX_WIDTH = 256


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
    b_h, e, p_bias, p_y, rank, rank_read, M, N, stride_en, stride_er, o_m, o_r,
    CLEAR: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr, BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of y = act(H · Eᵀ + bias). CLEAR: what E holds from the rank on is set to zero."""
    for o_n0 in range(0, N, BLOCK_N):
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
        b_y = apply_activation(b_y, ACTIVATION)
        m_y = (o_m < M)[:, None] & (o_n < N)[None, :]
        tl.store(p_y + o_n[None, :], b_y.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["rank", "M"])
def row_kernel(
    x, s, e, p_bias, p_y, p_h, rank, M, N, K, R,
    stride_xm, stride_sr, stride_sk, stride_en, stride_er, stride_ym, stride_hm,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SAVE_H: tl.constexpr,
    TENSOR_RANK: tl.constexpr, ROUND_RANK: tl.constexpr, TRANSPOSED: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of y = act(x · S[:r]ᵀ · E[:, :r]ᵀ + bias) and of H = x · S[:r]ᵀ.

    Reads x (M, K), S (R, K), E (N, R), bias (N,); writes y (M, N) and H, (M, r) or (M, R).
    S, E = v, u is the forward; S, E = uᵀ, vᵀ turns dy into dx, and H is then dH.

    rank is an int, or a pointer to int32 (TENSOR_RANK) that is clamped to 0..R.
    ROUND_RANK: factors are read up to the next multiple of 8 of the rank, which needs R % 8 == 0;
    a mask that ends anywhere in a contiguous dimension costs 2-byte loads.
    TRANSPOSED: S and E lie in memory as (K, R) and (R, N).
    DESCRIPTORS: x, s, e are host descriptors of the tensors as they lie in memory.
    """
    i_m = tl.program_id(0)
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
    # The same rounding as between two matmuls; the tile becomes the A operand of the next product.
    b_h = tl.where((o_r < rank)[None, :], b_h, 0.0).to(p_y.dtype.element_ty)
    if SAVE_H:
        width = tl.cdiv(R, 8) * 8 if TENSOR_RANK else rank_up
        p_h += o_m[:, None].to(tl.int64) * stride_hm + o_r[None, :]
        tl.store(p_h, b_h, mask=(o_m < M)[:, None] & (o_r < width)[None, :])
    p_y += o_m[:, None].to(tl.int64) * stride_ym
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
            b_h, e, p_bias, p_y, rank, rank_read, M, N, stride_en, stride_er, o_m, o_r, True,
            HAS_BIAS, ACTIVATION, TRANSPOSED, DESCRIPTORS, BLOCK_N, INPUT_PRECISION,
        )  # fmt: skip
    else:
        _expand_rows(
            b_h, e, p_bias, p_y, rank, rank_read, M, N, stride_en, stride_er, o_m, o_r, False,
            HAS_BIAS, ACTIVATION, TRANSPOSED, DESCRIPTORS, BLOCK_N, INPUT_PRECISION,
        )  # fmt: skip


@dataclass(frozen=True)
class RowConfig:
    """Tiles of x (BLOCK_M, BLOCK_K), H (BLOCK_M, BLOCK_R) and y (BLOCK_M, BLOCK_N).

    `precision` is "half" (16-bit types), "tf32" or "ieee" (float32); `descriptors` says that x and
    the factors are loaded through host TMA descriptors.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int
    precision: str = "half"
    descriptors: bool = False

    def __str__(self) -> str:
        tiles = f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K} r{self.BLOCK_R}"
        kind = "tma" if self.descriptors else "ptr"
        return f"{tiles} w{self.num_warps} s{self.num_stages} {self.precision} {kind}"


def _table(arch: str) -> Iterator[RowConfig]:
    """Configurations of an architecture; by compiler output only, none was timed on a GPU.

    Those of sm_80 stay within the 99 KiB of sm_86 and sm_89; on sm_90 they serve tensors that have
    no descriptors, where addresses and masks fill the registers. IEEE float32 has no tensor cores:
    its products run on scalar units, for which H must be small.
    """
    narrow = (16, 32, 64)
    pointers = (
        *(RowConfig(64, 64, 64, r, 4, 3) for r in (16, 32)),
        *(RowConfig(64, 64, 32, r, 8, 3) for r in (64, 128)),
        RowConfig(32, 32, 32, 256, 8, 3),
        *(RowConfig(64, 64, 32, r, 4, 3, "tf32") for r in (16, 32)),
        RowConfig(64, 32, 32, 64, 8, 3, "tf32"),
        RowConfig(64, 32, 32, 128, 8, 3, "tf32"),
        RowConfig(32, 32, 16, 256, 8, 2, "tf32"),
    )
    if arch == "sm_90":
        described = (
            *(RowConfig(64, 128, 64, r, 4, 4) for r in (*narrow, 128)),
            RowConfig(64, 64, 64, 256, 8, 3),
            *(RowConfig(128, 128, 64, r, 8, 4) for r in (*narrow, 128)),
            RowConfig(128, 64, 64, 256, 8, 3),
            *(RowConfig(64, 64, 32, r, 4, 4, "tf32") for r in narrow),
            RowConfig(64, 64, 32, 128, 8, 3, "tf32"),
            RowConfig(64, 32, 32, 256, 8, 3, "tf32"),
        )
        yield from (replace(config, descriptors=True) for config in described)
    yield from pointers
    yield from (RowConfig(32, 32, 32, r, 4, 2, "ieee") for r in (16, 32))
    yield from (RowConfig(32, 32, 16, r, 8, 2, "ieee") for r in (64, 128, 256))


SHIPPED = {arch: tuple(_table(arch)) for arch in ("sm_80", "sm_90")}


def width_bucket(width: int) -> int:
    """BLOCK_R that holds a rank: 16, 32, 64, 128 or 256."""
    return max(16, 1 << (width - 1).bit_length())


def choose_config(
    M: int, width: int, precision: str, arch: str, num_cores: int, *, descriptors: bool
) -> RowConfig:
    """Largest tile that leaves no core without a row block, else the smallest there is.

    Args:
        M: rows of x.
        width: rank, or R where only the device knows the rank; at most MAX_WIDTH.
        precision: "half", "tf32" or "ieee".
        arch: a key of SHIPPED.
        num_cores: multiprocessors of the device.
        descriptors: whether the tensors can have TMA descriptors.
    """
    fitting = [
        c for c in SHIPPED[arch] if c.BLOCK_R == width_bucket(width) and c.precision == precision
    ]
    if any(c.descriptors for c in fitting):
        fitting = [c for c in fitting if c.descriptors == descriptors]
    fitting.sort(key=lambda c: c.BLOCK_M)
    full = [c for c in fitting if -(-M // c.BLOCK_M) >= num_cores]
    return full[-1] if full else fitting[0]


def row(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None,
    rank: int | Tensor,
    activation: str | None,
    *,
    save_h: bool,
    config: RowConfig | None = None,
    input_precision: str = "ieee",
) -> tuple[Tensor, Tensor | None]:
    """Compute y = act(x @ v[:r].T @ u[:, :r].T + bias) and H = x @ v[:r].T, H in registers.

    Args:
        x: (M, K), M > 0, last stride 1; float16, bfloat16 or float32.
        v: (R, K).
        u: (N, R).
        bias: (N,) or None.
        rank: 0 < r <= 256, or a 0-d int32 tensor on the device of x, clamped to 0..R in the kernel;
            R <= 256 then.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".
        save_h: return H.
        config: tiles; None chooses.
        input_precision: "ieee" or "tf32"; says how float32 is multiplied.

    Returns:
        y (M, N), and H: (M, r), or for a tensor rank (M, R) with zeros beyond r; None unless asked.
    """
    return _launch(
        x, v, u, bias, rank, activation,
        save_h=save_h, transposed=False, config=config, input_precision=input_precision,
    )  # fmt: skip


def row_dx(
    dy: Tensor,
    u: Tensor,
    v: Tensor,
    rank: int | Tensor,
    *,
    config: RowConfig | None = None,
    input_precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Compute dx = dH @ v[:r] and dH = dy @ u[:, :r] with the same kernel.

    Args:
        dy: gradient of y before bias and activation (M, N), last stride 1.
        u: (N, R).
        v: (R, K).
        rank: as in row.
        config: tiles; None chooses.
        input_precision: as in row.

    Returns:
        dx (M, K), and dH shaped like H in row.
    """
    dx, dh = _launch(
        dy, u.t(), v.t(), None, rank, None,
        save_h=True, transposed=True, config=config, input_precision=input_precision,
    )  # fmt: skip
    assert dh is not None
    return dx, dh


def _launch(
    x: Tensor,
    s: Tensor,
    e: Tensor,
    bias: Tensor | None,
    rank: int | Tensor,
    activation: str | None,
    *,
    save_h: bool,
    transposed: bool,
    config: RowConfig | None,
    input_precision: str,
) -> tuple[Tensor, Tensor | None]:
    interpreter.ensure()
    (M, K), N, R = x.shape, e.shape[0], s.shape[0]
    tensor_rank = isinstance(rank, Tensor)
    width = R if tensor_rank else rank
    stored = (x, s.t(), e.t()) if transposed else (x, s, e)
    if config is None:
        device = record_of(x)
        config = choose_config(
            M, width, input_precision if x.itemsize == 4 else "half", table_arch(device.arch),
            device.num_cores, descriptors=all(map(_can_describe, stored)),
        )  # fmt: skip
    y = x.new_empty(M, N)
    h = empty_h(x, width) if save_h else None
    operands: tuple[Any, ...] = (x, s, e)
    if config.descriptors:
        operands = _describe(*stored, width, transposed=transposed, config=config)
    with device_of(x):
        row_kernel[(-(-M // config.BLOCK_M),)](
            *operands,
            # Any pointer of the type serves in the place of what is not there.
            y if bias is None else bias,
            y,
            y if h is None else h,
            rank, M, N, K, R,
            x.stride(0), s.stride(0), s.stride(1), e.stride(0), e.stride(1), y.stride(0),
            0 if h is None else h.stride(0),
            HAS_BIAS=bias is not None, ACTIVATION=activation_name(activation), SAVE_H=save_h,
            TENSOR_RANK=tensor_rank, ROUND_RANK=R % 8 == 0, TRANSPOSED=transposed,
            DESCRIPTORS=config.descriptors, BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N,
            BLOCK_K=config.BLOCK_K, BLOCK_R=config.BLOCK_R, INPUT_PRECISION=input_precision,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return y, h


def _can_describe(tensor: Tensor) -> bool:
    """Whether TMA can read a matrix: 16-byte aligned rows, one after another."""
    rows, columns = tensor.stride()
    aligned = rows * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0
    return aligned and columns == 1 and rows >= tensor.shape[1]


def _describe(
    x: Tensor, s: Tensor, e: Tensor, width: int, *, transposed: bool, config: RowConfig
) -> tuple[TensorDescriptor, ...]:
    """Host descriptors of tensors as they lie in memory; reads beyond `width` give 0."""
    tile_s, tile_e = (config.BLOCK_R, config.BLOCK_K), (config.BLOCK_N, config.BLOCK_R)
    shape_s, shape_e = (width, s.shape[1]), (e.shape[0], width)
    if transposed:
        tile_s, tile_e = tile_s[::-1], tile_e[::-1]
        shape_s, shape_e = (s.shape[0], width), (width, e.shape[1])
    return tuple(
        TensorDescriptor(tensor, list(shape), list(tensor.stride()), list(tile))
        for tensor, shape, tile in (
            (x, x.shape, (config.BLOCK_M, config.BLOCK_K)),
            (s, shape_s, tile_s),
            (e, shape_e, tile_e),
        )
    )


def aot_spec(config: RowConfig, dtype: str, arch: str) -> Iterator[dict[str, Any]]:
    """What tools/triton_report.py compiles for a configuration and "bf16", "fp16" or "fp32".

    forward: bias, gelu, H saved; dx: with a rank on the device; odd: nothing is divisible by 8.
    """
    if (dtype == "fp32") == (config.precision == "half"):
        return
    for form in ("forward", "dx", *(() if config.descriptors else ("forward odd", "dx odd"))):
        yield {
            "kernel": row_kernel,
            "label": f"{config} {form}",
            "signature": _signature(config, dtype, form),
            "options": {"num_warps": config.num_warps, "num_stages": config.num_stages},
            "dot_rows": config.BLOCK_M,
            "h_in_registers": config.precision != "ieee",
        }


def _signature(config: RowConfig, dtype: str, form: str) -> dict[str, Any]:
    """Arguments as Triton specialises them for contiguous tensors with sizes divisible by 16."""
    transposed, odd = form.startswith("dx"), form.endswith("odd")
    size = "i32" if odd else "i32:16"
    pointer = f"*{dtype}" if odd else f"*{dtype}:16"
    operands = {"x": pointer, "s": pointer, "e": pointer}
    if config.descriptors:
        m, n, k, r = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.BLOCK_R
        tiles = {"x": (m, k), "s": (k, r) if transposed else (r, k)}
        tiles["e"] = (r, n) if transposed else (n, r)
        operands = {name: f"tensordesc<{dtype}[{a},{b}]>" for name, (a, b) in tiles.items()}
    strides = {"stride_sr": size, "stride_sk": 1, "stride_en": size, "stride_er": 1}
    if transposed:
        strides = {"stride_sr": 1, "stride_sk": size, "stride_en": 1, "stride_er": size}
    return (
        operands
        | strides
        | dict.fromkeys(("p_bias", "p_y", "p_h"), pointer)
        | dict.fromkeys(("N", "K", "R", "stride_xm", "stride_ym"), size)
        | {
            "rank": "*i32" if transposed else "i32",
            "M": "i32",
            "stride_hm": "i32:16",
            "HAS_BIAS": not transposed,
            "ACTIVATION": "none" if transposed else "gelu",
            "SAVE_H": True,
            "TENSOR_RANK": transposed,
            "ROUND_RANK": not odd,
            "TRANSPOSED": transposed,
            "DESCRIPTORS": config.descriptors,
            "BLOCK_M": config.BLOCK_M,
            "BLOCK_N": config.BLOCK_N,
            "BLOCK_K": config.BLOCK_K,
            "BLOCK_R": config.BLOCK_R,
            "INPUT_PRECISION": "tf32" if config.precision == "tf32" else "ieee",
        }
    )
