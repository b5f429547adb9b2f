"""One library product for H, then one launch for the rest: bias and activation cost no pass over y.

What runs on the device is in expand_kernel.py, what tiles there are in expand_config.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from maestro_kernels.backends.triton import choose, interpreter
from maestro_kernels.backends.triton.descriptors import can_describe
from maestro_kernels.backends.triton.epilogue import activation_name
from maestro_kernels.backends.triton.expand_config import MAX_REGISTERS, SHIPPED, ExpandConfig
from maestro_kernels.backends.triton.expand_kernel import expand_kernel
from maestro_kernels.backends.triton.launch import device_of, empty_h, record_of

__all__ = ["SHIPPED", "ExpandConfig", "aot_spec", "expand", "expand_dx", "expand_kernel"]


def expand(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None,
    rank: int,
    activation: str | None,
    *,
    config: ExpandConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute H = x @ v[:r].T by a library, and y = act(H @ u[:, :r].T + bias) in one launch.

    Args:
        x: (M, K), M > 0; float16 or bfloat16.
        v: (R, K).
        u: (N, R), N % 8 == 0; copied where its rows do not start on 16 bytes.
        bias: (N,) or None.
        rank: 0 < r <= R.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".
        config: tiles; None chooses.

    Returns:
        y (M, N) and H (M, r), its rows launch.h_stride(r) elements apart.
    """
    interpreter.ensure()
    M, N = x.shape[0], u.shape[0]
    h = _product(x, v[:rank].t())
    config = config or choose.expand(record_of(x), M, N, x.shape[1], u.shape[1], x.dtype)
    if not can_describe(u):
        u = empty_h(u, rank).copy_(u[:, :rank])
    y = x.new_empty(M, N)
    # The interpreter knows no launches that overlap.
    pdl = not interpreter.active()
    with device_of(x):
        expand_kernel[(-(-M // config.BLOCK_M) * -(-N // config.BLOCK_N),)](
            _describe(h, rank, config.BLOCK_M, config.BLOCK_R),
            _describe(u, rank, config.BLOCK_N, config.BLOCK_R),
            _describe(y, N, config.BLOCK_M, config.STORE_N),
            # Any pointer of the type serves in the place of what is not there.
            y if bias is None else bias,
            rank, N, 0 if bias is None else N,
            ACTIVATION=activation_name(activation), PDL=pdl,
            BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_R=config.BLOCK_R,
            STORE_N=config.STORE_N, num_warps=config.num_warps, num_stages=config.num_stages,
            maxnreg=MAX_REGISTERS, launch_pdl=pdl,
        )  # fmt: skip
    return y, h


def expand_dx(
    dy: Tensor, u: Tensor, v: Tensor, rank: int, *, needs_x: bool
) -> tuple[Tensor | None, Tensor]:
    """Compute dH = dy @ u[:, :r], and dx = dH @ v[:r] where it is needed, by a library.

    Neither has an epilogue that would be worth a launch of ours. dH is laid out as H in expand.
    """
    dh = _product(dy, u[:, :rank])
    return dh @ v[:rank] if needs_x else None, dh


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A @ b with rows as kernels read them: 8 ranks at a time, zero beyond the last one."""
    width = b.shape[1]
    padded = empty_h(a, -(-width // 8) * 8)
    if width % 8:
        padded[:, width:].zero_()
    return torch.mm(a, b, out=padded[:, :width])


def _describe(tensor: Tensor, width: int, rows: int, columns: int) -> TensorDescriptor:
    """A host descriptor of (rows, columns) at a time; reads beyond `width` give 0."""
    shape, strides = [tensor.shape[0], width], list(tensor.stride())
    return TensorDescriptor(tensor, shape, strides, [rows, columns])


def aot_spec(config: ExpandConfig, dtype: str, arch: str) -> Iterator[dict[str, Any]]:
    """What tools/triton_report.py compiles for a configuration and "bf16", "fp16" or "fp32".

    gelu; silu: with an N that is a multiple of 8 only.
    """
    if dtype == "fp32":
        return
    for form in ("gelu", "silu"):
        yield {
            "kernel": expand_kernel,
            "label": f"{config} {form}",
            "signature": _signature(config, dtype, form),
            "options": {
                "num_warps": config.num_warps,
                "num_stages": config.num_stages,
                "maxnreg": MAX_REGISTERS,
                "launch_pdl": True,
            },
            "dot_rows": config.BLOCK_M,
            "resident": config.resident,
        }


def _signature(config: ExpandConfig, dtype: str, form: str) -> dict[str, Any]:
    """Arguments as Triton specialises them for tensors that torch has allocated."""
    return {
        "h": f"tensordesc<{dtype}[{config.BLOCK_M},{config.BLOCK_R}]>",
        "u": f"tensordesc<{dtype}[{config.BLOCK_N},{config.BLOCK_R}]>",
        "y": f"tensordesc<{dtype}[{config.BLOCK_M},{config.STORE_N}]>",
        "p_bias": f"*{dtype}:16",
        "rank": "i32",
        "N": "i32:16" if form == "gelu" else "i32",
        "num_bias": "i32",
        "ACTIVATION": form,
        "PDL": True,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_R": config.BLOCK_R,
        "STORE_N": config.STORE_N,
    }
