"""Configurations of the row kernel: pure functions of sizes and a device, without Triton."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

__all__ = [
    "MAX_REGISTERS",
    "MAX_WIDTH",
    "SHIPPED",
    "RowConfig",
    "RowPlan",
    "candidates",
    "plans",
    "width_bucket",
]

# Wider accumulators do not fit into the registers of a program.
MAX_WIDTH = 256
# Left alone, ptxas aims at more programs than shared memory holds, and on sm_100 spills for them.
MAX_REGISTERS = 255


@dataclass(frozen=True)
class RowConfig:
    """Tiles of x (BLOCK_M, BLOCK_K), H (BLOCK_M, BLOCK_R) and y (BLOCK_M, BLOCK_N).

    `precision` is "half" (16-bit types), "tf32" or "ieee" (float32); `descriptors` says that x and
    the factors are loaded through host TMA descriptors.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int
    precision: str = "half"
    descriptors: bool = False

    @property
    def resident(self) -> int:
        """Programs that share a multiprocessor; shared memory leaves room for one of the widest."""
        return 2 if self.num_warps == 4 and self.BLOCK_R < 128 else 1

    def __str__(self) -> str:
        tiles = f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K} r{self.BLOCK_R}"
        kind = "tma" if self.descriptors else "ptr"
        return f"{tiles} w{self.num_warps} s{self.num_stages} {self.precision} {kind}"


def _table(arch: str) -> Iterator[RowConfig]:
    """Configurations of an architecture; by compiler output only, none was timed on a GPU.

    Those of sm_80 stay within the 99 KiB of sm_86 and sm_89; on sm_90 they serve tensors that have
    no descriptors, where addresses and masks fill the registers. IEEE float32 has no tensor cores:
    its products run on scalar units, for which H must be small.
    """
    narrow = (16, 32, 64)
    pointers = (
        RowConfig(64, 64, 64, 16, 4, 3),
        RowConfig(64, 64, 32, 32, 4, 3),
        *(RowConfig(64, 64, 32, r, 8, 3) for r in (64, 128)),
        RowConfig(32, 32, 32, 256, 8, 3),
        *(RowConfig(64, 64, 32, r, 4, 3, "tf32") for r in (16, 32)),
        RowConfig(64, 32, 32, 64, 8, 3, "tf32"),
        RowConfig(64, 32, 16, 128, 8, 3, "tf32"),
        RowConfig(32, 32, 16, 256, 8, 2, "tf32"),
    )
    if arch == "sm_90":
        described = (
            *(RowConfig(64, 128, 64, r, 4, 4) for r in (*narrow, 128)),
            RowConfig(64, 64, 64, 256, 8, 3),
            *(RowConfig(128, 128, 64, r, 8, 4) for r in (*narrow, 128)),
            RowConfig(128, 64, 64, 256, 8, 3),
            *(RowConfig(64, 64, 32, r, 4, 4, "tf32") for r in (16, 32)),
            RowConfig(64, 64, 32, 64, 4, 3, "tf32"),
            RowConfig(64, 64, 32, 128, 8, 3, "tf32"),
            RowConfig(64, 32, 32, 256, 8, 2, "tf32"),
        )
        yield from (replace(config, descriptors=True) for config in described)
    yield from pointers
    yield RowConfig(32, 32, 32, 16, 4, 2, "ieee")
    yield RowConfig(32, 32, 16, 32, 4, 2, "ieee")
    yield from (RowConfig(32, 32, 16, r, 8, 2, "ieee") for r in (64, 128))
    yield RowConfig(16, 16, 16, 256, 8, 2, "ieee")


SHIPPED = {arch: tuple(_table(arch)) for arch in ("sm_80", "sm_90")}


def width_bucket(width: int) -> int:
    """BLOCK_R that holds a rank: 16, 32, 64, 128 or 256."""
    return max(16, 1 << (width - 1).bit_length())


@dataclass(frozen=True)
class RowPlan:
    """How one launch is cut up; any plan is correct.

    Attributes:
        num_whole: blocks of rows that have one program each; they come first.
        num_splits: programs that share each of the other blocks, by columns of y.
        num_programs: of the grid.
    """

    num_whole: int
    num_splits: int
    num_programs: int


def plans(config: RowConfig, M: int, N: int, num_cores: int) -> Iterator[RowPlan]:
    """The plan without shared blocks, and those that share the blocks of the last wave."""
    blocks, columns = -(-M // config.BLOCK_M), max(1, -(-N // config.BLOCK_N))
    yield RowPlan(blocks, 1, blocks)
    slots = num_cores * config.resident
    whole = blocks // slots * slots
    rest = blocks - whole
    if rest:
        most = min(columns, slots // rest)
        for splits in dict.fromkeys((2, most // 2, most)):
            if 1 < splits <= most:
                yield RowPlan(whole, splits, whole + rest * splits)


def candidates(
    arch: str, width: int, precision: str, *, descriptors: bool
) -> tuple[RowConfig, ...]:
    """Configurations that hold a rank, by rows.

    Args:
        arch: a key of SHIPPED.
        width: rank, or R where only the device knows the rank; at most MAX_WIDTH.
        precision: "half", "tf32" or "ieee".
        descriptors: whether the tensors can have TMA descriptors.
    """
    fitting = [
        c for c in SHIPPED[arch] if c.BLOCK_R == width_bucket(width) and c.precision == precision
    ]
    if any(c.descriptors for c in fitting):
        fitting = [c for c in fitting if c.descriptors == descriptors]
    return tuple(sorted(fitting, key=lambda c: c.BLOCK_M))
