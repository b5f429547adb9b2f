"""Running a call by one strategy of one backend, whatever `auto` and the backend would choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import maestro_kernels as mk
from bench.gpu.device import Device, Skip
from maestro_kernels import dispatch, plans
from maestro_kernels.call import Call
from maestro_kernels.ops import gradient
from maestro_kernels.problem import describe_call

__all__ = ["Runner"]


@dataclass(frozen=True)
class Runner:
    """Calls a strategy, or what `auto` takes.

    Attributes:
        device: where.
        family: "backend-strategy", or "auto".
    """

    device: Device
    family: str

    def __call__(
        self,
        x: Tensor,
        us: Sequence[Tensor],
        vs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        ranks: Any,
        activations: Sequence[str | None] | None = None,
        **added: Any,
    ) -> list[Tensor]:
        """Outputs of the layers, in memory that held NaN if the allocator gives it out again.

        Raises:
            Skip: the strategy does not take the call; says why.
        """
        call = self.bound(x, us, vs, biases, ranks, activations, **added)
        shapes = [(*x.shape[:-1], u.shape[0]) for u in us]
        # What a kernel leaves unwritten would otherwise be the right result of the call before.
        held = [torch.full(s, math.nan, dtype=x.dtype, device=x.device) for s in shapes]
        del held
        return call()

    def bound(
        self,
        x: Tensor,
        us: Sequence[Tensor],
        vs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        ranks: Any,
        activations: Sequence[str | None] | None = None,
        **added: Any,
    ) -> Callable[[], list[Tensor]]:
        """The same as a function of nothing, planned once; `added`: more options of one layer."""
        n = len(us)
        activations = activations or [None] * n
        fn = "lod_linear" if n == 1 else "lod_linear_grouped"
        one = ranks[0] if n == 1 and not isinstance(ranks, Tensor) else ranks
        if self.family == "auto":
            if n == 1:
                options = {"rank": one, "activation": activations[0], **added}
                return lambda: [mk.lod_linear(x, us[0], vs[0], biases[0], **options)]
            return lambda: list(
                mk.lod_linear_grouped(x, us, vs, biases, ranks=ranks, activation=activations)
            )
        call = Call(fn, (x,), us, vs, biases, ranks, activations)
        if added:
            residual, scale = added.get("residual"), added.get("scale", 1.0)
            call = call._replace(residuals=(residual,), scales=(scale,))
        if "norm" in added:
            call = call._replace(norms=(added["norm"],), norm_eps=added["norm_eps"])
        plan = self._plan(call)
        wants = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in call.tensors
        )

        def run() -> list[Tensor]:
            if wants:
                return list(gradient.apply(plan, call, True, *call.tensors))
            return gradient.forward(plan, call, False)[0]

        return run

    def _plan(self, call: Call) -> plans.Plan:
        backend, _, strategy = self.family.partition("-")
        problems = describe_call(call)
        if all(problem.degenerate for problem in problems):
            raise Skip("an empty result needs no kernel")
        try:
            plan = dispatch.select(problems, backend, fn=call.fn)
        except NotImplementedError as error:
            raise Skip(str(error).partition(f"{backend!r}: ")[2] or str(error)) from error
        strategy = self.device.strategy(backend, strategy)
        if not plans.backend_module(backend).takes(strategy, problems):
            raise Skip(f"{backend} does not take this call by {strategy}")
        return replace(plan, strategy=strategy)
