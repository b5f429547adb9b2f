"""Training one factor at a time, and ranks that hardware likes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from maestro_kernels.arguments import check_int
from maestro_kernels.nn import lod_layers
from maestro_kernels.training.layers import require_layers

# rule(N, K, rank) -> rank.
Rule = Callable[[int, int, int], int]

# The factor of a layer that is frozen for this phase only.
_FROZEN = "_training_frozen"


class SequentialFreezing:
    """Freeze one factor of every LoD layer, and change the factor every `period` epochs.

    In phase 0, 2, ... v is frozen, in phase 1, 3, ... u. The backward does not compute the gradient
    of a frozen factor, and the optimizer leaves it alone: no decay, no momentum.

    Args:
        model: holds LoD layers. Factors that are frozen already stay so.
        period: epochs in a phase, >= 1.

    Example:
        >>> import torch, maestro_kernels as mk
        >>> from maestro_kernels import training
        >>> model = torch.nn.Sequential(mk.LoDLinear(64, 64, 16))
        >>> training.SequentialFreezing(model).epoch(0)
        'v'
        >>> model[0].u.requires_grad, model[0].v.requires_grad
        (True, False)

    Raises:
        TypeError: model is no module.
        ValueError: no LoD layer, period < 1, or a DDP wrapper that waits for every gradient.

    Source: Hajimolahoseini et al., arXiv 2309.03824 (abstract; it gives no schedule).
    """

    def __init__(self, model: nn.Module, period: int = 1) -> None:
        fn = "SequentialFreezing"
        self.period = check_int(fn, "period", period, 1)
        layers = require_layers(fn, model)
        for module in model.modules():
            kinds = {cls.__name__ for cls in type(module).__mro__}
            if "DistributedDataParallel" in kinds and not module.find_unused_parameters:
                raise ValueError(
                    f"{fn}: model: expected DDP with find_unused_parameters=True, which does "
                    "without the gradients of frozen factors, got False"
                )
        self._model = model
        # By name, because shrinking makes new parameters.
        self._trainable = {
            (name, key): getattr(layer, key).requires_grad
            for name, layer in layers.items()
            for key in ("u", "v")
        }

    def epoch(self, n: int) -> str:
        """Freeze the factor whose turn it is in epoch n (from 0); returns its name, "u" or "v"."""
        frozen = "vu"[check_int("SequentialFreezing.epoch", "n", n, 0) // self.period % 2]
        self._set(frozen)
        return frozen

    def reset(self) -> None:
        """Make trainable what was trainable at the start."""
        self._set("")

    def _set(self, frozen: str) -> None:
        layers = require_layers("SequentialFreezing", self._model)
        for name, layer in layers.items():
            for key in ("u", "v"):
                factor, trainable = getattr(layer, key), self._trainable.get((name, key), False)
                factor.requires_grad_(trainable and key != frozen)
                if key == frozen:
                    # A gradient left over from the last phase would still move the factor.
                    factor.grad = None
            vars(layer)[_FROZEN] = frozen if self._trainable.get((name, frozen)) else ""


@contextmanager
def thawed(model: nn.Module) -> Iterator[None]:
    """Let factors that wait for their phase want gradients meanwhile.

    DDP never synchronises a gradient that nobody wants at the time of wrapping.
    """
    waiting = [
        (layer, key) for layer in lod_layers(model).values() if (key := vars(layer).get(_FROZEN))
    ]
    for layer, key in waiting:
        getattr(layer, key).requires_grad_(True)
    try:
        yield
    finally:
        # Looked up again: fully_shard makes new parameters.
        for layer, key in waiting:
            getattr(layer, key).requires_grad_(False)


def quantize_ranks(model: nn.Module, rule: int | Rule = 16) -> dict[str, int]:
    """{layer: active rank moved to one that suits the hardware}, for `set_ranks`.

    Args:
        model: holds LoD layers. Layers at rank 0 stay there.
        rule: a number for the nearest of its multiples (the lower of two, at least one multiple)
            within max_rank, or rule(N, K, rank) -> rank; `below_cliff` makes one of latencies.

    Raises:
        TypeError: model or rule is of another kind, or a rule returns no int.
        ValueError: no LoD layer, rule < 1, or a rule returns a rank outside 1..max_rank.

    Source: Hajimolahoseini et al., arXiv 2407.20266 and 2309.03824.
    """
    fn = "quantize_ranks"
    step = 1 if callable(rule) else check_int(fn, "rule", rule, 1)
    ranks: dict[str, int] = {}
    for name, layer in require_layers(fn, model).items():
        rank, R = layer.rank, layer.max_rank
        if rank == 0:
            ranks[name] = 0
        elif callable(rule):
            N, K = layer.matrix_shape
            found = rule(N, K, rank, R) if isinstance(rule, BelowCliff) else rule(N, K, rank)
            ranks[name] = check_int(fn, f"rule({N}, {K}, {rank})", found, 1, R)
        else:
            down = rank // step * step
            near = down if down and rank - down <= down + step - rank else down + step
            ranks[name] = min(near, R)
    return ranks


def below_cliff(latency: Callable[[int, int, int], float], reach: int = 15) -> BelowCliff:
    """A rule for `quantize_ranks`: the rank near by that takes the least time per component.

    Times rise in steps, so that is the last rank below a step, seldom the first above one.

    Args:
        latency: time of a layer in any unit, latency(N, K, rank), for instance
            `lambda N, K, rank: profile.latency(N=N, K=K, rank=rank, M=64)` of `search.profile`.
        reach: how far a rank may move, >= 0; never beyond 1..max_rank of the layer.

    Raises:
        TypeError: latency is no function, or reach no int.
        ValueError: reach < 0.
    """
    if not callable(latency):
        raise TypeError(f"below_cliff: latency: expected a function, got {type(latency).__name__}")
    return BelowCliff(latency, check_int("below_cliff", "reach", reach, 0))


@dataclass(frozen=True)
class BelowCliff:
    """argmin over r near `rank` of latency(N, K, r) / r; what `below_cliff` returns.

    Attributes:
        latency: latency(N, K, rank).
        reach: how far a rank may move.
    """

    latency: Callable[[int, int, int], float]
    reach: int

    def __call__(self, N: int, K: int, rank: int, R: int | None = None) -> int:
        """The rank for a layer that holds R components, min(N, K) of them if None."""
        top = min(N, K) if R is None else R
        near = range(max(1, rank - self.reach), min(top, rank + self.reach) + 1)
        # Nearest first: min keeps the first of equals.
        nearest = sorted(near, key=lambda r: (abs(r - rank), r))
        return min(nearest, key=lambda r: self.latency(N, K, r) / r)
