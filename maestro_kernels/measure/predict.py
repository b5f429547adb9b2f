"""Predicted time of kernels on a recorded GPU: bytes in flight, waves, bytes and FLOP.

A phase is a grid of equal tiles that run side by side; a launch is one or more phases after each
other. The time of a phase is that of its slowest limit:

    memory      bytes / min(bandwidth, bytes in flight on all cores / latency)      (Little's law)
    one core    tiles of the busiest core x bytes of a tile / what a core is fed
    products    tiles of the busiest core x FLOP of a tile / what a core multiplies

and one latency before the first bytes arrive. Tiles that do not fill the last wave show in the
tiles of the busiest core. Nothing here was measured: docs/dev/predictions.md says where each
assumption comes from and what would replace it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from maestro_kernels.hardware import Device
from maestro_kernels.measure.cost import Size

__all__ = [
    "H100_ASSUMED",
    "Assumptions",
    "Phase",
    "gemm",
    "library_backward",
    "library_calls",
    "needed_in_flight",
    "pass_over_memory",
    "seconds",
    "tile_share",
]


@dataclass(frozen=True)
class Assumptions:
    """What a device record does not hold; seconds, bytes per second, shares.

    Attributes:
        gap: from the end of one kernel to the first instruction of the next in a captured graph;
            the same for a library's kernel and for ours.
        gap_overlapped: the same where the kernel may begin before the one in front of it has ended
            (programmatic dependent launch), and that one is not ours.
        latency: from issuing a load to its data, from memory under load.
        cache_latency: the same from the second-level cache.
        handover: inside a launch, from the last store of a phase to the first load of the next.
        reduce: what a split K costs a library call beside its traffic.
        cache_bandwidth: from the second-level cache to all cores together.
        core_bandwidth: the most that one core takes in.
        mma_sync: share of the peak that products of less than 64 rows reach (mma.sync).
        generated: share of a library's product rate that a compiler's pipeline reaches.
        kept: share of the second-level cache in which an intermediate result survives.
    """

    gap: float = 2.0e-6
    gap_overlapped: float = 1.2e-6
    latency: float = 0.72e-6
    cache_latency: float = 0.3e-6
    handover: float = 1.2e-6
    reduce: float = 0.8e-6
    cache_bandwidth: float = 7.0e12
    core_bandwidth: float = 90e9
    mma_sync: float = 0.62
    generated: float = 0.75
    kept: float = 0.8


H100_ASSUMED = Assumptions()


@dataclass(frozen=True)
class Phase:
    """Equal tiles that may run at the same time.

    Attributes:
        tiles: how many.
        tile_bytes: what one tile loads and stores, from whichever level.
        tile_flops: FLOP of one tile, its padding included.
        memory_bytes: what all tiles together move from and to memory.
        in_flight: bytes that one program has asked for at any moment.
        asked_for: bytes that all programs together ask for before they begin (prefetches).
        resident: programs that share a core.
        share: of the peak that the products of such a tile reach.
        before: seconds that pass before the first tile can load.
        cached: what it loads is in the second-level cache when it begins.
    """

    tiles: int
    tile_bytes: float
    tile_flops: float
    memory_bytes: float
    in_flight: float
    asked_for: float = 0.0
    resident: int = 1
    share: float = 1.0
    before: float = 0.0
    cached: bool = False

    def waves(self, device: Device) -> float:
        """Tiles over programs that are resident at once; 1.07 takes as long as 2."""
        return self.tiles / (device.num_cores * self.resident)

    def in_flight_per_core(self, device: Device) -> float:
        """Bytes on the way to the busiest core, or asked for by it."""
        running = min(self.resident, -(-self.tiles // device.num_cores))
        return self.in_flight * running + self.asked_for / device.num_cores

    def seconds(self, device: Device, peak: float, assumed: Assumptions = H100_ASSUMED) -> float:
        """Predicted time, the launch itself not included; `peak` in FLOP/s of all cores."""
        assert device.bandwidth is not None
        cores = device.num_cores
        busy, per_core = min(self.tiles, cores), -(-self.tiles // cores)
        if not self.tiles:
            return 0.0
        flying = min(self.tiles, cores * self.resident) * self.in_flight
        flying += self.asked_for
        memory = self.memory_bytes / min(device.bandwidth, flying / assumed.latency)
        fed = min(
            assumed.core_bandwidth,
            assumed.cache_bandwidth / busy,
            self.in_flight_per_core(device) / assumed.cache_latency,
        )
        core = per_core * self.tile_bytes / fed
        products = per_core * self.tile_flops / (peak / cores * self.share)
        # A program that takes another tile asks for its first bytes anew; its neighbours run on.
        rounds = -(-per_core // self.resident) - 1
        first = assumed.cache_latency if self.cached else assumed.latency
        fill = first + rounds * assumed.cache_latency / self.resident
        return self.before + fill + max(memory, core, products)


def seconds(
    phases: Sequence[Phase],
    device: Device,
    peak: float,
    assumed: Assumptions = H100_ASSUMED,
    *,
    overlapped: bool = False,
) -> float:
    """Predicted time of one launch: a gap, then its phases one after the other."""
    gap = assumed.gap_overlapped if overlapped else assumed.gap
    return gap + sum(phase.seconds(device, peak, assumed) for phase in phases)


def needed_in_flight(device: Device, assumed: Assumptions = H100_ASSUMED) -> float:
    """Bytes on the way to each core with which memory reaches its bandwidth (Little's law)."""
    assert device.bandwidth is not None
    return device.bandwidth * assumed.latency / device.num_cores


def pass_over_memory(
    device: Device, read: float, written: float, assumed: Assumptions = H100_ASSUMED
) -> float:
    """Predicted seconds of a library's elementwise or summing kernel.

    What it reads comes from the second-level cache where that holds all of it.

    Args:
        device: whose bandwidth is known.
        read: bytes.
        written: bytes.
        assumed: the rest of the machine.
    """
    assert device.bandwidth is not None
    cached = read <= assumed.kept * (device.l2_bytes or 0)
    memory = (written if cached else read + written) / device.bandwidth
    cache = (read + written) / assumed.cache_bandwidth
    return assumed.gap + assumed.latency + max(memory, cache)


def tile_share(rows: int, columns: int) -> float:
    """Share of the peak that a tile of a product reaches: small ones wait for shared memory."""
    return min(1.0, 0.35 + rows * columns / (43 * (rows + columns)))


@functools.lru_cache(4096)
def gemm(
    device: Device,
    peak: float,
    itemsize: int,
    M: int,
    N: int,
    K: int,
    cached: int = 0,
    assumed: Assumptions = H100_ASSUMED,
) -> tuple[float, Phase]:
    """(seconds, phase) of a library's (M, K) @ (K, N) at the best of its tiles and splits of K.

    Meant to flatter the library: its tile is the best there is, two blocks share what they load,
    and its pipeline always has enough in flight.

    Args:
        device: whose bandwidth is known.
        peak: FLOP/s.
        itemsize: bytes per element.
        M: rows.
        N: columns of the result.
        K: summed over.
        cached: bytes of the operands that are still in the second-level cache.
        assumed: the rest of the machine.
    """
    best: tuple[float, Phase] | None = None
    operands = itemsize * (M * K + K * N + M * N)
    for rows in (16, 32, 64, 128, 256):
        for columns in (16, 32, 64, 128, 256):
            tiles = -(-M // rows) * -(-N // columns)
            share = tile_share(rows, columns) * (1.0 if rows >= 64 else assumed.mma_sync)
            for splits in (1, 2, 4, 8, 16, 32):
                if splits > 1 and (K // splits < 64 or tiles * splits > 4 * device.num_cores):
                    break
                loads = (min(rows, M) + min(columns, N)) * -(-K // splits) * itemsize
                stores = min(rows, M) * min(columns, N) * (4 if splits > 1 else itemsize)
                phase = Phase(
                    tiles=tiles * splits,
                    tile_bytes=0.75 * loads + stores,
                    tile_flops=2 * rows * columns * math.ceil(K / splits),
                    memory_bytes=operands - cached,
                    in_flight=min(128 * 1024, loads),
                    share=share,
                )
                took = seconds([phase], device, peak, assumed)
                if splits > 1:
                    took += assumed.reduce
                if best is None or took < best[0]:
                    best = took, phase
    assert best is not None
    return best


def library_calls(
    layers: Sequence[Size],
    device: Device,
    peak: float,
    itemsize: int,
    assumed: Assumptions = H100_ASSUMED,
    *,
    activation: bool = False,
) -> float:
    """Predicted seconds of two matmuls per layer: H = x @ v[:r].T, then y = H @ u[:, :r].T.

    H comes back from the second-level cache where what the first call reads and writes fits into
    it, and so does a shared x from the second layer on. An activation is one more kernel.
    """
    total = 0.0
    for i, size in enumerate(layers):
        hidden = size.M * size.rank * itemsize
        x = size.M * size.K * itemsize
        fits = x + hidden <= assumed.kept * (device.l2_bytes or 0)
        total += gemm(
            device, peak, itemsize, size.M, size.rank, size.K, x if i and fits else 0, assumed
        )[0]
        total += gemm(
            device, peak, itemsize, size.M, size.N, size.rank, hidden if fits else 0, assumed
        )[0]
        if activation:
            y = size.M * size.N * itemsize
            total += pass_over_memory(device, y, y, assumed)
    return total


def library_backward(
    layers: Sequence[Size],
    device: Device,
    peak: float,
    itemsize: int,
    assumed: Assumptions = H100_ASSUMED,
) -> tuple[float, float]:
    """Predicted seconds of dx, and of the weight gradients, by library calls.

    dx is two matmuls per layer, dH = dy @ u[:, :r] and dx = dH @ v[:r], and for a shared x one sum
    for each further layer; the rest is du = dy.T @ H, dv = dH.T @ x and, with a bias, a sum of dy.
    """
    mirrored = [Size(s.M, s.K, s.N, s.rank) for s in layers]
    # Each layer has a dy of its own: nothing but H is found in the cache.
    dx = sum(library_calls([size], device, peak, itemsize, assumed) for size in mirrored)
    weights = 0.0
    for i, size in enumerate(layers):
        x, dy = size.M * size.K * itemsize, size.M * size.N * itemsize
        if i:
            dx += pass_over_memory(device, 2 * x, x, assumed)
        weights += gemm(device, peak, itemsize, size.N, size.rank, size.M, 0, assumed)[0]
        weights += gemm(device, peak, itemsize, size.rank, size.K, size.M, 0, assumed)[0]
        if size.bias:
            weights += pass_over_memory(device, dy, size.N * itemsize, assumed)
    return dx, weights
