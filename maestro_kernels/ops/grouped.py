"""`lod_linear_grouped` as a registered op and its gradient: several layers, one call.

maestro_kernels::lod_linear_grouped           ys, for inference; its gradient computes the Hs again
maestro_kernels::lod_linear_grouped_train     (ys, hs)
maestro_kernels::lod_linear_grouped_backward  dxs + dus + dvs + dbiases, empty where not asked for

`xs` holds one shared input or one per layer; `biases` those that exist (torch.library
differentiates a Tensor[] but not a Tensor?[]), `has_bias` says whose; "none" is no activation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maestro_kernels.backends import loop, reference
from maestro_kernels.dispatch import Plan, plan_grouped
from maestro_kernels.ops import eager
from maestro_kernels.ops.flops import flop_formula
from maestro_kernels.ops.linear import library, register
from maestro_kernels.problem import check_grouped, check_storages

Ranks = Sequence[int | None] | Tensor

_ARGS = (
    "Tensor[] xs, Tensor[] us, Tensor[] vs, Tensor[] biases, bool[] has_bias, SymInt[]? ranks, "
    "Tensor? rank_tensor, str[] activations, str? backend"
)
library.define(f"lod_linear_grouped({_ARGS}) -> Tensor[]")
library.define(f"lod_linear_grouped_train({_ARGS}) -> (Tensor[], Tensor[])")
library.define(
    "lod_linear_grouped_backward(Tensor[] dys, Tensor[] xs, Tensor[] us, Tensor[] vs, "
    "Tensor[] biases, Tensor[] hs, bool[] has_bias, SymInt[]? ranks, Tensor? rank_tensor, "
    "str[] activations, str? backend, bool[] needs) -> Tensor[]"
)
_ops = torch.ops.maestro_kernels


def lod_linear_grouped(
    xs: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    ranks: Ranks,
    activations: Sequence[str | None],
    backend: str | None,
    save_h: bool,
) -> list[Tensor]:
    """Run one grouped call: see functional.lod_linear_grouped."""
    dtype = eager.autocast_dtype(xs[0]) if len(xs) else None
    if dtype is not None:
        xs, us, vs, biases = ([eager.cast(t, dtype) for t in ts] for ts in (xs, us, vs, biases))
    tensors = [*xs, *us, *vs, *(b for b in biases if b is not None)]
    wants_grad = torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in tensors
    )
    if eager.is_plain(*tensors):
        plan = plan_grouped(xs, us, vs, biases, ranks, activations, backend)
        if wants_grad:
            call = (plan, ranks, save_h, len(xs))
            return list(EagerGrouped.apply(call, *xs, *us, *vs, *biases))
        return run_forward(plan, xs, us, vs, biases, ranks, False)[0]
    check_grouped("lod_linear_grouped", xs, us, vs, biases, ranks, activations, backend)
    eager.refuse_forward_ad("lod_linear_grouped", tensors)
    if eager.transforms_active():
        return _layer_by_layer(xs, us, vs, biases, ranks, activations, backend, save_h)
    is_tensor = isinstance(ranks, Tensor)
    op = _ops.lod_linear_grouped_train if wants_grad and save_h else _ops.lod_linear_grouped
    result = op(
        list(xs),
        list(us),
        list(vs),
        [b for b in biases if b is not None],
        [b is not None for b in biases],
        None if isinstance(ranks, Tensor) else full_ranks(ranks, vs),
        ranks if is_tensor else None,
        [a or "none" for a in activations],
        backend,
    )
    return list(result[0] if wants_grad and save_h else result)


def _layer_by_layer(
    xs: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    ranks: Ranks,
    activations: Sequence[str | None],
    backend: str | None,
    save_h: bool,
) -> list[Tensor]:
    """Transforms of functorch see the single op: it has their rules."""
    from maestro_kernels.ops.linear import lod_linear

    return [
        lod_linear(
            xs[0 if len(xs) == 1 else i],
            us[i],
            vs[i],
            biases[i],
            ranks[i],
            activations[i],
            backend,
            save_h,
        )
        for i in range(len(us))
    ]


def full_ranks(ranks: Sequence[int | None], vs: Sequence[Tensor]) -> list[int]:
    """One int per layer; None means that layer's R."""
    return [v.shape[0] if r is None else r for r, v in zip(ranks, vs, strict=True)]


def run_forward(
    plan: Plan,
    xs: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    ranks: Ranks,
    save_h: bool,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """(ys, hs) of a planned call."""
    rows = [_rows(x) for x in xs]
    active = ranks if isinstance(ranks, Tensor) else full_ranks(ranks, vs)
    activations = [p.activation for p in plan.problems]
    module = plan.module
    args = (rows, us, vs, biases, active, activations)
    try:
        if hasattr(module, "grouped_forward"):
            ys, hs = module.grouped_forward(*args, save_h=save_h, strategy=plan.strategy)
        else:
            ys, hs = loop.grouped_forward(module, *args, save_h=save_h, strategy=plan.strategy)
    except RuntimeError:
        # A remembered plan checks no more than its key: what else is wrong is said here.
        check_grouped(plan.fn, xs, us, vs, biases, ranks, activations, None)
        check_group_storages(plan.fn, xs, us, vs, biases, ranks, range(len(us)))
        raise
    shared = len(xs) == 1
    ys = [
        y
        if xs[0 if shared else i].dim() == 2
        else y.view(*xs[0 if shared else i].shape[:-1], -1)
        if y.numel()
        else y.new_empty(*xs[0 if shared else i].shape[:-1], us[i].shape[0])
        for i, y in enumerate(ys)
    ]
    return ys, hs if hs is not None else [None] * len(ys)


def run_backward(
    plan: Plan,
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    hs: Sequence[Tensor | None],
    ranks: Ranks,
    needs: tuple[bool, bool, bool, bool],
    *,
    layers: Sequence[int],
) -> tuple[list[Tensor | None], ...]:
    """(dxs, dus, dvs, dbiases) of these layers of a plan; differentiable where grad mode is on."""
    differentiable = torch.is_grad_enabled()
    module = reference if differentiable else plan.module
    active = ranks if isinstance(ranks, Tensor) else full_ranks(ranks, vs)
    activations = [plan.problems[i].activation for i in layers]
    no_tensors: list[Tensor | None] = [None] * len(us)
    args = (
        [dy.reshape(_row_count(dy), dy.shape[-1]) for dy in dys],
        [_rows(x) for x in xs],
        us,
        vs,
        biases,
        no_tensors if differentiable else hs,
        no_tensors,
        active,
        activations,
    )
    try:
        if hasattr(module, "grouped_backward"):
            dxs, *rest = module.grouped_backward(*args, needs=needs)
        else:
            dxs, *rest = loop.grouped_backward(module, *args, needs=needs, strategy=plan.strategy)
    except RuntimeError:  # what was saved may have been freed since
        check_group_storages(f"{plan.fn} backward", xs, us, vs, biases, ranks, layers)
        raise
    dxs = [dx if dx is None else dx.reshape(x.shape) for dx, x in zip(dxs, xs, strict=True)]
    return dxs, *rest


def check_group_storages(
    fn: str,
    xs: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    ranks: Ranks,
    layers: Sequence[int],
) -> None:
    """problem.check_storages for these layers of a group, one entry each but for a shared x."""
    named: dict[str, Any] = {"x": xs[0]} if len(xs) == 1 else {}
    lists = {"x": xs if len(xs) > 1 else (), "us": us, "vs": vs, "biases": biases}
    named |= {f"{name}[{layers[i]}]": t for name, ts in lists.items() for i, t in enumerate(ts)}
    check_storages(fn, **named, ranks=ranks)


def _row_count(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(_row_count(x), x.shape[-1])


class EagerGrouped(torch.autograd.Function):
    """Eager gradient of a group: (plan, ranks, save_h, number of inputs), then flat tensors.

    As with layers of their own, a backward pass computes the gradients of the layers that it
    reaches, and the others keep what they saved for a later pass.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, call: tuple[Plan, Ranks, bool, int], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        plan, ranks, save_h, n_x = call
        xs, us, vs, biases = _split(tensors, n_x, len(plan.problems))
        ys, hs = run_forward(plan, xs, us, vs, biases, ranks, save_h)
        is_tensor = isinstance(ranks, Tensor)
        kept = hs if save_h else [None] * len(ys)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *kept, ranks if is_tensor else None)
        ctx.call = (plan, None if is_tensor else ranks, n_x)
        ctx.later = None
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: D102
        plan, ranks, n_x = ctx.call
        n = len(plan.problems)
        reached = [i for i, dy in enumerate(dys) if dy is not None]
        grads: list[Tensor | None] = [None] * (n_x + 3 * n)
        if reached:
            *saved, rank_tensor = _saved(ctx, reached, n_x, n)
            active = ranks if rank_tensor is None else rank_tensor
            wanted = ctx.needs_input_grad[1:]
            # Where each layer's x, u, v, bias and h stand among the tensors.
            at = [[0] if n_x == 1 else reached]
            at += [[n_x + part * n + i for i in reached] for part in range(4)]
            xs, us, vs, biases, hs = ([saved[i] for i in places] for places in at)
            need_x, need_u, need_v, need_b = (any(wanted[i] for i in part) for part in at[:4])
            found = run_backward(
                plan,
                [dy for dy in dys if dy is not None],
                xs,
                us,
                vs,
                biases,
                hs,
                active if len(reached) == n else _picked(active, reached),
                (need_x, need_u, need_v, need_b),
                layers=reached,
            )
            for places, values in zip(at, found, strict=False):
                for i, value in zip(places, values, strict=True):
                    grads[i] = value if wanted[i] else None
        return (None, *grads)


def _picked(ranks: Ranks, layers: Sequence[int]) -> Ranks:
    return ranks[list(layers)] if isinstance(ranks, Tensor) else [ranks[i] for i in layers]


# Whether the backward pass that is running keeps the graph (retain_graph, create_graph).
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def _saved(ctx: Any, reached: Sequence[int], n_x: int, n: int) -> Sequence[Any]:
    """What the forward saved, kept on for the layers that this backward pass does not reach.

    torch frees it all after the first pass that does not keep the graph. `ctx.later` then holds
    (layers not reached so far, tensors, their versions).
    """
    try:
        saved, layers = ctx.saved_tensors, range(n)
    except RuntimeError:
        if ctx.later is None or not ctx.later[0].issuperset(reached):
            raise
        layers, saved, versions = ctx.later
        for tensor, version in zip(saved, versions, strict=True):
            if tensor is not None and tensor._version != version:
                raise RuntimeError(
                    "lod_linear_grouped: backward: expected what the forward saved as it was, got "
                    f"a tensor {tuple(tensor.shape)} that was written to (version "
                    f"{tensor._version}, expected {version})"
                ) from None
    if _keeps_graph():
        return saved
    rest = frozenset(layers).difference(reached)
    if not rest:
        ctx.later = None
        return saved
    places = {n_x + part * n + i for part in range(4) for i in rest} | {n_x + 4 * n}
    places |= {0} if n_x == 1 else rest
    kept = [tensor if i in places else None for i, tensor in enumerate(saved)]
    ctx.later = rest, kept, [0 if t is None else t._version for t in kept]
    return saved


def _split(
    values: Sequence[Any], n_x: int, n: int, n_bias: int | None = None
) -> tuple[list[Any], ...]:
    """(xs, us, vs, biases) of a flat sequence; n_bias tells how many biases there are if not n."""
    cuts = (0, n_x, n_x + n, n_x + 2 * n, n_x + 2 * n + (n if n_bias is None else n_bias))
    return tuple(list(values[a:b]) for a, b in itertools.pairwise(cuts))


def _plan_op(
    xs: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    ranks: list[int] | None,
    rank_tensor: Tensor | None,
    activations: list[str],
    backend: str | None,
) -> tuple[Plan, Ranks]:
    full: Ranks = full_ranks([None] * len(vs), vs) if ranks is None else ranks
    active = full if rank_tensor is None else rank_tensor
    names = [None if a == "none" else a for a in activations]
    return plan_grouped(xs, us, vs, biases, active, names, backend), active


def _fill(biases: Sequence[Tensor], has_bias: Sequence[bool]) -> list[Tensor | None]:
    """One entry per layer again."""
    present = iter(biases)
    return [next(present) if has else None for has in has_bias]


def _op_forward(*args: Any) -> list[Tensor]:
    xs, us, vs, present, has_bias, *call = args
    biases = _fill(present, has_bias)
    plan, active = _plan_op(xs, us, vs, biases, *call)
    return run_forward(plan, xs, us, vs, biases, active, False)[0]


def _op_train(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    xs, us, vs, present, has_bias, *call = args
    biases = _fill(present, has_bias)
    plan, active = _plan_op(xs, us, vs, biases, *call)
    ys, hs = run_forward(plan, xs, us, vs, biases, active, True)
    return ys, [h.contiguous() for h in hs if h is not None]


def _op_backward(dys: list[Tensor], *args: Any) -> list[Tensor]:
    xs, us, vs, present, hs, has_bias, *call, needs = args
    biases = _fill(present, has_bias)
    plan, active = _plan_op(xs, us, vs, biases, *call)
    kept = hs or [None] * len(us)
    with torch.no_grad():
        *grads, dbiases = run_backward(
            plan, dys, xs, us, vs, biases, kept, active, tuple(needs), layers=range(len(us))
        )
    flat = [g for part in grads for g in part]
    flat += [g for g, has in zip(dbiases, has_bias, strict=True) if has]
    return [xs[0].new_empty(0) if g is None else g.contiguous() for g in flat]


def _fake_forward(*args: Any) -> list[Tensor]:
    xs, us = args[:2]
    return [
        x.new_empty((*x.shape[:-1], u.shape[0]))
        for x, u in zip(xs if len(xs) > 1 else list(xs) * len(us), us, strict=True)
    ]


def _fake_train(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    xs, us, vs, _, _, ranks, *_ = args
    widths = [v.shape[0] for v in vs] if ranks is None else ranks
    hs = [
        x.new_empty((_row_count(x), width))
        for x, width in zip(xs if len(xs) > 1 else list(xs) * len(us), widths, strict=True)
    ]
    return _fake_forward(*args), hs


def _fake_backward(dys: list[Tensor], *args: Any) -> list[Tensor]:
    xs, us, vs, biases, *_, needs = args
    shapes = (
        [(x.shape, needs[0]) for x in xs]
        + [(u.shape, needs[1]) for u in us]
        + [(v.shape, needs[2]) for v in vs]
        + [(b.shape, needs[3]) for b in biases]
    )
    return [xs[0].new_empty(tuple(shape) if need else (0,)) for shape, need in shapes]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    xs, us, vs, biases, has_bias, ranks, rank_tensor, activations, backend = inputs
    hs = output[1] if isinstance(output, tuple) else []
    ctx.save_for_backward(*xs, *us, *vs, *biases, *hs, rank_tensor)
    ctx.call = (len(xs), has_bias, ranks, activations, backend)
    ctx.wanted = [any(t.requires_grad for t in ts) for ts in (xs, us, vs, biases)]


def _registered_backward(ctx: Any, dys: Any, dhs: Any = None) -> tuple[Any, ...]:
    n_x, has_bias, ranks, activations, backend = ctx.call
    n, n_bias = len(has_bias), sum(has_bias)
    *saved, rank_tensor = ctx.saved_tensors
    xs, us, vs, biases = _split(saved, n_x, n, n_bias)
    hs = list(saved[n_x + 2 * n + n_bias :])
    inputs = xs if n_x > 1 else [xs[0]] * n
    dys = [
        x.new_zeros((*x.shape[:-1], u.shape[0])) if dy is None else dy
        for dy, x, u in zip(dys, inputs, us, strict=True)
    ]
    if torch.is_grad_enabled():
        filled = _fill(biases, has_bias)
        plan, active = _plan_op(xs, us, vs, filled, ranks, rank_tensor, activations, "reference")
        wanted = tuple(ctx.wanted)
        *grads, dbiases = run_backward(
            plan, dys, xs, us, vs, filled, [None] * n, active, wanted, layers=range(n)
        )
        parts = [*grads, [g for g, has in zip(dbiases, has_bias, strict=True) if has]]
    else:
        flat = _ops.lod_linear_grouped_backward(
            dys, xs, us, vs, biases, hs, has_bias, ranks, rank_tensor, activations, backend,
            ctx.wanted,
        )  # fmt: skip
        parts = [
            part if want else [None] * len(part)
            for part, want in zip(_split(flat, n_x, n, n_bias), ctx.wanted, strict=True)
        ]
    return (*(list(part) for part in parts), None, None, None, None, None)


register(
    "lod_linear_grouped",
    implementation=_op_forward,
    fake=_fake_forward,
    backward=_registered_backward,
    setup_context=_setup,
)
register(
    "lod_linear_grouped_train",
    implementation=_op_train,
    fake=_fake_train,
    backward=_registered_backward,
    setup_context=_setup,
)
register("lod_linear_grouped_backward", implementation=_op_backward, fake=_fake_backward)


@flop_formula(_ops.lod_linear_grouped, _ops.lod_linear_grouped_train)
def _forward_flop(
    x_shapes: Any,
    u_shapes: Any,
    v_shapes: Any,
    biases: Any,
    has_bias: Any,
    ranks: Any,
    *_: Any,
    **__: Any,
) -> int:
    total = 0
    for i, (u, v) in enumerate(zip(u_shapes, v_shapes, strict=True)):
        M = math.prod(x_shapes[0 if len(x_shapes) == 1 else i][:-1])
        total += 2 * M * (v[0] if ranks is None else ranks[i]) * (v[1] + u[0])
    return total


@flop_formula(_ops.lod_linear_grouped_backward)
def _backward_flop(
    dy_shapes: Any,
    x_shapes: Any,
    u_shapes: Any,
    v_shapes: Any,
    biases: Any,
    h_shapes: Any,
    has_bias: Any,
    ranks: Any,
    rank_tensor: Any,
    activations: Any,
    backend: Any,
    needs: list[bool],
    *_: Any,
    **__: Any,
) -> int:
    total = 0
    for i, (u, v) in enumerate(zip(u_shapes, v_shapes, strict=True)):
        M = math.prod(x_shapes[0 if len(x_shapes) == 1 else i][:-1])
        products = u[0] * ((needs[0] or needs[2]) + needs[1]) + v[1] * (needs[0] + needs[2])
        total += 2 * M * (v[0] if ranks is None else ranks[i]) * products
    return total
