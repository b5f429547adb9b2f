"""Running a call: eagerly by its plan, or as a registered op where something has to see one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from maestro_kernels import dispatch
from maestro_kernels.backends import KERNELS, matmul
from maestro_kernels.backends.native import ACTIVATION_CODES, LIBRARY_NAME
from maestro_kernels.backends.reference import ACTIVATIONS
from maestro_kernels.call import Call
from maestro_kernels.ops import eager, first_use, gradient, registered
from maestro_kernels.problem import check_call


def quick(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rank: int | Tensor | None,
    activation: str | None,
    backend: str | None,
    save_h: bool,
) -> Tensor | None:
    """Y of an eager call of one layer that ran before, or None where `run` is to be asked.

    A small call costs little more than this.
    """
    if eager.any_autocast() or not eager.is_plain(x, u, v, bias):
        return None
    try:
        wants_grad = torch.is_grad_enabled() and (
            x.requires_grad
            or u.requires_grad
            or v.requires_grad
            or (bias is not None and bias.requires_grad)
        )
    except AttributeError:  # None is no tensor: `run` has the words
        return None
    plan = dispatch.quick_plan(x, u, v, bias, rank, activation, backend, wants_grad)
    if plan is None or v is None or (wants_grad and eager.in_backward()):
        return None
    try:
        if plan.strategy == "fused" and not wants_grad:
            code = ACTIVATION_CODES[activation]
            return plan.raw(x, u, v, bias, -1 if rank is None else rank, None, code)
        r = u.shape[1] if rank is None else rank
        if plan.backend in KERNELS and not wants_grad:
            return plan.again(x, u, v, bias, r, activation)
        if wants_grad and not (save_h and plan.autograd_serves):
            call = Call("lod_linear", (x,), (u,), (v,), (bias,), (r,), (activation,))  # type: ignore[arg-type]
            y: Tensor = gradient.apply(plan, call, save_h, x, u, v, bias)[0]
            return y
        if not wants_grad and plan.products is not None:
            y = plan.products(x, u, v, bias, r)
            return y if activation is None else ACTIVATIONS[activation](y)
        if x.layout is u.layout is v.layout is torch.strided:
            return matmul.layer(x, u, v, bias, r, activation)[0]  # type: ignore[arg-type]
        return None
    except RuntimeError as refusal:
        # The plan in full has the words for a wrong call, and says what serves this layout.
        if plan.backend == "native" and LIBRARY_NAME not in str(refusal):
            raise
        return None


def quick_with_more(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rank: int | Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: float,
    norm: Tensor | None,
    norm_eps: float,
    backend: str | None,
    save_h: bool,
) -> Tensor | None:
    """`quick` of a call that adds a residual, scales or normalises."""
    if eager.any_autocast() or not eager.is_plain(x, u, v, bias, residual, norm):
        return None
    try:
        wants_grad = torch.is_grad_enabled() and (
            x.requires_grad
            or u.requires_grad
            or v.requires_grad
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
            or (norm is not None and norm.requires_grad)
        )
    except AttributeError:
        return None
    added = residual, scale, norm, norm_eps
    plan = dispatch.quick_plan(x, u, v, bias, rank, activation, backend, wants_grad, added)
    if plan is None or v is None:
        return None
    if wants_grad and not (save_h and plan.autograd_serves and not eager.in_backward()):
        return None
    try:
        if plan.backend == "native":
            code = ACTIVATION_CODES[activation]
            r = -1 if rank is None else rank
            return plan.raw(x, u, v, bias, r, None, code, *added)
        if x.dim() != 2 or not x.layout is u.layout is v.layout is torch.strided:
            return None
        r = u.shape[1] if rank is None else rank
        return matmul.layer(x, u, v, bias, r, activation, *added)[0]  # type: ignore[arg-type]
    except RuntimeError as refusal:
        if plan.backend == "native" and LIBRARY_NAME not in str(refusal):
            raise
        return None


def run(call: Call, backend: str | None, save_h: bool) -> list[Tensor]:
    """The outputs of a call: see functional.py for its arguments."""
    dtype = eager.autocast_dtype(call.xs[0]) if eager.any_autocast() and call.xs else None
    if dtype is not None:
        call = call.with_tensors([eager.cast(t, dtype) for t in call.tensors])
    tensors = call.tensors
    wants_grad = torch.is_grad_enabled() and _any_requires_grad(tensors)
    if eager.is_plain(*tensors):
        again = wants_grad and eager.in_backward()
        training = wants_grad and not (again and eager.repeats_inference())
        plan, done = dispatch.plan(call, backend, training, again), None
        if plan.rivals and not again:
            plan, done = first_use.settle(plan, call, save_h)
        if wants_grad and not (save_h and plan.autograd_serves):
            ys = list(gradient.apply(plan, call, save_h, *tensors))
        else:
            try:
                ys, _ = plan.module.forward(
                    call.for_backend(), save_h=False, strategy=plan.strategy
                )
            except RuntimeError:
                gradient.complain(call)
                raise
            ys = call.shaped(ys)
        if done is not None:
            done()
        return ys
    check_call(call, backend)
    eager.refuse_forward_ad(call.fn, tensors)
    return registered.run(call, backend, wants_grad and save_h)


def _any_requires_grad(tensors: Iterable[Any]) -> bool:
    """Whether a gradient is asked of an argument; what is no tensor asks for none."""
    return any(t is not None and getattr(t, "requires_grad", False) for t in tensors)
