"""Which kernels the slowest cases launch, and how long each takes, by torch's profiler."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu import suite
from bench.gpu.device import Device
from bench.gpu.items import Item
from bench.gpu.plan import Stage
from bench.gpu.state import lines
from maestro_kernels.benchmark.providers import default_providers
from maestro_kernels.measure.cases import Case
from maestro_kernels.measure.providers import make_case_inputs

__all__ = ["items", "slowest"]

_CALLS = 10


def items(device: Device, stage: Stage, family: str) -> Iterator[Item]:
    """The cases in which ours stands worst, or those that stand for all where none was timed."""
    cases = {case.id: case for case in (*suite.cases(), *suite.training())}
    state = os.environ.get("MK_GPU_STATE", "")
    worst = slowest(Path(state) / "records.jsonl") if state else []
    chosen = [cases[name] for name in worst if name in cases][:6] or suite.key()[:6]
    for case in chosen:
        yield Item(case.id, partial(_launches, device, case))


def slowest(records: Path) -> list[str]:
    """Names of timed cases, worst first by two matmuls over ours on the device."""
    found: dict[str, float] = {}
    for record in lines(records):
        if record["stage"] not in ("rows", "training") or record["family"] != "auto":
            continue
        rows = [json.loads(text) for text in (record.get("result") or {}).get("rows", ())]
        last = rows[-1]["launch"] if rows else ""
        times = {r["provider"]: r["p50_us"] for r in rows if r["launch"] == last}
        if times.get("ours") and times.get("two matmuls"):
            found[record["item"]] = times["two matmuls"] / times["ours"]
    return sorted(found, key=lambda name: found[name])


def _launches(device: Device, case: Case) -> dict[str, Any]:
    case = device.case(case)
    inputs = make_case_inputs(case, device.name)
    found = {}
    with torch.set_grad_enabled(case.mode == "training"):
        for provider in default_providers(case):
            if provider.name in ("ours", "two matmuls"):
                (bound,) = provider.bound(case, [inputs])
                found[provider.name] = kernels(device, bound)
    for name, launched in found.items():
        for kernel, count, us in launched:
            print(f"  {name:<12} {count:>3} x {us:>9.1f} us  {kernel[:90]}")
    return {"kernels": found}


def kernels(device: Device, call: Callable[[], object]) -> list[tuple[str, int, float]]:
    """(kernel, launches, microseconds) of one call, longest first."""
    for _ in range(3):
        call()
    device.check()
    activity = ProfilerActivity.CPU if device.is_stub else ProfilerActivity.CUDA
    with profile(activities=[activity]) as profiler:
        for _ in range(_CALLS):
            call()
        device.check()

    def own(event: Any) -> float:
        return event.self_cpu_time_total if device.is_stub else event.self_device_time_total

    events = sorted((e for e in profiler.key_averages() if own(e) > 0), key=own, reverse=True)
    return [(e.key, e.count // _CALLS, own(e) / _CALLS) for e in events[:12]]
