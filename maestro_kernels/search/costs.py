"""What each rank of each layer costs: error, weights, multiply-adds, bytes, milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.search.budget import Budget
from maestro_kernels.search.layers import Layer, module_dtype

Array = NDArray[np.float64]
Rows = Mapping[str, tuple[int, ...]]
Amount = TypeVar("Amount", float, Array)

# A factorised layer stores its active rank beside the factors.
_RANK_BYTES = 4
# An entry of the permutation that the [I; U] form stores.
_ORDER_BYTES = 4


class LatencyProfile(Protocol):
    """What allocation asks of a latency profile; `search.profile` makes one."""

    def latency(self, *, N: int, K: int, rank: int | str, M: int) -> float:
        """Milliseconds of one call on M rows at this rank, or of the "dense" layer."""


@dataclass(frozen=True)
class Costs(Generic[Amount]):
    """What ranks cost: numbers of a model or a part of it, arrays of the choices of a layer.

    Attributes:
        error: in the unit of the sensitivity; errors of layers are taken to add up.
        weights: in the layers considered.
        macs: multiply-adds in these layers for a batch, for one row where rows are unknown.
        bytes: of parameters and buffers.
        ms: milliseconds for the batch; None where no times are known.
    """

    error: Amount
    weights: Amount
    macs: Amount
    bytes: Amount
    ms: Amount | None

    def counted(self, budget: Budget | type[Budget]) -> Amount:
        """What the budget counts."""
        columns = {"weights": self.weights, "MACs": self.macs, "bytes": self.bytes, "ms": self.ms}
        found = columns[budget.unit]
        assert found is not None
        return found

    def of(self: Costs[float], budget: Budget, dense: Costs[float]) -> float:
        """In the budget's own measure: a fraction, milliseconds, a speed-up, or bytes."""
        return budget.value(self.counted(budget), dense.counted(budget))

    def __add__(self: Costs[float], other: Costs[float]) -> Costs[float]:
        """Of two parts together; None where the times of one are not known."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        sums: list[Any] = [None if a is None or b is None else a + b for a, b in pairs]
        return Costs(*sums)

    def each(self, take: Callable[[Any], Any]) -> Costs[Any]:
        """`take` of every column that is known."""
        found: list[Any] = [None if c is None else take(c) for c in vars(self).values()]
        return Costs(*found)


@dataclass(frozen=True)
class Choices:
    """The ranks a layer may run at, and what each costs.

    Attributes:
        layer: whose.
        ranks: the choices, rising, "dense" last; a rank may come in several forms.
        forms: what the layer is at each: "factors", "pivoted" ([I; U]) or "dense".
        costs: of each choice.
    """

    layer: Layer
    ranks: tuple[int | str, ...]
    forms: tuple[str, ...]
    costs: Costs[Array]

    def keep(self, index: NDArray[np.int64] | Sequence[int]) -> Choices:
        """These choices alone."""
        ranks, forms = zip(*((self.ranks[i], self.forms[i]) for i in index), strict=True)
        return Choices(self.layer, ranks, forms, self.costs.each(lambda column: column[index]))

    def at(self, j: int) -> Costs[float]:
        """Of one choice."""
        return self.costs.each(lambda column: float(column[j]))


def choices(
    layer: Layer,
    ranks: Sequence[int | str],
    forms: Sequence[str] | None = None,
    *,
    itemsize: int,
    rows: tuple[int, ...] = (),
    error: Callable[[int | str], float] = lambda rank: 0.0,
    ms: Sequence[float] | None = None,
) -> Choices:
    """What a layer costs at each of these ranks.

    Args:
        layer: whose.
        ranks: ints, or "dense".
        forms: of each rank; None is "dense" and else "factors".
        itemsize: bytes of a weight.
        rows: of x in each call for a batch; empty where unknown.
        error: at a rank.
        ms: at each of the ranks.
    """
    if forms is None:
        forms = ["dense" if isinstance(rank, str) else "factors" for rank in ranks]
    # Beside the matrices, in bytes.
    extra = {"factors": 0.0, "dense": 0.0, "pivoted": float(layer.N * _ORDER_BYTES)}
    rank_bytes = {"factors": _RANK_BYTES, "dense": 0.0, "pivoted": 0.0}
    macs = np.array([layer.weights(r, f) for r, f in zip(ranks, forms, strict=True)], float)
    weights = macs + np.array([extra[form] for form in forms]) / itemsize
    return Choices(
        layer,
        tuple(ranks),
        tuple(forms),
        Costs(
            np.array([error(rank) for rank in ranks], float),
            weights,
            macs * (sum(rows) if rows else 1),
            weights * itemsize + np.array([rank_bytes[form] for form in forms]),
            None if ms is None else np.array(ms, float),
        ),
    )


def multiples(layer: Layer, multiple_of: int, min_rank: int) -> list[int | str]:
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
    return found


def current_bytes(module: nn.Module, layer: Layer) -> int:
    """Bytes of the weights, and of the active rank, that a layer stores now."""
    if isinstance(module, LoDLayer):
        factors = module.u.numel() + module.v.numel()
        return factors * module.u.element_size() + _RANK_BYTES
    return layer.dense_weights * module_dtype(module).itemsize


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
