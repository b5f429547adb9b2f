"""What the ahead-of-time report says of a compiled configuration beside the compiler's figures.

Bytes in flight, occupancy and predicted time at the cases of the benchmark's suite that the planner
gives to it, with as many programs on a multiprocessor as its registers and shared memory allow.
Predictions are for a recorded H100 (docs/dev/predictions.md); no other device has a record.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from maestro_kernels import hardware
from maestro_kernels.backends.triton import row_config, two_phase_config, wgrad_config
from maestro_kernels.benchmark.cases import suite
from maestro_kernels.measure.predict import needed_in_flight
from tools.predicted import Launch, launches

__all__ = ["NEEDED", "Forecast", "forecast"]

# Bytes on the way to a multiprocessor for the bandwidth of memory.
NEEDED = needed_in_flight(hardware.H100)

_ARCH = hardware.H100.arch
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Forecast:
    """What a configuration is predicted to do in one form.

    Attributes:
        taken: cases of the suite that the planner gives to it.
        losing: those of them in which library calls are predicted to take no longer.
        case: the best of those that it takes, or where it takes none of those it could serve.
        in_flight: bytes on the way to a busy multiprocessor in each phase of that case.
        seconds: predicted for that case.
        roofline: of that case, in seconds.
        calls: seconds of the library calls in place of that launch.
    """

    taken: int
    losing: int
    case: str
    in_flight: tuple[float, ...]
    seconds: float
    roofline: float
    calls: float


def forecast(
    kernel: str, arch: str, dtype: str, config: Any, form: str, fitting: int
) -> Forecast | None:
    """Predictions for a compiled configuration; None where nothing of the suite is its work.

    Args:
        kernel: name of the @triton.jit function.
        arch: "sm_90"; there is a record of no other.
        dtype: "bf16", "fp16" or "fp32".
        config: tiles.
        form: what tells the variants of a configuration apart, e.g. "dx_sum".
        fitting: programs that registers and shared memory of a multiprocessor hold.
    """
    if arch != _ARCH or not fitting:
        return None
    words = form.split()
    precision = "tf32" if "tf32" in (*words, getattr(config, "precision", "")) else "ieee"
    part = "weights" if kernel == "wgrad_kernel" else "dx" if "dx" in form else "forward"
    group, odd = "grouped" in form or "sum" in form, "odd" in form
    work = [
        launch
        for launch in _launches(_DTYPES[dtype], precision)
        if (launch.kernel, launch.part) == (kernel, part)
        and (len(launch.case.layers) > 1, not launch.aligned) == (group, odd)
    ]
    taken = [launch for launch in work if launch.config == config]
    possible = taken or [launch for launch in work if _could_serve(config, launch)]
    if not possible:
        return None
    found = [(launch, launch.predict(config, fitting)) for launch in possible]
    best, prediction = min(found, key=lambda pair: pair[1].seconds / pair[0].calls)
    rank = "+".join(str(r) for r in dict.fromkeys(layer.rank for layer in best.case.layers))
    return Forecast(
        taken=len(taken),
        losing=sum(p.seconds >= launch.calls for launch, p in found) if taken else 0,
        case=f"{best.case.source} M {best.case.M} r {rank}",
        in_flight=tuple(p.in_flight_per_core(hardware.H100) for p in prediction.phases),
        seconds=prediction.seconds,
        roofline=best.roofline,
        calls=best.calls,
    )


@functools.cache
def _launches(dtype: str, precision: str) -> tuple[Launch, ...]:
    """Every launch of the full suite in a dtype."""
    return tuple(_planned(dtype, precision))


def _planned(dtype: str, precision: str) -> Iterator[Launch]:
    with _multiplying_float32(precision):
        for case in suite("full", dtypes=(dtype,), device_type="cuda"):
            yield from launches(case)[1]


@contextmanager
def _multiplying_float32(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _could_serve(config: Any, launch: Launch) -> bool:
    """Whether a configuration can run a launch that the planner gave to another."""
    if isinstance(config, row_config.RowConfig):
        rank = launch.case.layers[0].rank
        return row_config.width_bucket(rank) == config.BLOCK_R
    if isinstance(config, two_phase_config.TwoPhaseConfig):
        return not config.decode or launch.case.M <= config.BLOCK_M
    return isinstance(config, wgrad_config.WgradConfig)
