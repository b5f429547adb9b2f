"""Configurations and launch plans of the two-phase kernel.

Pure functions of sizes and a device record: nothing here touches a tensor, Triton or a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from maestro_kernels import hardware

__all__ = [
    "CANDIDATES",
    "COUNTERS_BEFORE_ARRIVALS",
    "MAX_REGISTERS",
    "MAX_SPLIT",
    "MIN_STEPS",
    "PREFETCHED",
    "SHIPPED",
    "UNALIGNED",
    "TwoPhaseConfig",
    "TwoPhasePlan",
    "candidates",
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
# Bytes of E that wait in L2 for their turn while H is made: a quarter of an H100's.
PREFETCHED = 12 << 20


@dataclass(frozen=True)
class TwoPhaseConfig:
    """Tiles of x and H (BLOCK_M, BLOCK_K, BLOCK_R), of y (BLOCK_M, BLOCK_N); warps and stages.

    STEP_R is how many ranks a step of the expand reads, 0 as many as BLOCK_R. `decode` says that
    factors are prefetched, and where the device can, that launches overlap (PDL).
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int
    STEP_R: int = 0
    decode: bool = False

    @property
    def ranks_per_step(self) -> int:
        """STEP_R where there is one, else BLOCK_R."""
        return self.STEP_R or self.BLOCK_R

    @property
    def resident(self) -> int:
        """Programs that share a multiprocessor: its registers hold two of 4 warps or one of 8."""
        return 2 if self.num_warps == 4 else 1

    @property
    def takes_norm(self) -> bool:
        """Whether a norm's weight and sums find registers beside a tile of H; by the compiler."""
        return self.BLOCK_M * self.BLOCK_R < 128 * 128

    def __str__(self) -> str:
        tiles = f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K} r{self.BLOCK_R}"
        step = f"/{self.STEP_R}" if self.STEP_R else ""
        decode = " decode" if self.decode else ""
        return f"{tiles}{step} w{self.num_warps} s{self.num_stages}{decode}"


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


# Few rows: factors are prefetched, and the expand reads 128 ranks a step, so that enough bytes are
# in flight for the bandwidth of memory (docs/dev/predictions.md).
_DECODE = (
    TwoPhaseConfig(16, 32, 128, 32, 4, 4, 128, decode=True),
    TwoPhaseConfig(16, 64, 128, 32, 4, 4, 128, decode=True),
    TwoPhaseConfig(32, 64, 128, 32, 4, 3, 128, decode=True),
    TwoPhaseConfig(64, 64, 128, 32, 4, 3, 128, decode=True),
    TwoPhaseConfig(64, 128, 128, 32, 4, 3, 64, decode=True),
)
# What choose.two_phase takes the predicted fastest of: each compiles without spills on every
# architecture that it is offered on. Multiplying float32 exactly takes FMAs, whose operands must
# fit into registers: BLOCK_R is 16 there.
CANDIDATES: dict[tuple[str, str], tuple[TwoPhaseConfig, ...]] = {
    ("sm_90", "16-bit"): (
        *_DECODE,
        TwoPhaseConfig(64, 64, 64, 64, 4, 4),
        TwoPhaseConfig(64, 128, 64, 64, 4, 4),
        TwoPhaseConfig(128, 128, 64, 64, 8, 4),
        TwoPhaseConfig(128, 128, 64, 128, 8, 4, 64),
    ),
    ("sm_80", "16-bit"): (
        *_DECODE,
        TwoPhaseConfig(64, 64, 64, 64, 4, 4),
        TwoPhaseConfig(128, 128, 32, 64, 8, 3),
    ),
}
for _arch in ("sm_80", "sm_90"):
    CANDIDATES[_arch, "tf32"] = (
        TwoPhaseConfig(16, 32, 64, 32, 4, 4, 64, decode=True),
        TwoPhaseConfig(64, 64, 32, 32, 4, 3),
    )
    CANDIDATES[_arch, "ieee"] = (
        TwoPhaseConfig(16, 32, 64, 16, 4, 4, decode=True),
        TwoPhaseConfig(64, 64, 32, 16, 8, 3),
    )
# Layouts that need exact masks and narrow loads (see two_phase._layout): addresses fill the
# registers, so tiles are smaller, and nothing is prefetched.
UNALIGNED: dict[str, tuple[TwoPhaseConfig, ...]] = {
    "16-bit": (TwoPhaseConfig(16, 32, 128, 32, 4, 4), TwoPhaseConfig(32, 64, 128, 32, 4, 3)),
    "tf32": (TwoPhaseConfig(16, 32, 64, 32, 4, 4), TwoPhaseConfig(32, 64, 32, 32, 4, 3)),
    "ieee": (TwoPhaseConfig(16, 32, 32, 16, 4, 4), TwoPhaseConfig(32, 64, 32, 16, 8, 3)),
}
SHIPPED: dict[str, tuple[TwoPhaseConfig, ...]] = {
    arch: tuple(
        dict.fromkeys(
            config
            for kind in ("16-bit", "tf32", "ieee")
            for config in CANDIDATES[arch, kind] + UNALIGNED[kind]
        )
    )
    for arch in ("sm_80", "sm_90")
}


def candidates(arch: str, kind: str, M: int, *, aligned: bool) -> tuple[TwoPhaseConfig, ...]:
    """Configurations that may serve M rows.

    Args:
        arch: a key of SHIPPED.
        kind: "16-bit", "tf32" or "ieee".
        M: rows; up to 16 of them take the tiles for 16 rows, which multiply no more than these.
        aligned: the kernel can read 16 bytes at a time: all sizes and row strides are multiples
            of 8, tensors start on 16 bytes.
    """
    offered = CANDIDATES[arch, kind] if aligned else UNALIGNED[kind]
    few, many = (tuple(c for c in offered if (c.BLOCK_M == 16) == few) for few in (True, False))
    if M <= 16:
        return few
    # Those for few rows cost less where they serve, and are not compiled for many.
    decode = tuple(c for c in many if c.decode and c.BLOCK_M >= min(M, 64)) if M <= 64 else ()
    return decode or tuple(c for c in many if not c.decode)


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
