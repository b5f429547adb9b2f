"""Slicing what an optimizer remembers of a parameter, and swapping parameters inside optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Optimizers = Optimizer | Sequence[Optimizer] | None
# They keep parameters, or pieces of them, in places of their own.
_OPAQUE = ("LBFGS", "ZeroRedundancyOptimizer")


@dataclass(frozen=True)
class Cut:
    """Components 0..width-1 of `size`, which lie along `dim` of a factor, group after group."""

    dim: int
    size: int
    width: int
    groups: int = 1

    def prefix(self, tensor: Tensor) -> Tensor:
        """The first `width` components, in memory of their own."""
        parts = tensor.unflatten(self.dim, (self.groups, self.size)).narrow(
            self.dim + 1, 0, self.width
        )
        return parts.flatten(self.dim, self.dim + 1).clone(memory_format=torch.contiguous_format)

    def clear(self, tensor: Tensor) -> None:
        """Zero the components from `width` on."""
        parts = tensor.unflatten(self.dim, (self.groups, self.size))
        parts.narrow(self.dim + 1, self.width, self.size - self.width).zero_()

    def applies_to(self, state: Any, parameter: Tensor) -> bool:
        """Whether this piece of optimizer state has the components, and not a 1 in their place."""
        return (
            isinstance(state, Tensor)
            and state.dim() == parameter.dim()
            and state.shape[self.dim] == parameter.shape[self.dim]
        )


def check_optimizers(fn: str, optimizer: Optimizers) -> list[Optimizer]:
    """One, several or no optimizers as a list; raises for those that cannot be taken apart."""
    if optimizer is None:
        return []
    found = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    expected = f"{fn}: optimizer: expected a torch.optim.Optimizer, a sequence of them or None"
    if not isinstance(found, Sequence):
        raise TypeError(f"{expected}, got {type(optimizer).__name__}")
    found = [bare_optimizer(item) for item in found]
    for item in found:
        if not isinstance(item, Optimizer):
            raise TypeError(f"{expected}, got {type(item).__name__} in it")
        opaque = [c.__name__ for c in type(item).__mro__ if c.__name__ in _OPAQUE]
        if opaque:
            raise NotImplementedError(
                f"{fn}: optimizer: expected one that keeps its state per parameter, got {opaque[0]}"
            )
    return list(found)


def bare_optimizer(optimizer: Any) -> Any:
    """The optimizer inside the one that accelerate's `prepare` gave out, else itself."""
    while any(cls.__name__ == "AcceleratedOptimizer" for cls in type(optimizer).__mro__):
        optimizer = optimizer.optimizer
    return optimizer


def check_state(fn: str, optimizers: Iterable[Optimizer], names: dict[Tensor, str]) -> None:
    """Raise unless all state is a scalar, has its parameter's shape, or that with ones in it.

    The whole optimizer is looked at, because a square preconditioner may happen to have the shape
    of the one parameter that is cut.
    """
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            entries = state if isinstance(parameter, Tensor) else {parameter: state}
            for key, value in entries.items():
                if not _sliceable(value, parameter):
                    got = (
                        f"shape {tuple(value.shape)}"
                        if isinstance(value, Tensor)
                        else type(value).__name__
                    )
                    raise NotImplementedError(
                        f"{fn}: optimizer: expected state of the parameter's shape "
                        f"{tuple(parameter.shape)} for {names.get(parameter, 'a parameter')}, "
                        f"got {type(optimizer).__name__} state {key!r} of {got}"
                    )


def _sliceable(value: Any, parameter: Tensor) -> bool:
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, bool | int | float | str)
    if value.dim() == 0 or value.shape == (1,):
        return True
    return value.dim() == parameter.dim() and all(
        have in (want, 1) for have, want in zip(value.shape, parameter.shape, strict=True)
    )


def replace_parameter(
    optimizers: Iterable[Optimizer], old: nn.Parameter, new: nn.Parameter, cut: Cut | None = None
) -> None:
    """Put `new` in the place of `old`, with old's state cut; without a cut state is dropped."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [new if p is old else p for p in group["params"]]
        if old not in optimizer.state:
            continue
        state = optimizer.state.pop(old)
        if cut is None:
            continue
        kept = {k: cut.prefix(v) if cut.applies_to(v, old) else v for k, v in state.items()}
        _rebalance(kept, state, cut)
        optimizer.state[new] = kept


def clear_state(optimizers: Iterable[Optimizer], parameter: nn.Parameter, cut: Cut) -> None:
    """Zero what is remembered of the components beyond the cut."""
    for optimizer in optimizers:
        if parameter in optimizer.state:
            state = optimizer.state[parameter]
            before = {k: v.clone() for k, v in state.items() if k in _FACTORED}
            for value in state.values():
                if cut.applies_to(value, parameter):
                    cut.clear(value)
            _rebalance(state, before, cut)


def drop_parameter(optimizers: Iterable[Optimizer], old: nn.Parameter) -> None:
    """Take a parameter, its state and its name out of the optimizers."""
    for optimizer in optimizers:
        optimizer.state.pop(old, None)
        for group in optimizer.param_groups:
            keep = [i for i, p in enumerate(group["params"]) if p is not old]
            for key in ("params", "param_names"):
                if key in group:
                    group[key][:] = [group[key][i] for i in keep]


_FACTORED = ("row_var", "col_var")


def _rebalance(state: dict[str, Any], before: dict[str, Any], cut: Cut) -> None:
    """Adafactor of a matrix: keep row_var @ col_var / mean(row_var) of what is left as it was.

    Both means are the mean squared gradient, so what one lost the other has to lose too.
    """
    if not all(isinstance(state.get(key), Tensor) for key in _FACTORED):
        return
    lost, whole = ("col_var", "row_var") if cut.dim == 1 else ("row_var", "col_var")
    if state[lost].dim() != 2:
        return
    old, new = before[lost].mean(), state[lost].mean()
    state[whole].mul_(torch.where(old > 0, new / old, 1))
