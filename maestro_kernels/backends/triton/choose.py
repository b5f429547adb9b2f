"""Which tiles serve a call, by predicted time; pure functions of sizes and a device, no Triton."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from maestro_kernels import hardware
from maestro_kernels.backends.triton import expand_config, predict, row_config
from maestro_kernels.backends.triton.expand_config import ExpandConfig
from maestro_kernels.backends.triton.launch import table_arch
from maestro_kernels.backends.triton.row_config import RowConfig, RowPlan, plans
from maestro_kernels.backends.triton.two_phase_config import TwoPhaseConfig, candidates
from maestro_kernels.hardware import Device
from maestro_kernels.measure.cost import Size

__all__ = ["expand", "known", "peak", "row", "strategies", "two_phase"]

# IEEE float32 products on an H100: no tensor cores, 50 of the data sheet's 67 TFLOP/s.
_IEEE_PEAK = 50e12


def known(device: Device) -> Device:
    """The device, its unknown bandwidths and peaks those of an H100 of as many cores.

    Only their proportions matter to a choice.
    """
    if device.bandwidth is not None and device.peak_flops:
        return device
    share = device.num_cores / hardware.H100.num_cores
    assert hardware.H100.bandwidth is not None
    peaks = tuple((name, flops * share) for name, flops in hardware.H100.peak_flops)
    return replace(device, bandwidth=hardware.H100.bandwidth * share, peak_flops=peaks)


def peak(device: Device, dtype: torch.dtype, input_precision: str) -> float:
    """FLOP/s of a library's products on a known device; `input_precision` is that of float32."""
    if dtype == torch.float32 and input_precision == "ieee":
        return _IEEE_PEAK * device.num_cores / hardware.H100.num_cores
    found = device.peak(dtype) or device.peak(torch.bfloat16)
    assert found is not None
    return found


@functools.lru_cache(4096)
def two_phase(
    device: Device,
    M: int,
    Ns: tuple[int, ...],
    Ks: tuple[int, ...],
    Rs: tuple[int, ...],
    dtype: torch.dtype,
    input_precision: str = "ieee",
    *,
    aligned: bool = True,
    normed: bool = False,
) -> TwoPhaseConfig:
    """Configuration for one launch, predicted at full rank so that no rank makes a variant.

    Args:
        device: to run on; architectures without configurations take those of another.
        M: rows.
        Ns: out_features of each layer.
        Ks: in_features of each layer.
        Rs: widths of the factors.
        dtype: of x.
        input_precision: "ieee" or "tf32", for float32.
        aligned: see two_phase_config.candidates.
        normed: whether a layer has a norm.
    """
    kind = input_precision if dtype == torch.float32 else "16-bit"
    offered = candidates(table_arch(device.arch), kind, M, aligned=aligned)
    offered = [c for c in offered if c.takes_norm] if normed else offered
    if len(offered) == 1:
        return offered[0]
    device = known(device)
    flops = peak(device, dtype, input_precision)
    # A factor without rows or columns takes no time, and is no phase.
    sizes = [Size(M, N, K, max(R, 1)) for N, K, R in zip(Ns, Ks, Rs, strict=True)]
    return min(
        offered,
        key=lambda c: predict.two_phase(device, c, sizes, dtype.itemsize, flops).seconds,
    )


@functools.lru_cache(4096)
def row(
    device: Device,
    M: int,
    N: int,
    K: int,
    width: int,
    dtype: torch.dtype,
    input_precision: str = "ieee",
    *,
    descriptors: bool = True,
) -> tuple[RowConfig, RowPlan]:
    """Configuration and plan of one launch of the row kernel, predicted at full width.

    Args:
        device: as for two_phase.
        M: rows.
        N: out_features.
        K: in_features.
        width: of H, row_config.width_bucket of the rank.
        dtype: of x.
        input_precision: "ieee" or "tf32", for float32.
        descriptors: whether the tensors can have TMA descriptors.
    """
    kind = input_precision if dtype == torch.float32 else "half"
    offered = row_config.candidates(table_arch(device.arch), width, kind, descriptors=descriptors)
    device = known(device)
    flops, size = peak(device, dtype, input_precision), Size(M, N, K, width)
    return min(
        ((config, plan) for config in offered for plan in plans(config, M, N, device.num_cores)),
        key=lambda c: predict.row(device, *c, size, dtype.itemsize, flops).seconds,
    )


@functools.lru_cache(4096)
def expand(device: Device, M: int, N: int, K: int, R: int, dtype: torch.dtype) -> ExpandConfig:
    """Configuration of one launch of the expand kernel, predicted at full rank.

    Args:
        device: as for two_phase; one of expand_config.ARCHITECTURES.
        M: rows.
        N: out_features.
        K: in_features.
        R: width of the factors.
        dtype: of x, 16 bits wide.
    """
    device = known(device)
    flops, size = peak(device, dtype, "ieee"), Size(M, N, K, max(R, 1))
    return min(
        expand_config.SHIPPED[table_arch(device.arch)],
        key=lambda c: predict.expand(device, c, size, dtype.itemsize, flops).seconds,
    )


@functools.lru_cache(4096)
def strategies(
    device: Device,
    M: int,
    N: int,
    K: int,
    rank: int,
    dtype: torch.dtype,
    input_precision: str = "ieee",
    *,
    aligned: bool = True,
) -> dict[str, float]:
    """Predicted seconds of one layer by each strategy that can run it, the best tiles of each.

    Args:
        device: as for two_phase.
        M: rows.
        N: out_features.
        K: in_features.
        rank: active rank, or R where only the device knows it.
        dtype: of x.
        input_precision: "ieee" or "tf32", for float32.
        aligned: rows of every matrix can be read 16 bytes at a time, by TMA where there is one.
    """
    tiles = two_phase(device, M, (N,), (K,), (rank,), dtype, input_precision, aligned=aligned)
    found = known(device)
    flops, size = peak(found, dtype, input_precision), Size(M, N, K, rank)
    args = size, dtype.itemsize, flops
    seconds = {}
    if rank <= row_config.MAX_WIDTH:
        width = row_config.width_bucket(rank)
        config, plan = row(device, M, N, K, width, dtype, input_precision, descriptors=aligned)
        seconds["row"] = predict.row(found, config, plan, *args).seconds
    seconds["two_phase"] = predict.two_phase(found, tiles, [size], dtype.itemsize, flops).seconds
    if device.arch in expand_config.ARCHITECTURES and dtype.itemsize == 2 and aligned:
        seconds["expand"] = predict.expand(
            found, expand(device, M, N, K, rank, dtype), *args
        ).seconds
    return seconds
