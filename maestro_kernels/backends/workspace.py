"""Memory of the kernels that synchronise inside a launch.

Counters are zero before a launch and zero again afterwards.

A kernel leaves its counters as it found them, so they are zeroed once and not before every launch.
Each (device, stream) has its own, because launches on one stream follow one another; a launch that
may begin before the one in front of it has ended waits for that before it looks at them. Launches
captured into a CUDA graph share the counters of their capture and stream, and nobody else ever gets
those: the nodes of a stream are replayed one after another, and a graph does not overlap itself,
but graphs can be replayed on any stream at the same time as others.

Scratch has no contents to keep. A stream has one block of it; what is larger, or belongs to a
graph, is allocated for the call and goes back to the pool that the call allocates from.

Both come from the driver, so that they lie in no pool of torch's: a pool that is being filled for a
CUDA graph is checked for tensors that stay, and is used again behind the back of those.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from maestro_kernels.backends import driver

# Counters of two launches share no 128-byte line.
_LINE = 32
# int32 counters asked of the driver at a time: a hundred graphs' and streams'.
_CHUNK = 1 << 18


def _stream_of_torch(index: int) -> int:
    handle: int = torch.cuda.current_stream(index).cuda_stream
    return handle


# Handle of the current stream of CUDA device `index`; a torch.cuda.Stream costs 2 us to make.
current_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", _stream_of_torch
)


_is_capturing = torch._C._cuda_isCurrentStreamCapturing


class Counters:
    """Zeroed int32 counters of one device.

    Args:
        device: where they live.
        allocate: count -> int32 zeros that are never freed, or None if that cannot be done.
    """

    def __init__(
        self, device: torch.device, allocate: Callable[[int], Tensor | None] | None = None
    ) -> None:
        self.device = device
        self._allocate = allocate or self._anywhere
        self._held: dict[tuple[int, int], Tensor] = {}
        self._free: Tensor | None = None
        self._lock = threading.Lock()

    def of(self, stream: int, capture: int, size: int) -> Tensor | None:
        """`size` counters of a stream, eager (capture 0) or in one capture; None if there are none.

        Whoever asks with another stream or capture never gets the same ones.
        """
        held = self._held.get((stream, capture))
        if held is not None and held.numel() >= size:
            return held
        with self._lock:
            held = self._held.get((stream, capture))
            if held is not None and held.numel() >= size:  # another thread was first
                return held
            # Doubled on a stream, so that a growing problem does not allocate each time. Launches
            # that were given the smaller block keep it: nobody else will.
            least = size if capture else max(size, 1024, 2 * (0 if held is None else held.numel()))
            taken = self._take(-(-least // _LINE) * _LINE)
            if taken is not None:
                self._held[stream, capture] = taken
            return taken

    def _take(self, size: int) -> Tensor | None:
        if self._free is None or self._free.numel() < size:
            self._free = self._allocate(max(size, _CHUNK))
            if self._free is None:
                return None
        taken, self._free = self._free[:size], self._free[size:]
        return taken

    def _anywhere(self, count: int) -> Tensor | None:
        if self.device.type == "cuda":
            return driver.zeroed(self.device, count)
        return torch.zeros(count, dtype=torch.int32, device=self.device)


_counters: dict[torch.device, Counters] = {}


def counters(device: torch.device, size: int) -> Tensor:
    """At least `size` zeroed int32 counters for one launch on the current stream of `device`."""
    held = _counters.get(device)
    if held is None:
        held = _counters.setdefault(device, Counters(device))
    stream, capture = _place(device)
    found = None if capture is None else held.of(stream, capture, size)
    if found is not None:
        return found
    if capture == 0 and not fills_a_pool(device):
        # No memory beside torch's: kept for this stream, as its allocator orders by stream too.
        held = _fallback.setdefault(device, Counters(device, _zeros_of(device)))
        found = held.of(stream, 0, size)
        assert found is not None
        return found
    # Zeroed by a kernel of the graph at each replay, and given back after this launch.
    return torch.zeros(size, dtype=torch.int32, device=device)


_fallback: dict[torch.device, Counters] = {}


def _zeros_of(device: torch.device) -> Callable[[int], Tensor]:
    def allocate(count: int) -> Tensor:
        found = torch.zeros(count, dtype=torch.int32, device=device)
        # Parts go to streams that have not waited for this one.
        torch.cuda.current_stream(device).synchronize()
        return found

    return allocate


def _place(device: torch.device) -> tuple[int, int | None]:
    """(current stream, capture it takes part in: 0 for none, None where it has no name)."""
    if device.type == "cpu":
        return 0, 0
    stream = current_stream(device.index)
    if _is_capturing():
        return stream, driver.capture_id(stream)
    return stream, 0


def fills_a_pool(device: torch.device) -> bool:
    """Whether what this thread allocates now belongs to a CUDA graph: nothing may stay of it.

    Under capture it does, and while torch.compile (reduce-overhead, max-autotune) runs a function
    eagerly before it captures it: into the same pool, and without capturing.
    """
    if device.type != "cuda":
        return False
    if _is_capturing():
        return True
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None:  # nobody has compiled anything for CUDA graphs
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    containers = trees.get_obj(trees.local, "tree_manager_containers")
    container = containers.get(index)
    manager = None if container is None else container.tree_manager
    return manager is not None and bool(manager.in_warmup)


# H of 4096 rows at rank 1024 in 16 bits; the partial sums of small M are far smaller.
_SCRATCH_BYTES = 8 << 20
_scratch: dict[tuple[torch.device, int], Tensor] = {}


def scratch(device: torch.device) -> Tensor | None:
    """The bytes that launches on the current stream of a CUDA device share; None under capture.

    None too where only a pool that is being filled could give them.
    """
    stream, capture = _place(device)
    if capture != 0:
        return None
    held = _scratch.get((device, stream))
    if held is None:
        found = driver.zeroed(device, _SCRATCH_BYTES // 4)
        if found is not None:
            held = found.view(torch.uint8)
        elif fills_a_pool(device):
            return None
        else:
            held = torch.empty(_SCRATCH_BYTES, dtype=torch.uint8, device=device)
        _scratch[device, stream] = held
    return held


# On each device two zeros, and then 0, 1, 2, ...: graphs read them, so they are never freed.
_ramps: dict[torch.device, Tensor] = {}


def ramp(device: torch.device, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(0, 1, ..., count - 1 as int32, a zero of `dtype`) on a device, made once for it."""
    held = _ramps.get(device)
    if held is None or held.numel() < count + 2:
        with torch.inference_mode(False):
            values = torch.arange(-2, max(4096, 2 * count), dtype=torch.int32).clamp_(min=0)
            held = driver.copied(device, values) if device.type == "cuda" else values.to(device)
        if held is None:  # kernels of this call, and of its graph
            index = torch.arange(count, dtype=torch.int32, device=device)
            return index, torch.zeros((), dtype=dtype, device=device)
        _ramps[device] = held
    return held[2 : count + 2], held[:2].view(dtype)[0]
