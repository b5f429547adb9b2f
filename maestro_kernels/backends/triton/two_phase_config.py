"""Configurations and launch plans of the two-phase kernel.

Pure functions of sizes and a device record: nothing here touches a tensor, Triton or a GPU.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from maestro_kernels import hardware
from maestro_kernels.backends.triton.launch import table_arch

__all__ = [
    "COUNTERS_BEFORE_ARRIVALS",
    "MAX_REGISTERS",
    "MAX_SPLIT",
    "MIN_STEPS",
    "SHIPPED",
    "TABLES",
    "UNALIGNED",
    "TwoPhaseConfig",
    "TwoPhasePlan",
    "choose_config",
    "plan_two_phase",
]

# Two programs of 4 warps, or one of 8, share the 65536 registers of a multiprocessor. Left alone,
# ptxas aims at more programs than the plan has and spills a few bytes to get there.
MAX_REGISTERS = 255
# Slots the last arriver has to add: each costs it BLOCK_M * BLOCK_R * 4 bytes from L2.
MAX_SPLIT = 16
# Steps of BLOCK_K below which a split would spend its time on starting its loads.
MIN_STEPS = 2
# The ticket and the count of leaving programs have a 128-byte line each, the arrivals follow.
COUNTERS_BEFORE_ARRIVALS = 64


@dataclass(frozen=True)
class TwoPhaseConfig:
    """Tiles of x and H (BLOCK_M, BLOCK_K, BLOCK_R), of y (BLOCK_M, BLOCK_N); warps and stages."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int

    @property
    def resident(self) -> int:
        """Programs that share a multiprocessor: its registers hold two of 4 warps or one of 8."""
        return 2 if self.num_warps == 4 else 1

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
TABLES: dict[tuple[str, str], tuple[_Row, ...]] = {
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
    TABLES[_arch, "tf32"] = (
        (16, math.inf, TwoPhaseConfig(16, 32, 64, 32, 4, 4)),
        (math.inf, math.inf, TwoPhaseConfig(64, 64, 32, 32, 4, 3)),
    )
    TABLES[_arch, "ieee"] = (
        (16, math.inf, TwoPhaseConfig(16, 32, 64, 16, 4, 4)),
        (math.inf, math.inf, TwoPhaseConfig(64, 64, 32, 16, 8, 3)),
    )
# Layouts that need exact masks and narrow loads (see _layout): addresses fill the registers, so
# tiles are smaller.
UNALIGNED: dict[str, tuple[_Row, ...]] = {
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
            for row in TABLES[arch, kind] + UNALIGNED[kind]
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
    table = TABLES[table_arch(arch), kind] if aligned else UNALIGNED[kind]
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
    resident = device.num_cores * config.resident
    shrink = num_m * sum(-(-r // config.BLOCK_R) for r in ranks)
    expand = num_m * sum(-(-N // config.BLOCK_N) for N in Ns)
    # One row block with one rank block could be split: a tensor rank may be as small as that.
    can_split = 2 * num_m <= resident
    return TwoPhasePlan(
        num_programs=max(1, min(resident, max(shrink, expand, resident if can_split else 0))),
        split_target=resident,
        partials=resident * config.BLOCK_M * config.BLOCK_R if can_split else 1,
        counters=COUNTERS_BEFORE_ARRIVALS + resident + len(ranks) * num_m,
    )
