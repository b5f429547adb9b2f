"""How a call runs: its plan, and what `explain` prints of it. dispatch.py makes plans."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

from maestro_kernels import hardware
from maestro_kernels.backends import KERNELS, matmul
from maestro_kernels.measure.cost import Cost, Size, count
from maestro_kernels.tables import FORWARD, Mode

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from maestro_kernels.hardware import Device
    from maestro_kernels.problem import LoDProblem


def backend_module(name: str) -> ModuleType:
    """Import a backend on first use."""
    return importlib.import_module(f"maestro_kernels.backends.{name}")


@dataclass(frozen=True)
class Plan:
    """How a call runs: printed by `explain`, executed by ops/.

    Attributes:
        fn: public function the plan is for.
        problems: one entry per layer.
        backend: "reference", "matmul", "triton" or "native".
        strategy: the form of the computation inside that backend.
        reason: why this and not another.
        others: backend -> why it was not taken or cannot serve.
        shared_x: the layers of a group read one x.
        mode: of the calls it is for.
        bucket: the kind of call that a measurement at first use is remembered for.
        rivals: "backend: strategy" of what is to be measured before this plan is more than a
            prediction; empty once that is done, and where nothing may be measured.
        halves: "backend: strategy" of what computes dx and of what computes the gradients of
            weights; None where the backend computes both.
    """

    fn: str
    problems: tuple[LoDProblem, ...]
    backend: str
    strategy: str
    reason: str
    others: dict[str, str]
    shared_x: bool = True
    mode: Mode = FORWARD
    bucket: str = ""
    rivals: tuple[str, ...] = ()
    halves: tuple[str, str] | None = None

    @cached_property
    def module(self) -> Any:
        """The backend that runs it."""
        return backend_module(self.backend)

    @cached_property
    def is_quick(self) -> bool:
        """Whether what runs it refuses every call of one layer that the validator would refuse.

        That is so of the native library's CPU op, of library matmuls on tensors with strides, and
        of kernels on a GPU, which serve what is laid out as a validated call was (`again`).
        """
        problem = self.problems[0]
        if problem.rank is None:
            return False
        on_gpu = self.backend in KERNELS and problem.device.type != "cpu"
        again = on_gpu and problem.is_plain and not self.mode.training
        two = (self.backend, self.strategy) == ("matmul", matmul.TWO)
        return self.strategy == "fused" or two or again

    @cached_property
    def raw(self) -> Callable[..., Tensor]:
        """The native library's op of one layer."""
        is_plain = self.problems[0].is_plain
        op: Callable[..., Tensor] = self.module.raw_linear(is_plain=is_plain)
        return op

    @cached_property
    def products(self) -> Callable[..., Tensor] | None:
        """Both library matmuls of one layer below its stored rank in one op, without gradients.

        For views that cost as much to make in Python; None where there are none, or no such op.
        """
        problem = self.problems[0]
        below = problem.rank is not None and problem.rank < problem.R
        if problem.device.type != "cpu" or not (below and problem.is_plain):
            return None
        return backend_module("native").library_products(problem)  # type: ignore[no-any-return]

    @cached_property
    def again(self) -> Callable[..., Tensor | None]:
        """What serves one layer on a GPU without gradients, see `backends.Kernels.quick`."""
        serve: Callable[..., Tensor | None] = self.module.quick(self.strategy)
        return serve

    @cached_property
    def autograd_serves(self) -> bool:
        """Two library matmuls without an activation: torch's own gradient saves and does no more.

        It costs a small call half of what a Function of ours does. Of a tensor rank it would
        multiply the zeros beyond it with whatever v holds there.
        """
        problem, *others = self.problems
        plain = problem.activation is None and problem.rank is not None and not self.halves
        return plain and not others and self.backend == "matmul"

    def __str__(self) -> str:
        lines = [f"{self.fn}: {problem}" for problem in self.problems]
        lines += [f"  runs on   {self.backend}: {self.strategy}", f"  because   {self.reason}"]
        lines += [f"  not on    {name}: {why}" for name, why in self.others.items()]
        if self.halves:
            lines.append("  backward  dx by {}; weight gradients by {}".format(*self.halves))
        if self.rivals:
            names = ", ".join(self.rivals)
            lines.append(f"  measures  {names} against two matmuls at the first such call")
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """A plan with its predicted cost on this device; printing it is the point.

    Attributes:
        plan: what would run.
    """

    plan: Plan

    @cached_property
    def cost(self) -> Cost:
        """FLOP and bytes of the planned form."""
        sizes = [Size.of(p) for p in self.plan.problems]
        one = self.plan.backend in KERNELS and self.plan.strategy != "expand"
        form = "fused" if one else "two matmuls"
        size = self.plan.problems[0].dtype.itemsize
        return count(form, sizes, size, shared_x=self.plan.shared_x)  # type: ignore[arg-type]

    @property
    def bytes(self) -> int:
        """Bytes moved to and from memory, each operand of a step once."""
        return int(self.cost.bytes)

    @property
    def flop(self) -> int:
        """Multiplications and additions."""
        return int(self.cost.flops)

    @cached_property
    def seconds(self) -> float | None:
        """Ideal time of the planned form on this device; measures its peaks on first use.

        None for tensors whose device is not here: meta and fake ones.
        """
        return self._ideal[0]

    @cached_property
    def roofline_share(self) -> float | None:
        """Ideal time of one fused pass over that of the planned form, 0..1; measures as above."""
        return self._ideal[1]

    @cached_property
    def _ideal(self) -> tuple[float | None, float | None]:
        problem = self.plan.problems[0]
        if not hardware.is_here(problem.device):
            return None, None
        return self._on(hardware.measured_device(problem.device, problem.dtype))

    def _on(self, device: Device) -> tuple[float | None, float | None]:
        """(seconds, roofline_share) with the peaks of `device`."""
        problem = self.plan.problems[0]
        seconds = self.cost.seconds(device, problem.dtype)
        sizes = [Size.of(p) for p in self.plan.problems]
        fused = count("fused", sizes, problem.dtype.itemsize, shared_x=self.plan.shared_x)
        ideal = fused.seconds(device, problem.dtype)
        return seconds, ideal / seconds if seconds and ideal is not None else None

    def __str__(self) -> str:
        lines = [
            str(self.plan),
            f"  moves     {self.bytes / 1e6:,.2f} MB",
            f"  computes  {self.flop / 1e6:,.2f} MFLOP",
        ]
        problem = self.plan.problems[0]
        if not hardware.is_here(problem.device):
            lines.append(f"  at best   not known: no {problem.device.type} device is here")
            return "\n".join(lines)
        # Printing times nothing: it says what is known, and what would find out.
        device = hardware.known_device(problem.device, problem.dtype)
        seconds, share = self._on(device)
        if seconds is not None and share is not None:
            lines.append(
                f"  at best   {seconds * 1e6:,.1f} µs on this device (roofline, {device.source} "
                f"peaks), where one fused pass could take {share:.0%} of that"
            )
        else:
            lines.append("  at best   not known before .seconds measured this device's peaks")
        return "\n".join(lines)
