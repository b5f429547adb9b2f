"""Rows of the benchmark: `auto` and plain torch, device times with cold caches, and eager calls."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from bench.gpu import suite
from bench.gpu.device import Device
from bench.gpu.items import Item
from bench.gpu.plan import Stage
from maestro_kernels.benchmark.providers import default_providers
from maestro_kernels.benchmark.run import Options, run_case
from maestro_kernels.measure.cases import Case
from maestro_kernels.measure.providers import Forward, Inputs, Provider, dense_forward, two_forward

__all__ = ["autotuned", "items", "measure"]

# Seconds of samples of a case in one launch mode, all providers together.
_SECONDS = 0.08
_AUTO = ("dense", "two matmuls", "ours", "ours, ungrouped")


def items(device: Device, stage: Stage, family: str) -> Iterator[Item]:
    """The suite for `auto`; a dozen cases for what is compiled, which takes long."""
    if stage.name == "first-use":
        cases, chosen = suite.first_use(), plain
    elif family == "compiled":
        cases, chosen = suite.key(), autotuned
    else:
        cases, chosen = suite.cases(), plain
    for case in cases:
        yield Item(case.id, partial(measure, device, case, chosen))


def measure(device: Device, case: Case, chosen: Any) -> dict[str, Any]:
    """The rows of a case."""
    case = device.case(case)
    options = Options(
        device.name, _SECONDS, ("cold",), compiled=True, command="python -m bench.gpu.run"
    )
    record = device.measured(case.dtype)
    started = os.environ.get("MK_GPU_STARTED", "")
    found = run_case(case, chosen(device, case), record, started, options)
    wrong = {f"{r.provider}: {r.reason}": None for r in found if r.gate in ("failed", "error")}
    return {"rows": [row.to_json() for row in found], "wrong": "; ".join(wrong)}


def plain(device: Device, case: Case) -> Sequence[Provider]:
    """What `auto` runs, two matmuls and the dense layer."""
    return [p for p in default_providers(case) if p.name in _AUTO]


def autotuned(device: Device, case: Case) -> Sequence[Provider]:
    """The same by torch.compile with everything it may try, against plain two matmuls."""
    two = [p for p in default_providers(case) if p.name == "two matmuls"]
    mode = "default" if device.is_stub else "max-autotune-no-cudagraphs"
    return [
        *two,
        Provider("two matmuls, autotuned", "two matmuls", partial(_bind, False, mode)),
        Provider("dense, autotuned", "dense", partial(_bind, True, mode)),
    ]


def _bind(dense: bool, mode: str, case: Case, ring: Sequence[Inputs]) -> list[Forward]:
    forward = dense_forward if dense else two_forward
    # Compiling on a CPU takes a C++ compiler half a minute; there it is the same without.
    compiled: Any = forward
    if mode != "default":
        compiled = torch.compile(forward, dynamic=False, mode=mode)
    if dense:
        return [partial(compiled, i.x, i.dense, i.biases) for i in ring]
    return [partial(compiled, i.x, i.us, i.vs, i.biases, i.ranks) for i in ring]
