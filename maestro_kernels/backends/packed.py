"""Forms of a layer with weights packed once for CPU inference, and which of them is fastest.

Every form computes act(x @ v[:r].T @ u[:, :r].T + bias) for x (M, K): the native kernel on packed
factors, two oneDNN linears on reordered factors, or one on the merged matrix. Which one wins
depends on M, so it is measured per bucket of M, once for all layers of one size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from maestro_kernels.backends import native, onednn
from maestro_kernels.measure import timing
from maestro_kernels.measure.cost import break_even_rank

Form = Callable[[Tensor, Tensor | None], Tensor]
FORMS = ("fused", "two oneDNN linears", "merged dense", "unpacked")

# M that oneDNN lays weights out for. The layouts for 1 to 1024 rows ran every M alike, within noise
# (docs/dev/performance-log.md), so one copy serves them all.
_ROWS = 256

# In place on the result. oneDNN's own are left alone: its relu makes a NaN zero, its tanh and its
# logistic function err several times as much as torch's in float32.
_ACTIVATIONS: dict[str | None, Callable[[Tensor], object]] = {
    "relu": torch.ops.aten.relu_.default,
    "gelu": torch.ops.aten.gelu_.default,
    "gelu_tanh": partial(torch.ops.aten.gelu_.default, approximate="tanh"),
    "silu": torch.ops.aten.silu_.default,
}


def can_make(name: str, u: Tensor, v: Tensor, rank: int) -> bool:
    """Whether `make_form` can pack these factors in a form; "unpacked" has nothing to pack."""
    if name == "fused":
        return native.load_error() is None and _packable(u, v)
    return (
        name in FORMS[1:3]
        and rank > 0
        and onednn.unsupported(u.dtype) is None
        and 0 not in (*u.shape, *v.shape)
    )


def may_merge(N: int, K: int, rank: int) -> bool:
    """Whether the merged matrix is worth its memory: below half of break-even it is not."""
    return 2 * rank >= break_even_rank(N, K)


def make_form(name: str, u: Tensor, v: Tensor, rank: int, activation: str | None) -> Form:
    """Pack the factors for one of FORMS that `can_make` takes.

    Args:
        name: one of FORMS but "unpacked".
        u: output factor (N, R).
        v: input factor (R, K).
        rank: active rank.
        activation: applied after the bias.
    """
    u, v = u.detach(), v.detach()
    if name == "fused":
        return partial(native.raw("packed_linear"), native.pack([u], [v], [rank], [activation]))
    if name == "merged dense":
        # Rounded once: the layer it stands for rounds H, and may err no less.
        merged = (u[:, :rank].double() @ v[:rank].double()).to(u.dtype)
        return _onednn([merged], activation)
    return _onednn([v[:rank], u[:, :rank]], activation)


def with_residual(
    fused: Form, x: Tensor, bias: Tensor | None, residual: Tensor | None, scale: float
) -> Tensor:
    """What the form "fused" computes, with H multiplied by `scale` and `residual` added."""
    made: Tensor = fused.args[0]  # type: ignore[attr-defined]
    residual = None if residual is None else residual.contiguous()
    y: Tensor = native.raw("packed_residual")(made, x.contiguous(), bias, residual, scale)
    return y


def _packable(u: Tensor, v: Tensor) -> bool:
    return (
        u.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and 0 not in (*u.shape, *v.shape)
        and u.stride(1) in (1, u.shape[1])
        and v.stride(1) in (1, v.shape[1])
    )


def _onednn(weights: Sequence[Tensor], activation: str | None) -> Form:
    """One or two oneDNN linears; the bias and the activation belong to the last."""
    *first, last = [onednn.reorder(w, _ROWS) for w in weights]
    act = _ACTIVATIONS.get(activation)

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        for weight in first:
            x = onednn.linear(x, weight, None)
        y = onednn.linear(x, last, bias)
        if act is not None:
            act(y)
        return y

    return run


def make_group_form(
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    ranks: Sequence[int],
    activations: Sequence[str | None],
) -> Callable[[Tensor, Sequence[Tensor | None]], list[Tensor]]:
    """Layers of one x in one parallel region; `can_make` takes each of them "fused"."""
    return partial(native.raw("packed_grouped"), native.pack(us, vs, ranks, activations))


_MAX_REMEMBERED = 4096
_fastest: dict[Any, str] = {}
_measuring = threading.Lock()


def fastest(
    key: Any, candidates: Mapping[str, Callable[[], object]], *, wait: bool = False
) -> str | None:
    """Name of the fastest candidate by a short interleaved measurement, remembered under `key`.

    Args:
        key: what the answer holds for, beside the number of threads.
        candidates: name -> call.
        wait: for a measurement that another thread makes; else the answer is None meanwhile, since
            two at a time would measure each other.
    """
    key = (key, torch.get_num_threads())
    name = _fastest.get(key)
    if name in candidates:
        return name
    if not _measuring.acquire(blocking=wait):
        return None
    try:
        name = _fastest.get(key)
        if name not in candidates:
            with torch.no_grad():
                stats = timing.interleave(
                    candidates, seconds=0.06, sample_seconds=4e-4, min_rounds=7
                )
            name = min(stats, key=lambda n: stats[n].p50)
            if len(_fastest) >= _MAX_REMEMBERED:
                _fastest.clear()
            _fastest[key] = name
    finally:
        _measuring.release()
    return name
