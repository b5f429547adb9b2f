"""Inputs and the one accuracy gate, shared by the tests and by every benchmark.

Nothing here is imported by the package's own computing paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maestro_kernels.backends import reference

__all__ = ["accuracy_error", "assert_accurate", "make_inputs", "poison", "rounding_errors"]


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
        device: where they live. A CUDA device draws them itself: a host takes seconds for large
            ones.
        bias: False gives None in the last place.
        seed: of the generator; numbers of a CPU and of a CUDA device differ.
        requires_grad: whether the tensors are leaves that want gradients.
    """
    place = torch.device(device)
    source = place if place.type == "cuda" else torch.device("cpu")
    generator = torch.Generator(source).manual_seed(seed)
    lead = (M,) if isinstance(M, int) else tuple(M)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        value = torch.randn(*shape, generator=generator, dtype=torch.float64, device=source) * scale
        return value.to(device=place, dtype=dtype).requires_grad_(requires_grad)

    x = draw(*lead, K)
    u = draw(N, R, scale=max(R, 1) ** -0.5)
    v = draw(R, K, scale=max(K, 1) ** -0.5)
    return x, u, v, (draw(N) if bias else None)


def accuracy_error(
    out: Tensor,
    torch_out: Tensor,
    ref64: Tensor,
    rounding: Tensor | Callable[[], Tensor] | None = None,
) -> str | None:
    """Say how `out` breaks the derived tolerance, or None when it meets it.

    max|out - ref| <= max(2 * max|torch_out - ref|, max(rounding)) + eps   * max|ref|
    RMS(out - ref) <= max(2 * RMS(torch_out - ref), RMS(rounding)) + eps/2 * RMS(ref)

    Args:
        out: the result under test.
        torch_out: two library matmuls in the same dtype on the same inputs.
        ref64: the formula in float64 on the same (already rounded) inputs.
        rounding: what `rounding_errors` says of this result. Without it the library's matmuls are
            the only measure; where a result rests on a few rounded scalars, they may be lucky. A
            function is only asked where they are not enough, since it costs several products.
    """
    if callable(rounding):
        if accuracy_error(out, torch_out, ref64) is None:
            return None
        rounding = rounding()
    if out.shape != ref64.shape:
        return f"shape: expected {tuple(ref64.shape)}, got {tuple(out.shape)}"
    if out.numel() == 0:
        return None
    if not bool(torch_out.isfinite().all()):
        return "the two-matmul result it is compared with is not finite"
    # Where the result lies: a host takes seconds for what a GPU judges in none.
    place = out.device
    out64, torch64, ref64 = (t.detach().double().to(place) for t in (out, torch_out, ref64))
    eps = torch.finfo(out.dtype).eps
    for name, order, floor in (("max", float("inf"), eps), ("RMS", 2.0, eps / 2)):
        got = torch.linalg.vector_norm(out64 - ref64, order)
        bound = 2 * torch.linalg.vector_norm(torch64 - ref64, order)
        if rounding is not None:
            bound = bound.maximum(torch.linalg.vector_norm(rounding.double().to(place), order))
        bound = bound + floor * torch.linalg.vector_norm(ref64, order)
        if not bool(got <= bound):  # also true for NaN
            return f"{name} error: expected <= {float(bound):.3e}, got {float(got):.3e}"
    return None


def assert_accurate(
    name: str,
    out: Tensor,
    torch_out: Tensor,
    ref64: Tensor,
    rounding: Tensor | Callable[[], Tensor] | None = None,
) -> None:
    """Raise AssertionError unless `out` meets the tolerance of `accuracy_error`."""
    problem = accuracy_error(out, torch_out, ref64, rounding)
    if problem is not None:
        raise AssertionError(f"{name}: {problem}")


def rounding_errors(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    rank: int | None = None,
    activation: str | None = None,
    bias: Tensor | None = None,
    dy: Tensor | None = None,
) -> dict[str, Tensor]:
    """Error that rounding may leave in each element of y, H and the gradients, in float64.

    With a, b the factors of a product, da, db their errors, e and w half an eps of the dtype and of
    float32, in which sums are kept,

        error(a @ b)^2 = da^2 @ b^2 + a^2 @ db^2 + (2 w |a| @ |b|)^2
        error(rounded c) = error(c) + e |c|

    H, dz and dH are rounded, y and the gradients too, but that is the last term of the tolerance.
    Errors of different elements are independent, so that their squares add up. The constant: the
    partial sums of K terms of random sign and size s grow like s sqrt(j), their rounding errors
    w s sqrt(j / 3) add up to w s K / sqrt(6), and sum |a b| is about 0.64 s K. A sum in one chain
    thus errs by 0.64 w |a| @ |b|, whatever K; 2 is three times that, since it is one draw.

    Args:
        x: (M, K).
        u: (N, R).
        v: (R, K).
        rank: active rank; None is R.
        activation: its derivative is at most 1.13, the second at most 0.8.
        bias: (N,) or None.
        dy: gradient of y (M, N); None leaves out the gradients.

    Returns:
        "y", "h" (M, r), and with dy also "dx", "du", "dv" and "dbias".
    """
    R = u.shape[1]
    r = R if rank is None else rank
    e = torch.finfo(x.dtype).eps / 2
    w = min(e, torch.finfo(torch.float32).eps / 2)
    x, u, v = (t.detach().double() for t in (x, u[:, :r], v[:r]))

    def product(a: Tensor, da: Tensor | None, b: Tensor, db: Tensor | None = None) -> Tensor:
        square = (2 * w * (a.abs() @ b.abs())).square()
        if da is not None:
            square = square + da.square() @ b.square()
        if db is not None:
            square = square + a.square() @ db.square()
        return square.sqrt()

    h = x @ v.mT
    h_error = product(x, None, v.mT) + e * h.abs()
    z_error = product(h, h_error, u.mT)
    errors = {"y": z_error * (1.0 if activation is None else 1.13), "h": h_error}
    if dy is None:
        return errors
    dz = dy.detach().double()
    dz_error = None
    if activation is not None:
        z = h @ u.mT + (0 if bias is None else bias.detach().double())
        dz_error = 0.8 * z_error * dz.abs() + e * dz.abs()
        dz = reference.activation_backward(dz, z, activation)
    dh = dz @ u
    dh_error = product(dz, dz_error, u) + e * dh.abs()
    ones = dz.new_ones(1, len(dz))
    errors["dx"] = product(dh, dh_error, v)
    dz_error_t = None if dz_error is None else dz_error.mT
    errors["du"] = F.pad(product(dz.mT, dz_error_t, h, h_error), (0, R - r))
    errors["dv"] = F.pad(product(dh.mT, dh_error.mT, x), (0, 0, 0, R - r))
    errors["dbias"] = product(ones, None, dz, dz_error)[0]
    return errors


def poison(tensor: Tensor) -> Tensor:
    """Fill with NaN, or the smallest integer, so that an element never written shows."""
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(torch.iinfo(tensor.dtype).min)
