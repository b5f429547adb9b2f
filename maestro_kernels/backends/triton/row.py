"""Launches the row kernel: y or dx of one layer with many rows, H in registers.

What runs on the device is in row_kernel.py, what decides tiles in row_config.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from maestro_kernels.backends.triton import choose, interpreter
from maestro_kernels.backends.triton.descriptors import can_describe
from maestro_kernels.backends.triton.epilogue import activation_name
from maestro_kernels.backends.triton.launch import device_of, empty_h, record_of
from maestro_kernels.backends.triton.row_config import (
    MAX_REGISTERS,
    MAX_WIDTH,
    SHIPPED,
    RowConfig,
    RowPlan,
    plans,
    width_bucket,
)
from maestro_kernels.backends.triton.row_kernel import row_kernel

__all__ = [
    "MAX_WIDTH",
    "SHIPPED",
    "RowConfig",
    "RowPlan",
    "aot_spec",
    "row",
    "row_dx",
    "row_kernel",
    "width_bucket",
]


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
    plan: RowPlan | None = None,
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
        plan: programs for each block of rows; None chooses.
        input_precision: "ieee" or "tf32"; says how float32 is multiplied.

    Returns:
        y (M, N), and H: (M, r), or for a tensor rank (M, R) with zeros beyond r; None unless asked.
    """
    return _launch(
        x, v, u, bias, rank, activation,
        save_h=save_h, transposed=False, config=config, plan=plan, input_precision=input_precision,
    )  # fmt: skip


def row_dx(
    dy: Tensor,
    u: Tensor,
    v: Tensor,
    rank: int | Tensor,
    *,
    config: RowConfig | None = None,
    plan: RowPlan | None = None,
    input_precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Compute dx = dH @ v[:r] and dH = dy @ u[:, :r] with the same kernel.

    Args:
        dy: gradient of y before bias and activation (M, N), last stride 1.
        u: (N, R).
        v: (R, K).
        rank: as in row.
        config: tiles; None chooses.
        plan: programs for each block of rows; None chooses.
        input_precision: as in row.

    Returns:
        dx (M, K), and dH shaped like H in row.
    """
    dx, dh = _launch(
        dy, u.t(), v.t(), None, rank, None,
        save_h=True, transposed=True, config=config, plan=plan, input_precision=input_precision,
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
    plan: RowPlan | None,
    input_precision: str,
) -> tuple[Tensor, Tensor | None]:
    interpreter.ensure()
    (M, K), N, R = x.shape, e.shape[0], s.shape[0]
    tensor_rank = isinstance(rank, Tensor)
    width = R if tensor_rank else rank
    stored = (x, s.t(), e.t()) if transposed else (x, s, e)
    device = record_of(x)
    if config is None:
        config, planned = choose.row(
            device, M, N, K, width_bucket(width), x.dtype, input_precision,
            descriptors=all(map(can_describe, stored)),
        )  # fmt: skip
        plan = plan or planned
    plan = plan or next(plans(config, M, N, device.num_cores))
    y = x.new_empty(M, N)
    h = empty_h(x, width) if save_h else None
    operands: tuple[Any, ...] = (x, s, e)
    if config.descriptors:
        operands = _describe(*stored, width, transposed=transposed, config=config)
    with device_of(x):
        row_kernel[(plan.num_programs,)](
            *operands,
            # Any pointer of the type serves in the place of what is not there.
            y if bias is None else bias,
            y,
            y if h is None else h,
            rank, M, N, K, R, plan.num_whole, plan.num_splits,
            x.stride(0), s.stride(0), s.stride(1), e.stride(0), e.stride(1), y.stride(0),
            0 if h is None else h.stride(0),
            HAS_BIAS=bias is not None, ACTIVATION=activation_name(activation), SAVE_H=save_h,
            TENSOR_RANK=tensor_rank, ROUND_RANK=R % 8 == 0, TRANSPOSED=transposed,
            DESCRIPTORS=config.descriptors, BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N,
            BLOCK_K=config.BLOCK_K, BLOCK_R=config.BLOCK_R, INPUT_PRECISION=input_precision,
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    return y, h


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
            "options": {
                "num_warps": config.num_warps,
                "num_stages": config.num_stages,
                "maxnreg": MAX_REGISTERS,
            },
            "dot_rows": config.BLOCK_M,
            "resident": config.resident,
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
            "num_whole": "i32",
            "num_splits": "i32",
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
