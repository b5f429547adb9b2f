"""What the slowest cases spend their time on: `python -m bench.gpu_kernels --rows rows.jsonl`.

Of the measured cases, those in which ours stands worst against the fastest baseline are run under
torch's profiler; the kernels of ours and of two matmuls are printed with their device times.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu_suite import load_whole_lines
from maestro_kernels.benchmark.providers import default_providers
from maestro_kernels.benchmark.rows import Row, latest_run
from maestro_kernels.benchmark.summary import outcomes
from maestro_kernels.measure.cases import Case, Layer
from maestro_kernels.measure.providers import make_case_inputs

_CALLS = 10


def case_of(row: Row) -> Case:
    """The case that a row was measured on."""
    sizes = zip(row.N, row.R, row.rank, strict=True)
    layers = tuple(Layer(N, row.K, R, rank) for N, R, rank in sizes)
    return Case(row.source, row.M, layers, row.dtype, row.mode, row.bias)  # type: ignore[arg-type]


def worst(rows: list[Row], count: int) -> list[Case]:
    """Cases by how badly ours does against the fastest baseline."""
    found = [o for o in outcomes(rows) if o.ours.cache == "cold" and o.ratio(o.best)]
    found.sort(key=lambda o: o.ratio(o.best) or 0.0)
    cases = {case_of(o.ours): None for o in found}
    return list(cases)[:count]


def kernels(call: Callable[[], object]) -> list[tuple[str, int, float]]:
    """(kernel, launches, microseconds of one call) in order of time."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(_CALLS):
            call()
        torch.cuda.synchronize()
    events = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    return [(e.key, e.count // _CALLS, e.self_device_time_total / _CALLS) for e in events]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, required=True, metavar="ROWS.jsonl")
    parser.add_argument("--count", type=int, default=5)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_kernels: expected a CUDA device, got none", file=sys.stderr)
        return 2
    cases = worst(latest_run(load_whole_lines(args.rows)), args.count)
    for case in cases:
        print(f"\n{case.id}")
        inputs = make_case_inputs(case, "cuda")
        for provider in default_providers(case):
            if provider.name not in ("ours", "two matmuls"):
                continue
            with torch.set_grad_enabled(case.mode == "training"):
                (bound,) = provider.bound(case, [inputs])
                for name, launches, us in kernels(bound):
                    print(f"  {provider.name:<12} {launches:>3} x {us:>9.1f} us  {name[:90]}")
    return int(not cases)


if __name__ == "__main__":
    sys.exit(main())
