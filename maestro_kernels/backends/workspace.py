"""Memory of the kernels that synchronise inside a launch.

Counters are zero before a launch and zero again afterwards.

A kernel leaves its counters as it found them, so they are zeroed once and not before every launch.
Each (device, stream) has its own, because launches on one stream follow one another. A launch that
is being captured into a CUDA graph gets counters of its own for good: graphs can be replayed on any
stream, at the same time as others.
Scratch has no contents to keep. A stream has one block of it; what is larger, or under capture, is
allocated for the call and belongs to the caching allocator, which reuses it in the order of the
stream and keeps it in the graph's private pool.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Counters", "counters", "scratch"]

# int32 counters set aside on a device for launches under capture: about a thousand of them.
_RESERVE = 1 << 18
# Counters of two launches share no 128-byte line.
_LINE = 32


class Counters:
    """Zeroed int32 counters of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._of_stream: dict[int, Tensor] = {}
        self._reserve: Tensor | None = None
        self._blocks: list[Tensor] = []

    def eager(self, stream: int, size: int) -> Tensor:
        """`size` counters of a stream; launches on other streams never get the same ones."""
        held = self._of_stream.get(stream)
        if held is None or held.numel() < size:
            # Doubled, so that a growing problem does not allocate each time. The smaller block may
            # still be in use by the launch before; the allocator reuses it behind that launch.
            size_held = max(size, 1024, 2 * (0 if held is None else held.numel()))
            held = torch.zeros(size_held, dtype=torch.int32, device=self.device)
            self._of_stream[stream] = held
        if self._reserve is None or self._reserve.numel() < _RESERVE // 2:
            self._refill()
        return held

    def captured(self, size: int) -> Tensor:
        """`size` counters that no other launch will ever get.

        They were zeroed before the capture. If no eager call came first, or the reserve is used up,
        the zeros are written by a node of the graph, at each replay.
        """
        size = -(-size // _LINE) * _LINE
        if self._reserve is None or self._reserve.numel() < size:
            return torch.zeros(size, dtype=torch.int32, device=self.device)
        taken, self._reserve = self._reserve[:size], self._reserve[size:]
        return taken

    def _refill(self) -> None:
        self._reserve = torch.zeros(_RESERVE, dtype=torch.int32, device=self.device)
        # Kept for good: what has been handed out is known to graphs, not to torch.
        self._blocks.append(self._reserve)
        if self.device.type == "cuda":
            # A graph may be replayed on a stream that never waits for this one.
            torch.cuda.current_stream(self.device).synchronize()


_counters: dict[torch.device, Counters] = {}


def counters(device: torch.device, size: int) -> Tensor:
    """At least `size` zeroed int32 counters for one launch on the current stream of `device`."""
    held = _counters.get(device)
    if held is None:
        held = _counters.setdefault(device, Counters(device))
    if device.type != "cuda":
        return held.eager(0, size)
    if torch.cuda.is_current_stream_capturing():
        return held.captured(size)
    return held.eager(torch.cuda.current_stream(device).cuda_stream, size)


# H of 4096 rows at rank 1024 in 16 bits; the partial sums of small M are far smaller.
_SCRATCH_BYTES = 8 << 20
_scratch: dict[tuple[torch.device, int], Tensor] = {}


def scratch(device: torch.device) -> Tensor | None:
    """The bytes that launches on the current stream of a CUDA device share; None under capture."""
    if torch.cuda.is_current_stream_capturing():
        return None
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    held = _scratch.get(key)
    if held is None:
        held = torch.empty(_SCRATCH_BYTES, dtype=torch.uint8, device=device)
        _scratch[key] = held
    return held
