"""Training: forward and backward against plain torch, peak memory, and a step at sampled ranks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import maestro_kernels as mk
from bench.gpu import suite
from bench.gpu.device import Device
from bench.gpu.items import Item
from bench.gpu.plan import Stage
from bench.gpu.rows import measure, plain
from maestro_kernels.measure.timing import CpuClock, CudaClock, interleave
from maestro_kernels.testing import assert_accurate, make_inputs

__all__ = ["items"]

_SECONDS = 1.0


def items(device: Device, stage: Stage, family: str) -> Iterator[Item]:
    """Rows first, then what they do not say."""
    first, *others = suite.training()
    yield Item(first.id, partial(measure, device, first, plain))
    yield Item("sampled ranks", partial(_sampled, device))
    yield Item("peak memory", partial(_memory, device))
    for case in others:
        yield Item(case.id, partial(measure, device, case, plain))


def _layer(device: Device) -> tuple[Tensor, Tensor, Tensor]:
    sizes = device.sizes(4096, 4096, 4096, 2048)
    x, u, v, _ = make_inputs(
        *sizes, dtype=torch.bfloat16, device=device.name, bias=False, requires_grad=True
    )
    return x, u, v


def _straightforward(x: Tensor, u: Tensor, v: Tensor, rank: int) -> Tensor:
    """As the method's own code runs a rank: boolean masks, which copy both factors."""
    mask = torch.arange(u.shape[1], device=u.device) < rank
    return F.linear(F.linear(x, v[mask]), u[:, mask])


def _step(forward: Callable[..., Tensor], rank: int, x: Tensor, u: Tensor, v: Tensor) -> Any:
    y = forward(x, u, v, rank)
    return (y, *torch.autograd.grad(y, (x, u, v), torch.ones_like(y)))


def _ours(x: Tensor, u: Tensor, v: Tensor, rank: int) -> Tensor:
    return mk.lod_linear(x, u, v, rank=rank)


def _two(x: Tensor, u: Tensor, v: Tensor, rank: int) -> Tensor:
    return F.linear(F.linear(x, v[:rank]), u[:, :rank])


def _sampled(device: Device) -> dict[str, Any]:
    """A training step with a new rank each time, 1..R, as level-of-detail training draws them."""
    x, u, v = _layer(device)
    ranks = [random.Random(0).randint(1, u.shape[1]) for _ in range(8)]
    wide = [t.detach().double().requires_grad_() for t in (x, u, v)]
    for name, y, same, ref in zip(
        ("y", "dx", "du", "dv"),
        _step(_ours, ranks[0], x, u, v),
        _step(_two, ranks[0], x, u, v),
        _step(_two, ranks[0], *wide),
        strict=True,
    ):
        assert_accurate(name, device.output(y), same, ref)

    def steps(forward: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            for rank in ranks:
                _step(forward, rank, x, u, v)

        return run

    candidates = {"ours": _ours, "two matmuls": _two, "straightforward": _straightforward}
    stats = interleave(
        {name: steps(forward) for name, forward in candidates.items()},
        seconds=0.02 if device.is_stub else _SECONDS,
        clock=CpuClock() if device.is_stub else CudaClock(),
    )
    return {"us": {name: s.p50 * 1e6 / len(ranks) for name, s in stats.items()}, "ranks": ranks}


def _memory(device: Device) -> dict[str, Any]:
    """Bytes that a step needs beyond its inputs."""
    x, u, v = _layer(device)
    rank = u.shape[1] // 8
    peaks = {}
    for name, forward in {"ours": _ours, "two matmuls": _two}.items():
        _step(forward, rank, x, u, v)
        peaks[name] = device.peak_bytes(partial(_step, forward, rank, x, u, v))
    return {"bytes": peaks}
