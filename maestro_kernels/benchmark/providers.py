"""What is compared: dense, two matmuls, both compiled, both on oneDNN-packed weights, and ours.

A provider turns one set of inputs into a call. One that cannot run a case says why and is still
reported; timing and judging are done in run.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import maestro_kernels as mk
from maestro_kernels import dispatch, problem
from maestro_kernels.backends import native, onednn
from maestro_kernels.benchmark.cases import Case
from maestro_kernels.nn.grouping import LayerGroup
from maestro_kernels.tables import Mode
from maestro_kernels.testing import make_inputs

__all__ = ["Bound", "Inputs", "Provider", "Unavailable", "default_providers", "make_case_inputs"]

Family = Literal["dense", "two matmuls", "ours"]
Forward = Callable[[], Sequence[Tensor]]


class Unavailable(RuntimeError):
    """A provider cannot run a case; the message is the reason that goes into its row."""


@dataclass(frozen=True)
class Inputs:
    """One set of arguments of a case: x (M, K), per layer u (N, R), v (R, K), W (N, K), bias, dy.

    `dense` is u[:, :r] @ v[:r] rounded to the dtype: the layer that the factors replace.
    """

    x: Tensor
    us: tuple[Tensor, ...]
    vs: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    dys: tuple[Tensor, ...]
    ranks: tuple[int, ...]
    dense: tuple[Tensor, ...] = ()

    def copy(self) -> Inputs:
        """The same values at other addresses; strides and requires_grad are kept."""

        def copies(tensors: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(None if t is None else _clone(t) for t in tensors)

        return replace(
            self,
            x=_clone(self.x),
            us=copies(self.us),
            vs=copies(self.vs),
            biases=copies(self.biases),
            dys=copies(self.dys),
            dense=copies(self.dense),
        )

    def bytes(self, family: Family) -> int:
        """Bytes that one call of a family reads."""
        weights = self.dense if family == "dense" else (*self.us, *self.vs)
        return sum(t.numel() * t.element_size() for t in (self.x, *weights))


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def make_case_inputs(case: Case, device: torch.device | str, seed: int = 0) -> Inputs:
    """Fresh random arguments of a case; in training mode they want gradients."""
    dtype, wants = case.torch_dtype, case.mode == "training"
    made = [
        make_inputs(
            case.M, s.N, s.K, s.R, dtype=dtype, device=device, bias=case.bias, seed=seed + i
        )
        for i, s in enumerate(case.layers)
    ]
    dense = [
        (u[:, : s.rank].float() @ v[: s.rank].float()).to(dtype)
        for (_, u, v, _), s in zip(made, case.layers, strict=True)
    ]
    dys = [
        make_inputs(case.M, 1, s.N, 1, dtype=dtype, device=device, seed=seed + 101 + i)[0]
        for i, s in enumerate(case.layers)
    ]

    def leaf(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.detach().requires_grad_(wants)

    return Inputs(
        x=leaf(made[0][0]),
        us=tuple(leaf(u) for _, u, _, _ in made),
        vs=tuple(leaf(v) for _, _, v, _ in made),
        biases=tuple(leaf(b) for _, _, _, b in made),
        dys=tuple(dys) if wants else (),
        ranks=tuple(s.rank for s in case.layers),
        dense=tuple(leaf(w) for w in dense),
    )


@dataclass(frozen=True)
class Bound:
    """A provider on one set of inputs: calling it gives outputs, then gradients in training."""

    forward: Forward
    leaves: tuple[Tensor, ...] = ()
    dys: tuple[Tensor, ...] = ()

    def __call__(self) -> tuple[Tensor, ...]:
        """Outputs of the layers; in training followed by gradients of x and of every weight.

        The caller sets the gradient mode: entering it here would be timed with a small layer.
        """
        ys = self.forward()
        return (*ys, *torch.autograd.grad(ys, self.leaves, self.dys)) if self.dys else tuple(ys)


# Binds a list of inputs at once, because what is compiled is compiled once for all of them.
Bind = Callable[[Case, Sequence[Inputs]], list[Forward]]


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        name: how rows and plots call it.
        family: "dense" is another function with other bytes; "two matmuls" is what ours must beat.
        bind: inputs -> one forward per set of inputs; may raise Unavailable.
        trains: whether gradients flow through it.
        config: the plan text for a case, for rows; empty where there is nothing to choose.
    """

    name: str
    family: Family
    bind: Bind = field(repr=False)
    trains: bool = True
    config: Callable[[Case, Inputs], str] = field(default=lambda case, inputs: "", repr=False)

    def bound(self, case: Case, ring: Sequence[Inputs]) -> list[Bound]:
        """One call per set of inputs.

        Raises:
            Unavailable: with the reason.
        """
        if case.mode == "training" and not self.trains:
            raise Unavailable("packed weights have no gradient")
        forwards = self.bind(case, ring)
        if case.mode == "forward":
            return [Bound(forward) for forward in forwards]
        pairs = zip(forwards, ring, strict=True)
        return [Bound(forward, self.leaves(i), i.dys) for forward, i in pairs]

    def leaves(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """What gradients are taken of, x first."""
        weights = inputs.dense if self.family == "dense" else (*inputs.us, *inputs.vs)
        return (inputs.x, *weights, *(b for b in inputs.biases if b is not None))


def dense_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """Compute y = x @ W.T + bias, one F.linear per layer."""
    return [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]


def two_forward(
    x: Tensor,
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    ranks: Sequence[int],
) -> list[Tensor]:
    """Compute y = x @ v[:r].T @ u[:, :r].T + bias, two F.linear per layer on prefix views."""
    layers = zip(us, vs, biases, ranks, strict=True)
    return [F.linear(F.linear(x, v[:r]), u[:, :r], b) for u, v, b, r in layers]


def _bind_dense(case: Case, ring: Sequence[Inputs]) -> list[Forward]:
    return [partial(dense_forward, i.x, i.dense, i.biases) for i in ring]


def _bind_two(case: Case, ring: Sequence[Inputs]) -> list[Forward]:
    return [partial(two_forward, i.x, i.us, i.vs, i.biases, i.ranks) for i in ring]


def _bind_dense_compiled(case: Case, ring: Sequence[Inputs]) -> list[Forward]:
    compiled = torch.compile(dense_forward, dynamic=False)
    return [partial(compiled, i.x, i.dense, i.biases) for i in ring]


def _bind_two_compiled(case: Case, ring: Sequence[Inputs]) -> list[Forward]:
    compiled = torch.compile(two_forward, dynamic=False)
    return [partial(compiled, i.x, i.us, i.vs, i.biases, i.ranks) for i in ring]


def _pack(weight: Tensor, M: int) -> Tensor:
    """Reorder a weight once into the layout oneDNN prefers for M rows."""
    if weight.device.type != "cpu":
        raise Unavailable("oneDNN serves CPU tensors")
    reason = onednn.unsupported(weight.dtype)
    if reason is not None:
        raise Unavailable(reason)
    return onednn.reorder(weight, M)


def _bind_dense_onednn(case: Case, ring: Sequence[Inputs]) -> list[Forward]:
    def forward(x: Tensor, packed: Sequence[Tensor], biases: Sequence[Any]) -> list[Tensor]:
        return [onednn.linear(x, w, b) for w, b in zip(packed, biases, strict=True)]

    packs = [[_pack(w, case.M) for w in i.dense] for i in ring]
    return [partial(forward, i.x, p, i.biases) for i, p in zip(ring, packs, strict=True)]


def _bind_two_onednn(case: Case, ring: Sequence[Inputs]) -> list[Forward]:
    if 0 in (layer.rank for layer in case.layers):
        raise Unavailable("oneDNN does not pack an empty weight")

    def forward(x: Tensor, packed: Sequence[Any], biases: Sequence[Any]) -> list[Tensor]:
        pairs = zip(packed, biases, strict=True)
        return [onednn.linear(onednn.linear(x, v, None), u, b) for (u, v), b in pairs]

    packs = [
        [
            (_pack(u[:, :r], case.M), _pack(v[:r], case.M))
            for u, v, r in zip(i.us, i.vs, i.ranks, strict=True)
        ]
        for i in ring
    ]
    return [partial(forward, i.x, p, i.biases) for i, p in zip(ring, packs, strict=True)]


def _plan(inputs: Inputs, backend: str | None, *, fn: str) -> dispatch.Plan:
    layers = zip(inputs.us, inputs.vs, inputs.biases, inputs.ranks, strict=True)
    problems = [problem.describe(inputs.x, u, v, b, r, None) for u, v, b, r in layers]
    mode = Mode(training=inputs.x.requires_grad)
    return dispatch.select(problems, backend, fn=fn, mode=mode)


def _ours(name: str, backend: str | None, *, grouped: bool) -> Provider:
    fn = "lod_linear_grouped" if grouped else "lod_linear"

    def forward(i: Inputs, backend: str | None = backend) -> list[Tensor]:
        if grouped:
            return list(
                mk.lod_linear_grouped(i.x, i.us, i.vs, i.biases, ranks=i.ranks, backend=backend)
            )
        layers = zip(i.us, i.vs, i.biases, i.ranks, strict=True)
        return [mk.lod_linear(i.x, u, v, b, rank=r, backend=backend) for u, v, b, r in layers]

    def bind(case: Case, ring: Sequence[Inputs]) -> list[Forward]:
        if backend == "triton" and ring[0].x.device.type == "cpu":
            # TRITON_INTERPRET=1 would serve it, a thousand times slower than any kernel.
            raise Unavailable("triton kernels need a CUDA device; the interpreter is not timed")
        try:
            plan = _plan(ring[0], backend, fn=fn)
        except NotImplementedError as error:
            # The message names the call and the argument first; the row knows both already.
            raise Unavailable(str(error).partition(f"{backend!r}: ")[2] or str(error)) from error
        if backend is not None:
            forward(ring[0], None)  # auto measures a kind of call when it meets one
            auto = _plan(ring[0], None, fn=fn)
            if (plan.backend, plan.strategy) == (auto.backend, auto.strategy):
                raise Unavailable("this is what auto runs")
        return [partial(forward, i) for i in ring]

    def config(case: Case, inputs: Inputs) -> str:
        plan = _plan(inputs, backend, fn=fn)
        return f"{plan.backend}: {plan.strategy}"

    return Provider(name, "ours", bind, config=config)


def _prepacked(name: str, form: str | None) -> Provider:
    """Layers after `prepack`, called as a model calls them; their siblings share one call."""

    def module(inputs: Inputs) -> list[mk.LoDLinear]:
        made = []
        for u, v, b, r in zip(inputs.us, inputs.vs, inputs.biases, inputs.ranks, strict=True):
            layer = mk.LoDLinear.from_factors(u, v, b)
            layer.rank = r
            made.append(layer)
        if len(made) > 1:
            members = LayerGroup(made)
            for layer in made:
                layer.group = members
        mk.prepack(torch.nn.ModuleList(made).eval().requires_grad_(False), form=form)
        return made

    def bind(case: Case, ring: Sequence[Inputs]) -> list[Forward]:
        if ring[0].x.device.type != "cpu":
            raise Unavailable("weights are packed for CPU kernels only")
        reason = native.load_error() if form == "fused" else None
        if reason is not None:
            raise Unavailable(reason)
        # Each layer once outside the timed region: the first call packs, and chooses a form.
        forwards = [partial(_call_all, module(i), i.x) for i in ring]
        for forward in forwards:
            forward()
        return list(forwards)

    def config(case: Case, inputs: Inputs) -> str:
        layers = module(inputs)
        _call_all(layers, inputs.x)
        packed = (layers[0].group or layers[0]).packed
        return f"prepacked: {(packed and packed.choice(case.M)) or 'unpacked'}"

    return Provider(name, "ours", bind, trains=False, config=config)


def _call_all(layers: Sequence[mk.LoDLinear], x: Tensor) -> list[Tensor]:
    # Not layer(x): the other providers are functions, and pay for no nn.Module around the call.
    return [layer.forward(x) for layer in layers]


# The reference is the yardstick of the accuracy gate and no candidate.
_FORCED = tuple(name for name in problem.BACKENDS if name not in (None, "auto", "reference"))


def default_providers(case: Case) -> list[Provider]:
    """Every provider that is compared on a case, those that cannot run included.

    For a group, "ours" is the grouped call and "ours, ungrouped" one call per layer.
    """
    grouped = len(case.layers) > 1
    providers = [
        Provider("dense", "dense", _bind_dense),
        Provider("dense, compiled", "dense", _bind_dense_compiled),
        Provider("dense, oneDNN packed", "dense", _bind_dense_onednn, trains=False),
        Provider("two matmuls", "two matmuls", _bind_two),
        Provider("two matmuls, compiled", "two matmuls", _bind_two_compiled),
        Provider("two matmuls, oneDNN packed", "two matmuls", _bind_two_onednn, trains=False),
        _ours("ours", None, grouped=grouped),
    ]
    if grouped:
        providers.append(_ours("ours, ungrouped", None, grouped=False))
    providers += [_ours(f"ours, {name}", name, grouped=grouped) for name in _FORCED]
    return [
        *providers,
        _prepacked("ours, prepacked", None),
        _prepacked("ours, prepacked fused", "fused"),
    ]
