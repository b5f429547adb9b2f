"""The ops that torch.compile, export, functorch, autocast and FlopCounterMode see.

maestro_kernels::lod_linear           ys, for inference; its gradient computes the Hs again
maestro_kernels::lod_linear_train     (ys, hs), the Hs kept for the gradient
maestro_kernels::lod_linear_backward  dxs + dus + dvs + dbiases + dresiduals + dnorms, empty where
                                      not asked

A layer is a group of one. `xs` holds one shared input or one per layer; `biases` those that exist
(torch.library differentiates a Tensor[] but not a Tensor?[]), `has_bias` says whose, and so for
residuals and norms; exported programs have one tensor that nobody reads where there are none.
"none" is no activation. A schema has no `int | Tensor`: `ranks` or `rank_tensor` holds the ranks,
or neither.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from maestro_kernels.call import Call, Ranks
from maestro_kernels.dispatch import plan as plan_call
from maestro_kernels.measure import cost
from maestro_kernels.ops import eager, first_use
from maestro_kernels.ops.flops import flop_formula
from maestro_kernels.ops.gradient import backward, forward, kept_outputs

library = torch.library.Library("maestro_kernels", "DEF")
_TENSORS = (
    "Tensor[] xs, Tensor[] us, Tensor[] vs, Tensor[] biases, Tensor[] residuals, Tensor[] norms"
)
_CHOICES = (
    "bool[] has_bias, bool[] has_residual, bool[] has_norm, SymInt[]? ranks, Tensor? rank_tensor, "
    "str[] activations, float[] scales, float norm_eps, str? backend"
)
# Lists of tensors that come first, of those that may want gradients; the choices behind them.
_KINDS, _NUM_CHOICES = 6, 9
library.define(f"lod_linear({_TENSORS}, {_CHOICES}) -> Tensor[]")
library.define(f"lod_linear_train({_TENSORS}, {_CHOICES}) -> (Tensor[], Tensor[])")
library.define(
    f"lod_linear_backward(Tensor[] dys, Tensor[] hs, Tensor[] ys, bool[] needs, {_TENSORS}, "
    f"{_CHOICES}) -> Tensor[]"
)
_ops = torch.ops.maestro_kernels


def run(call: Call, backend: str | None, train: bool) -> list[Tensor]:
    """The outputs of a checked call, H kept for the gradient if `train`."""
    signature = _Signature.of(call, backend)
    if eager.transforms_active():
        return list(_Transformed.apply(signature, *signature.tensors(call))[: call.n])
    arguments = signature.arguments(signature.tensors(call))
    if torch.compiler.is_exporting():
        # Packages of AOTInductor lose a list that is empty.
        xs, us, vs, *others = arguments[:_KINDS]
        filled = (part or list(call.xs[:1]) for part in others)
        arguments = (xs, us, vs, *filled, *arguments[_KINDS:])
    if train:
        return list(_ops.lod_linear_train(*arguments)[0])
    return list(_ops.lod_linear(*arguments))


class _Signature(NamedTuple):
    """What an op is told beside the tensors that want gradients, and how many there are of each."""

    n_x: int
    has_bias: list[bool]
    has_residual: list[bool]
    has_norm: list[bool]
    ranks: list[int] | None
    has_rank_tensor: bool
    activations: list[str]
    scales: list[float]
    norm_eps: float
    backend: str | None

    @classmethod
    def of(cls, call: Call, backend: str | None) -> _Signature:
        ranks = call.ranks
        return cls(
            len(call.xs),
            [b is not None for b in call.biases],
            [call.residual(i) is not None for i in range(call.n)],
            [call.norm(i) is not None for i in range(call.n)],
            None
            if isinstance(ranks, Tensor)
            else [v.shape[0] if r is None else r for r, v in zip(ranks, call.vs, strict=True)],
            isinstance(ranks, Tensor),
            [a or "none" for a in call.activations],
            # Never empty: torch.library takes that for a list of tensors.
            list(call.scales) or [1.0] * call.n,
            call.norm_eps,
            backend,
        )

    def tensors(self, call: Call) -> list[Tensor]:
        """xs, us, vs, the biases, residuals and norms that exist, then the rank tensor if any."""
        ranks = [call.ranks] if isinstance(call.ranks, Tensor) else []
        return [t for t in call.tensors if t is not None] + ranks

    def split(self, tensors: Sequence[Any]) -> tuple[list[Any], ...]:
        """(xs, us, vs, biases, residuals, norms, the rest) of a flat sequence in this order."""
        n = len(self.has_bias)
        some = map(sum, (self.has_bias, self.has_residual, self.has_norm))
        numbers = (self.n_x, n, n, *some)
        cuts = itertools.accumulate(numbers, initial=0)
        *parts, rest = (list(tensors[a:b]) for a, b in itertools.pairwise((*cuts, len(tensors))))
        return *parts, rest

    def arguments(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """An op's arguments, of flat tensors as `tensors` gives them."""
        *parts, rest = self.split(tensors)
        ranks = rest[0] if self.has_rank_tensor else None
        has = self.has_bias, self.has_residual, self.has_norm
        others = self.activations, self.scales, self.norm_eps, self.backend
        return (*parts, *has, self.ranks, ranks, *others)


def _call_of(
    xs: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    biases: Sequence[Tensor],
    residuals: Sequence[Tensor],
    norms: Sequence[Tensor],
    has_bias: Sequence[bool],
    has_residual: Sequence[bool],
    has_norm: Sequence[bool],
    ranks: Sequence[int] | None,
    rank_tensor: Tensor | None,
    activations: Sequence[str],
    scales: Sequence[float],
    norm_eps: float,
    backend: str | None,
) -> Call:
    """The call that an op's arguments stand for."""
    given: Ranks = [None] * len(us) if ranks is None else ranks
    # A group of one may come with ranks (1,), which are none of a single layer.
    single = len(us) == 1 and (rank_tensor is None or rank_tensor.dim() == 0)
    return Call(
        "lod_linear" if single else "lod_linear_grouped",
        xs,
        us,
        vs,
        _fill(biases, has_bias),
        given if rank_tensor is None else rank_tensor,
        [None if a == "none" else a for a in activations],
        _fill(residuals, has_residual) if any(has_residual) else (),
        () if all(type(s) is float and s == 1.0 for s in scales) else scales,
        _fill(norms, has_norm) if any(has_norm) else (),
        norm_eps,
    )


def _fill(present: Sequence[Tensor], has: Sequence[bool]) -> list[Tensor | None]:
    """One entry per layer again."""
    entries = iter(present)
    return [next(entries) if there else None for there in has]


def _op_forward(*args: Any) -> list[Tensor]:
    return _planned(False, *args)[0]


def _planned(save_h: bool, *args: Any) -> tuple[list[Tensor], Sequence[Tensor | None]]:
    """(ys, hs) of an op that runs: whose gradient is an op of its own, so that forwards decide."""
    call = _call_of(*args)
    plan, done = plan_call(call, args[-1]), None
    if plan.rivals:
        plan, done = first_use.settle(plan, call, save_h)
    outputs = forward(plan, call, save_h)
    if done is not None:
        done()
    return outputs


def _op_train(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    ys, hs = _planned(True, *args)
    # The fake promises dense Hs; kernels may pad their rows.
    return ys, [h.contiguous() for h in hs if h is not None]


def _op_backward(
    dys: list[Tensor], hs: list[Tensor], ys: list[Tensor], needs: list[bool], *args: Any
) -> list[Tensor]:
    call = _call_of(*args)
    wanted = (needs[0], needs[1], needs[2], needs[3])
    kept = _fill(ys, [bool(ys) and a == "relu" for a in call.activations])
    with torch.no_grad():
        *grads, dzs, norms = backward(
            plan_call(call, args[-1]), call, dys, hs or [None] * call.n, kept, wanted
        )
        # Without an activation it is dy itself, which an op may not return.
        both = zip(dzs, call.activations, strict=False)
        dzs = [z.clone() if z is not None and a is None else z for z, a in both]
    parts = zip(_present(call, [*grads, dzs, norms]), needs, strict=True)
    flat = [g if need else None for part, need in parts for g in part]
    return [call.xs[0].new_empty(0) if g is None else g.contiguous() for g in flat]


def _present(call: Call, grads: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """[dxs, dus, dvs, dbiases, dresiduals, dnorms], of the last three those that exist only."""
    *parts, dbiases, dresiduals, dnorms = grads
    others = (dbiases, call.biases), (dresiduals, call.residuals), (dnorms, call.norms)
    for found, given in others:
        parts.append([g for g, t in zip(found, given, strict=True) if t is not None])
    return parts


def _fake_forward(*args: Any) -> list[Tensor]:
    call = _call_of(*args)
    return [call.x(i).new_empty((*call.x(i).shape[:-1], u.shape[0])) for i, u in enumerate(call.us)]


def _fake_train(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    call = _call_of(*args)
    hs = []
    for i, v in enumerate(call.vs):
        x, rank = call.x(i), None if isinstance(call.ranks, Tensor) else call.ranks[i]
        width = v.shape[0] if rank is None else rank
        hs.append(x.new_empty((math.prod(x.shape[:-1]), width)))
    return _fake_forward(*args), hs


def _fake_backward(
    dys: list[Tensor], hs: list[Tensor], ys: list[Tensor], needs: list[bool], *args: Any
) -> list[Tensor]:
    return [
        t.new_empty(tuple(t.shape) if need else (0,))
        for tensors, need in zip(args[:_KINDS], needs, strict=True)
        for t in tensors
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ys, hs = output if isinstance(output, tuple) else (output, [])
    call = _call_of(*inputs)
    signature = _Signature.of(call, inputs[-1])
    tensors = signature.tensors(call)
    _keep(ctx, signature, tensors, kept_outputs(call, ys) if hs else [], hs)
    ctx.wanted = [any(t.requires_grad for t in part) for part in signature.split(tensors)[:_KINDS]]
    ctx.numbers = [len(part) for part in inputs[:_KINDS]]


def _keep(
    ctx: Any,
    signature: _Signature,
    tensors: Sequence[Tensor],
    ys: Sequence[Tensor | None],
    hs: Sequence[Tensor],
) -> None:
    ys = [y for y in ys if y is not None]
    ctx.save_for_backward(*tensors, *ys, *hs)
    ctx.signature, ctx.cuts = signature, (len(tensors), len(tensors) + len(ys))


def _gradients(ctx: Any, dys: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[list[Any]]:
    """[dxs, dus, ..., dnorms] of what exists; None for all of a kind not wanted."""
    signature, (a, b) = ctx.signature, ctx.cuts
    saved = ctx.saved_tensors
    tensors, ys, hs = saved[:a], saved[a:b], saved[b:]
    arguments = signature.arguments(tensors)
    call = _call_of(*arguments)
    filled = [
        call.x(i).new_zeros((*call.x(i).shape[:-1], u.shape[0])) if dy is None else dy
        for i, (dy, u) in enumerate(zip(dys, call.us, strict=True))
    ]
    if torch.is_grad_enabled():
        plan = plan_call(call, "reference")
        nothing: list[None] = [None] * call.n
        needs = (wanted[0], wanted[1], wanted[2], wanted[3])
        return [
            list(g) for g in _present(call, backward(plan, call, filled, nothing, nothing, needs))
        ]
    flat = _ops.lod_linear_backward(filled, list(hs), list(ys), list(wanted), *arguments)
    *parts, _ = signature.split(flat)
    return [part if want else [None] * len(part) for part, want in zip(parts, wanted, strict=True)]


def _registered_backward(ctx: Any, dys: Any, dhs: Any = None) -> tuple[Any, ...]:
    both = zip(_gradients(ctx, dys, ctx.wanted), ctx.numbers, strict=True)
    parts = ([*part, *[None] * (number - len(part))] for part, number in both)
    return (*parts, *[None] * _NUM_CHOICES)


class _Transformed(torch.autograd.Function):
    """The same under functorch transforms, which differentiate no lists and want setup_context.

    (signature, *tensors) -> (*ys, *hs)
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(signature: _Signature, *tensors: Any) -> tuple[Tensor, ...]:
        ys, hs = _ops.lod_linear_train(*signature.arguments(tensors))
        return (*ys, *hs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        signature, *tensors = inputs
        ctx.n = len(signature.has_bias)
        ys, hs = output[: ctx.n], output[ctx.n :]
        relu = [y for y, a in zip(ys, signature.activations, strict=True) if a == "relu"]
        _keep(ctx, signature, tensors, relu, hs)
        ctx.mark_non_differentiable(*hs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[1:]
        wanted = [any(part) for part in ctx.signature.split(needs)[:_KINDS]]
        flat = [g for part in _gradients(ctx, dys[: ctx.n], wanted) for g in part]
        flat += [None] * ctx.signature.has_rank_tensor
        return (None, *(g if need else None for g, need in zip(flat, needs, strict=True)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(eager.forward_ad_message("lod_linear"))


def _vmap(op: Callable[..., Any]) -> Callable[..., Any]:
    """Batching rule: a batch of x is one more leading dimension; batched factors make a loop.

    So is a batch of residuals, which have the leading dimensions of x.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        x_dims, *factors, residual_dims, norm_dims = in_dims[:_KINDS]
        others = (*factors, norm_dims, *in_dims[_KINDS:])
        together = None not in (*x_dims, *residual_dims) and not any(map(_is_batched, others))
        if op is _ops.lod_linear and together:
            xs, residuals = (
                [t.movedim(dim, 0) for t, dim in zip(tensors, dims, strict=True)]
                for tensors, dims in ((args[0], x_dims), (args[4], residual_dims))
            )
            return op(xs, *args[1:4], residuals, *args[5:]), 0
        results = [op(*_of_batch(args, in_dims, i)) for i in range(info.batch_size)]
        return tree_map(lambda *entries: torch.stack(entries), *results), 0

    return rule


def _is_batched(dims: Any) -> bool:
    return any(d is not None for d in dims) if isinstance(dims, list | tuple) else dims is not None


def _of_batch(values: Any, dims: Any, i: int) -> Any:
    """Entry i of everything that is batched."""
    if isinstance(values, list | tuple):
        inner = dims if isinstance(dims, list | tuple) else [dims] * len(values)
        return [_of_batch(v, d, i) for v, d in zip(values, inner, strict=True)]
    return values if dims is None else values.select(dims, i)


def _autocast(op: Any, device_type: str) -> Callable[..., Any]:
    """Cast the tensors, then call the op again below the autocast key."""
    key = getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}")
    keys = torch._C.DispatchKeySet(key)

    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            dtype = torch.get_autocast_dtype(device_type)
            factors = ([eager.cast(t, dtype) for t in tensors] for tensors in args[:_KINDS])
            return op(*factors, *args[_KINDS:])

    return kernel


def _register(name: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    qualified, op = f"maestro_kernels::{name}", getattr(_ops, name)
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=library)
    torch.library.register_vmap(qualified, _vmap(op), lib=library)
    return op


for _name, _implementation, _fake in (
    ("lod_linear", _op_forward, _fake_forward),
    ("lod_linear_train", _op_train, _fake_train),
):
    _op = _register(_name, _implementation, _fake)
    torch.library.register_autograd(
        f"maestro_kernels::{_name}", _registered_backward, setup_context=_setup, lib=library
    )
    for _device in ("cpu", "cuda"):
        library.impl(_name, _autocast(_op, _device), f"Autocast{_device.upper()}")
_register("lod_linear_backward", _op_backward, _fake_backward)


def _sizes(xs: Any, us: Any, vs: Any, ranks: Any) -> Iterator[tuple[int, int, int, int]]:
    """(M, N, K, r) of each layer, of the shapes of an op's arguments."""
    for i, (u, v) in enumerate(zip(us, vs, strict=True)):
        M = math.prod(xs[0 if len(xs) == 1 else i][:-1])
        yield M, u[0], v[1], v[0] if ranks is None else ranks[i]


@flop_formula(_ops.lod_linear, _ops.lod_linear_train)
def _forward_flop(
    xs: Any, us: Any, vs: Any, biases: Any, residuals: Any, norms: Any, has_bias: Any,
    has_residual: Any, has_norm: Any, ranks: Any, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return sum(cost.forward_flop(*size) for size in _sizes(xs, us, vs, ranks))


@flop_formula(_ops.lod_linear_backward)
def _backward_flop(
    dys: Any, hs: Any, ys: Any, needs: Any, xs: Any, us: Any, vs: Any, biases: Any, residuals: Any,
    norms: Any, has_bias: Any, has_residual: Any, has_norm: Any, ranks: Any, *_: Any, **__: Any,
) -> int:  # fmt: skip
    dx, du, dv, *_ = needs
    return sum(cost.backward_flop(*s, dx=dx, du=du, dv=dv) for s in _sizes(xs, us, vs, ranks))
