"""Predicted time of the Triton kernels: what a configuration and a plan ask of a recorded GPU.

Pure functions of sizes and a device record, without Triton; measure/predict.py has the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from maestro_kernels.backends.triton.expand_config import ExpandConfig
from maestro_kernels.backends.triton.row_config import RowConfig, RowPlan
from maestro_kernels.backends.triton.two_phase_config import (
    MAX_SPLIT,
    MIN_STEPS,
    PREFETCHED,
    TwoPhaseConfig,
    plan_two_phase,
)
from maestro_kernels.backends.triton.wgrad_config import WgradConfig, plan_wgrad
from maestro_kernels.hardware import Device
from maestro_kernels.measure import predict
from maestro_kernels.measure.cost import Size
from maestro_kernels.measure.predict import H100_ASSUMED, Assumptions, Phase

__all__ = ["Prediction", "expand", "row", "two_phase", "wgrad"]


@dataclass(frozen=True)
class Prediction:
    """One launch: its phases (shrink and expand, or one that does both) and its time."""

    phases: tuple[Phase, ...]
    seconds: float


def two_phase(
    device: Device,
    config: TwoPhaseConfig,
    sizes: Sequence[Size],
    itemsize: int,
    peak: float,
    assumed: Assumptions = H100_ASSUMED,
    *,
    resident: int | None = None,
    summed: bool = False,
) -> Prediction:
    """Of one launch of the two-phase kernel for layers that share x, or for one.

    Args:
        device: whose bandwidth is known.
        config: tiles.
        sizes: the layers at their active ranks; as many rows each.
        itemsize: bytes per element.
        peak: FLOP/s of the library's products in this dtype.
        assumed: the rest of the machine.
        resident: programs that a core holds by the compiler's figures; None as planned.
        summed: each layer has an x of its own, and one y is the sum of theirs: dx of such layers.
    """
    # The grid has as many programs as are planned to be resident.
    resident = min(config.resident, resident or config.resident)
    M, K = sizes[0].M, max(size.K for size in sizes)
    ranks = tuple(size.rank for size in sizes)
    plan = plan_two_phase(device, config, M, tuple(size.N for size in sizes), ranks)
    num_m, rows = -(-M // config.BLOCK_M), min(config.BLOCK_M, M)
    unsplit = max(num_m * sum(-(-rank // config.BLOCK_R) for rank in ranks), 1)
    steps = -(-K // config.BLOCK_K)
    splits = max(1, min(plan.split_target // unsplit, steps // MIN_STEPS, MAX_SPLIT))
    per_split = -(-steps // splits)
    width = min(config.BLOCK_R, max(ranks))
    step = (rows + width) * config.BLOCK_K * itemsize
    # A split is stored and loaded again in float32.
    stored = rows * width * (8 if splits > 1 else itemsize)
    factor_s = sum(size.rank * size.K for size in sizes)
    factor_u = sum(size.N * size.rank for size in sizes) * itemsize
    read_x = sum(size.K for size in sizes) if summed else K
    early = min(factor_u, PREFETCHED) if config.decode else 0
    shrink = Phase(
        tiles=unsplit * splits,
        tile_bytes=per_split * step + stored,
        tile_flops=2 * config.BLOCK_M * config.BLOCK_R * per_split * config.BLOCK_K,
        memory_bytes=(M * read_x + factor_s) * itemsize + early,
        in_flight=min(config.num_stages - 1, per_split) * step,
        asked_for=early + factor_s * itemsize if config.decode else 0,
        resident=resident,
        share=_share(device, config.BLOCK_M, config.BLOCK_R, itemsize, assumed),
    )
    hidden = M * sum(ranks) * itemsize
    # H is written and read by way of the second-level cache, and beyond it.
    spilled = 0 if M * K * itemsize + hidden <= assumed.kept * (device.l2_bytes or 0) else hidden
    outputs = [size.N for size in (sizes[:1] if summed else sizes)]
    rank, columns = sum(ranks) / len(outputs), config.BLOCK_N
    step = (rows + columns) * config.ranks_per_step * itemsize
    loaded = (rows + columns) * rank * itemsize
    expand = Phase(
        tiles=num_m * sum(-(-N // columns) for N in outputs),
        tile_bytes=loaded + rows * columns * itemsize,
        tile_flops=2 * config.BLOCK_M * columns * rank,
        memory_bytes=sum(outputs) * M * itemsize + factor_u - early + 2 * spilled,
        in_flight=min((config.num_stages - 1) * step, loaded),
        resident=resident,
        share=_share(device, config.BLOCK_M, columns, itemsize, assumed),
        before=assumed.handover + (assumed.handover if splits > 1 else 0.0),
        cached=0 < factor_u == early,
    )
    phases = (shrink, expand)
    overlapped = config.decode and device.arch not in ("sm_80", "sm_86", "sm_89")
    took = predict.seconds(phases, device, peak, assumed, overlapped=overlapped)
    return Prediction(phases, took)


def row(
    device: Device,
    config: RowConfig,
    plan: RowPlan,
    size: Size,
    itemsize: int,
    peak: float,
    assumed: Assumptions = H100_ASSUMED,
    *,
    resident: int | None = None,
) -> Prediction:
    """Of one launch of the row kernel; arguments as for two_phase."""
    whole = plan.num_whole
    shared = (plan.num_programs - whole) // plan.num_splits
    rows = min(config.BLOCK_M, size.M)
    width = min(config.BLOCK_R, size.rank)
    step = (rows + width) * config.BLOCK_K + config.BLOCK_N * width

    def phase(blocks: int, splits: int, before: float) -> Phase:
        columns = -(-size.N // splits)
        factors = width * (size.K + columns)
        return Phase(
            tiles=blocks * splits,
            tile_bytes=(factors + rows * (size.K + columns)) * itemsize,
            tile_flops=2 * config.BLOCK_M * config.BLOCK_R * (size.K + columns),
            memory_bytes=blocks * rows * (size.K + size.N) * itemsize,
            in_flight=(config.num_stages - 1) * step / 2 * itemsize,
            resident=resident or config.resident,
            share=_share(device, config.BLOCK_M, config.BLOCK_N, itemsize, assumed),
            # The loads of u begin when those of the shrink have ended.
            before=before + assumed.cache_latency,
        )

    # Factors are read from memory once.
    first = width * (size.K + size.N) * itemsize / (device.bandwidth or 1)
    parts = [(whole, 1), (shared, plan.num_splits)]
    phases = tuple(phase(*part, first if part is parts[0] else 0.0) for part in parts if part[0])
    return Prediction(phases, predict.seconds(phases, device, peak, assumed))


def expand(
    device: Device,
    config: ExpandConfig,
    size: Size,
    itemsize: int,
    peak: float,
    assumed: Assumptions = H100_ASSUMED,
    *,
    resident: int | None = None,
) -> Prediction:
    """Of a library's product for H and one launch of the expand kernel; arguments as above."""
    took, shrink = predict.gemm(device, peak, itemsize, size.M, size.rank, size.K, assumed=assumed)
    hidden = size.M * size.rank * itemsize
    near = size.M * size.K * itemsize + hidden <= assumed.kept * (device.l2_bytes or 0)
    rows, columns = min(config.BLOCK_M, size.M), config.BLOCK_N
    loaded = (rows + columns) * size.rank * itemsize
    step = (rows + columns) * config.BLOCK_R * itemsize
    phase = Phase(
        tiles=-(-size.M // config.BLOCK_M) * -(-size.N // columns),
        tile_bytes=loaded + rows * columns * itemsize,
        tile_flops=2 * config.BLOCK_M * columns * size.rank,
        memory_bytes=(size.N * (size.M + size.rank)) * itemsize + (0 if near else hidden),
        in_flight=min((config.num_stages - 1) * step, loaded),
        resident=resident or config.resident,
        share=_share(device, config.BLOCK_M, columns, itemsize, assumed),
    )
    took += predict.seconds([phase], device, peak, assumed, overlapped=True)
    return Prediction((shrink, phase), took)


def wgrad(
    device: Device,
    config: WgradConfig,
    sizes: Sequence[Size],
    itemsize: int,
    peak: float,
    assumed: Assumptions = H100_ASSUMED,
    *,
    resident: int | None = None,
) -> Prediction:
    """Of one launch that makes du, dv and dbias of layers that share x; arguments as above."""
    M = sizes[0].M
    widths = [(W, size.rank, size.rank) for size in sizes for W in (size.N, size.K)]
    plan = plan_wgrad(device, config, M, widths)
    tiles = sum(-(-W // config.BLOCK_W) * -(-rank // config.BLOCK_R) for W, rank, _ in widths)
    steps = -(-M // config.BLOCK_M)
    splits = max(1, min(plan.split_target // max(tiles, 1), plan.max_split))
    per_split = -(-steps // splits)
    step = min(config.BLOCK_M, M) * (config.BLOCK_R + config.BLOCK_W) * itemsize
    tile = config.BLOCK_R * config.BLOCK_W
    gradients = sum(size.rank * (size.N + size.K) for size in sizes)
    read = M * (max(size.K for size in sizes) + sum(size.N + 2 * size.rank for size in sizes))
    phase = Phase(
        tiles=tiles * splits,
        tile_bytes=per_split * step + tile * (8 if splits > 1 else itemsize),
        tile_flops=2 * tile * per_split * config.BLOCK_M,
        memory_bytes=(read + gradients) * itemsize,
        in_flight=min(config.num_stages - 1, per_split) * step,
        resident=resident or config.resident,
        share=_share(device, config.BLOCK_R, config.BLOCK_W, itemsize, assumed),
        before=assumed.handover if splits > 1 else 0.0,
    )
    return Prediction((phase,), predict.seconds([phase], device, peak, assumed))


def _share(device: Device, rows: int, columns: int, itemsize: int, assumed: Assumptions) -> float:
    """Share of the peak that a tile's instructions reach."""
    warpgroup = device.arch not in ("sm_80", "sm_86", "sm_89", "sm_120") and rows >= 64
    share = predict.tile_share(rows, columns) * assumed.generated
    return share if warpgroup or itemsize == 4 else share * assumed.mma_sync
