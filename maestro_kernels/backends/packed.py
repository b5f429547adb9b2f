"""Forms of a layer with weights packed once for CPU inference, and which of them is fastest.

Every form computes act(x @ v[:r].T @ u[:, :r].T + bias) for x (M, K): the native kernel on packed
factors, two oneDNN linears on reordered factors, or one on the merged matrix. Which one wins
depends on M, so it is measured per M, once for all layers of one size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from maestro_kernels.backends import native, onednn

__all__ = ["FORMS", "Form", "fastest", "make_form", "make_group_form"]

Form = Callable[[Tensor, Tensor | None], Tensor]
FORMS = ("fused", "two oneDNN linears", "merged dense", "unpacked")

# In place on the result. oneDNN's own are left alone but for relu: its tanh and its logistic
# function err several times as much as torch's in float32.
_ACTIVATIONS: dict[str | None, Callable[[Tensor], object]] = {
    "gelu": torch.ops.aten.gelu_.default,
    "gelu_tanh": partial(torch.ops.aten.gelu_.default, approximate="tanh"),
    "silu": torch.ops.aten.silu_.default,
}


def make_form(
    name: str, u: Tensor, v: Tensor, rank: int, activation: str | None, rows: int
) -> Form | None:
    """Pack the factors for one of FORMS, or None where it cannot serve them.

    Args:
        name: one of FORMS; "unpacked" has nothing to pack and gives None.
        u: output factor (N, R).
        v: input factor (R, K).
        rank: active rank.
        activation: applied after the bias.
        rows: M that oneDNN should lay its weights out for.
    """
    u, v = u.detach(), v.detach()
    if name == "fused":
        return _fused(u, v, rank, activation)
    if not (name in FORMS[1:3] and rank and onednn.unsupported(u.dtype) is None):
        return None
    if name == "merged dense":
        # Rounded once: the layer it stands for rounds H, and may err no less.
        merged = (u[:, :rank].double() @ v[:rank].double()).to(u.dtype)
        return _onednn([merged], activation, rows)
    return _onednn([v[:rank], u[:, :rank]], activation, rows)


def _fused(u: Tensor, v: Tensor, rank: int, activation: str | None) -> Form | None:
    if native.load_error() is not None or not _packable(u, v):
        return None
    return partial(native.raw("packed_linear"), native.pack([u], [v], [rank], [activation]))


def _packable(u: Tensor, v: Tensor) -> bool:
    return (
        u.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and 0 not in (*u.shape, *v.shape)
        and u.stride(1) in (1, u.shape[1])
        and v.stride(1) in (1, v.shape[1])
    )


def _onednn(weights: Sequence[Tensor], activation: str | None, rows: int) -> Form:
    """One or two oneDNN linears; the bias and the activation belong to the last."""
    *first, last = [onednn.reorder(w, rows) for w in weights]
    post = "relu" if activation == "relu" else "none"
    act = _ACTIVATIONS.get(activation)

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        for weight in first:
            x = onednn.linear(x, weight, None)
        y = onednn.linear(x, last, bias, post)
        if act is not None:
            act(y)
        return y

    return run


def make_group_form(
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    ranks: Sequence[int],
    activations: Sequence[str | None],
) -> Callable[[Tensor, Sequence[Tensor | None]], list[Tensor]] | None:
    """Layers that read one x in one parallel region on packed factors, or None where it cannot."""
    if native.load_error() is not None:
        return None
    if not all(_packable(u, v) for u, v in zip(us, vs, strict=True)):
        return None
    return partial(native.raw("packed_grouped"), native.pack(us, vs, ranks, activations))


_fastest: dict[Any, str] = {}


def fastest(key: Any, candidates: Mapping[str, Callable[[], object]]) -> str:
    """Name of the fastest candidate by a short interleaved measurement, remembered under `key`."""
    key = (key, torch.get_num_threads())
    name = _fastest.get(key)
    if name is None or name not in candidates:
        from maestro_kernels.benchmark.timing import interleave

        with torch.no_grad():
            stats = interleave(candidates, seconds=0.06, sample_seconds=4e-4, min_rounds=7)
        name = min(stats, key=lambda n: stats[n].p50)
        _fastest[key] = name
    return name
