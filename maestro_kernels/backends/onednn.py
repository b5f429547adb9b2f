"""oneDNN linears on CPU weights that were reordered once: the one place that calls its ops.

Which dtypes it takes depends on the CPU and on ONEDNN_MAX_CPU_ISA, and it raises for the others.
Taking one says nothing about speed: on AVX-512 without BF16 instructions, bfloat16 is emulated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

# Looked up once: a linear on a small layer takes a few microseconds.
_linear = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)


def unsupported(dtype: torch.dtype) -> str | None:
    """Why weights of a dtype cannot be reordered here and now, or None where they can.

    Args:
        dtype: of weight and x.
    """
    if not torch.backends.mkldnn.enabled:
        return "oneDNN is switched off: torch.backends.mkldnn.enabled is False"
    return _lacking(dtype)


@functools.cache
def _lacking(dtype: torch.dtype) -> str | None:
    """What this machine lacks."""
    if not torch.backends.mkldnn.is_available() or _linear is None:
        return "this torch is built without oneDNN"
    # Both ask oneDNN, not the CPU, and are what the reordering itself asks before it raises.
    takes: dict[torch.dtype, Callable[[], bool]] = {
        torch.float32: lambda: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    name = str(dtype).removeprefix("torch.")
    if dtype not in takes:
        return f"oneDNN linears serve float32, bfloat16 and float16, not {name}"
    return None if takes[dtype]() else f"oneDNN has no {name} linear on this CPU"


def reorder(weight: Tensor, rows: int) -> Tensor:
    """Copy a weight (N, K) into the layout that oneDNN prefers for x of `rows` rows.

    Args:
        weight: a CPU tensor with N, K > 0.
        rows: M to lay out for; other M compute the same values.

    Raises:
        NotImplementedError: `unsupported` has a reason for its dtype.
        ValueError: another device than the CPU, or an empty weight.
    """
    reason = unsupported(weight.dtype)
    if reason is not None:
        raise NotImplementedError(f"reorder: weight: expected a dtype oneDNN takes: {reason}")
    if weight.device.type != "cpu":
        raise ValueError(f"reorder: weight: expected a CPU tensor, got {weight.device}")
    if 0 in weight.shape:
        raise ValueError(f"reorder: weight: expected N, K > 0, got {tuple(weight.shape)}")
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, post: str = "none") -> Tensor:
    """Compute y = post(x @ w.T + bias) for a w that `reorder` packed; y (M, N) for x (M, K).

    Args:
        x: plain tensor (..., K) in the dtype of w.
        packed: result of `reorder`.
        bias: (N,) or None.
        post: "none" or "relu".
    """
    y: Tensor = _linear(x, packed, bias, post, [], "")  # type: ignore[misc]
    return y
