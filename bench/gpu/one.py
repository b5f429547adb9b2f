"""One call of one strategy, for a profiler: `python -m bench.gpu.one FAMILY CASE`."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from bench.gpu import suite
from bench.gpu.device import Device, here
from bench.gpu.force import Runner
from maestro_kernels.measure.providers import make_case_inputs

__all__ = ["bound"]


def bound(device: Device, family: str, name: str) -> Callable[[], object]:
    """A case of the suite as one call of a strategy.

    Raises:
        Skip: the strategy does not take it.
    """
    case = device.case({case.id: case for case in suite.cases()}[name])
    i = make_case_inputs(case, device.name)
    return Runner(device, family).bound(i.x, i.us, i.vs, i.biases, i.ranks)


def main(family: str, name: str) -> int:
    """Warm up, then one call between the profiler's marks."""
    device = here()
    with torch.no_grad():
        call = bound(device, family, name)
        for _ in range(3):
            call()
        device.check()
        with device.profiled():
            call()
            device.check()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
