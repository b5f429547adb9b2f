"""The forms of the two-phase kernel that tools/triton_report.py compiles ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from maestro_kernels.backends.triton.launch import table_arch
from maestro_kernels.backends.triton.two_phase_config import (
    CANDIDATES,
    MAX_REGISTERS,
    UNALIGNED,
    TwoPhaseConfig,
)
from maestro_kernels.backends.triton.two_phase_kernel import two_phase_kernel

__all__ = ["aot_spec"]

_FORMS = ("single", "residual", "norm", "grouped", "dx", "dx_sum")
_UNALIGNED_FORMS = ("odd", "dx_odd")


def aot_spec(config: TwoPhaseConfig, dtype: str, arch: str) -> Iterator[dict[str, Any]]:
    """What tools/triton_report.py compiles for a configuration and "bf16", "fp16" or "fp32".

    single: int rank, bias and gelu; residual, norm: the same with one and a scale; grouped: three
    layers, tensor ranks, H saved, silu beside none; dx: one layer; dx_sum: three layers that share
    x, tensor ranks; odd, dx_odd: one layer whose sizes have no common divisor.
    """
    for precision in ("ieee", "tf32") if dtype == "fp32" else ("16-bit",):
        suffix = f" {precision}" if dtype == "fp32" else ""
        offered = CANDIDATES[table_arch(arch), precision]
        tables = ((offered, _FORMS), (UNALIGNED[precision], _UNALIGNED_FORMS))
        for form in (f for configs, forms in tables if config in configs for f in forms):
            if form == "norm" and not config.takes_norm:
                continue
            yield {
                "kernel": two_phase_kernel,
                "label": f"{config} {form}{suffix}",
                "signature": _signature(config, dtype, arch, form, precision),
                "options": {
                    "num_warps": config.num_warps,
                    "num_stages": config.num_stages,
                    "maxnreg": MAX_REGISTERS,
                    "launch_pdl": config.decode and arch != "sm_80",
                },
                "dot_rows": config.BLOCK_M,
                "resident": config.resident,
            }


def _signature(
    config: TwoPhaseConfig, dtype: str, arch: str, form: str, precision: str
) -> dict[str, Any]:
    """Arguments as Triton specialises them for contiguous tensors, sizes divisible by 16 or odd."""
    backward, group, odd = form.startswith("dx"), form in ("grouped", "dx_sum"), "odd" in form
    count, size = 3 if group else 1, "i32" if odd else "i32:16"

    def each(value: object) -> tuple[object, ...]:
        return (value,) * count

    pointers = ("xs", "ss", "es", "biases", "ys", "hs")
    sizes = ("Ns", "Ks", "Rs", "strides_xm", "strides_ym")
    strides = {"strides_sr": size, "strides_sk": 1, "strides_en": size, "strides_er": 1}
    if backward:
        strides = {"strides_sr": 1, "strides_sk": size, "strides_en": 1, "strides_er": size}
    strides["strides_hm"] = "i32:16"
    activations = {"grouped": ("silu", "none", "none")}.get(
        form, ("none",) if backward else ("gelu",)
    )
    return (
        {name: each(f"*{dtype}:16") for name in pointers}
        | {name: each(size) for name in sizes}
        | {name: each(value) for name, value in strides.items()}
        | {
            "ranks": "*i32" if group else each("i32"),
            "partials": "*fp32:16",
            "counters": "*i32:16",
            "M": "i32",
            "split_target": "i32",
            "residuals": each(f"*{dtype}:16") if form == "residual" else None,
            "strides_resm": each(size) if form == "residual" else None,
            "scales": each("fp32") if form in ("residual", "norm") else None,
            "norms": each(f"*{dtype}:16") if form == "norm" else None,
            "raws": each(f"*{dtype}:16") if form == "norm" else None,
            "squares": "*fp32:16" if form == "norm" else None,
            "norm_eps": "fp32" if form == "norm" else None,
            "RESIDUAL_BITS": int(form == "residual"),
            "NORM_BITS": int(form == "norm"),
            "BIAS_BITS": 0 if backward else 5 if group else 1,
            "ACTIVATIONS": activations,
            "TENSOR_RANK": group,
            "SUM_LAYERS": form == "dx_sum",
            "ZERO_TAIL": group,
            "LAYOUT": "any" if odd else "columns" if backward else "rows",
            "LAYERS": 4 if group else 1,
            "INPUT_PRECISION": "tf32" if precision == "tf32" else "ieee",
            "BLOCK_M": config.BLOCK_M,
            "BLOCK_N": config.BLOCK_N,
            "BLOCK_K": config.BLOCK_K,
            "BLOCK_R": config.BLOCK_R,
            "STEP_R": config.ranks_per_step,
            "PREFETCH": config.decode and not odd,
            "PDL": config.decode and arch != "sm_80",
        }
    )
