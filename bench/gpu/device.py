"""The device as the items see it: a CUDA GPU, or a stub of one that runs everything on a CPU.

MK_GPU_STUB=1 takes the stub: CPU tensors, small sizes, the Triton interpreter for correctness and
the library's CPU kernels in place of the CUDA ones. MK_GPU_PLANT, a JSON object of
"STAGE/FAMILY/ITEM" patterns, makes it misbehave there as a GPU can: "hang", "crash", "segv",
"sticky" (this call fails and so does every later one in the process), "slow", "wrong", "raise".
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from maestro_kernels import hardware
from maestro_kernels.measure.cases import Case, Layer

__all__ = ["Cuda", "Device", "Skip", "Stub", "here"]


class Skip(Exception):
    """An item does not apply here; the message says why."""


class Cuda:
    """The current CUDA device."""

    name = "cuda"
    is_stub = False

    def begin(self, item: str) -> None:
        """Before an item."""

    def check(self) -> None:
        """Wait for everything that was launched; RuntimeError when the context is broken."""
        torch.cuda.synchronize()

    def tidy(self) -> None:
        """After an item: give back what it held, since other processes want memory too."""
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()

    def facts(self) -> hardware.Device:
        """What the device is."""
        return hardware.current_device(self.name)

    def measured(self, dtype: str) -> hardware.Device:
        """The same with its peaks, which rows are held to."""
        return hardware.measured_device(self.name, dtype)

    def case(self, case: Case) -> Case:
        """The case as it is run here."""
        return case

    def sizes(self, M: int, N: int, K: int, R: int) -> tuple[int, int, int, int]:
        """M, N, K, R of a call as it is run here."""
        return M, N, K, R

    def strategy(self, backend: str, strategy: str) -> str:
        """The strategy that stands for one of the CUDA kernels here."""
        return strategy

    def output(self, y: Tensor) -> Tensor:
        """A result of ours on its way to its gate."""
        return y

    def graph(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """(replay, what the captured call returned)."""
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        return graph.replay, result

    def on_streams(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """What the calls return, each on a stream of its own, at the same time."""
        streams = [torch.cuda.Stream() for _ in calls]
        torch.cuda.synchronize()
        found = []
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                found.append(call())
        torch.cuda.synchronize()
        return found

    @contextlib.contextmanager
    def profiled(self) -> Iterator[None]:
        """What a profiler that was told to wait looks at."""
        torch.cuda.profiler.start()
        yield
        torch.cuda.profiler.stop()

    def some(self, items: Iterable[Any]) -> list[Any]:
        """The items that are run here."""
        return list(items)

    def free_bytes(self) -> int:
        """Memory that is free."""
        return int(torch.cuda.mem_get_info()[0])

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """Bytes that a call allocates at most beyond what is there before it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)


class Stub(Cuda):
    """A CPU that behaves like a GPU of a few kilobytes."""

    name = "cpu"
    is_stub = True

    def __init__(self) -> None:
        self._plants: dict[str, str] = json.loads(os.environ.get("MK_GPU_PLANT", "{}"))
        self._plant = ""
        self._is_broken = False

    def begin(self, item: str) -> None:
        """Do what is planted for this item."""
        plants = self._plants.items()
        self._plant = next((p for name, p in plants if fnmatch.fnmatch(item, name)), "")
        if self._plant == "hang":
            time.sleep(3600)
        elif self._plant == "crash":
            os._exit(3)
        elif self._plant == "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif self._plant == "slow":
            # Ends, but late, as a kernel of a bad configuration does.
            time.sleep(float(os.environ.get("MK_GPU_SLOW", "600")))
        elif self._plant == "raise":
            raise RuntimeError("Triton Error [CUDA]: out of resource: shared memory")
        elif self._plant == "sticky":
            self._is_broken = True
        self.check()

    def check(self) -> None:
        """Fail for good after a sticky error."""
        if self._is_broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def tidy(self) -> None:
        """Nothing is held."""

    def measured(self, dtype: str) -> hardware.Device:
        """Without peaks: nobody reads what the stub times."""
        return self.facts()

    def case(self, case: Case) -> Case:
        """A case a hundred times smaller; different cases stay different."""
        layers = []
        for s in case.layers:
            _, N, K, R = self.sizes(1, s.N, s.K, s.R)
            layers.append(Layer(N, K, R, min(R, max(1, s.rank // 16))))
        return replace(case, M=self.sizes(case.M, 1, 1, 1)[0], layers=tuple(layers))

    def sizes(self, M: int, N: int, K: int, R: int) -> tuple[int, int, int, int]:
        """M, N, K, R a hundred times smaller."""
        return 1 + M.bit_length(), max(8, N // 128), max(16, K // 128), max(8, R // 16)

    def strategy(self, backend: str, strategy: str) -> str:
        """The library's CPU kernels stand for its CUDA kernels."""
        return "fused" if backend == "native" else strategy

    def output(self, y: Tensor) -> Tensor:
        """One wrong element where that is planted."""
        if self._plant == "wrong" and y.numel():
            y = y.detach().clone()
            y.view(-1)[-1] += 1
        return y

    def graph(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Calling again, into the same result."""
        result = call()

        def replay() -> None:
            again = call()
            pairs = [(result, again)] if isinstance(result, Tensor) else zip(result, again)  # noqa: B905
            for kept, new in pairs:
                kept.data.copy_(new)

        return replay, result

    def on_streams(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """One after the other."""
        return [call() for call in calls]

    @contextlib.contextmanager
    def profiled(self) -> Iterator[None]:
        """Nobody looks."""
        yield

    def some(self, items: Iterable[Any]) -> list[Any]:
        """As many as MK_GPU_MOST says: a test has less time than there is."""
        most = os.environ.get("MK_GPU_MOST")
        return list(items)[: int(most) if most else None]

    def free_bytes(self) -> int:
        """Too little for anything large."""
        return 1 << 20

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """The bytes of what it returns."""
        found = call()
        return sum(t.nbytes for t in found if isinstance(t, Tensor))


Device = Cuda


def here() -> Device:
    """The device of this process.

    Raises:
        Skip: there is none.
    """
    if os.environ.get("MK_GPU_STUB") == "1":
        return Stub()
    if not torch.cuda.is_available():
        raise Skip("torch sees no CUDA device")
    with contextlib.suppress(AttributeError):
        torch.cuda.init()
    return Cuda()
