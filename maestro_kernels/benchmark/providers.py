"""What is compared: dense, two matmuls, both compiled, both on oneDNN-packed weights, and ours.

A provider that cannot run a case says why and is still reported; timing and judging are done in
run.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import maestro_kernels as mk
from maestro_kernels import dispatch, plans, problem
from maestro_kernels.backends import native, onednn
from maestro_kernels.measure.cases import Case
from maestro_kernels.measure.providers import (
    DENSE,
    DENSE_ONEDNN,
    TWO,
    Forward,
    Inputs,
    Provider,
    Unavailable,
    dense_forward,
    packed_weight,
    two_forward,
)
from maestro_kernels.nn.grouping import LayerGroup
from maestro_kernels.tables import Mode


def _bind_dense_compiled(case: Case, ring: Sequence[Inputs]) -> list[Forward]:
    compiled = torch.compile(dense_forward, dynamic=False)
    return [partial(compiled, i.x, i.dense, i.biases) for i in ring]


def _bind_two_compiled(case: Case, ring: Sequence[Inputs]) -> list[Forward]:
    compiled = torch.compile(two_forward, dynamic=False)
    return [partial(compiled, i.x, i.us, i.vs, i.biases, i.ranks) for i in ring]


def _bind_two_onednn(case: Case, ring: Sequence[Inputs]) -> list[Forward]:
    if 0 in (layer.rank for layer in case.layers):
        raise Unavailable("oneDNN does not pack an empty weight")

    def forward(x: Tensor, packed: Sequence[Any], biases: Sequence[Any]) -> list[Tensor]:
        pairs = zip(packed, biases, strict=True)
        return [onednn.linear(onednn.linear(x, v, None), u, b) for (u, v), b in pairs]

    packs = [
        [
            (packed_weight(u[:, :r], case.M), packed_weight(v[:r], case.M))
            for u, v, r in zip(i.us, i.vs, i.ranks, strict=True)
        ]
        for i in ring
    ]
    return [partial(forward, i.x, p, i.biases) for i, p in zip(ring, packs, strict=True)]


def _plan(inputs: Inputs, backend: str | None, *, fn: str) -> plans.Plan:
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
        DENSE,
        Provider("dense, compiled", "dense", _bind_dense_compiled),
        DENSE_ONEDNN,
        TWO,
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
