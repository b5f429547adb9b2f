"""Nsight Compute and compute-sanitizer on each strategy, where the environment stage saw them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu import one, suite
from bench.gpu.device import Device
from bench.gpu.environment import find, run
from bench.gpu.items import Item
from bench.gpu.plan import Stage
from bench.gpu.state import lines

__all__ = ["items"]

_SECTIONS = (
    "SpeedOfLight",
    "LaunchStats",
    "Occupancy",
    "MemoryWorkloadAnalysis",
    "WarpStateStats",
    "SchedulerStats",
)
# Status of compute-sanitizer where it found something; pytest's and Python's are others.
_FOUND = 9


def items(device: Device, stage: Stage, family: str) -> Iterator[Item]:
    """Profiles of key cases, or the small checks under each tool of the sanitizer."""
    if stage.needs == "ncu":
        for case in suite.key():
            yield Item(case.id, partial(_profile, device, stage, family, case.id))
    else:
        # racecheck sees shared memory only; what crosses blocks is for the checks to find.
        for tool in ("memcheck", "synccheck", "racecheck"):
            yield Item(tool, partial(_sanitize, stage, family, tool))


def _profile(device: Device, stage: Stage, family: str, name: str) -> dict[str, Any]:
    # Asked here: the start of a process and of a device for each "no" would be most of the stage.
    one.bound(device, family, name)
    program = [sys.executable, "-m", "bench.gpu.one", family, name]
    sections = [part for section in _SECTIONS for part in ("--section", section)]
    options = ["--clock-control", "none", "--profile-from-start", "off", *sections]
    status, text = _output([find("ncu"), *options, *program], stage.limit)
    print(text)
    assert status == 0, f"status {status}: {_last(text)}"
    folder = Path(os.environ["MK_GPU_STATE"])
    with (folder / f"ncu-{family}.txt").open("a", encoding="utf-8") as file:
        file.write(f"===== {family} {name}\n{text}\n")
    return {"characters": len(text)}


def _sanitize(stage: Stage, family: str, tool: str) -> dict[str, Any]:
    scratch = Path(os.environ["MK_GPU_STATE"]) / "journal" / f"sanitizer.{family}.{tool}"
    scratch.mkdir(parents=True, exist_ok=True)
    journal = scratch / "checks.jsonl"
    journal.unlink(missing_ok=True)
    command = [
        *(find("compute-sanitizer"), "--tool", tool, "--error-exitcode", str(_FOUND)),
        *(sys.executable, "-m", "bench.gpu.worker", "checks", family, "--small"),
        *("--state", str(scratch), "--commit", "none", "--journal", str(journal)),
        *("--seconds", str(stage.limit - 20)),
    ]
    # Allocations of their own: the caching allocator would hide what lies out of bounds.
    caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    status, text = _output(command, stage.limit, **caching)
    print(text[-4000:])
    summary = next((s for s in reversed(text.splitlines()) if "SUMMARY" in s), _last(text))
    assert status == 0, f"status {status}: {summary.strip()}"
    ran = [line for line in lines(journal) if "end" in line]
    assert ran, "no check came to its end"
    return {"summary": summary.strip(), "checks": len(ran)}


def _output(command: list[str], seconds: float, **environment: str) -> tuple[int, str]:
    try:
        done = run(command, seconds - 2, **environment)
    except subprocess.TimeoutExpired as error:
        text = error.stdout or b""
        said = text.decode(errors="replace") if isinstance(text, bytes) else text
        raise AssertionError(f"no end after {error.timeout:.0f} s: {_last(said)}") from None
    return done.returncode, done.stdout


def _last(text: str) -> str:
    found = [line.strip() for line in text.splitlines() if line.strip()]
    return found[-1][:200] if found else "it said nothing"
