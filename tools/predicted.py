"""Predicted time of the Triton kernels beside the roofline and library calls; runs nothing.

    python -m tools.predicted                  # every case of the full suite, bf16, a recorded H100
    python -m tools.predicted --losing         # only what is predicted slower than library calls;
                                               # "only dx": that launch is faster, the whole is not
    python -m tools.predicted --suite quick --activation gelu

A row is a case of the benchmark's suite, served as the planner serves it; training is the forward,
dx and the gradients of the weights. docs/dev/predictions.md lists what the figures rest on. No GPU
was asked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from maestro_kernels import hardware
from maestro_kernels.backends import triton as planner
from maestro_kernels.backends.triton import choose, predict, row_config, wgrad_config
from maestro_kernels.backends.triton.launch import table_arch
from maestro_kernels.benchmark import cases
from maestro_kernels.hardware import Device
from maestro_kernels.measure.cases import Case
from maestro_kernels.measure.cost import Cost, Size
from maestro_kernels.measure.predict import library_backward, library_calls
from maestro_kernels.problem import LoDProblem
from tools import tables

__all__ = ["Launch", "Row", "launches", "main", "predicted_row", "rows"]


@dataclass(frozen=True)
class Launch:
    """One launch of a case; seconds.

    Attributes:
        kernel: name of its @triton.jit function.
        part: "forward", "dx" or "weights".
        case: what it belongs to.
        config: tiles.
        aligned: rows can be read 16 bytes at a time.
        predicted: with as many programs on a core as its plan counts on.
        roofline: of this part alone.
        calls: library calls that compute the same.
        predict: (config, programs on a core) -> prediction.
    """

    kernel: str
    part: str
    case: Case
    config: Any
    aligned: bool
    predicted: predict.Prediction
    roofline: float
    calls: float
    predict: Callable[[Any, int | None], predict.Prediction]


@dataclass(frozen=True)
class Row:
    """One case: the strategy of its forward, its launches, the device that it is planned for."""

    case: Case
    strategy: str
    launches: tuple[Launch, ...]
    device: Device

    @property
    def predicted(self) -> float:
        """Seconds of all launches."""
        return sum(launch.predicted.seconds for launch in self.launches)

    @property
    def roofline(self) -> float:
        """Seconds of as many ideal passes."""
        return sum(launch.roofline for launch in self.launches)

    @property
    def calls(self) -> float:
        """Seconds of library calls."""
        return sum(launch.calls for launch in self.launches)

    @property
    def ratio(self) -> float:
        """Predicted time over that of library calls."""
        return self.predicted / self.calls

    @property
    def verdict(self) -> str:
        """Whether it is predicted to beat library calls, with all of its launches or with some."""
        if self.ratio < 1:
            return "ok"
        winning = [x.part for x in self.launches if x.predicted.seconds < x.calls]
        return f"only {' and '.join(winning)}" if winning else "cannot win"

    def phases(self, show: Callable[[Any], str]) -> str:
        """Something of each phase of each launch."""
        return ", ".join(
            " + ".join(show(phase) for phase in launch.predicted.phases) for launch in self.launches
        )


def launches(
    case: Case, device: Device = hardware.H100, activation: str | None = None
) -> tuple[str, tuple[Launch, ...]]:
    """(strategy, launches) of a case as the planner serves it."""
    problems = [
        LoDProblem(
            M=case.M, N=s.N, K=s.K, R=s.R, rank=s.rank, has_bias=case.bias, activation=activation,
            dtype=case.torch_dtype, device=torch.device("cuda"),
        )
        for s in case.layers
    ]  # fmt: skip
    strategy, _ = planner.choose_strategy(problems, device)
    dtype, precision = case.torch_dtype, planner.input_precision()
    peak, itemsize = choose.peak(device, dtype, precision), dtype.itemsize
    steps = [Cost((step,), itemsize).seconds(device, dtype) for step in case.cost("fused").steps]
    rooflines = [step for step in steps if step is not None]
    mirrored = [Size(s.M, s.K, s.N, s.rank) for s in case.sizes]
    calls = [
        library_calls(case.sizes, device, peak, itemsize, activation=activation is not None),
        *(library_backward(case.sizes, device, peak, itemsize)),
    ]
    Rs = tuple(s.R for s in case.layers)

    def product(part: str, sizes: list[Size], roofline: float, library: float) -> Launch:
        K, widths = max(s.K for s in sizes), [n for s in sizes for n in (s.N, s.K)]
        summed = part == "dx" and len(sizes) > 1
        if strategy == "expand" and part == "dx":
            # Two products of the library's, and nothing of ours.
            found = predict.Prediction((), library)
            return Launch(
                "library", part, case, "library", True, found, roofline, library,
                lambda config, resident: found,
            )  # fmt: skip
        if strategy == "row":
            size = sizes[0]
            described = not any(n * itemsize % 16 for n in (*widths, *Rs))
            width = row_config.width_bucket(size.rank)
            kernel = "row_kernel"
            config: Any = choose.row(
                device, size.M, size.N, size.K, width, dtype, precision, descriptors=described
            )[0]

            def of(config: Any, resident: int | None) -> predict.Prediction:
                plans = row_config.plans(config, size.M, size.N, device.num_cores)
                found = (
                    predict.row(device, config, plan, size, itemsize, peak, resident=resident)
                    for plan in plans
                )
                return min(found, key=lambda p: p.seconds)
        elif strategy == "expand":
            size = sizes[0]
            described, kernel = True, "expand_kernel"
            config = choose.expand(device, size.M, size.N, size.K, Rs[0], dtype)

            def of(config: Any, resident: int | None) -> predict.Prediction:
                return predict.expand(device, config, size, itemsize, peak, resident=resident)
        else:
            described = not any(n % 8 for n in (*widths, *Rs))
            kernel = "two_phase_kernel"
            config = choose.two_phase(
                device, case.M, tuple(s.N for s in sizes), (K,) * len(sizes), Rs, dtype, precision,
                aligned=described,
            )  # fmt: skip

            def of(config: Any, resident: int | None) -> predict.Prediction:
                return predict.two_phase(
                    device, config, sizes, itemsize, peak, resident=resident, summed=summed
                )

        found = of(config, None)
        return Launch(kernel, part, case, config, described, found, roofline, library, of)

    def weights(roofline: float, library: float) -> Launch:
        described = not any(n % 16 for s in case.layers for n in (s.N, s.K, s.R))
        config = wgrad_config.choose_config(
            max(Rs), "half" if itemsize == 2 else precision, table_arch(device.arch),
            aligned=described,
        )  # fmt: skip

        def of(config: Any, resident: int | None) -> predict.Prediction:
            return predict.wgrad(device, config, case.sizes, itemsize, peak, resident=resident)

        found = of(config, None)
        return Launch(
            "wgrad_kernel", "weights", case, config, described, found, roofline, library, of
        )

    made = [product("forward", case.sizes, rooflines[0], calls[0])]
    if case.mode == "training":
        made += [product("dx", mirrored, rooflines[1], calls[1]), weights(rooflines[2], calls[2])]
    return strategy, tuple(made)


def predicted_row(case: Case, device: Device = hardware.H100, activation: str | None = None) -> Row:
    """What the planner takes for a case, and its prediction."""
    return Row(case, *launches(case, device, activation), device)


def rows(
    suite: str = "full", dtype: str = "bfloat16", activation: str | None = None
) -> Iterator[Row]:
    """A row for every case of a suite of the benchmark, in its order."""
    for case in cases.suite(suite, dtypes=(dtype,), device_type="cuda"):
        yield predicted_row(case, activation=activation)


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "layer": lambda r: r.case.source,
    "mode": lambda r: r.case.mode,
    "r": lambda r: "+".join(str(n) for n in dict.fromkeys(s.rank for s in r.case.layers)),
    "M": lambda r: str(r.case.M),
    "kernel": lambda r: r.strategy,
    "configuration": lambda r: ", ".join(str(launch.config) for launch in r.launches),
    "in flight KiB/SM": lambda r: r.phases(
        lambda phase: f"{phase.in_flight_per_core(r.device) / 1024:.0f}"
    ),
    "waves": lambda r: r.phases(lambda phase: f"{phase.waves(r.device):.2f}"),
    "predicted us": lambda r: f"{1e6 * r.predicted:.1f}",
    "roofline us": lambda r: f"{1e6 * r.roofline:.1f}",
    "calls us": lambda r: f"{1e6 * r.calls:.1f}",
    "ratio": lambda r: f"{r.ratio:.2f}",
    "verdict": lambda r: r.verdict,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.predicted", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--suite", default="full", choices=list(cases.SUITES))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--activation", choices=["relu", "gelu", "gelu_tanh", "silu"])
    parser.add_argument("--losing", action="store_true", help="only cases that cannot win")
    options = parser.parse_args(arguments)
    found = list(rows(options.suite, options.dtype, options.activation))
    losing = [row for row in found if row.verdict != "ok"]
    print(tables.table(_COLUMNS, losing if options.losing else found))
    partly = sum(row.verdict.startswith("only") for row in losing)
    print(
        f"{len(found)} cases: {len(losing)} predicted not to win over library calls, of these "
        f"{partly} win with some of their launches"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
