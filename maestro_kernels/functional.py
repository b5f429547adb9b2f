"""The public functions. Defaults live here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maestro_kernels import dispatch as _dispatch
from maestro_kernels.call import Call
from maestro_kernels.dispatch import QUICK
from maestro_kernels.ops.run import quick, quick_with_more, run
from maestro_kernels.plans import Explanation
from maestro_kernels.problem import check_storages

__all__ = ["explain", "lod_linear", "lod_linear_grouped"]


def lod_linear(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    rank: int | Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
    norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    backend: str | None = None,
    save_h: bool = True,
) -> Tensor:
    """Compute y = act((scale · x @ v[:r].T) @ u[:, :r].T + bias + residual), r = rank, in one call.

    With a norm, y = act((scale · RMSNorm(x @ v[:r].T)) @ u[:, :r].T + bias + residual), where
    RMSNorm(h) = norm[:r] · h / sqrt(mean(h²) + norm_eps) over the r active components of a row: the
    pairs with a norm between them that language models ship (q_a, q_a_layernorm, q_b).

    Sums are kept in float32 or better; H = scale · x @ v[:r].T is rounded to the dtype of x, as two
    library matmuls would. A residual is added before y is written: a low-rank correction of what
    another layer computed (LoRA, the rest of a quantised weight) takes no second pass over y.
    Gradients of u[:, r:] and v[r:] are exactly zero. No factor is copied for a rank. One call is
    bitwise repeatable on the same device.

    Args:
        x: input (..., K), float16, bfloat16, float32 or float64.
        u: output factor (N, R), dtype and device of x.
        v: input factor (R, K), dtype and device of x.
        bias: (N,) or None.
        rank: active rank, 0 <= rank <= R; None means R. A 0-d int32 tensor on x's device is clamped
            to 0..R on the device and never read by the host, so that a captured CUDA graph or a
            compiled model follows it.
        activation: None, "relu", "gelu" (erf), "gelu_tanh" or "silu", applied after the additions.
        residual: (..., N), dtype and device of x, or None; it gets a gradient too.
        scale: a finite number, no tensor; it gets no gradient.
        norm: weight (R,) of an RMSNorm between the factors, dtype and device of x, or None; it gets
            a gradient, zero beyond r. The mean is over r components: at another rank each counts
            for more or less, as if the model had been built with that rank. The rank is then at
            least 1; a tensor rank of 0 gives act(bias + residual).
        norm_eps: a finite number > 0, what is added to the mean of squares.
        backend: None or "auto" chooses (see `explain`); "reference", "matmul", "triton" or "native"
            forces one.
        save_h: keep H, (M, r), for the backward; False computes it again there.

    Returns:
        Tensor (..., N), dtype of x, never an alias of residual. Rank 0 gives act(bias + residual).

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
    is_plain = residual is None is norm and type(scale) is float and scale == 1.0
    if backend in QUICK:
        y = (
            quick(x, u, v, bias, rank, activation, backend, save_h)
            if is_plain
            else quick_with_more(
                x, u, v, bias, rank, activation, residual, scale, norm, norm_eps, backend, save_h
            )
        )
        if y is not None:
            return y
    call = _single(x, u, v, bias, rank, activation)
    if not is_plain:
        call = _with_more(call, residual, scale, norm, norm_eps)
    return run(call, backend, save_h)[0]


def lod_linear_grouped(
    x: Tensor | Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    biases: Tensor | Sequence[Tensor | None] | None = None,
    *,
    ranks: int | Tensor | Sequence[int | Tensor | None] | None = None,
    activation: str | Sequence[str | None] | None = None,
    residuals: Sequence[Tensor | None] | None = None,
    scales: float | Sequence[float] = 1.0,
    norms: Sequence[Tensor | None] | None = None,
    norm_eps: float = 1e-6,
    backend: str | None = None,
    save_h: bool = True,
) -> list[Tensor]:
    """Compute y_i = act_i((scale_i · x_i @ v_i[:r_i].T) @ u_i[:, :r_i].T + bias_i + residual_i).

    With norms, scale_i · RMSNorm_i(x_i @ v_i[:r_i].T) stands for the first product. The layers may
    differ in N, R and r; nothing is padded to the largest rank. They read one shared x (q/k/v,
    gate/up) or one x each.

    Args:
        x: one tensor (..., K), or a sequence with one input per layer.
        us: output factors (N_i, R_i).
        vs: input factors (R_i, K_i).
        biases: one (N_i,) tensor or None per layer; None or one tensor holds for every layer.
        ranks: one active rank per layer (int, 0-d int32 tensor or None), one value for every layer,
            or one int32 tensor (n,) on x's device.
        activation: one name or None for every layer, or one per layer.
        residuals: None, or one (..., N_i) or None per layer.
        scales: one number for every layer, or one per layer.
        norms: None, or one (R_i,) or None per layer; as for `lod_linear`.
        norm_eps: one number for every layer.
        backend: as for `lod_linear`.
        save_h: as for `lod_linear`.

    Returns:
        List of tensors (..., N_i), in the order of `us`.

    Raises:
        TypeError: an argument is no tensor or has the wrong dtype.
        ValueError: a length, shape, device, rank, activation or backend does not fit.
        NotImplementedError: the forced backend cannot serve this call, or forward-mode AD.

    Example:
        >>> import torch, maestro_kernels as mk
        >>> x = torch.randn(4, 64)
        >>> us, vs = [torch.randn(n, 16) for n in (64, 32, 32)], [torch.randn(16, 64)] * 3
        >>> [tuple(y.shape) for y in mk.lod_linear_grouped(x, us, vs, ranks=[16, 8, 5])]
        [(4, 64), (4, 32), (4, 32)]
    """
    call = _spread(x, us, vs, biases, ranks, activation)
    return run(_with_added(call, residuals, scales, norms, norm_eps), backend, save_h)


def explain(
    x: Tensor | Sequence[Tensor],
    u: Tensor | Sequence[Tensor],
    v: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None = None,
    *,
    rank: int | Tensor | Sequence[int | Tensor | None] | None = None,
    activation: str | Sequence[str | None] | None = None,
    residual: Tensor | Sequence[Tensor | None] | None = None,
    scale: float | Sequence[float] = 1.0,
    norm: Tensor | Sequence[Tensor | None] | None = None,
    norm_eps: float = 1e-6,
    backend: str | None = None,
) -> Explanation:
    """Say which strategy would run a call, why, and its predicted cost; computes nothing.

    With gradients enabled and wanted by an argument, the call is one of training. Where the first
    call of a kind is going to measure (`set_tuning`), it says what.

    Args are those of `lod_linear`, or of `lod_linear_grouped` where u is a sequence.

    Returns:
        An Explanation: `.plan`, `.bytes` (each operand moved once), `.flop`; `.seconds` and
        `.roofline_share`, predicted from this device's peaks, which the first of them in a process
        measures (about a second). Printing it says what is known by then and times nothing.

    Raises:
        The errors of the call itself.
    """
    several = isinstance(u, Sequence) and not isinstance(u, str)
    call = (_spread if several else _single)(x, u, v, bias, rank, activation)
    if several:
        call = _with_added(call, residual, scale, norm, norm_eps)
    else:
        call = _with_more(call, residual, scale, norm, norm_eps)
    wants_grad = torch.is_grad_enabled() and any(
        t is not None and getattr(t, "requires_grad", False) for t in call.tensors
    )
    plan = _dispatch.plan_afresh(call, backend, wants_grad)
    check_storages(plan.fn, call)
    return Explanation(plan)


def _single(x: Any, u: Any, v: Any, bias: Any, rank: Any, activation: Any) -> Call:
    """The call of one layer."""
    ranks = rank if isinstance(rank, Tensor) else (rank,)
    return Call("lod_linear", (x,), (u,), (v,), (bias,), ranks, (activation,))


def _with_more(call: Call, residual: Any, scale: Any, norm: Any, norm_eps: float) -> Call:
    """The call of one layer with what a plain one does not have."""
    if residual is not None or type(scale) is not float or scale != 1.0:
        call = call._replace(residuals=(residual,), scales=(scale,))
    return call if norm is None else call._replace(norms=(norm,), norm_eps=norm_eps)


def _spread(x: Any, us: Any, vs: Any, biases: Any, ranks: Any, activation: Any) -> Call:
    """The call of a group: one value or one per layer becomes one per layer, lengths unchecked."""
    fn = "lod_linear_grouped"
    for name, value in (("us", us), ("vs", vs)):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(
                f"{fn}: {name}: expected a sequence of factors, got {type(value).__name__}"
            )
    n = len(us)
    xs = [x] if isinstance(x, Tensor) else _listed("x", x, "one tensor or a sequence of tensors")
    if biases is None or isinstance(biases, Tensor):
        biases = [biases] * n
    biases = _listed("biases", biases, "None, a tensor or a sequence of those")
    if activation is None or isinstance(activation, str):
        activation = [activation] * n
    activation = _listed("activation", activation, "a name, None or a sequence of those")
    if isinstance(ranks, Tensor) and ranks.dim() == 0:
        ranks = ranks.expand(n).contiguous()
    elif ranks is None or isinstance(ranks, int | torch.SymInt):
        ranks = [ranks] * n
    elif not isinstance(ranks, Tensor):
        ranks = _listed("ranks", ranks, "an int, None, an int32 tensor or a sequence of those")
        if any(isinstance(r, Tensor) for r in ranks):
            ranks = _stack_ranks(ranks, vs)
    return Call(fn, xs, list(us), list(vs), biases, ranks, activation)


def _with_added(call: Call, residuals: Any, scales: Any, norms: Any, norm_eps: float) -> Call:
    """The call of a group with all that a plain one does not have."""
    if norms is not None:
        norms = _listed("norms", norms, "None or a sequence of tensors and None")
        call = call._replace(norms=norms, norm_eps=norm_eps)
    if residuals is not None:
        residuals = _listed("residuals", residuals, "None or a sequence of tensors and None")
        call = call._replace(residuals=residuals)
    if isinstance(scales, Sequence):
        return call._replace(scales=_listed("scales", scales, "a number or a sequence of numbers"))
    return (
        call if type(scales) is float and scales == 1.0 else call._replace(scales=[scales] * call.n)
    )


def _listed(name: str, value: Any, expected: str) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(
            f"lod_linear_grouped: {name}: expected {expected}, got {type(value).__name__}"
        )
    return list(value)


def _stack_ranks(ranks: Sequence[Any], vs: Sequence[Tensor]) -> Tensor:
    """One int32 tensor for a mixture of device and host ranks."""
    device = next(r.device for r in ranks if isinstance(r, Tensor))
    filled = []
    for i, rank in enumerate(ranks):
        R = vs[i].shape[0] if i < len(vs) and isinstance(vs[i], Tensor) else 0
        value = R if rank is None else rank
        if isinstance(value, Tensor):
            fits = value.dtype == torch.int32 and value.dim() == 0
            got = f"{value.dtype} of shape {tuple(value.shape)}"
        else:
            fits = isinstance(value, int | torch.SymInt) and not isinstance(value, bool)
            got = type(value).__name__
        if not fits:
            raise TypeError(
                f"lod_linear_grouped: ranks[{i}]: expected None, an int or a 0-d int32 tensor, "
                f"got {got}"
            )
        if not isinstance(value, Tensor) and not 0 <= value <= R:
            raise ValueError(
                f"lod_linear_grouped: ranks[{i}]: expected 0 <= rank <= {R}, got {value}"
            )
        filled.append(torch.as_tensor(value, dtype=torch.int32, device=device))
    return torch.stack(filled)
