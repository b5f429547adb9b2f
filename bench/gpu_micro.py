"""What the strategy model assumes about a GPU, measured: `python -m bench.gpu_micro --out FILE`.

Times come from CUDA graphs. Where one step of a chain is asked for, chains of two lengths are timed
and their difference is divided: what starting a graph costs drops out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from maestro_kernels import hardware
from maestro_kernels.files import write_text

MIB = 1 << 20


@dataclass(frozen=True)
class Figure:
    """One measured number; `value` is None where it could not be measured, and `note` says why."""

    name: str
    value: float | None
    unit: str
    note: str = ""


@triton.jit
def _step_kernel(p_x, PDL: tl.constexpr):
    if PDL:
        gdc_wait()
    tl.store(p_x, tl.load(p_x) + 1.0)
    if PDL:
        gdc_launch_dependents()


@triton.jit
def _barrier_kernel(p_arrived, count, num_programs):
    # Every program waits until all have arrived `i` times; they must be resident together.
    for i in range(1, count + 1):
        tl.atomic_add(p_arrived, 1, sem="acq_rel")
        while tl.atomic_add(p_arrived, 0, sem="acquire") < i * num_programs:
            pass


@triton.jit
def _read_kernel(p_x, p_out, blocks, repeats, BLOCK: tl.constexpr):
    # Every program reads the whole buffer, each from another place on, so that all of L2 is busy.
    i_program = tl.program_id(0)
    o_lane = tl.arange(0, BLOCK)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for i in range(blocks * repeats):
        i_block = (i_program * 17 + i) % blocks
        b_sum += tl.load(p_x + i_block * BLOCK + o_lane, cache_modifier=".cg")
    tl.store(p_out + i_program * BLOCK + o_lane, b_sum)


@triton.jit
def _atomic_kernel(p_x, repeats, slots, BLOCK: tl.constexpr):
    i_program = tl.program_id(0)
    o_lane = tl.arange(0, BLOCK)
    for i in range(repeats):
        i_slot = (i_program + i) % slots
        tl.atomic_add(p_x + i_slot * BLOCK + o_lane, 1.0, sem="relaxed")


def graph_seconds(call: Callable[[], object], calls: int = 1, replays: int = 30) -> float:
    """Median seconds of a replayed CUDA graph that holds `calls` calls."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(replays + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times[3:])


def per_step(seconds_of: Callable[[int], float], short: int, long: int) -> float:
    """Seconds of one more step of a chain."""
    return (seconds_of(long) - seconds_of(short)) / (long - short)


def graph_node() -> Figure:
    x = torch.zeros(1, device="cuda")
    step = per_step(lambda n: graph_seconds(lambda: _step_kernel[(1,)](x, False), n), 50, 250)
    return Figure("graph node to node", 1e6 * step, "us", "one-thread kernels, each reads the last")


def pdl_boundary() -> Figure:
    x = torch.zeros(1, device="cuda")

    def call() -> None:
        _step_kernel[(1,)](x, True, launch_pdl=True)

    step = per_step(lambda n: graph_seconds(call, n), 50, 250)
    return Figure("PDL boundary", 1e6 * step, "us", "the same with programmatic dependent launch")


def grid_barrier() -> Figure:
    programs = hardware.current_device("cuda").num_cores
    arrived = torch.zeros(1, dtype=torch.int32, device="cuda")

    def seconds_of(count: int) -> float:
        def call() -> None:
            arrived.zero_()
            _barrier_kernel[(programs,)](
                arrived, count, programs, num_warps=4, launch_cooperative_grid=True
            )

        return graph_seconds(call)

    note = f"{programs} programs, one atomic each"
    return Figure("grid barrier", 1e6 * per_step(seconds_of, 10, 110), "us", note)


def l2_rate() -> Figure:
    programs, block = 2 * hardware.current_device("cuda").num_cores, 4096
    x = torch.zeros(16 * MIB // 4, device="cuda")
    out = torch.empty(programs * block, device="cuda")
    blocks = x.numel() // block
    seconds = graph_seconds(
        lambda: _read_kernel[(programs,)](x, out, blocks, 1, block, num_warps=8)
    )
    rate = programs * x.numel() * 4 / seconds
    return Figure("L2 to SM rate", rate / 1e12, "TB/s", "every program reads the same 16 MiB")


def atomic_rate(slots: int, note: str) -> Figure:
    programs, block, repeats = 4 * hardware.current_device("cuda").num_cores, 1024, 64
    x = torch.zeros(slots * block, device="cuda")
    seconds = graph_seconds(lambda: _atomic_kernel[(programs,)](x, repeats, slots, block))
    rate = programs * block * repeats / seconds
    return Figure(f"float32 atomics, {note}", rate / 1e9, "G/s", f"{slots * block} addresses")


def copy_bandwidth() -> Figure:
    source = torch.zeros(1024 * MIB // 4, device="cuda")
    target = torch.empty_like(source)
    seconds = graph_seconds(lambda: target.copy_(source), replays=10)
    return Figure("copy bandwidth", 2 * source.numel() * 4 / seconds / 1e12, "TB/s", "1 GiB, r + w")


def bf16_peak() -> Figure:
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = graph_seconds(lambda: torch.mm(a, b), replays=10)
    return Figure("bf16 matmul", 2 * n**3 / seconds / 1e12, "TFLOP/s", f"{n}^3")


def two_cublas(M: int, r: int, N: int = 4096, K: int = 4096) -> Figure:
    x, v, u = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        for shape in ((M, K), (r, K), (N, r))
    )
    linear = torch.nn.functional.linear
    calls = 10
    seconds = graph_seconds(lambda: linear(linear(x, v), u), calls, replays=10) / calls
    return Figure(f"two cuBLAS M {M} r {r}", 1e6 * seconds, "us", f"K = {K}, N = {N}, warm")


def all_figures(quick: bool) -> list[Callable[[], Figure]]:
    """Measurements, cheapest first."""
    found: list[Callable[[], Figure]] = [
        graph_node,
        pdl_boundary,
        grid_barrier,
        l2_rate,
        lambda: atomic_rate(1024, "spread"),
        lambda: atomic_rate(4, "contended"),
        copy_bandwidth,
        bf16_peak,
    ]
    ranks = (32, 256) if quick else (32, 64, 128, 256, 512, 1024)
    rows = (1, 64, 1024) if quick else (1, 64, 256, 1024, 8192, 32768)
    found += [lambda M=M, r=r: two_cublas(M, r) for r in ranks for M in rows]
    return found


def measure(function: Callable[[], Figure]) -> Figure:
    """One figure; what the device or this Triton cannot do becomes a note."""
    try:
        return function()
    except Exception as error:  # a compiler error of a kernel must not cost the other figures
        name = getattr(function, "__name__", "figure")
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Figure(name.replace("_", " "), None, "", f"{type(error).__name__}: {first}"[:300])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_micro: expected a CUDA device, got none", file=sys.stderr)
        return 2
    figures = []
    for function in all_figures(args.quick):
        figures.append(measure(function))
        f = figures[-1]
        value = "not measured" if f.value is None else f"{f.value:.4g} {f.unit}"
        print(f"{f.name:<32} {value:>16}  {f.note}", flush=True)
    record = {
        "device": asdict(hardware.current_device("cuda")),
        "versions": hardware.versions(),
        "figures": [asdict(f) for f in figures],
    }
    write_text(args.out, json.dumps(record, indent=1) + "\n")
    return int(all(f.value is None for f in figures))


if __name__ == "__main__":
    sys.exit(main())
