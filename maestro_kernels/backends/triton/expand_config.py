"""Configurations of the expand kernel: pure functions of sizes, without Triton."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "MAX_REGISTERS", "SHIPPED", "ExpandConfig"]

# Whose devices have TMA and warpgroup products; on others a library does as well as Triton.
ARCHITECTURES = ("sm_90", "sm_100", "sm_103")
# Left alone, ptxas aims at more programs than shared memory holds and spills for them.
MAX_REGISTERS = 255


@dataclass(frozen=True)
class ExpandConfig:
    """Tile of y (BLOCK_M, BLOCK_N), summed BLOCK_R ranks at a time."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    num_warps: int
    num_stages: int

    @property
    def STORE_N(self) -> int:
        """Columns that a store takes: those of an activation that fits beside the sum."""
        return min(self.BLOCK_N, 128)

    @property
    def resident(self) -> int:
        """Programs that share a multiprocessor: its registers hold two of 4 warps or one of 8."""
        return 2 if self.num_warps == 4 else 1

    def __str__(self) -> str:
        tiles = f"{self.BLOCK_M}x{self.BLOCK_N} r{self.BLOCK_R}"
        return f"{tiles} w{self.num_warps} s{self.num_stages}"


# choose.expand takes the predicted fastest; by compiler output only, none was timed on a GPU.
SHIPPED: dict[str, tuple[ExpandConfig, ...]] = {
    "sm_80": (),
    "sm_90": (
        ExpandConfig(64, 64, 64, 4, 4),
        ExpandConfig(64, 128, 64, 4, 4),
        ExpandConfig(128, 128, 64, 8, 4),
        ExpandConfig(128, 256, 64, 8, 4),
    ),
}
