"""The public functions. Defaults live here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maestro_kernels.ops import linear as _linear

__all__ = ["lod_linear"]


def lod_linear(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    rank: int | Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
    save_h: bool = True,
) -> Tensor:
    """Compute y = act(x @ v[:r].T @ u[:, :r].T + bias), r = rank, in one call.

    Sums are kept in float32 or better; H = x @ v[:r].T is rounded to the dtype of x, exactly as two
    library matmuls would. Gradients of u[:, r:] and v[r:] are exactly zero. No factor is copied for
    a rank. One call is bitwise repeatable on the same device.

    Args:
        x: input (..., K), float16, bfloat16, float32 or float64.
        u: output factor (N, R), dtype and device of x.
        v: input factor (R, K), dtype and device of x.
        bias: (N,) or None.
        rank: active rank, 0 <= rank <= R; None means R. A 0-d int32 tensor on x's device is clamped
            to 0..R on the device and never read by the host, so that a captured CUDA graph or a
            compiled model follows it.
        activation: None, "relu", "gelu" (erf), "gelu_tanh" or "silu", applied after the bias.
        backend: None or "auto" chooses (see `explain`); "reference", "matmul", "triton" or "native"
            forces one.
        save_h: keep H, (M, r), for the backward; False computes it again there.

    Returns:
        Tensor (..., N), dtype of x. Rank 0 gives act(bias), or zeros.

    Raises:
        TypeError: an argument is no tensor or has the wrong dtype.
        ValueError: a shape, device, rank, activation or backend does not fit.
        NotImplementedError: the forced backend cannot serve this call, or forward-mode AD.

    Example:
        >>> import torch, maestro_kernels as mk
        >>> x, u, v = torch.randn(4, 64), torch.randn(96, 16), torch.randn(16, 64)
        >>> mk.lod_linear(x, u, v, rank=8, activation="relu").shape
        torch.Size([4, 96])

    Source:
        Horvath et al., Maestro: Uncovering Low-Rank Structures via Trainable Decomposition,
        ICML 2024 (arXiv 2308.14929).
    """
    return _linear.lod_linear(x, u, v, bias, rank, activation, backend, save_h)
