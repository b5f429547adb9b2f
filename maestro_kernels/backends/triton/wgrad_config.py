"""Configurations and launch plans of the weight-gradient kernel.

Pure functions of sizes and a device record: nothing here touches a tensor, Triton or a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from maestro_kernels import hardware

__all__ = [
    "SHIPPED",
    "UNALIGNED",
    "WgradConfig",
    "WgradPlan",
    "choose_config",
    "plan_wgrad",
]


@dataclass(frozen=True)
class WgradConfig:
    """Tile of a gradient (BLOCK_R, BLOCK_W), summed BLOCK_M rows at a time.

    `precision` is "half" (16-bit types), "tf32" or "ieee" (float32).
    """

    BLOCK_M: int
    BLOCK_R: int
    BLOCK_W: int
    num_warps: int
    num_stages: int
    precision: str = "half"

    @property
    def resident(self) -> int:
        """Programs that share a multiprocessor: its registers hold two of 4 warps or one of 8."""
        return 2 if self.num_warps == 4 else 1

    @property
    def max_registers(self) -> int | None:
        """Registers of a thread that ptxas may use, or None to leave it alone.

        Alone it aims at more programs than the plan has and spills a few bytes to get there; with a
        limit it spills those of exact float32 products (Triton 3.9, sm_90).
        """
        return None if self.precision == "ieee" else 255

    def __str__(self) -> str:
        tiles = f"{self.BLOCK_M}x{self.BLOCK_W} r{self.BLOCK_R}"
        return f"{tiles} w{self.num_warps} s{self.num_stages} {self.precision}"


@dataclass(frozen=True)
class WgradPlan:
    """How one launch is cut up.

    Attributes:
        num_programs: programs of the grid; any number is correct.
        split_target: work items that splitting M may reach; fixes the order of the sums.
        max_split: splits of one tile; 1 where no slots are needed.
        partials: float32 elements of the slots.
    """

    num_programs: int
    split_target: int
    max_split: int
    partials: int


UNALIGNED = WgradConfig(32, 64, 64, 4, 3)
# A factor of 64 columns or fewer leaves half of a tile for 128 empty. Not timed on a GPU.
SHIPPED: dict[str, tuple[WgradConfig, ...]] = {
    arch: (
        WgradConfig(block_m, 64, 128, num_warps, 4),
        WgradConfig(block_m, 128, 128, 8, 4),
        UNALIGNED,
        WgradConfig(32, 64, 64, 4, 3, "tf32"),
        WgradConfig(32, 32, 32, 4, 2, "ieee"),
    )
    for arch, block_m, num_warps in (("sm_80", 32, 8), ("sm_90", 64, 4))
}
_MAX_SPLIT = 64


def choose_config(R: int, precision: str, arch: str, *, aligned: bool = True) -> WgradConfig:
    """Configuration for the largest R of a group, so that no rank makes another variant.

    Args:
        R: width of the factors.
        precision: "half", "tf32" or "ieee".
        arch: a key of SHIPPED.
        aligned: see launch.is_aligned.
    """
    if precision == "half" and not aligned:
        return UNALIGNED
    fitting = [c for c in SHIPPED[arch] if c.precision == precision and c != UNALIGNED]
    return next((c for c in fitting if c.BLOCK_R >= R), fitting[-1])


def plan_wgrad(
    device: hardware.Device,
    config: WgradConfig,
    M: int,
    sizes: Sequence[tuple[int, int, int | None]],
) -> WgradPlan:
    """Plan of one launch.

    Args:
        device: its number of cores is the number of programs to occupy.
        config: tiles.
        M: rows that are summed.
        sizes: (W, R, rank) of each product; rank is None where only the device knows it.
    """
    resident = device.num_cores * config.resident
    blocks = [(-(-W // config.BLOCK_W), R, rank) for W, R, rank in sizes]
    tiles = sum(num_w * -(-R // config.BLOCK_R) for num_w, R, _ in blocks)
    fewest = sum(num_w * -(-min(rank or 0, R) // config.BLOCK_R) for num_w, R, rank in blocks)
    # The last split to arrive reads all slots of its tile alone, at about the time of half a step
    # of M each: more splits than this take longer to add up than they save.
    max_split = min(math.isqrt(2 * -(-M // config.BLOCK_M)), _MAX_SPLIT)
    if 2 * max(fewest, 1) > resident or max_split < 2:
        max_split = 1
    slot = config.BLOCK_R * config.BLOCK_W + config.BLOCK_W
    return WgradPlan(
        num_programs=max(resident if max_split > 1 else 1, tiles),
        split_target=resident,
        max_split=max_split,
        partials=resident * slot if max_split > 1 else 1,
    )
