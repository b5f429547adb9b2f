"""What each rank of each layer costs: weights, multiply-adds, bytes, milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.search.layers import Layer, module_dtype

__all__ = ["Choices", "LatencyProfile", "below_steps", "choices", "layer_latency"]

Array = NDArray[np.float64]
Rows = Mapping[str, tuple[int, ...]]

# A factorised layer stores its active rank beside the factors.
_RANK_BYTES = 4


class LatencyProfile(Protocol):
    """What allocation asks of a latency profile; `search.profile` makes one."""

    def latency(self, *, N: int, K: int, rank: int | str, M: int) -> float:
        """Milliseconds of one call on M rows at this rank, or of the "dense" layer."""


@dataclass(frozen=True)
class Choices:
    """The ranks a layer may run at, in rising order, "dense" last, and what each costs.

    Attributes:
        layer: whose.
        ranks: the choices.
        weights: stored weights.
        macs: multiply-adds for a batch, for one row where the rows are unknown.
        bytes: stored bytes of weights and of the active rank.
        ms: milliseconds for a batch; None without a profile or rows.
    """

    layer: Layer
    ranks: tuple[int | str, ...]
    weights: Array
    macs: Array
    bytes: Array
    ms: Array | None

    def keep(self, index: NDArray[np.int64]) -> Choices:
        """These choices alone."""
        return Choices(
            self.layer,
            tuple(self.ranks[i] for i in index),
            self.weights[index],
            self.macs[index],
            self.bytes[index],
            None if self.ms is None else self.ms[index],
        )


def choices(
    layer: Layer,
    module: nn.Module,
    *,
    multiple_of: int,
    min_rank: int,
    rows: tuple[int, ...],
    latency: Callable[[Layer, int | str], float] | None,
) -> Choices:
    """Every multiple of `multiple_of` from min_rank to the largest rank that can pay, and "dense".

    Ranks whose factors would hold as many weights as the dense matrix are left out where the layer
    can be dense. Where nothing is left, min_rank itself is.
    """
    top = layer.max_rank
    if layer.can_be_dense:
        top = min(top, (layer.N * layer.K - 1) // (layer.N + layer.K))
    first = -(-max(min_rank, 1) // multiple_of) * multiple_of
    found: list[int | str] = list(range(first, top + 1, multiple_of))
    if not layer.can_be_dense and layer.max_rank % multiple_of:
        found.append(layer.max_rank)
    if min_rank == 0:
        found.insert(0, 0)
    if layer.can_be_dense:
        found.append("dense")
    itemsize = module_dtype(module).itemsize
    weights = np.array([layer.weights(rank) for rank in found], float)
    stored = np.array([0 if rank == "dense" else _RANK_BYTES for rank in found], float)
    ms = None if latency is None else np.array([latency(layer, rank) for rank in found])
    return Choices(
        layer, tuple(found), weights, weights * (sum(rows) if rows else 1),
        weights * itemsize + stored, ms,
    )  # fmt: skip


def current_bytes(module: nn.Module, layer: Layer) -> int:
    """Bytes of the weights, and of the active rank, that a layer stores now."""
    if isinstance(module, LoDLayer):
        factors = module.u.numel() + module.v.numel()
        return factors * module.u.element_size() + _RANK_BYTES
    return layer.dense_weights * module_dtype(module).itemsize


def current_weights(module: nn.Module, layer: Layer) -> int:
    """Weights that a layer stores now."""
    if isinstance(module, LoDLayer):
        return module.u.numel() + module.v.numel()
    return layer.dense_weights


def layer_latency(
    profile: LatencyProfile, rows: Rows, fn: str
) -> Callable[[Layer, int | str], float]:
    """Milliseconds of all calls of a layer for a batch, each distinct shape asked for once.

    Raises:
        ValueError: the profile gives a value that is no positive finite number.
    """
    known: dict[tuple[int, int, int | str, int], float] = {}

    def one(layer: Layer, rank: int | str, M: int) -> float:
        key = (layer.N, layer.K, rank, M)
        if key not in known:
            ms = float(profile.latency(N=layer.N, K=layer.K, rank=rank, M=M))
            if not (np.isfinite(ms) and ms > 0):
                raise ValueError(
                    f"{fn}: profile: expected positive latencies, got {ms} for N={layer.N}, "
                    f"K={layer.K}, rank={rank}, M={M}"
                )
            known[key] = ms
        return known[key]

    return lambda layer, rank: sum(one(layer, rank, M) for M in rows[layer.name] if M)


def below_steps(ms: Array, tolerance: float = 0.02) -> NDArray[np.int64]:
    """Of choices in rising order of rank, those just below a step of the latency, rising.

    From the top down, a choice is kept if it is at least `tolerance` faster than every choice above
    it that is kept: so a rank gives way to a higher one, or to the dense layer, that takes no
    longer. The first choice above the others is always kept.
    """
    kept = [len(ms) - 1]
    for j in range(len(ms) - 2, -1, -1):
        if ms[j] < ms[kept[-1]] * (1 - tolerance):
            kept.append(j)
    return np.array(kept[::-1])
