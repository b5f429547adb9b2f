"""What this machine has: the device, a library with CUDA kernels, profiler and sanitizer that work.

A tool that is installed may still not work on a virtual machine, so each is tried on a small
program.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

import torch

from bench.gpu.device import Device, Skip
from bench.gpu.items import Item
from bench.gpu.plan import Stage
from maestro_kernels import hardware

__all__ = ["find", "items", "run"]

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "maestro_kernels" / "_native.so"
_PROGRAM = (
    "import torch; x = torch.ones(8, device='{device}'); x.add_(1); assert float(x.sum()) == 16"
)
_ASKS = (
    "from maestro_kernels.backends import native; import sys; "
    "sys.exit(native.cuda_error() if '{device}' == 'cuda' else native.load_error())"
)
# Seconds until a tool must have ended, and a build.
_TOOL, _BUILD = 50, 200


def items(device: Device, stage: Stage, family: str) -> Iterator[Item]:
    """The device and the library, or one tool."""
    if family == "device":
        yield Item("facts", partial(_facts, device))
        yield Item("library", partial(_library, device))
    else:
        yield Item("works", partial({"ncu": _ncu}.get(family, _sanitizer), device))


def find(tool: str) -> str:
    """Path of a tool, also where it is installed but not on the PATH.

    Raises:
        Skip: it is not here.
    """
    places = ("/usr/local/cuda*/bin", "/opt/nvidia/nsight-compute/*", "/opt/nvidia/*/bin")
    found = shutil.which(tool) or next(
        (p for place in places for p in sorted(glob(f"{place}/{tool}")) if os.access(p, os.X_OK)),
        None,
    )
    if found is None:
        raise Skip(f"{tool} is not installed")
    return found


def run(command: list[str], seconds: float, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command with its output; TimeoutExpired after `seconds`."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
    )


def _facts(device: Device) -> dict[str, Any]:
    found: dict[str, Any] = {"device": asdict(device.facts()), "versions": hardware.versions()}
    if shutil.which("nvidia-smi"):
        query = "name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu,pstate"
        asked = run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], 20)
        found["nvidia-smi"] = asked.stdout.strip()
    print(found)
    return found


def _library(device: Device) -> dict[str, Any]:
    """The carried library if it loads, else one that is built here."""
    carried = Path(os.environ.get("MK_GPU_CARRIED", "")) / LIBRARY.name
    said = []
    if carried.is_file() and not device.is_stub:
        shutil.copyfile(carried, LIBRARY)
        reason = _asked(device)
        if reason is None:
            return {"library": "carried"}
        said.append(f"carried: {reason}")
    reason = _asked(device)
    if reason is None:
        return {"library": "was here"}
    said.append(reason)
    if device.is_stub or not (shutil.which("nvcc") and shutil.which("cmake")):
        raise AssertionError("; ".join([*said, "nothing to build it with"]))
    number = device.facts().arch.removeprefix("sm_")
    target = f"{number}a" if int(number) >= 90 else number
    built = run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        _BUILD,
        MK_NATIVE="1",
        MK_CMAKE_ARGS=f"-DMK_CUDA_GENCODE={target}",
    )
    print(built.stdout[-4000:])
    reason = _asked(device)
    if reason is not None:
        raise AssertionError("; ".join([*said, f"built here: {reason}"]))
    return {"library": "built here", "said": said}


def _asked(device: Device) -> str | None:
    """What a process that loads the library says against it, or None."""
    done = run([sys.executable, "-c", _ASKS.format(device=device.name)], 60)
    if done.returncode == 0:
        return None
    return (done.stdout.strip() or f"status {done.returncode}").splitlines()[-1]


def _program(device: Device) -> list[str]:
    return [sys.executable, "-c", _PROGRAM.format(device=device.name)]


def _ncu(device: Device) -> dict[str, Any]:
    metric = "sm__cycles_active.avg"
    # The clocks of a machine that is lent stay as they are.
    options = ["--clock-control", "none", "--metrics", metric, "--launch-count", "1"]
    done = run([find("ncu"), *options, *_program(device)], _TOOL)
    print(done.stdout)
    if done.returncode or metric not in done.stdout:
        raise Skip(f"it does not read counters here: {_said(done.stdout)}")
    return {"path": find("ncu")}


def _sanitizer(device: Device) -> dict[str, Any]:
    tool = "compute-sanitizer"
    done = run([find(tool), "--tool", "memcheck", *_program(device)], _TOOL)
    print(done.stdout)
    if done.returncode or "ERROR SUMMARY: 0 errors" not in done.stdout:
        raise Skip(f"it does not run here: {_said(done.stdout)}")
    return {"path": find(tool), "torch": torch.__version__}


def _said(text: str) -> str:
    wrong = [
        line for line in text.splitlines() if "rror" in line or "not supported" in line.lower()
    ]
    return (wrong or text.strip().splitlines() or ["nothing"])[0].strip()[:200]
