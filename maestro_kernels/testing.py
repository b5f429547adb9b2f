"""Inputs and the one accuracy gate, shared by the tests and by every benchmark.

Nothing here is imported by the package's own computing paths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["accuracy_error", "assert_accurate", "make_inputs", "poison"]


def make_inputs(
    M: int | Sequence[int],
    N: int,
    K: int,
    R: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    bias: bool = True,
    seed: int = 0,
    requires_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Random (x, u, v, bias) of one layer, scaled so that y is of order one.

    Args:
        M: rows of x, or its leading dimensions; x is (*M, K).
        N: out_features; u is (N, R), bias is (N,).
        K: in_features; v is (R, K).
        R: max_rank.
        dtype: dtype of all tensors; values are rounded to it before they are returned.
        device: where they live.
        bias: False gives None in the last place.
        seed: seed of the CPU generator, so that every device sees the same numbers.
        requires_grad: whether the tensors are leaves that want gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    lead = (M,) if isinstance(M, int) else tuple(M)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        value = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return value.to(device=device, dtype=dtype).requires_grad_(requires_grad)

    x = draw(*lead, K)
    u = draw(N, R, scale=max(R, 1) ** -0.5)
    v = draw(R, K, scale=max(K, 1) ** -0.5)
    return x, u, v, (draw(N) if bias else None)


def accuracy_error(out: Tensor, torch_out: Tensor, ref64: Tensor) -> str | None:
    """Say how `out` breaks the derived tolerance, or None when it meets it.

    max|out - ref| <= 2 * max|torch_out - ref| + eps   * max|ref|
    RMS(out - ref) <= 2 * RMS(torch_out - ref) + eps/2 * RMS(ref)

    Args:
        out: the result under test.
        torch_out: two library matmuls in the same dtype on the same inputs.
        ref64: the formula in float64 on the same (already rounded) inputs.
    """
    if out.shape != ref64.shape:
        return f"shape: expected {tuple(ref64.shape)}, got {tuple(out.shape)}"
    if out.numel() == 0:
        return None
    if not bool(torch_out.isfinite().all()):
        return "the two-matmul result it is compared with is not finite"
    out64, torch64, ref64 = (t.detach().double().cpu() for t in (out, torch_out, ref64))
    eps = torch.finfo(out.dtype).eps
    for name, order, floor in (("max", float("inf"), eps), ("RMS", 2.0, eps / 2)):
        got = torch.linalg.vector_norm(out64 - ref64, order)
        bound = 2 * torch.linalg.vector_norm(torch64 - ref64, order)
        bound = bound + floor * torch.linalg.vector_norm(ref64, order)
        if not bool(got <= bound):  # also true for NaN
            return f"{name} error: expected <= {float(bound):.3e}, got {float(got):.3e}"
    return None


def assert_accurate(name: str, out: Tensor, torch_out: Tensor, ref64: Tensor) -> None:
    """Raise AssertionError unless `out` errs at most twice as much as PyTorch in the same dtype."""
    problem = accuracy_error(out, torch_out, ref64)
    if problem is not None:
        raise AssertionError(f"{name}: {problem}")


def poison(tensor: Tensor) -> Tensor:
    """Fill with NaN, or the smallest integer, so that an element never written shows."""
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(torch.iinfo(tensor.dtype).min)
