"""Configurations and launch plans of the two-phase kernel, and what is compiled ahead of time.

Pure functions of sizes and a device record: nothing here touches a tensor or a GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from maestro_kernels import hardware
from maestro_kernels.backends.triton.launch import table_arch
from maestro_kernels.backends.triton.two_phase_kernel import (
    COUNTERS_BEFORE_ARRIVALS,
    two_phase_kernel,
)

__all__ = [
    "MAX_REGISTERS",
    "SHIPPED",
    "TwoPhaseConfig",
    "TwoPhasePlan",
    "aot_spec",
    "choose_config",
    "plan_two_phase",
]

# Two programs of 4 warps, or one of 8, share the 65536 registers of a multiprocessor. Left alone,
# ptxas aims at more programs than the plan has and spills a few bytes to get there.
MAX_REGISTERS = 255


@dataclass(frozen=True)
class TwoPhaseConfig:
    """Tiles of x and H (BLOCK_M, BLOCK_K, BLOCK_R), of y (BLOCK_M, BLOCK_N); warps and stages."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        tiles = f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K} r{self.BLOCK_R}"
        return f"{tiles} w{self.num_warps} s{self.num_stages}"


@dataclass(frozen=True)
class TwoPhasePlan:
    """How one launch is cut up; sizes in elements.

    Attributes:
        num_programs: programs of the grid; any number is correct.
        split_target: tiles that phase 1 may reach by splitting K; fixes the order of the sums.
        partials: float32 slots for the sums of split tiles.
        counters: int32 counters.
    """

    num_programs: int
    split_target: int
    partials: int
    counters: int


_SMALL = TwoPhaseConfig(16, 32, 128, 32, 4, 4)
_SMALL_WIDE = TwoPhaseConfig(16, 64, 128, 32, 4, 4)
_MIDDLE = TwoPhaseConfig(32, 64, 128, 32, 4, 3)
_LARGE = TwoPhaseConfig(64, 64, 64, 64, 4, 4)
_Row = tuple[float, float, TwoPhaseConfig]  # largest M, largest N, what serves them
# First match wins. Chosen by the model in the maintainers' notes and by what compiles without
# spills; not measured on a GPU. Multiplying float32 exactly takes FMAs, whose operands must fit
# into registers: BLOCK_R is 16 there.
_TABLES: dict[tuple[str, str], tuple[_Row, ...]] = {
    ("sm_90", "16-bit"): (
        (16, 8192, _SMALL),
        (16, math.inf, _SMALL_WIDE),
        (32, math.inf, _MIDDLE),
        (512, math.inf, _LARGE),
        (2048, math.inf, TwoPhaseConfig(64, 128, 64, 64, 4, 4)),
        (math.inf, math.inf, TwoPhaseConfig(128, 128, 64, 64, 8, 4)),
    ),
    ("sm_80", "16-bit"): (
        (16, 8192, _SMALL),
        (16, math.inf, _SMALL_WIDE),
        (32, math.inf, _MIDDLE),
        (512, math.inf, _LARGE),
        (math.inf, math.inf, TwoPhaseConfig(128, 128, 32, 64, 8, 3)),
    ),
}
for _arch in ("sm_80", "sm_90"):
    _TABLES[_arch, "tf32"] = (
        (16, math.inf, TwoPhaseConfig(16, 32, 64, 32, 4, 4)),
        (math.inf, math.inf, TwoPhaseConfig(64, 64, 32, 32, 4, 3)),
    )
    _TABLES[_arch, "ieee"] = (
        (16, math.inf, TwoPhaseConfig(16, 32, 64, 16, 4, 4)),
        (math.inf, math.inf, TwoPhaseConfig(64, 64, 32, 16, 8, 3)),
    )
# Layouts that need exact masks and narrow loads (see _layout): addresses fill the registers, so
# tiles are smaller.
_UNALIGNED: dict[str, tuple[_Row, ...]] = {
    "16-bit": ((16, math.inf, _SMALL), (math.inf, math.inf, _MIDDLE)),
    "tf32": (
        (16, math.inf, TwoPhaseConfig(16, 32, 64, 32, 4, 4)),
        (math.inf, math.inf, TwoPhaseConfig(32, 64, 32, 32, 4, 3)),
    ),
    "ieee": (
        (16, math.inf, TwoPhaseConfig(16, 32, 32, 16, 4, 4)),
        (math.inf, math.inf, TwoPhaseConfig(32, 64, 32, 16, 8, 3)),
    ),
}
# Every configuration that choose_config can return.
SHIPPED: dict[str, tuple[TwoPhaseConfig, ...]] = {
    arch: tuple(
        dict.fromkeys(
            row[2]
            for kind in ("16-bit", "tf32", "ieee")
            for row in _TABLES[arch, kind] + _UNALIGNED[kind]
        )
    )
    for arch in ("sm_80", "sm_90")
}


def choose_config(
    M: int,
    N: int,
    dtype: torch.dtype,
    arch: str,
    input_precision: str = "ieee",
    *,
    aligned: bool = True,
) -> TwoPhaseConfig:
    """Configuration for M rows and the largest N of a group.

    Architectures without an entry take those of another, see table_arch.

    Args:
        M: rows.
        N: out_features.
        dtype: of x.
        arch: "sm_90".
        input_precision: "ieee" or "tf32", for float32.
        aligned: the kernel can read 16 bytes at a time: all sizes and row strides are multiples
            of 8, tensors start on 16 bytes.
    """
    kind = input_precision if dtype == torch.float32 else "16-bit"
    table = _TABLES[table_arch(arch), kind] if aligned else _UNALIGNED[kind]
    return next(row[2] for row in table if row[0] >= M and row[1] >= N)


@functools.lru_cache(4096)
def plan_two_phase(
    device: hardware.Device,
    config: TwoPhaseConfig,
    M: int,
    Ns: tuple[int, ...],
    ranks: tuple[int, ...],
) -> TwoPhasePlan:
    """Plan of one launch; ranks are the active ones, or R where the host does not know them.

    A program waits only for running ones, so the number of programs is only a matter of speed:
    as many as can be resident, or as there are tiles.
    """
    num_m = -(-M // config.BLOCK_M)
    # Registers allow two programs of 4 warps on a multiprocessor, or one of 8.
    resident = device.num_cores * (2 if config.num_warps == 4 else 1)
    shrink = num_m * sum(-(-r // config.BLOCK_R) for r in ranks)
    expand = num_m * sum(-(-N // config.BLOCK_N) for N in Ns)
    # One row block with one rank block could be split: a tensor rank may be as small as that.
    can_split = 2 * num_m <= resident
    return TwoPhasePlan(
        num_programs=max(1, min(resident, max(shrink, expand, resident if can_split else 0))),
        split_target=resident,
        partials=resident * config.BLOCK_M * config.BLOCK_R if can_split else 1,
        counters=COUNTERS_BEFORE_ARRIVALS.value + resident + len(ranks) * num_m,
    )


_FORMS = ("single", "grouped", "dx", "dx_sum")
_UNALIGNED_FORMS = ("odd", "dx_odd")


def aot_spec(config: TwoPhaseConfig, dtype: str, arch: str) -> Iterator[dict[str, Any]]:
    """What tools/triton_report.py compiles for a configuration and "bf16", "fp16" or "fp32".

    single: int rank, bias and gelu; grouped: three layers, tensor ranks, H saved, silu beside none;
    dx: of one layer; dx_sum: three layers that share x, tensor ranks; odd, dx_odd: one layer whose
    sizes have no common divisor.
    """
    for precision in ("ieee", "tf32") if dtype == "fp32" else ("16-bit",):
        suffix = f" {precision}" if dtype == "fp32" else ""
        tables = ((_TABLES[arch, precision], _FORMS), (_UNALIGNED[precision], _UNALIGNED_FORMS))
        for form in (
            f for table, forms in tables if config in [r[2] for r in table] for f in forms
        ):
            yield {
                "kernel": two_phase_kernel,
                "label": f"{config} {form}{suffix}",
                "signature": _signature(config, dtype, form, precision),
                "options": {
                    "num_warps": config.num_warps,
                    "num_stages": config.num_stages,
                    "maxnreg": MAX_REGISTERS,
                },
                "dot_rows": config.BLOCK_M,
            }


def _signature(config: TwoPhaseConfig, dtype: str, form: str, precision: str) -> dict[str, Any]:
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
    activations = {"single": ("gelu",), "odd": ("gelu",), "grouped": ("silu", "none", "none")}.get(
        form, ("none",)
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
        }
    )
