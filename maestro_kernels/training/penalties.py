"""Penalties that push the later components of LoD layers towards zero.

All are formulas on one small matrix, the squared norm of every component of every factor, which a
single autograd function computes by reading each factor once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from maestro_kernels.nn import LoDLayer
from maestro_kernels.training.layers import require_layers


def hierarchical_group_lasso(model: nn.Module, *, scale_by_size: bool = False) -> Tensor:
    """sum_layers sum_{b=0..R-1} ( ||u[:, b:]||_F + ||v[b:]||_F ), a 0-d tensor.

    Component b lies in b + 1 groups, so later components feel more pressure and die first. Where a
    tail is exactly zero its gradient is zero (a valid subgradient), never NaN.

    Args:
        model: holds LoD layers; all stored components count, whatever the active ranks.
        scale_by_size: weigh every norm by sqrt(elements in its group), so that one factor for the
            penalty suits layers of different sizes. The paper does not.

    Returns:
        float32, or float64 where a factor is; on the device of the first layer.

    Raises:
        TypeError: model is no module.
        ValueError: model has no LoD layer.

    Source: Maestro (arXiv 2308.14929). Twice differentiable where no tail is zero.
    """
    layers = _layers("hierarchical_group_lasso", model)
    tails = _squared_norms(layers).flip(1).cumsum(1).flip(1)
    return _sum_of_roots(tails, _group_sizes(layers, tails, tail=True) if scale_by_size else None)


def group_lasso(model: nn.Module, *, scale_by_size: bool = False) -> Tensor:
    """sum_layers sum_b ( ||u[:, b]|| + ||v[b]|| ): every component is a group of its own.

    Arguments, result, errors and zeros as in `hierarchical_group_lasso`.
    """
    layers = _layers("group_lasso", model)
    squares = _squared_norms(layers)
    sizes = _group_sizes(layers, squares, tail=False) if scale_by_size else None
    return _sum_of_roots(squares, sizes)


def funnel_start(model: nn.Module) -> dict[str, Tensor]:
    """{layer name: ||v[b]|| of its components (R,)}: what `funnel` measures change against.

    Take it once, before training, and keep it in the checkpoint.
    """
    layers = require_layers("funnel_start", model)
    with torch.no_grad():
        rows = _squared_norms(list(layers.values()))[len(layers) :].sqrt()
    return {name: rows[i, : la.max_rank].clone() for i, (name, la) in enumerate(layers.items())}


def funnel(model: nn.Module, start: Mapping[str, Tensor]) -> Tensor:
    """sum_layers sum_b m |g_b| / (c + |g_b|), g_b = ||v[b]||, m = g_b(0), c = 0.01 g_b(0).

    Steep near zero and flat far from it: small components are driven out, large ones left alone.
    A component that was zero at the start costs nothing.

    Args:
        model: holds LoD layers.
        start: `funnel_start(model)` from before training; layers that shrank use its prefix.

    Raises:
        TypeError: model is no module.
        ValueError: no LoD layer, or `start` lacks a layer or holds fewer components.

    Source: Chu and Lee, arXiv 2112.03690; g is the gate of the compressing factor.
    """
    layers = require_layers("funnel", model)
    initial = []
    for name, layer in layers.items():
        value, R = start.get(name), layer.max_rank
        if value is None or value.dim() != 1 or len(value) < R:
            got = "none" if value is None else f"shape {tuple(value.shape)}"
            raise ValueError(f"funnel: start[{name!r}]: expected at least {R} values, got {got}")
        initial.append(value[:R])
    squares = _squared_norms(list(layers.values()))[len(layers) :]
    gates, alive = _safe_sqrt(squares)
    m = pad_sequence([t.to(gates) for t in initial], batch_first=True)
    alive = alive & (m > 0)
    return torch.where(alive, m * gates / (0.01 * m + gates), 0).sum()


def _layers(fn: str, model: nn.Module) -> list[LoDLayer]:
    return list(require_layers(fn, model).values())


def _safe_sqrt(squares: Tensor) -> tuple[Tensor, Tensor]:
    """Roots, 1 in place of zero, and a mask of the rest: no infinite slope enters the graph."""
    alive = squares > 0
    return torch.where(alive, squares, 1).sqrt(), alive


def _sum_of_roots(squares: Tensor, weights: Tensor | None) -> Tensor:
    roots, alive = _safe_sqrt(squares)
    if weights is not None:
        roots = roots * weights
    return torch.where(alive, roots, 0).sum()


def _squared_norms(layers: list[LoDLayer]) -> Tensor:
    """Squared norms of components, zero beyond R: all u, then all v, (2 * layers, largest R)."""
    groups = (1,) * len(layers) + tuple(layer.groups for layer in layers)
    factors = [layer.u for layer in layers] + [layer.v for layer in layers]
    squares: Tensor = _SquaredNorms.apply(groups, *factors)
    return squares


class _SquaredNorms(torch.autograd.Function):
    """Squared norms of the components of u factors (first half) and v factors (second half)."""

    @staticmethod
    def forward(ctx: Any, groups: tuple[int, ...], *factors: Tensor) -> Tensor:
        ctx.groups = groups
        ctx.save_for_backward(*factors)
        half = len(factors) // 2
        dtype = torch.float64 if any(t.dtype is torch.float64 for t in factors) else torch.float32
        rows = [_norms(t, 0, dtype) for t in factors[:half]]
        for v, count in zip(factors[half:], groups[half:], strict=True):
            if count == 1:
                rows.append(_norms(v.flatten(1), 1, dtype))
            else:
                parts = v.flatten(1).unflatten(0, (count, v.shape[0] // count))
                rows.append(_norms(parts, (0, 2), dtype))
        device = factors[0].device
        return _padded([row.to(device) for row in rows]).square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        factors, groups = ctx.saved_tensors, ctx.groups
        half = len(factors) // 2
        twice = 2 * grad
        grads: list[Tensor | None] = []
        for i, (t, count) in enumerate(zip(factors, groups, strict=True)):
            if not ctx.needs_input_grad[i + 1]:
                grads.append(None)
                continue
            R = t.shape[1] if i < half else t.shape[0] // count
            slope = twice[i, :R].to(t.device)
            if i >= half:
                slope = slope if count == 1 else slope.repeat(count)
                slope = slope.reshape(-1, *(1,) * (t.dim() - 1))
            grads.append(_scaled(t, slope).to(t.dtype))
        return None, *grads


def _norms(factor: Tensor, dim: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dim == 0 and factor.device.type == "cpu" and not hasattr(factor, "full_tensor"):
        # torch's norms down the columns of a matrix take 4 to 12 times as long on a CPU.
        return (torch.ones(len(factor), dtype=dtype) @ factor.to(dtype).square()).sqrt()
    norms: Tensor = torch.linalg.vector_norm(factor, dim=dim, dtype=dtype)
    # FSDP2 spreads a factor over processes; its norms are small, and all of them need all.
    return norms.full_tensor() if hasattr(norms, "full_tensor") else norms


def _padded(rows: list[Tensor]) -> Tensor:
    """The rows as one matrix: two launches on a device, where pad_sequence makes one per row."""
    widths = [len(row) for row in rows]
    if len(set(widths)) == 1:
        return torch.stack(rows)
    if torch.compiler.is_compiling():
        return pad_sequence(rows, batch_first=True)
    flat = torch.cat((*rows, rows[0].new_zeros(1)))
    return flat[_places(tuple(widths), flat.device)]


@lru_cache(maxsize=8)
def _places(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where the values of each row lie in their concatenation, and the zero that follows."""
    end = sum(widths)
    starts = [0, *accumulate(widths)]
    return torch.tensor(
        [
            [*range(s, s + w), *[end] * (max(widths) - w)]
            for s, w in zip(starts, widths, strict=False)
        ]
    ).to(device)


def _scaled(factor: Tensor, slope: Tensor) -> Tensor:
    """The product, spread over the processes as the factor is; all of them know the slope."""
    if not hasattr(factor, "device_mesh"):
        return factor * slope
    from torch.distributed.tensor import DTensor, Replicate

    mesh = factor.device_mesh
    product = factor * DTensor.from_local(slope, mesh, [Replicate()] * mesh.ndim, run_check=False)
    # With a single row or column torch would rather hold it whole on each.
    spread: Tensor = product.redistribute(placements=factor.placements)  # type: ignore[attr-defined]
    return spread


def _group_sizes(layers: list[LoDLayer], like: Tensor, *, tail: bool) -> Tensor:
    shapes = [(layer.max_rank, layer.u.numel()) for layer in layers]
    shapes += [(layer.max_rank, layer.v.numel()) for layer in layers]
    # A compiler that traced through the cache would leave its fake tensors there.
    sizes = _root_sizes if torch.compiler.is_compiling() else _cached_root_sizes
    return sizes(tuple(shapes), tail, like.dtype, like.device)


def _root_sizes(
    shapes: tuple[tuple[int, int], ...], tail: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """sqrt(elements) of the group that starts at each component."""
    rows = []
    for R, numel in shapes:
        each = numel // R if R else 0
        count = torch.arange(R, 0, -1) if tail else torch.ones(R)
        rows.append((each * count.to(dtype)).sqrt())
    return pad_sequence(rows, batch_first=True).to(device)


_cached_root_sizes = lru_cache(maxsize=8)(_root_sizes)
