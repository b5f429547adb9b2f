"""What a planned call of our CUDA kernels costs the host, on a machine without a GPU.

    OMP_NUM_THREADS=1 python -m bench.host_cost [--rounds 41]

Everything runs but the launch itself: Triton's driver, its compiler and the library's op are stood
in for, tensors are "meta" ones. Printed for each kernel: Python and
C calls, and the time over that of two `F.linear` (on the CPU) and one launch by Triton's
`kernel[grid]`, which take turns with it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

import maestro_kernels as mk
from maestro_kernels import dispatch
from maestro_kernels.backends import native, workspace
from maestro_kernels.backends import triton as backend
from maestro_kernels.backends.native import cuda
from maestro_kernels.backends.triton import launch, launcher, row, two_phase

KERNELS = {
    ("triton", "two_phase"): two_phase.two_phase_kernel,
    ("triton", "row"): row.row_kernel,
    ("native", "decode"): None,
}


class Driver:
    """What Triton asks of a driver: an H100's."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Variant(CompiledKernel):
    """A compiled kernel with Triton's own launcher, whose last step notes what it was given."""

    launched: list[tuple[Any, ...]] = []  # noqa: RUF012

    def __init__(self, source: Any) -> None:
        self.src, self.name, self.module, self.metadata = source, source.name, "module", None
        self.function, self.packed_metadata = self, ("packed",)
        self._run = launch_it = object.__new__(CudaLauncher)
        for name in ("global_scratch", "profile_scratch"):
            setattr(launch_it, f"{name}_size", 0)
            setattr(launch_it, f"{name}_align", 1)
        launch_it.num_ctas = 1
        launch_it.launch_cooperative_grid = launch_it.launch_pdl = launch_it.gsan_enabled = False
        launch_it.arg_annotations = launch_it.kernel_signature = None
        launch_it.launch = lambda *arguments: self.launched.append(arguments)

    def __del__(self) -> None:
        pass


def without_a_gpu() -> None:
    """Stand in for Triton's driver and compiler in this process."""
    triton.compiler.compile = lambda source, **_: Variant(source)
    driver.set_active(Driver())


def _new_empty(like: Tensor, *size: int) -> Tensor:
    """As one C call: torch's own for meta tensors is written in Python."""
    return torch.empty(size, dtype=like.dtype, device=like.device)


def _no_address(tensor: Tensor) -> int:
    """What is asked of no tensor on a GPU."""
    return 0


_NOT_COUNTED = (_new_empty.__code__, _no_address.__code__)


def on_meta_tensors() -> None:
    """Let meta tensors be served as CUDA tensors are, with as many calls."""
    # Calls of C functions in the place of others: the current device, None here; a stream.
    launch._current_device = sys.gettrace
    launcher.current_stream = workspace.current_stream = id
    workspace._is_capturing = sys.is_finalizing
    torch.cuda.is_current_stream_capturing = lambda: sys.is_finalizing()
    dispatch.is_capturing = lambda x: torch.cuda.is_current_stream_capturing()
    workspace.driver.zeroed = lambda device, count: torch.empty(
        count, dtype=torch.int32, device=device
    )
    Tensor.new_empty = _new_empty
    launcher._none = _no_address
    backend.unsupported = native.unsupported = lambda problem: None
    native.unsupported_group = lambda problems: None
    cuda._op = lambda: lambda *arguments: [arguments[0][0]]


def forced(kind: tuple[str, str]) -> None:
    """Let `auto` choose one kernel."""
    dispatch.forget()
    dispatch._predict = lambda *_: (*kind, "the one that is measured")


def calls(run: Callable[[], object]) -> int:
    """Python and C calls of a function."""
    found = 0

    def look(frame: Any, event: str, _: Any) -> None:
        nonlocal found
        if event == "c_call" or (event == "call" and frame.f_code not in _NOT_COUNTED):
            found += 1

    run()
    run()
    gc.disable()
    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return found - 2  # run itself, setprofile


def tensors(place: str) -> tuple[Tensor, ...]:
    """x, u, v, bias of a layer that takes no time."""
    return tuple(
        torch.zeros(*shape, dtype=torch.bfloat16, device=place)
        for shape in ((16, 64), (64, 32), (32, 64), (64,))
    )


def planned_call(kind: tuple[str, str]) -> Callable[[], object]:
    """A call that ran before."""
    forced(kind)
    x, u, v, bias = tensors("meta")
    return lambda: mk.lod_linear(x, u, v, bias, rank=24)


def launch_by_triton(kernel: Any, run: Callable[[], object]) -> Callable[[], object]:
    """`kernel[grid]` of what a call launches."""
    seen: dict[str, Any] = {}
    by_triton = launcher.Launcher._by_triton

    def look(self: Any, arguments: Any) -> None:
        seen.update(grid=self._grid, arguments=arguments, named=self._constants | self._options)
        by_triton(self, arguments)

    launcher.Launcher._by_triton = look
    two_phase._launches.clear()
    row._launches.clear()
    dispatch.replan()
    run()
    launcher.Launcher._by_triton = by_triton
    grid, arguments, named = seen["grid"], seen["arguments"], seen["named"]
    return lambda: kernel[grid](*arguments, **named)


def two_linear() -> Callable[[], object]:
    """Two library matmuls of the same layer on the CPU, in float32: bfloat16 is slow there."""
    x, u, v, bias = (t.float() for t in tensors("cpu"))
    return lambda: F.linear(F.linear(x, v), u, bias)


def seconds(run: Callable[[], object], count: int = 500) -> float:
    """Of one call."""
    begin = time.perf_counter()
    for _ in range(count):
        run()
    spent = time.perf_counter() - begin
    Variant.launched.clear()
    return spent / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=41)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    without_a_gpu()
    on_meta_tensors()
    two = two_linear()
    with torch.no_grad():
        by_triton = None
        for kind, kernel in KERNELS.items():
            ours = planned_call(kind)
            by_triton = launch_by_triton(kernel, ours) if kernel else by_triton
            assert by_triton is not None
            sides = {"ours": ours, "two F.linear": two, "kernel[grid]": by_triton}
            found = {name: calls(run) for name, run in sides.items()}
            turns = [[seconds(run) for run in sides.values()] for _ in range(rounds)]
            us = [1e6 * statistics.median(of_one) for of_one in zip(*turns, strict=True)]
            ratio = statistics.median(a / (b + c) for a, b, c in turns)
            print(f"{kind[0]}: {kind[1]}")
            for name, n, one in zip(found, found.values(), us, strict=True):
                print(f"  {name:14} {n:4} calls {one:6.1f} us")
            print(f"  time over two F.linear and kernel[grid]: {ratio:.2f}")


if __name__ == "__main__":
    main()
