"""`lod_linear` as a registered op and its one gradient.

maestro_kernels::lod_linear           y, for inference; its gradient computes H again
maestro_kernels::lod_linear_train     (y, H), H kept for the gradient
maestro_kernels::lod_linear_backward  (dx, du, dv, dbias)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maestro_kernels.backends import reference
from maestro_kernels.backends.native import ACTIVATION_CODES, LIBRARY_NAME
from maestro_kernels.dispatch import Plan, native_plan, plan_linear, select
from maestro_kernels.ops import eager
from maestro_kernels.ops.flops import flop_formula
from maestro_kernels.problem import check_choices, check_linear, check_storages, describe

Rank = int | Tensor | None
Needs = tuple[bool, bool, bool, bool]

library = torch.library.Library("maestro_kernels", "DEF")
_ARGS = (
    "Tensor x, Tensor u, Tensor v, Tensor? bias, SymInt? rank, Tensor? rank_tensor, "
    "str? activation, str? backend"
)
library.define(f"lod_linear({_ARGS}) -> Tensor")
library.define(f"lod_linear_train({_ARGS}) -> (Tensor, Tensor)")
library.define(
    "lod_linear_backward(Tensor dy, Tensor x, Tensor u, Tensor v, Tensor? bias, Tensor? h, "
    "Tensor? y, SymInt? rank, Tensor? rank_tensor, str? activation, str? backend, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_ops = torch.ops.maestro_kernels


def lod_linear(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rank: Rank,
    activation: str | None,
    backend: str | None,
    save_h: bool,
) -> Tensor:
    """Run one call: see functional.lod_linear."""
    if eager.any_autocast():
        dtype = eager.autocast_dtype(x)
        if dtype is not None:
            x, u, v, bias = (eager.cast(t, dtype) for t in (x, u, v, bias))
    if eager.is_plain(x, u, v, bias):
        wants_grad = torch.is_grad_enabled() and any_requires_grad(x, u, v, bias)
        found = native_plan(x, u, rank, activation) if backend is None else None
        if found is not None and v is not None:
            try:
                if wants_grad:
                    return apply_eager(x, u, v, bias, (found[0], rank, save_h))
                code = ACTIVATION_CODES[activation]
                return found[1](x, u, v, bias, -1 if rank is None else rank, None, code)
            except RuntimeError as refusal:
                # The plan in full has the words for a wrong call, and says what serves this layout.
                if LIBRARY_NAME not in str(refusal):
                    raise
        plan = plan_linear(x, u, v, bias, rank, activation, backend)
        if not wants_grad:
            return run_forward(plan, x, u, v, bias, rank, False)[0]
        if save_h and plan.autograd_serves:
            return run_forward(plan, x, u, v, bias, rank, True)[0]
        return apply_eager(x, u, v, bias, (plan, rank, save_h))
    check_choices("lod_linear", activation, backend)
    check_linear("lod_linear", x, u, v, bias, rank)
    eager.refuse_forward_ad("lod_linear", (x, u, v, bias))
    args = (x, u, v, bias, *split_rank(rank), activation, backend)
    if eager.transforms_active():
        return TransformedLoDLinear.apply(*args)[0]
    if torch.is_grad_enabled() and save_h and any_requires_grad(x, u, v, bias):
        return _ops.lod_linear_train(*args)[0]
    return _ops.lod_linear(*args)


def any_requires_grad(x: Any, u: Any, v: Any, bias: Any) -> bool:
    """Whether a gradient is asked of an argument; what is no tensor asks for none."""
    try:
        return bool(
            x.requires_grad
            or u.requires_grad
            or v.requires_grad
            or (bias is not None and bias.requires_grad)
        )
    except AttributeError:  # the validator says which argument is no tensor
        return False


def split_rank(rank: Rank) -> tuple[int | None, Tensor | None]:
    """A schema has no `int | Tensor`: (int or None, tensor or None)."""
    return (None, rank) if isinstance(rank, Tensor) else (rank, None)


def join_rank(rank: int | None, rank_tensor: Tensor | None, R: int) -> int | Tensor:
    """The backends' form of a rank: an int or a device tensor."""
    if rank_tensor is not None:
        return rank_tensor
    return R if rank is None else rank


def run_forward(
    plan: Plan, x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, rank: Rank, save_h: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, H) of a planned call; flattens and restores the leading dimensions."""
    forward, R, activation, strategy = plan.single
    if rank is None:
        rank = R
    try:
        if x.dim() == 2:
            return forward(x, u, v, bias, rank, activation, save_h=save_h, strategy=strategy)
        rows = x.reshape(plan.problems[0].M, x.shape[-1])
        y, h = forward(rows, u, v, bias, rank, activation, save_h=save_h, strategy=strategy)
        return y.view(*x.shape[:-1], u.shape[0]), h
    except RuntimeError:
        # A remembered plan checks no more than its key: what else is wrong is said here.
        check_linear(plan.fn, x, u, v, bias, rank)
        check_storages(plan.fn, x=x, u=u, v=v, bias=bias, rank=rank)
        raise


def run_backward(
    plan: Plan,
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    y: Tensor | None,
    rank: Rank,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, du, dv, dbias) of a planned call.

    Where the gradient itself is to be differentiated (create_graph, functorch), the reference's
    algebra runs instead of a kernel, with H computed again so that it is part of the graph.
    """
    problem = plan.problems[0]
    differentiable = torch.is_grad_enabled()
    module = reference if differentiable else plan.module
    if x.dim() != 2:
        rows = math.prod(x.shape[:-1])
        dy = dy.reshape(rows, problem.N)
        y = None if y is None else y.reshape(rows, problem.N)
    try:
        dx, du, dv, dbias = module.backward(
            dy,
            x if x.dim() == 2 else x.reshape(-1, problem.K) if problem.K else x.reshape(rows, 0),
            u,
            v,
            bias,
            None if differentiable else h,
            None if differentiable else y,
            problem.R if rank is None else rank,
            problem.activation,
            needs=needs,
            strategy=plan.strategy,
        )
    except RuntimeError:  # what was saved may have been freed since
        check_storages(f"{plan.fn} backward", dy=dy, x=x, u=u, v=v, bias=bias, rank=rank)
        raise
    if dx is not None and dx.dim() != x.dim():
        dx = dx.reshape(x.shape)
    return dx, du, dv, dbias


class EagerLoDLinear(torch.autograd.Function):
    """Eager gradient. Old style on purpose: setup_context costs more than the two products do."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: Tensor,
        u: Tensor,
        v: Tensor,
        bias: Tensor | None,
        call: tuple[Plan, Rank, bool],
    ) -> Tensor:
        plan, rank, save_h = call
        y, h = run_forward(plan, x, u, v, bias, rank, save_h)
        if not save_h:
            h = None
        relu = plan.single[2] == "relu"
        if relu or isinstance(rank, Tensor):
            rank_tensor = rank if isinstance(rank, Tensor) else None
            ctx.save_for_backward(x, u, v, bias, h, y if relu else None, rank_tensor)
        else:
            ctx.save_for_backward(x, u, v, bias, h)
        ctx.plan = plan
        ctx.rank = None if isinstance(rank, Tensor) else rank
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, u, v, bias, h, *rest = ctx.saved_tensors
        y, rank_tensor = rest or (None, None)
        rank = ctx.rank if rank_tensor is None else rank_tensor
        needs = ctx.needs_input_grad[:4]
        return (*run_backward(ctx.plan, dy, x, u, v, bias, h, y, rank, needs), None)


# Function.apply looks for functorch on every call; the callers here have done that already.
apply_eager = super(torch.autograd.Function, EagerLoDLinear).apply


class TransformedLoDLinear(torch.autograd.Function):
    """The same gradient under functorch transforms, which ask for setup_context."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:  # noqa: D102
        return _ops.lod_linear_train(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: D102
        _setup(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        return _registered_backward(ctx, dy, dh)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # noqa: D102
        raise NotImplementedError(eager.forward_ad_message("lod_linear"))


def _plan_op(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rank: int | None,
    rank_tensor: Tensor | None,
    activation: str | None,
    backend: str | None,
) -> Plan:
    return plan_linear(
        x, u, v, bias, rank if rank_tensor is None else rank_tensor, activation, backend
    )


def _op_forward(*args: Any) -> Tensor:
    x, u, v, bias, rank, rank_tensor, _, _ = args
    active = rank if rank_tensor is None else rank_tensor
    return run_forward(_plan_op(*args), x, u, v, bias, active, False)[0]


def _op_train(*args: Any) -> tuple[Tensor, Tensor]:
    x, u, v, bias, rank, rank_tensor, _, _ = args
    plan = _plan_op(*args)
    active = rank if rank_tensor is None else rank_tensor
    y, h = run_forward(plan, x, u, v, bias, active, True)
    assert h is not None
    # The fake promises a dense H; kernels may pad its rows.
    return y, h.contiguous()


def _op_backward(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    y: Tensor | None,
    rank: int | None,
    rank_tensor: Tensor | None,
    activation: str | None,
    backend: str | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    plan = _plan_op(x, u, v, bias, rank, rank_tensor, activation, backend)
    active = rank if rank_tensor is None else rank_tensor
    wanted = (needs[0], needs[1], needs[2], needs[3])
    with torch.no_grad():
        grads = run_backward(plan, dy, x, u, v, bias, h, y, active, wanted)
    return tuple(x.new_empty(0) if g is None else g.contiguous() for g in grads)


def output_shapes(
    x: Tensor, u: Tensor, v: Tensor, rank: int | None, rank_tensor: Tensor | None
) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Shapes of y and H; the fakes and the backends agree on them."""
    width = v.shape[0] if rank is None or rank_tensor is not None else rank
    return (*x.shape[:-1], u.shape[0]), (math.prod(x.shape[:-1]), width)


def _fake_forward(*args: Any) -> Tensor:
    x, u, v, _, rank, rank_tensor, _, _ = args
    return x.new_empty(output_shapes(x, u, v, rank, rank_tensor)[0])


def _fake_train(*args: Any) -> tuple[Tensor, Tensor]:
    x, u, v, _, rank, rank_tensor, _, _ = args
    y_shape, h_shape = output_shapes(x, u, v, rank, rank_tensor)
    return x.new_empty(y_shape), x.new_empty(h_shape)


def _fake_backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    x, u, v, _, _, _, _, _, _, _, needs = args
    shapes = (x.shape, u.shape, v.shape, (u.shape[0],))
    return tuple(
        x.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, u, v, bias, rank, rank_tensor, activation, backend = inputs
    y, h = output if isinstance(output, tuple) else (output, None)
    ctx.save_for_backward(x, u, v, bias, h, y if activation == "relu" else None, rank_tensor)
    ctx.choices = (rank, activation, backend)


def _registered_backward(ctx: Any, dy: Tensor, dh: Tensor | None = None) -> tuple[Any, ...]:
    x, u, v, bias, h, y, rank_tensor = ctx.saved_tensors
    rank, activation, backend = ctx.choices
    needs = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled():
        active = rank if rank_tensor is None else rank_tensor
        plan = select(describe(x, u, v, bias, active, activation), "reference")
        grads = run_backward(plan, dy, x, u, v, bias, None, None, active, needs)
        return (*grads, None, None, None, None)
    grads = _ops.lod_linear_backward(
        dy, x, u, v, bias, h, y, rank, rank_tensor, activation, backend, list(needs)
    )
    return (
        *(g if need else None for g, need in zip(grads, needs, strict=True)),
        None,
        None,
        None,
        None,
    )


def _vmap(op: Callable[..., Any]) -> Callable[..., Any]:
    """Batching rule: a batch of x is one more leading dimension; batched factors make a loop."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        x_dim, *others = in_dims
        if all(dim is None for dim in others) and op is _ops.lod_linear:
            return op(args[0].movedim(x_dim, 0), *args[1:]), 0
        results = [
            op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], tuple):
            stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
            return stacked, tuple(0 for _ in stacked)
        return torch.stack(results), 0

    return rule


def _autocast(op: Any, device_type: str) -> Callable[..., Any]:
    """Cast the tensors, then call the op again below the autocast key."""
    key = getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}")
    keys = torch._C.DispatchKeySet(key)

    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            dtype = torch.get_autocast_dtype(device_type)
            return op(
                *(
                    [eager.cast(t, dtype) for t in a]
                    if isinstance(a, list | tuple)
                    else eager.cast(a, dtype)
                    for a in args
                )
            )

    return kernel


def register(
    name: str,
    *,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    vmap: Callable[..., Any] | None = None,
) -> None:
    """Everything torch asks about one op, in one place."""
    qualified = f"maestro_kernels::{name}"
    op = getattr(_ops, name)
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=library)
    if vmap is not None:
        torch.library.register_vmap(qualified, vmap, lib=library)
    if backward is not None:
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=library
        )
        for device_type in ("cpu", "cuda"):
            library.impl(name, _autocast(op, device_type), f"Autocast{device_type.upper()}")


register(
    "lod_linear",
    implementation=_op_forward,
    fake=_fake_forward,
    backward=_registered_backward,
    setup_context=_setup,
    vmap=_vmap(_ops.lod_linear),
)
register(
    "lod_linear_train",
    implementation=_op_train,
    fake=_fake_train,
    backward=_registered_backward,
    setup_context=_setup,
    vmap=_vmap(_ops.lod_linear_train),
)
register(
    "lod_linear_backward",
    implementation=_op_backward,
    fake=_fake_backward,
    vmap=_vmap(_ops.lod_linear_backward),
)


@flop_formula(_ops.lod_linear, _ops.lod_linear_train)
def _forward_flop(
    x_shape: Any, u_shape: Any, v_shape: Any, bias: Any, rank: int | None, *_: Any, **__: Any
) -> int:
    M = math.prod(x_shape[:-1])
    r = v_shape[0] if rank is None else rank
    return 2 * M * r * (v_shape[1] + u_shape[0])


@flop_formula(_ops.lod_linear_backward)
def _backward_flop(
    dy_shape: Any,
    x_shape: Any,
    u_shape: Any,
    v_shape: Any,
    bias: Any,
    h_shape: Any,
    y_shape: Any,
    rank: int | None,
    rank_tensor: Any,
    activation: str | None,
    backend: str | None,
    needs: list[bool],
    *_: Any,
    **__: Any,
) -> int:
    M, K, N = math.prod(x_shape[:-1]), v_shape[1], u_shape[0]
    r = v_shape[0] if rank is None else rank
    needs_x, needs_u, needs_v = needs[:3]
    products = (N * (needs_x or needs_v)) + K * needs_x + N * needs_u + K * needs_v
    return 2 * M * r * products
