"""What the strategy model assumes about a GPU, measured one figure at a time.

Times come from CUDA graphs. Where one step of a chain is asked for, chains of two lengths are timed
and their difference is divided: what starting a graph costs drops out.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.gpu.device import Device, Skip
from bench.gpu.items import Item
from bench.gpu.plan import Stage

__all__ = ["items"]

MIB = 1 << 20
# (value, unit, note)
Figure = tuple[float, str, str]


def items(device: Device, stage: Stage, family: str) -> Iterator[Item]:
    """Of the chip: what the model rests on. Of the library: the pair that ours must beat."""
    micro = Micro(device)
    if family == "chip":
        figures: dict[str, Callable[[], Figure]] = {
            "copy bandwidth": micro.copy_bandwidth,
            "bf16 matmul": micro.bf16_peak,
            "graph node to node": micro.graph_node,
            "PDL boundary": micro.pdl_boundary,
            "L2 to SM": micro.l2_rate,
            "memory to one SM": micro.stream_rate,
            "float32 atomics, spread": partial(micro.atomic_rate, 1024),
            "float32 atomics, contended": partial(micro.atomic_rate, 4),
            # Last: programs that are not resident together would wait for ever.
            "grid barrier": micro.grid_barrier,
        }
    else:
        sizes = itertools.product((64, 256, 32, 1024, 128, 512), (1, 64, 1024, 8192, 256, 32768))
        figures = {f"two cuBLAS M {M} r {r}": partial(micro.two_cublas, M, r) for r, M in sizes}
        figures["two cuBLAS M 4096 r 127"] = partial(micro.two_cublas, 4096, 127)
    for name, figure in figures.items():
        yield Item(name, partial(_record, figure))


def _record(figure: Callable[[], Figure]) -> dict[str, Any]:
    value, unit, note = figure()
    return {"value": value, "unit": unit, "note": note}


class Micro:
    """The figures of one device."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def _zeros(self, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=self._device.name)

    def _cores(self) -> int:
        if self._device.is_stub:
            raise Skip("the stub has no chip of its own")
        return self._device.facts().num_cores

    def _seconds(
        self,
        call: Callable[[], object],
        calls: int = 1,
        replays: int = 30,
        cold: bool = False,
    ) -> float:
        """Median seconds of a replayed graph of `calls` calls; cold: after the L2 was flushed."""

        def several() -> None:
            for _ in range(calls):
                call()

        if self._device.is_stub:
            several()
            start = time.perf_counter()
            several()
            return time.perf_counter() - start
        replay, _ = self._device.graph(several)
        flush = self._zeros(2 * (self._device.facts().l2_bytes or 0), torch.uint8) if cold else None
        times = []
        for _ in range(replays + 3):
            start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if flush is not None:
                flush.zero_()
            start_event.record()
            replay()
            end_event.record()
            end_event.synchronize()
            times.append(start_event.elapsed_time(end_event) * 1e-3)
        return statistics.median(times[3:])

    def _step(self, call: Callable[[], object], short: int = 50, long: int = 250) -> float:
        """Seconds of one more call of a chain."""
        return (self._seconds(call, long) - self._seconds(call, short)) / (long - short)

    def graph_node(self) -> Figure:
        """From the end of a kernel to the end of the next in a graph."""
        self._cores()
        from bench.gpu.chip import step_kernel

        x = self._zeros(1)
        step = self._step(lambda: step_kernel[(1,)](x, False))
        return 1e6 * step, "us", "one-thread kernels, each reads what the last wrote"

    def pdl_boundary(self) -> Figure:
        """The same with programmatic dependent launch."""
        self._cores()
        from bench.gpu.chip import step_kernel

        x = self._zeros(1)
        step = self._step(lambda: step_kernel[(1,)](x, True, launch_pdl=True))
        return 1e6 * step, "us", "the same with programmatic dependent launch"

    def grid_barrier(self) -> Figure:
        """One barrier of a program on every SM."""
        programs = self._cores()
        from bench.gpu.chip import barrier_kernel

        arrived = self._zeros(1, torch.int32)

        def seconds_of(count: int) -> float:
            def call() -> None:
                arrived.zero_()
                barrier_kernel[(programs,)](
                    arrived, count, programs, num_warps=4, launch_cooperative_grid=True
                )

            return self._seconds(call)

        step = (seconds_of(110) - seconds_of(10)) / 100
        return 1e6 * step, "us", f"{programs} programs, one atomic each"

    def l2_rate(self) -> Figure:
        """Bytes that all SMs read from L2."""
        programs, block = 2 * self._cores(), 4096
        from bench.gpu.chip import read_kernel

        x, out = self._zeros(16 * MIB // 4), self._zeros(programs * block)
        blocks = x.numel() // block
        seconds = self._seconds(
            lambda: read_kernel[(programs,)](x, out, blocks, 1, block, num_warps=8)
        )
        return programs * x.nbytes / seconds / 1e12, "TB/s", "every program reads the same 16 MiB"

    def stream_rate(self) -> Figure:
        """Bytes that one SM reads from memory, alone on the chip and with all others."""
        cores, block, blocks = self._cores(), 4096, 128
        from bench.gpu.chip import stream_kernel

        x, out = self._zeros(cores * blocks * block), self._zeros(cores * block)

        def rate(programs: int) -> float:
            seconds = self._seconds(
                lambda: stream_kernel[(programs,)](x, out, blocks, block, num_warps=8), cold=True
            )
            return blocks * block * 4 / seconds / 1e9

        return rate(1), "GB/s", f"alone; {rate(cores):.1f} with {cores} at once, 2 MiB each"

    def atomic_rate(self, slots: int) -> Figure:
        """Atomic float32 additions per second."""
        programs, block, repeats = 4 * self._cores(), 1024, 64
        from bench.gpu.chip import atomic_kernel

        x = self._zeros(slots * block)
        seconds = self._seconds(lambda: atomic_kernel[(programs,)](x, repeats, slots, block))
        return programs * block * repeats / seconds / 1e9, "G/s", f"{slots * block} addresses"

    def copy_bandwidth(self) -> Figure:
        """Bytes read and written by a large copy."""
        source = self._zeros((1 if self._device.is_stub else 1024) * MIB // 4)
        target = torch.empty_like(source)
        seconds = self._seconds(lambda: target.copy_(source), replays=10)
        return 2 * source.nbytes / seconds / 1e12, "TB/s", f"{source.nbytes // MIB} MiB, r + w"

    def bf16_peak(self) -> Figure:
        """A large matrix product on random data."""
        n = 128 if self._device.is_stub else 8192
        a, b = (torch.randn(n, n, device=self._device.name, dtype=torch.bfloat16) for _ in range(2))
        seconds = self._seconds(lambda: torch.mm(a, b), replays=10)
        return 2 * n**3 / seconds / 1e12, "TFLOP/s", f"{n}^3"

    def two_cublas(self, M: int, r: int) -> Figure:
        """The pair at 4096 x 4096, eight sets of factors in one graph, L2 flushed before it."""
        M, N, K, r = self._device.sizes(M, 4096, 4096, r)
        ring = [
            [
                torch.randn(shape, device=self._device.name, dtype=torch.bfloat16)
                for shape in ((M, K), (r, K), (N, r))
            ]
            for _ in range(8 if M <= 1024 else 2)
        ]

        def call() -> None:
            for x, v, u in ring:
                linear(linear(x, v), u)

        seconds = self._seconds(call, replays=10, cold=True) / len(ring)
        return 1e6 * seconds, "us", f"K = {K}, N = {N}, cold"
