"""Short probes of what a device can do: FLOP/s and bytes/s as a torch user can reach them.

What they found is remembered by hardware.py, which knows the devices.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from maestro_kernels.backends import onednn


def free_bytes(kind: str) -> int:
    """Memory that a probe may take from, far from all of which it should."""
    if kind == "cuda":
        free: int = torch.cuda.mem_get_info()[0]
        return free
    # macOS counts only all pages, Windows none.
    names = getattr(os, "sysconf_names", {})
    pages = [name for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES") if name in names]
    return os.sysconf(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else 8 << 30


def flops(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest library matmul, at the sizes that this device does in milliseconds."""
    routes = [matmul]
    if device.type == "cpu" and onednn.unsupported(dtype) is None:
        # float32 F.linear goes to MKL, which on some CPUs reaches a fraction of what oneDNN does.
        routes.append(_onednn_linear)
    return max(grown(route, dtype, device) for route in routes)


def matmul(a: Tensor, b: Tensor) -> Callable[[], object]:
    """A route that `grown` can time: torch's own matmul."""
    return lambda: torch.mm(a, b)


def _onednn_linear(a: Tensor, b: Tensor) -> Callable[[], object]:
    packed = onednn.reorder(b, a.shape[0])
    return lambda: onednn.linear(a, packed, None)


def grown(
    route: Callable[[Tensor, Tensor], Callable[[], object]],
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Best FLOP/s over n x n matmuls of doubling n, until one takes longer than 10 ms.

    Processors differ by a factor of 1e5 in what one matmul takes: those without instructions for
    a dtype compute it one element at a time, and there n = 2048 would take most of a minute.
    """
    best, n = 0.0, 64
    while True:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        call = route(a, b)
        seconds = _best_seconds(call, device, budget=0.03)
        if seconds > 0.01 or n == 8192:
            # Not slow because something else ran meanwhile: the peak is the best of a longer look.
            seconds = min(seconds, _best_seconds(call, device))
        best = max(best, 2 * n**3 / seconds)
        if seconds > 0.01 or n == 8192:
            return best
        n *= 2


def bandwidth(num_bytes: int, device: torch.device) -> float:
    """Bytes/s of the faster of reading and copying a buffer of this size."""
    source = torch.ones(num_bytes // 4, device=device)
    half = source.numel() // 2
    read = _best_seconds(lambda: source.sum(), device)
    copy = _best_seconds(lambda: source[:half].copy_(source[half : 2 * half]), device)
    return num_bytes / min(read, copy)


def _best_seconds(call: Callable[[], object], device: torch.device, budget: float = 0.25) -> float:
    """Fastest of repeated calls: a ceiling is what nothing measured later should exceed."""
    call()
    times: list[float] = []
    stop = time.perf_counter() + budget
    while len(times) < 4 or (time.perf_counter() < stop and len(times) < 100):
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
