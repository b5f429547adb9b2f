"""Predicted time of the Triton kernels beside the roofline and two library calls; runs nothing.

    python -m tools.predicted                  # bf16, one layer and groups, a recorded H100
    python -m tools.predicted --losing         # only what is predicted slower than the calls

A row is a case of the benchmark's suite at one of the sizes below, served as the planner serves it.
docs/dev/predictions.md lists what the figures rest on. No GPU was asked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from maestro_kernels import hardware
from maestro_kernels.backends import triton as planner
from maestro_kernels.backends.triton import choose, predict, row_config
from maestro_kernels.benchmark.cases import MODELS
from maestro_kernels.measure.cases import Case
from maestro_kernels.measure.predict import library_calls
from maestro_kernels.problem import LoDProblem
from tools import tables

__all__ = ["Row", "main", "predicted_row", "rows"]

LAYERS = ("Llama-2-7B o", "Llama-3-8B up", "Llama-3-8B q/k/v", "Llama-3-8B gate/up")
ROWS = (1, 16, 32, 64, 256, 1024, 2048, 4096, 8192, 9000, 16384, 32768)
RANKS = (64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Row:
    """One case: what serves it and how long everything is predicted to take, in seconds."""

    case: Case
    strategy: str
    configuration: str
    in_flight: tuple[float, ...]  # bytes on the way to a busy core, for each phase
    waves: tuple[float, ...]
    predicted: float
    roofline: float
    calls: float

    @property
    def ratio(self) -> float:
        """Predicted time over that of two library calls for each layer."""
        return self.predicted / self.calls


def predicted_row(case: Case, device: hardware.Device = hardware.H100) -> Row:
    """What the planner takes for a case, and its prediction."""
    dtype, peak = case.torch_dtype, device.peak(case.dtype)
    assert peak is not None
    problems = [
        LoDProblem(
            M=s.M, N=s.N, K=s.K, R=s.rank, rank=s.rank, has_bias=s.bias, activation=None,
            dtype=dtype, device=torch.device("cuda"),
        )
        for s in case.sizes
    ]  # fmt: skip
    strategy, _ = planner.choose_strategy(problems, device)
    itemsize = dtype.itemsize
    found: predict.Prediction
    if strategy == "row":
        size = case.sizes[0]
        width = row_config.width_bucket(size.rank)
        config, plan = choose.row(device, size.M, size.N, size.K, width, dtype)
        found = predict.row(device, config, plan, size, itemsize, peak)
        shared = f" {plan.num_splits} share a block" if plan.num_splits > 1 else ""
        name = f"{config}{shared}"
    else:
        tiles = choose.two_phase(
            device, case.M, tuple(s.N for s in case.sizes), (case.K,) * len(problems),
            tuple(s.rank for s in case.sizes), dtype,
        )  # fmt: skip
        found = predict.two_phase(device, tiles, case.sizes, itemsize, peak)
        name = str(tiles)
    roofline = case.cost("fused").seconds(device, dtype)
    assert roofline is not None
    return Row(
        case, strategy, name,
        tuple(phase.in_flight_per_core(device) for phase in found.phases),
        tuple(phase.waves(device) for phase in found.phases),
        found.seconds, roofline, library_calls(case.sizes, device, peak, itemsize),
    )  # fmt: skip


def rows(
    layers: Sequence[str] = LAYERS, ms: Sequence[int] = ROWS, ranks: Sequence[int] = RANKS
) -> Iterator[Row]:
    """Rows of the table in its order; bfloat16."""
    for layer in layers:
        for rank in ranks:
            if rank < min(MODELS[layer].Ns):
                for M in ms:
                    yield predicted_row(MODELS[layer].case(M, rank, dtype="bfloat16"))


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "layer": lambda r: r.case.source,
    "r": lambda r: str(r.case.layers[0].rank),
    "M": lambda r: str(r.case.M),
    "kernel": lambda r: r.strategy,
    "configuration": lambda r: r.configuration,
    "in flight KiB/SM": lambda r: " + ".join(f"{b / 1024:.0f}" for b in r.in_flight),
    "waves": lambda r: " + ".join(f"{w:.2f}" for w in r.waves),
    "predicted us": lambda r: f"{1e6 * r.predicted:.1f}",
    "roofline us": lambda r: f"{1e6 * r.roofline:.1f}",
    "calls us": lambda r: f"{1e6 * r.calls:.1f}",
    "ratio": lambda r: f"{r.ratio:.2f}",
    "verdict": lambda r: "cannot win" if r.ratio >= 1 else "ok",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.predicted", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--losing", action="store_true", help="only cases that cannot win")
    options = parser.parse_args(arguments)
    chosen = [row for row in rows() if not options.losing or row.ratio >= 1]
    print(tables.table(_COLUMNS, chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main())
