"""The one gradient of a call, for eager calls; registered.py hands it to torch's other machinery.

With dz = dy * act'(z), for each layer: dH = scale · dz @ u[:, :r], dx = dH @ v[:r],
du[:, :r] = dz.T @ H, dv[:r] = dH.T @ x, dbias = the sum of dz over rows, dresidual = dz. H is what
the forward kept, or computed again. What a norm between the factors adds is in
`reference.input_grads`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maestro_kernels.backends import reference
from maestro_kernels.call import Call, Grads, Needs, as_rows
from maestro_kernels.plans import Plan, backend_module
from maestro_kernels.problem import check_call, check_storages

_Grads = tuple[Grads, Grads, Grads, Grads, Grads, Grads]


def forward(plan: Plan, call: Call, save_h: bool) -> tuple[list[Tensor], Sequence[Tensor | None]]:
    """(ys, hs) of a planned call."""
    try:
        ys, hs = plan.module.forward(call.for_backend(), save_h=save_h, strategy=plan.strategy)
    except RuntimeError:
        complain(call)
        raise
    return call.shaped(ys), hs


def complain(call: Call) -> None:
    """Say what is wrong with a call that failed: a remembered plan checked no more than its key."""
    check_call(call)
    check_storages(call.fn, call)


def backward(
    plan: Plan,
    call: Call,
    dys: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    ys: Sequence[Tensor | None],
    needs: Needs,
    layers: Sequence[int] | None = None,
) -> _Grads:
    """(dxs, dus, dvs, dbiases, dresiduals, dnorms) of a call; the last two [] where none has one.

    Where the gradient itself is to be differentiated (create_graph, functorch), the reference's
    algebra runs instead of a kernel, with H computed again so that it is part of the graph.

    Args:
        plan: of the forward.
        call: of the layers that gradients reach.
        dys: theirs.
        hs: H of each, None to compute it again.
        ys: output of each, where `kept_outputs` kept it.
        needs: which of x, u, v and bias want a gradient.
        layers: which of the plan's layers these are; None is all.
    """
    again = torch.is_grad_enabled()
    nothing: list[None] = [None] * call.n
    arguments = (
        call.for_backend(),
        [as_rows(dy) for dy in dys],
        nothing if again else hs,
        nothing if again else [y if y is None else as_rows(y) for y in ys],
    )
    try:
        if plan.halves is None or again:
            own = reference if again else plan.module, plan.strategy
            grads = by_halves(own, own, *arguments, needs=needs)
        else:
            names = (half.split(": ") for half in plan.halves)
            first, second = ((backend_module(name), strategy) for name, strategy in names)
            grads = by_halves(first, second, *arguments, needs=needs)
    except RuntimeError:  # what was saved may have been freed since
        check_storages(f"{plan.fn} backward", call, layers, **dict(zip(("dy",), dys, strict=False)))
        raise
    dxs, dresiduals = grads[0], grads[4]
    for i, (dx, x) in enumerate(zip(dxs, call.xs, strict=True)):
        if dx is not None and dx.dim() != x.dim():
            dxs[i] = dx.reshape(x.shape)
    for i, (dz, dy) in enumerate(zip(dresiduals, dys, strict=False)):
        dresiduals[i] = dz.reshape(dy.shape)  # type: ignore[union-attr]
    return grads


def by_halves(
    first: tuple[Any, str],
    second: tuple[Any, str],
    call: Call,
    dys: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    ys: Sequence[Tensor | None],
    *,
    needs: Needs,
) -> _Grads:
    """(dxs, dus, dvs, dbiases, dresiduals, dnorms): dx, dz, dnorm by the first (backend, strategy).

    The gradients of weights are the second's; those of residuals are dz. [] where none has one.
    The other arguments are those of `backends.Backend.input_grads`.
    """
    module, strategy = first
    dxs, norms, *kept = module.input_grads(call, dys, hs, ys, needs=needs, strategy=strategy)
    module, strategy = second
    weights = module.weight_grads(call, *kept, needs=needs, strategy=strategy)
    return dxs, *weights, [*kept[0]] if call.residuals else [], norms if call.norms else []


def kept_outputs(call: Call, ys: Sequence[Tensor]) -> list[Tensor | None]:
    """The outputs that spare the backward computing z: those of relu, which have its sign."""
    return [y if a == "relu" else None for y, a in zip(ys, call.activations, strict=True)]


class Gradient(torch.autograd.Function):
    """(plan, call, save_h, *call.tensors) -> ys.

    Old style on purpose: setup_context costs more than the two products of a small layer do. As
    with layers of their own, a backward pass computes the gradients of the layers that it reaches,
    and the others keep what they saved for a later pass.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, plan: Plan, call: Call, save_h: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ys, hs = forward(plan, call, save_h)
        ranks = call.ranks
        is_tensor = isinstance(ranks, Tensor)
        ctx.set_materialize_grads(False)
        nothing = [None] * len(ys)
        if call.residuals:  # without an activation nothing asks for z
            both = zip(call.residuals, call.activations, strict=True)
            kept = [None if a is None else t for t, a in both]
            tensors = (*tensors[: len(call.xs) + 3 * call.n], *kept, *call.norms)
        ctx.save_for_backward(
            *tensors,
            *(hs if save_h else nothing),
            *(kept_outputs(call, ys) if "relu" in call.activations else nothing),
            ranks if is_tensor else None,
        )
        added = bool(call.residuals), bool(call.norms), call.scales, call.norm_eps
        ctx.call = plan, len(call.xs), None if is_tensor else ranks, added
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> tuple[Tensor | None, ...]:  # noqa: D102
        (plan, n_x, ranks, (adds, norms, scales, norm_eps)), n = ctx.call, len(dys)
        reached = [i for i, dy in enumerate(dys) if dy is not None]
        wanted = ctx.needs_input_grad[3:]
        if not reached:
            return (None,) * (3 + len(wanted))
        saved = _saved(ctx, reached, n_x, n)
        ranks = saved[-1] if ranks is None else ranks
        n_parts = 6 + adds + norms
        if n == 1:
            parts, needs = [(tensor,) for tensor in saved[:n_parts]], [(want,) for want in wanted]
        else:
            parts, needs = _parts(saved, n_x, n)[:n_parts], _parts(wanted, n_x, n)
        if len(reached) < n:
            parts, needs = _of(reached, parts, n_x), _of(reached, needs, n_x)
            tensor = isinstance(ranks, Tensor)
            ranks = ranks[reached] if tensor else [ranks[i] for i in reached]
            dys = tuple([dys[i] for i in reached])
            scales = [scales[i] for i in reached] if scales else ()
        xs, us, vs, biases, *others, hs, ys = parts
        activations = [plan.problems[i].activation for i in reached]
        residuals, weights = others[0] if adds else (), others[-1] if norms else ()
        factors = xs, us, vs, biases, ranks, activations
        call = Call(plan.fn, *factors, residuals, scales, weights, norm_eps)
        need_x, need_u, need_v, need_b = map(any, needs[:4])
        found = backward(plan, call, dys, hs, ys, (need_x, need_u, need_v, need_b), reached)
        grads: Sequence[Sequence[Tensor | None]]
        grads = [*found[:4], *([found[4]] if adds else []), *([found[5]] if norms else [])]
        if len(reached) < n:
            grads = _among(reached, grads, n_x, n)
        flat = itertools.chain(*grads)
        return (None, None, None, *[g if w else None for g, w in zip(flat, wanted, strict=True)])


def _parts(values: Sequence[Any], n_x: int, n: int) -> list[Any]:
    """A flat sequence cut into what there is one of per x, and then into what there is n of."""
    return [values[:n_x], *[values[a : a + n] for a in range(n_x, len(values), n)]]


def _of(layers: Sequence[int], parts: Sequence[Any], n_x: int) -> list[Any]:
    """The entries of some layers of each part; what belongs to a shared x stays."""
    xs, *others = parts
    some = [[part[i] for i in layers] for part in others]
    return [xs if n_x == 1 else [xs[i] for i in layers], *some]


def _among(
    layers: Sequence[int], found: Sequence[Sequence[Tensor | None]], n_x: int, n: int
) -> list[Sequence[Tensor | None]]:
    """Gradients of some layers, with None for the others; see `_of`."""
    spread = [dict(zip(layers, part, strict=True)) for part in found[n_x == 1 :]]
    grads: list[Sequence[Tensor | None]] = [[part.get(i) for i in range(n)] for part in spread]
    return [found[0], *grads] if n_x == 1 else grads


# Function.apply looks for functorch on every call; the callers have done that already.
apply = super(torch.autograd.Function, Gradient).apply

# Whether the backward pass that is running keeps the graph (retain_graph, create_graph).
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def _saved(ctx: Any, reached: Sequence[int], n_x: int, n: int) -> Sequence[Any]:
    """What the forward saved, kept on for the layers that this backward pass does not reach.

    torch frees it all after the first pass that does not keep the graph. `ctx.later` then holds
    (layers not reached so far, tensors, their versions).
    """
    if n == 1:
        saved: Sequence[Any] = ctx.saved_tensors
        return saved
    later = getattr(ctx, "later", None)
    layers: Any
    try:
        saved, layers = ctx.saved_tensors, range(n)
    except RuntimeError:
        if later is None or not later[0].issuperset(reached):
            raise
        layers, saved, versions = later
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
    # What there is one of per layer, between the xs and the ranks.
    n_parts = (len(saved) - n_x - 1) // n
    places = {n_x + part * n + i for part in range(n_parts) for i in rest} | {len(saved) - 1}
    places |= {0} if n_x == 1 else rest
    kept = [tensor if i in places else None for i, tensor in enumerate(saved)]
    ctx.later = rest, kept, [0 if t is None else t._version for t in kept]
    return saved
