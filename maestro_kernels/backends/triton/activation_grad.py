"""The gradient before an activation, dz = dy · act'(z), written once for both backward launches.

z = H · u[:, :r]ᵀ + bias is never saved: its tiles are computed again from H, which takes less time
than reading them for r < 512. The sign of y stands in for z where the activation is relu.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from maestro_kernels.backends.triton import interpreter
from maestro_kernels.backends.triton.epilogue import activation_derivative, activation_name
from maestro_kernels.backends.triton.launch import (
    device_of,
    is_aligned,
    readable_h,
    record_of,
    table_arch,
)
from maestro_kernels.backends.triton.two_phase_kernel import expand_sum

__all__ = [
    "SHIPPED",
    "ActivationGradConfig",
    "activation_grad",
    "activation_grad_kernel",
    "aot_spec",
    "choose_config",
]


@triton.jit(do_not_specialize=["rank", "M"])
def activation_grad_kernel(
    p_dy, p_y, p_h, p_u, p_bias, p_dz, rank, M, N, R,
    stride_dym, stride_ym, stride_hm, stride_un, stride_ur, stride_dzm,
    FROM_Y: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    TENSOR_RANK: tl.constexpr, ROUND_RANK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of dz = dy · act'(H · u[:, :r]ᵀ + bias), or of dz = dy · act'(y) (FROM_Y).

    rank is an int, or a pointer to int32 (TENSOR_RANK) that is clamped to 0..R.
    ROUND_RANK: u is read 8 ranks at a time, which needs R % 8 == 0; H always is.
    """
    num_n = tl.cdiv(N, BLOCK_N)
    i_m = tl.program_id(0) // num_n
    i_n = tl.program_id(0) % num_n
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_tile = (o_m < M)[:, None] & (o_n < N)[None, :]
    o_row = o_m[:, None].to(tl.int64)
    if FROM_Y:
        b_z = tl.load(p_y + o_row * stride_ym + o_n[None, :], mask=m_tile, other=0.0)
        b_z = b_z.to(tl.float32)
    else:
        if TENSOR_RANK:
            rank = tl.minimum(tl.maximum(tl.load(rank), 0), R)
        b_z = expand_sum(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32), p_h, p_u, M, N, rank, stride_hm, stride_un,
            stride_ur, i_m, i_n, ROUND_RANK, BLOCK_M, BLOCK_N, BLOCK_R, BLOCK_R,
            INPUT_PRECISION,
        )  # fmt: skip
        if HAS_BIAS:
            b_z += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    b_dy = tl.load(p_dy + o_row * stride_dym + o_n[None, :], mask=m_tile, other=0.0)
    b_dz = b_dy.to(tl.float32) * activation_derivative(b_z, ACTIVATION)
    p_dz += o_row * stride_dzm + o_n[None, :]
    tl.store(p_dz, b_dz.to(p_dz.dtype.element_ty), mask=m_tile)


@dataclass(frozen=True)
class ActivationGradConfig:
    """Tile of dz (BLOCK_M, BLOCK_N), computed from BLOCK_R columns of H at a time.

    `precision` is "half" (16-bit types), "tf32" or "ieee" (float32).
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    num_warps: int
    num_stages: int
    precision: str = "half"

    def __str__(self) -> str:
        tiles = f"{self.BLOCK_M}x{self.BLOCK_N} r{self.BLOCK_R}"
        return f"{tiles} w{self.num_warps} s{self.num_stages} {self.precision}"


# By compiler output only, none was timed on a GPU.
SHIPPED: dict[str, tuple[ActivationGradConfig, ...]] = {
    arch: (
        ActivationGradConfig(64, 64, 64, 4, 3),
        ActivationGradConfig(128, block_n, 64, 8, 3),
        ActivationGradConfig(64, 64, 32, 4, 3, "tf32"),
        ActivationGradConfig(32, 32, 32, 4, 2, "ieee"),
    )
    for arch, block_n in (("sm_80", 64), ("sm_90", 128))
}


def choose_config(
    M: int, N: int, precision: str, arch: str, num_cores: int, *, aligned: bool = True
) -> ActivationGradConfig:
    """Largest tile that leaves no core without one, else the smallest there is.

    Only the smallest has registers to spare where rows are not `aligned` (launch.is_aligned).
    """
    fitting = [c for c in SHIPPED[arch] if c.precision == precision]
    fitting = fitting if aligned else fitting[:1]
    full = [c for c in fitting if -(-M // c.BLOCK_M) * -(-N // c.BLOCK_N) >= num_cores]
    return full[-1] if full else fitting[0]


def activation_grad(
    dy: Tensor,
    h: Tensor | None,
    u: Tensor,
    bias: Tensor | None,
    y: Tensor | None,
    rank: int | Tensor,
    activation: str,
    *,
    config: ActivationGradConfig | None = None,
    input_precision: str = "ieee",
) -> Tensor:
    """Compute dz = dy * act'(z), z = H @ u[:, :r].T + bias.

    Args:
        dy: gradient of y (M, N), last stride 1; float16, bfloat16 or float32.
        h: H (M, r), or (M, R) for a tensor rank; may be None where y stands in for z.
        u: (N, R).
        bias: (N,) or None.
        y: output of the forward (M, N), last stride 1; looked at for relu only, where it saves
            computing z; may be None.
        rank: r, or a 0-d int32 tensor on the device, clamped to 0..R in the kernel.
        activation: "relu", "gelu", "gelu_tanh" or "silu".
        config: tiles; None chooses.
        input_precision: "ieee" or "tf32"; says how float32 is multiplied.

    Returns:
        dz (M, N) in the dtype of dy.
    """
    interpreter.ensure()
    (M, N), R = dy.shape, u.shape[1]
    from_y = activation == "relu" and y is not None
    if from_y:
        h = dy
    assert h is not None, "activation_grad: H or, for relu, y"
    h = h if from_y else readable_h(h)
    if config is None:
        device = record_of(dy)
        precision = input_precision if dy.element_size() == 4 else "half"
        config = choose_config(
            M, N, precision, table_arch(device.arch), device.num_cores,
            aligned=is_aligned(dy, y) if from_y else is_aligned(dy, u),
        )  # fmt: skip
    dz = dy.new_empty(M, N)
    y = dy if y is None else y
    with device_of(dy):
        activation_grad_kernel[(-(-M // config.BLOCK_M) * -(-N // config.BLOCK_N),)](
            # Any pointer of the type serves in the place of what is not read.
            dy, y, h, u, dy if bias is None else bias, dz, rank, M, N, R,
            dy.stride(0), y.stride(0), h.stride(0), u.stride(0), u.stride(1), dz.stride(0),
            FROM_Y=from_y, HAS_BIAS=bias is not None, ACTIVATION=activation_name(activation),
            TENSOR_RANK=isinstance(rank, Tensor), ROUND_RANK=R % 8 == 0, BLOCK_M=config.BLOCK_M,
            BLOCK_N=config.BLOCK_N, BLOCK_R=config.BLOCK_R, INPUT_PRECISION=input_precision,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return dz


def aot_spec(config: ActivationGradConfig, dtype: str, arch: str) -> Iterator[dict[str, Any]]:
    """What tools/triton_report.py compiles for a configuration and "bf16", "fp16" or "fp32".

    gelu: with a bias, int rank; device rank: silu; relu: from y; odd: nothing divisible by 8.
    """
    if (dtype == "fp32") == (config.precision == "half"):
        return
    odd = () if config.BLOCK_M == 128 else ("gelu odd", "device rank odd", "relu odd")
    for form in ("gelu", "device rank", "relu", *odd):
        yield {
            "kernel": activation_grad_kernel,
            "label": f"{config} {form}",
            "signature": _signature(config, dtype, form),
            "options": {"num_warps": config.num_warps, "num_stages": config.num_stages},
            "dot_rows": 0 if form.startswith("relu") else config.BLOCK_M,
        }


def _signature(config: ActivationGradConfig, dtype: str, form: str) -> dict[str, Any]:
    """Arguments as Triton specialises them for contiguous tensors with sizes divisible by 16."""
    odd, form = form.endswith("odd"), form.removesuffix(" odd")
    pointer, size = (f"*{dtype}", "i32") if odd else (f"*{dtype}:16", "i32:16")
    sizes = ("N", "R", "stride_dym", "stride_ym", "stride_un", "stride_dzm")
    return (
        dict.fromkeys(("p_dy", "p_y", "p_u", "p_bias", "p_dz"), pointer)
        | dict.fromkeys(sizes, size)
        | {
            "rank": "*i32" if form == "device rank" else "i32",
            "M": "i32",
            "p_h": f"*{dtype}:16",
            "stride_hm": "i32:16",
            "stride_ur": 1,
            "FROM_Y": form == "relu",
            "HAS_BIAS": form == "gelu",
            "ACTIVATION": form if form in ("gelu", "relu") else "silu",
            "TENSOR_RANK": form == "device rank",
            "ROUND_RANK": not odd,
            "BLOCK_M": config.BLOCK_M,
            "BLOCK_N": config.BLOCK_N,
            "BLOCK_R": config.BLOCK_R,
            "INPUT_PRECISION": "tf32" if config.precision == "tf32" else "ieee",
        }
    )
