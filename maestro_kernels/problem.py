"""The one place that validates and describes a call.

What a layer computes is `act(H @ u[:, :r].T + bias + residual)`, H = scale · x @ v[:r].T or scale ·
RMSNorm(x @ v[:r].T), x (..., K), v (R, K), u (N, R). A `LoDProblem` says which of those it is;
which kernel serves it is decided in dispatch.py.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from maestro_kernels.backends import FAMILIES
from maestro_kernels.call import Call

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")
BACKENDS = (None, "auto", *FAMILIES)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class LoDProblem:
    """One layer's call: sizes, rank, types and layout, nothing about how it is run.

    Attributes:
        M: rows of x after flattening its leading dimensions.
        N: out_features.
        K: in_features.
        R: max_rank, the width of the factors.
        rank: active rank, or None when it is a tensor on the device that the host never reads.
        dtype: dtype of x, u, v, bias and y.
        device: where they live.
        has_bias: whether a bias is added.
        activation: one of ACTIVATIONS, applied after the bias.
        x_stride: strides of x flattened to (M, K), in elements.
        u_stride: strides of u, in elements.
        v_stride: strides of v, in elements.
        aligned: every tensor starts on a 16-byte boundary.
        has_residual: whether a matrix (M, N) is added.
        is_scaled: whether H is multiplied by a number, which the plan does not depend on.
        has_norm: whether an RMSNorm stands between the factors.
    """

    M: int
    N: int
    K: int
    R: int
    rank: int | None
    dtype: torch.dtype
    device: torch.device
    has_bias: bool = False
    activation: str | None = None
    x_stride: tuple[int, ...] = ()
    u_stride: tuple[int, ...] = ()
    v_stride: tuple[int, ...] = ()
    aligned: bool = True
    has_residual: bool = False
    is_scaled: bool = False
    has_norm: bool = False

    @property
    def max_active_rank(self) -> int:
        """The rank the host must plan for: `rank`, or R when only the device knows it."""
        return self.R if self.rank is None else self.rank

    @property
    def is_plain(self) -> bool:
        """Nothing is added to the output, nothing scaled and H not normalised."""
        return not (self.has_residual or self.is_scaled or self.has_norm)

    @property
    def degenerate(self) -> bool:
        """No product is left to compute: the result is empty or act(bias)."""
        return self.M == 0 or self.N == 0 or self.K == 0 or self.max_active_rank == 0

    def __str__(self) -> str:
        rank = "tensor" if self.rank is None else self.rank
        kind = str(self.dtype).removeprefix("torch.")
        extras = (
            (" + bias" if self.has_bias else "")
            + (" + residual" if self.has_residual else "")
            + (f", {self.activation}" if self.activation else "")
        )
        scale = "scale · " if self.is_scaled else ""
        h = f"x ({self.M}, {self.K}) · v[:{rank}]ᵀ"
        h = f"RMSNorm({h})" if self.has_norm else h
        return (
            f"{scale}{h} · u[:, :{rank}]ᵀ{extras} -> "
            f"({self.M}, {self.N}), R = {self.R}, {kind} on {self.device}"
        )


def check_choices(fn: str, activation: Any, backend: Any) -> None:
    """Raise ValueError for an unknown activation or backend."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{fn}: activation: expected one of {ACTIVATIONS}, got {activation!r}")
    if backend not in BACKENDS:
        raise ValueError(f"{fn}: backend: expected one of {BACKENDS}, got {backend!r}")


def check_linear(
    fn: str,
    x: Any,
    u: Any,
    v: Any,
    bias: Any,
    rank: Any,
    *,
    names: tuple[str, str, str, str, str] = ("x", "u", "v", "bias", "rank"),
) -> None:
    """Raise a TypeError or ValueError that names the argument unless the five fit together."""
    x_name, u_name, v_name, bias_name, rank_name = names
    tensors = ((x_name, x), (u_name, u), (v_name, v))
    for name, value in (*tensors, *(() if bias is None else ((bias_name, bias),))):
        if not isinstance(value, Tensor):
            raise TypeError(f"{fn}: {name}: expected a Tensor, got {type(value).__name__}")
        _check_plain(fn, name, value)
    if x.dtype not in DTYPES:
        expected = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{fn}: {x_name}: expected dtype {expected}, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError(f"{fn}: {x_name}: expected shape (..., K), got a 0-d tensor")
    for name, value in ((u_name, u), (v_name, v)):
        if value.dim() != 2:
            raise ValueError(f"{fn}: {name}: expected a 2-d factor, got shape {_shape(value)}")
    if v.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{fn}: {v_name}: expected shape (R, {x.shape[-1]}) to match {x_name} {_shape(x)}, "
            f"got {_shape(v)}"
        )
    if u.shape[1] != v.shape[0]:
        raise ValueError(
            f"{fn}: {u_name}: expected shape (N, {v.shape[0]}) to match {v_name} {_shape(v)}, "
            f"got {_shape(u)}"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != u.shape[0]):
        raise ValueError(
            f"{fn}: {bias_name}: expected shape ({u.shape[0]},) to match {u_name} {_shape(u)}, "
            f"got {_shape(bias)}"
        )
    for name, value in ((u_name, u), (v_name, v), (bias_name, bias)):
        if value is None:
            continue
        if value.dtype != x.dtype:
            raise TypeError(f"{fn}: {name}: expected {x.dtype} like {x_name}, got {value.dtype}")
        if value.device != x.device:
            raise ValueError(
                f"{fn}: {name}: expected device {x.device} like {x_name}, got {value.device}"
            )
    _check_rank(fn, rank_name, rank, x, v.shape[0])


def _check_plain(fn: str, name: str, tensor: Tensor) -> None:
    """Raise TypeError for a tensor whose values do not lie in memory at strides of their own."""
    if tensor.is_quantized:
        raise TypeError(f"{fn}: {name}: expected a dense tensor, got quantised {tensor.dtype}")
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested" if tensor.is_nested else f"a {tensor.layout}"
        raise TypeError(f"{fn}: {name}: expected a dense tensor, got {kind} one")


def check_storages(fn: str, call: Call, layers: Sequence[int] | None = None, **more: Any) -> None:
    """Raise ValueError for an ordinary tensor whose storage is too short for it.

    FSDP and others free the memory of a tensor that they keep: `untyped_storage().resize_(0)`.
    Asked after something went wrong, not on every call.

    Args:
        fn: what the error names.
        call: its tensors are looked at.
        layers: the numbers of its layers in the group that the user knows; None counts from 0.
        more: other tensors by name.
    """
    xs, us, vs, biases, ranks = call.xs, call.us, call.vs, call.biases, call.ranks
    residuals, norms = call.residuals, call.norms
    tensors: dict[str, Any] = {**more, "x": xs[0]} if len(xs) == 1 else more
    if call.fn == "lod_linear":
        tensors |= {"u": us[0], "v": vs[0], "bias": biases[0], "rank": ranks}
        tensors |= {"residual": call.residual(0), "norm": call.norm(0)}
    else:
        lists = {"us": us, "vs": vs, "biases": biases, "residuals": residuals, "norms": norms}
        lists["x"] = xs if len(xs) > 1 else ()
        for i, number in enumerate(range(call.n) if layers is None else layers):
            tensors |= {f"{name}[{number}]": ts[i] for name, ts in lists.items() if ts}
        tensors["ranks"] = ranks
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, Parameter) or tensor.layout != torch.strided:
            continue
        if tensor.is_meta or tensor.is_nested or tensor.numel() == 0:
            continue
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        expected = (tensor.storage_offset() + last + 1) * tensor.element_size()
        got = tensor.untyped_storage().nbytes()
        if got < expected:
            raise ValueError(
                f"{fn}: {name}: expected a storage of at least {expected} bytes, got {got} "
                f"(freed by untyped_storage().resize_?)"
            )


def _check_rank(fn: str, name: str, rank: Any, x: Tensor, R: int) -> None:
    if rank is None:
        return
    if isinstance(rank, Tensor):
        if rank.dtype != torch.int32:
            raise TypeError(f"{fn}: {name}: expected a 0-d int32 tensor, got {rank.dtype}")
        if rank.dim() != 0:
            raise ValueError(f"{fn}: {name}: expected a 0-d int32 tensor, got {_shape(rank)}")
        if rank.device != x.device:
            raise ValueError(f"{fn}: {name}: expected device {x.device}, got {rank.device}")
        return
    if isinstance(rank, bool) or not isinstance(rank, int | torch.SymInt):
        raise TypeError(
            f"{fn}: {name}: expected None, an int or a 0-d int32 tensor, got {type(rank).__name__}"
        )
    if not 0 <= rank <= R:
        raise ValueError(f"{fn}: {name}: expected 0 <= rank <= {R}, got {rank}")


def check_call(call: Call, backend: Any = None) -> None:
    """Raise a TypeError or ValueError that names the argument unless a call holds together.

    A single layer's errors name its arguments, those of a group name entries of its lists.
    """
    fn, xs, us, vs, biases, ranks, activations, residuals, scales, norms, _ = call
    if fn == "lod_linear":
        check_choices(fn, activations[0], backend)
        rank = ranks if isinstance(ranks, Tensor) else ranks[0]
        check_linear(fn, xs[0], us[0], vs[0], biases[0], rank)
        _check_added(call, 0, ("x", "u", "residual", "scale"))
        _check_norm(call, 0, ("x", "v", "norm", "rank"))
        return
    n, shared = len(us), len(xs) == 1
    if n == 0:
        raise ValueError(f"{fn}: us: expected at least one layer, got none")
    if len(xs) not in (1, n):
        raise ValueError(f"{fn}: x: expected one tensor or {n} (one per layer), got {len(xs)}")
    lists: dict[str, Sequence[Any]] = {"vs": vs, "biases": biases, "activation": activations}
    others = ("residuals", residuals), ("scales", scales), ("norms", norms)
    lists |= {name: entries for name, entries in others if entries}
    for name, entries in lists.items():
        if len(entries) != n:
            raise ValueError(f"{fn}: {name}: expected {n} entries like us, got {len(entries)}")
    if isinstance(ranks, Tensor):
        if ranks.dtype != torch.int32:
            raise TypeError(f"{fn}: ranks: expected an int32 tensor ({n},), got {ranks.dtype}")
        if ranks.dim() != 1 or ranks.shape[0] != n:
            raise ValueError(
                f"{fn}: ranks: expected an int32 tensor ({n},), got shape {_shape(ranks)}"
            )
    elif len(ranks) != n:
        raise ValueError(f"{fn}: ranks: expected {n} entries like us, got {len(ranks)}")
    first = xs[0]
    for i in range(n):
        x = call.x(i)
        check_choices(fn, activations[i], backend)
        x_name = "x" if shared else f"x[{i}]"
        names = (x_name, f"us[{i}]", f"vs[{i}]", f"biases[{i}]", f"ranks[{i}]")
        rank = None if isinstance(ranks, Tensor) else ranks[i]
        check_linear(fn, x, us[i], vs[i], biases[i], rank, names=names)
        _check_added(call, i, (x_name, f"us[{i}]", f"residuals[{i}]", f"scales[{i}]"))
        _check_norm(call, i, (x_name, f"vs[{i}]", f"norms[{i}]", f"ranks[{i}]"))
        if x.dtype != first.dtype:
            raise TypeError(f"{fn}: x[{i}]: expected {first.dtype} like x[0], got {x.dtype}")
        if x.device != first.device:
            raise ValueError(f"{fn}: x[{i}]: expected device {first.device}, got {x.device}")
    if isinstance(ranks, Tensor) and ranks.device != first.device:
        raise ValueError(f"{fn}: ranks: expected device {first.device}, got {ranks.device}")


def _check_added(call: Call, i: int, names: tuple[str, str, str, str]) -> None:
    """Raise a TypeError or ValueError unless a checked layer's residual and scale fit it."""
    fn, x, u, residual, scale = call.fn, call.x(i), call.us[i], call.residual(i), call.scale(i)
    x_name, u_name, name, scale_name = names
    is_number = isinstance(scale, int | float | torch.SymFloat) and not isinstance(scale, bool)
    if not is_number:
        got = type(scale).__name__
        raise TypeError(f"{fn}: {scale_name}: expected a number, got {got}")
    if scale - scale != 0:  # torch.compile does not trace math.isfinite
        raise ValueError(f"{fn}: {scale_name}: expected a finite number, got {scale}")
    if residual is None:
        return
    if not isinstance(residual, Tensor):
        raise TypeError(f"{fn}: {name}: expected a Tensor, got {type(residual).__name__}")
    _check_plain(fn, name, residual)
    expected = (*x.shape[:-1], u.shape[0])
    if tuple(residual.shape) != expected:
        raise ValueError(
            f"{fn}: {name}: expected shape {expected} to match {x_name} {_shape(x)} and {u_name} "
            f"{_shape(u)}, got {_shape(residual)}"
        )
    if residual.dtype != x.dtype:
        raise TypeError(f"{fn}: {name}: expected {x.dtype} like {x_name}, got {residual.dtype}")
    if residual.device != x.device:
        raise ValueError(
            f"{fn}: {name}: expected device {x.device} like {x_name}, got {residual.device}"
        )


def _check_norm(call: Call, i: int, names: tuple[str, str, str, str]) -> None:
    """Raise a TypeError or ValueError unless a checked layer's norm fits it."""
    fn, x, v, norm, eps = call.fn, call.x(i), call.vs[i], call.norm(i), call.norm_eps
    x_name, v_name, name, rank_name = names
    if norm is None:
        return
    if not isinstance(eps, int | float | torch.SymFloat) or isinstance(eps, bool):
        raise TypeError(f"{fn}: norm_eps: expected a number, got {type(eps).__name__}")
    if not eps > 0 or eps - eps != 0:
        raise ValueError(f"{fn}: norm_eps: expected a finite number > 0, got {eps}")
    if not isinstance(norm, Tensor):
        raise TypeError(f"{fn}: {name}: expected a Tensor, got {type(norm).__name__}")
    _check_plain(fn, name, norm)
    if tuple(norm.shape) != (v.shape[0],):
        raise ValueError(
            f"{fn}: {name}: expected shape ({v.shape[0]},) to match {v_name} {_shape(v)}, "
            f"got {_shape(norm)}"
        )
    if norm.dtype != x.dtype:
        raise TypeError(f"{fn}: {name}: expected {x.dtype} like {x_name}, got {norm.dtype}")
    if norm.device != x.device:
        raise ValueError(
            f"{fn}: {name}: expected device {x.device} like {x_name}, got {norm.device}"
        )
    rank = v.shape[0] if isinstance(call.ranks, Tensor) else call.ranks[i]
    if (v.shape[0] if rank is None else rank) == 0:
        raise ValueError(f"{fn}: {rank_name}: expected at least 1 with a norm, got 0")


def describe_call(call: Call) -> tuple[LoDProblem, ...]:
    """Describe the layers of a checked call."""
    found = [describe(*call.layer(i)) for i in range(call.n)]
    if call.is_plain:
        return tuple(found)
    return tuple(
        replace(
            problem,
            has_residual=call.residual(i) is not None,
            is_scaled=call.scale(i) != 1,
            has_norm=call.norm(i) is not None,
            aligned=problem.aligned and _is_aligned(call.residual(i)) and _is_aligned(call.norm(i)),
        )
        for i, problem in enumerate(found)
    )


def describe(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rank: int | Tensor | None,
    activation: str | None,
) -> LoDProblem:
    """Describe one checked call."""
    N, R = u.shape
    K = v.shape[1]
    if rank is None:
        active: int | None = R
    else:
        active = None if isinstance(rank, Tensor) else operator.index(rank)
    tensors = (x, u, v) if bias is None else (x, u, v, bias)
    return LoDProblem(
        M=math.prod(x.shape[:-1]),
        N=N,
        K=K,
        R=R,
        rank=active,
        dtype=x.dtype,
        device=x.device,
        has_bias=bias is not None,
        activation=activation,
        x_stride=(x.stride(-2) if x.dim() > 1 else K, x.stride(-1)),
        u_stride=tuple(u.stride()),
        v_stride=tuple(v.stride()),
        aligned=all(map(_is_aligned, tensors)),
    )


def _is_aligned(tensor: Tensor | None) -> bool:
    # The storage of every allocator torch has starts on at least 16 bytes; a view may not.
    return tensor is None or tensor.storage_offset() * tensor.element_size() % 16 == 0


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
