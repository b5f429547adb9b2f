"""Launches the row kernel: y or dx of one layer with many rows, H in registers.

What runs on the device is in row_kernel.py, what decides tiles in row_config.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from maestro_kernels.backends.triton import choose, interpreter
from maestro_kernels.backends.triton.descriptors import can_describe
from maestro_kernels.backends.triton.epilogue import activation_name
from maestro_kernels.backends.triton.launch import (
    empty_h,
    h_stride,
    input_precision,
    is_elsewhere,
    record_of,
)
from maestro_kernels.backends.triton.launcher import Launcher, keep, layouts
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
from maestro_kernels.call import as_rows

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
    residual: Tensor | None = None,
    scale: float = 1.0,
    norm: Tensor | None = None,
    norm_eps: float = 0.0,
    *,
    save_h: bool,
    config: RowConfig | None = None,
    plan: RowPlan | None = None,
    input_precision: str = "ieee",
) -> tuple[Tensor, Tensor | None]:
    """Compute y = act(H @ u[:, :r].T + bias + residual), H = scale · x @ v[:r].T in registers.

    Args:
        x: (M, K), M > 0, last stride 1; float16, bfloat16 or float32.
        v: (R, K).
        u: (N, R).
        bias: (N,) or None.
        rank: 0 < r <= 256, or a 0-d int32 tensor on the device of x, clamped to 0..R in the kernel;
            R <= 256 then.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".
        residual: (M, N), last stride 1, or None.
        scale: what H is multiplied by.
        norm: weight (R,) of an RMSNorm between the products, or None; contiguous.
        norm_eps: what is added to the mean of squares.
        save_h: return H.
        config: tiles; None chooses.
        plan: programs for each block of rows; None chooses.
        input_precision: "ieee" or "tf32"; says how float32 is multiplied.

    Returns:
        y (M, N), and H: (M, r), or for a tensor rank (M, R) with zeros beyond r; None unless asked.
        It is from before a norm.
    """
    return _launch(
        x, v, u, bias, rank, activation, residual, scale, norm, norm_eps,
        save_h=save_h, transposed=False, config=config, plan=plan, input_precision=input_precision,
    )  # fmt: skip


def row_dx(
    dy: Tensor,
    u: Tensor,
    v: Tensor,
    rank: int | Tensor,
    scale: float = 1.0,
    *,
    config: RowConfig | None = None,
    plan: RowPlan | None = None,
    input_precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Compute dx = dH @ v[:r] and dH = scale · dy @ u[:, :r] with the same kernel.

    Args:
        dy: gradient of y before bias and activation (M, N), last stride 1.
        u: (N, R).
        v: (R, K).
        rank: as in row.
        scale: as in row.
        config: tiles; None chooses.
        plan: programs for each block of rows; None chooses.
        input_precision: as in row.

    Returns:
        dx (M, K), and dH shaped like H in row.
    """
    dx, dh = _launch(
        dy, u.t(), v.t(), None, rank, None, None, scale, None, 0.0,
        save_h=True, transposed=True, config=config, plan=plan, input_precision=input_precision,
    )  # fmt: skip
    assert dh is not None
    return dx, dh


class _Launch(NamedTuple):
    """A launch but for its tensors: of layouts that were launched before, or are about to be.

    Attributes:
        launcher: kernel, grid and constants.
        M: rows.
        N: columns of y.
        width: columns of H, 0 where it is not saved.
        describe: what makes the descriptors of x, S and E; None where they are read by pointers.
        rank: r, None where it is a tensor.
        numbers: the arguments behind the rank, before the residual.
    """

    launcher: Launcher
    M: int
    N: int
    width: int
    describe: Callable[[Tensor, Tensor, Tensor], tuple[TensorDescriptor, ...]] | None
    rank: int | None
    numbers: tuple[int | None, ...]


_launches: dict[tuple[Any, ...], _Launch] = {}


def _launch(
    x: Tensor,
    s: Tensor,
    e: Tensor,
    bias: Tensor | None,
    rank: int | Tensor,
    activation: str | None,
    residual: Tensor | None,
    scale: float,
    norm: Tensor | None,
    norm_eps: float,
    *,
    save_h: bool,
    transposed: bool,
    config: RowConfig | None,
    plan: RowPlan | None,
    input_precision: str,
) -> tuple[Tensor, Tensor | None]:
    interpreter.ensure()
    is_tensor = isinstance(rank, Tensor)
    how = (
        None if is_tensor else rank, activation, save_h, transposed, config, plan, input_precision
    )  # fmt: skip
    key = (x.device, how, layouts((x, s, e, bias, residual, norm)), scale == 1)
    found = _launches.get(key)
    if found is None:
        found = keep(_launches, key, _planned(x, s, e, bias, residual, *how))
    factor = None if scale == 1 else float(scale)
    given = rank if isinstance(rank, Tensor) else None
    return _run(found, x, s, e, bias, given, residual, factor, norm, norm_eps)


def again(
    x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, rank: int, activation: str | None
) -> Tensor | None:
    """Y of `row` for x (..., K), None where no tensors that lie like these went through it."""
    how = rank, activation, False, False, None, None, input_precision(x.dtype)
    rows = x if x.ndim == 2 else as_rows(x)
    found = _launches.get((x.device, how, layouts((rows, v, u, bias, None, None)), True))
    if found is None:
        return None
    y, _ = _run(found, rows, v, u, bias, None, None, None)
    return y if rows is x else y.view(*x.shape[:-1], u.shape[0])


def _run(
    launch: _Launch,
    x: Tensor,
    s: Tensor,
    e: Tensor,
    bias: Tensor | None,
    rank: Tensor | None,
    residual: Tensor | None,
    scale: float | None,
    norm: Tensor | None = None,
    norm_eps: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Launch with these tensors."""
    launcher, M, N, width, describe, known_rank, numbers = launch
    if is_elsewhere(x):
        with torch.cuda.device(x.device):
            return _run(launch, x, s, e, bias, rank, residual, scale, norm, norm_eps)
    y = x.new_empty(M, N)
    h = empty_h(x, width) if width else None
    operands = (x, s, e) if describe is None else describe(x, s, e)
    launcher(
        x,
        *operands,
        # Any pointer of the type serves in the place of what is not there.
        y if bias is None else bias,
        y,
        y if h is None else h,
        known_rank if rank is None else rank,
        *numbers,
        residual,
        scale,
        norm,
        None if norm is None else float(norm_eps),
    )
    return y, h


def _planned(
    x: Tensor,
    s: Tensor,
    e: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rank: int | None,
    activation: str | None,
    save_h: bool,
    transposed: bool,
    config: RowConfig | None,
    plan: RowPlan | None,
    input_precision: str,
) -> _Launch:
    """Tiles, grid, descriptors and constants for tensors that lie like these."""
    (M, K), N, R = x.shape, e.shape[0], s.shape[0]
    width = R if rank is None else rank
    stored = (x, s.t(), e.t()) if transposed else (x, s, e)
    device = record_of(x)
    if config is None:
        config, planned = choose.row(
            device, M, N, K, width_bucket(width), x.dtype, input_precision,
            descriptors=all(map(can_describe, stored)),
        )  # fmt: skip
        plan = plan or planned
    plan = plan or next(plans(config, M, N, device.num_cores))
    describe = None
    if config.descriptors:
        describe = _describe(*stored, width, transposed=transposed, config=config)
    launcher = Launcher(
        row_kernel,
        plan.num_programs,
        {
            "HAS_BIAS": bias is not None,
            "ACTIVATION": activation_name(activation),
            "SAVE_H": save_h,
            "TENSOR_RANK": rank is None,
            "ROUND_RANK": R % 8 == 0,
            "TRANSPOSED": transposed,
            "DESCRIPTORS": config.descriptors,
            "BLOCK_M": config.BLOCK_M,
            "BLOCK_N": config.BLOCK_N,
            "BLOCK_K": config.BLOCK_K,
            "BLOCK_R": config.BLOCK_R,
            "INPUT_PRECISION": input_precision,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=MAX_REGISTERS,
    )
    numbers = (
        M, N, K, R, plan.num_whole, plan.num_splits,
        x.stride(0), s.stride(0), s.stride(1), e.stride(0), e.stride(1), N,
        h_stride(width) if save_h else 0, None if residual is None else residual.stride(0),
    )  # fmt: skip
    return _Launch(launcher, M, N, width if save_h else 0, describe, rank, numbers)


def _describe(
    x: Tensor, s: Tensor, e: Tensor, width: int, *, transposed: bool, config: RowConfig
) -> Callable[[Tensor, Tensor, Tensor], tuple[TensorDescriptor, ...]]:
    """What makes host descriptors of tensors that lie like these; reads beyond `width` give 0.

    S and E come as they lie in memory.
    """
    tile_s, tile_e = (config.BLOCK_R, config.BLOCK_K), (config.BLOCK_N, config.BLOCK_R)
    shape_s, shape_e = (width, s.shape[1]), (e.shape[0], width)
    if transposed:
        tile_s, tile_e = tile_s[::-1], tile_e[::-1]
        shape_s, shape_e = (s.shape[0], width), (width, e.shape[1])
    # Its checks of shapes and strides cost as much as the launch, and hold for what lies alike.
    checked = [
        vars(TensorDescriptor(tensor, list(shape), list(tensor.stride()), list(tile)))
        for tensor, shape, tile in (
            (x, x.shape, (config.BLOCK_M, config.BLOCK_K)),
            (s, shape_s, tile_s),
            (e, shape_e, tile_e),
        )
    ]
    for fields in checked:
        del fields["base"]  # or the first tensors would live as long as the plan

    def describe(*tensors: Tensor) -> tuple[TensorDescriptor, ...]:
        return tuple(map(_descriptor, tensors, checked))

    return describe


def _descriptor(base: Tensor, fields: dict[str, Any]) -> TensorDescriptor:
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    descriptor.__dict__ = {**fields, "base": base}
    return descriptor


def aot_spec(config: RowConfig, dtype: str, arch: str) -> Iterator[dict[str, Any]]:
    """What tools/triton_report.py compiles for a configuration and "bf16", "fp16" or "fp32".

    forward: bias, gelu, H saved; residual, norm: the same with one and a scale, which exact float32
    does not take; dx: with a rank on the device; odd: nothing is divisible by 8.
    """
    if (dtype == "fp32") == (config.precision == "half"):
        return
    odd = () if config.descriptors else ("forward odd", "dx odd")
    added = () if config.precision == "ieee" else ("residual", "norm")
    for form in ("forward", *added, "dx", *odd):
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
            "stride_resm": size if form == "residual" else None,
            "p_residual": pointer if form == "residual" else None,
            "scale": "fp32" if form in ("residual", "norm") else None,
            "p_norm": pointer if form == "norm" else None,
            "norm_eps": "fp32" if form == "norm" else None,
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
