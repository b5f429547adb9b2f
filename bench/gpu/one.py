"""One call of one strategy, for a profiler: `python -m bench.gpu.one FAMILY CASE`.

MK_GPU_ONE=ask only says, by its status, whether the strategy takes the case.
"""

from __future__ import annotations

import os
import sys

import torch

from bench.gpu import suite
from bench.gpu.device import Skip, here
from bench.gpu.force import Runner
from maestro_kernels.benchmark.providers import make_case_inputs


def main(family: str, name: str) -> int:
    """Warm up, then one call between the profiler's marks."""
    device = here()
    case = device.case({case.id: case for case in suite.cases()}[name])
    i = make_case_inputs(case, device.name)
    with torch.no_grad():
        try:
            call = Runner(device, family).bound(i.x, i.us, i.vs, i.biases, i.ranks)
        except Skip as reason:
            print(reason)
            return 1
        if os.environ.get("MK_GPU_ONE") == "ask":
            return 0
        for _ in range(3):
            call()
        device.check()
        if device.is_stub:
            call()
            return 0
        torch.cuda.profiler.start()
        call()
        device.check()
        torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
