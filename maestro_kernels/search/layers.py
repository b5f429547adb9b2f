"""The layers that a search considers, their costs per rank, and the rows of x they see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maestro_kernels.nn.candidates import Selector, classify, selector
from maestro_kernels.nn.conv import LoDConv2d
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.nn.moments import calibrating, run_batch

__all__ = ["Layer", "at_full_rank", "considered", "count_rows", "first_tensor"]


@dataclass(frozen=True)
class Layer:
    """One layer whose rank can be chosen.

    Attributes:
        name: dotted name in the model.
        kind: as classify names it.
        N: rows of its matrix, per group.
        K: columns of its matrix, per group.
        groups: matrices of this size.
        max_rank: largest rank to choose, min(N, K) of a dense layer, R of a factorised one.
        can_be_dense: whether "dense" is a choice. A factorised layer becomes dense by merging its
            active prefix, so it must be at its full rank.
    """

    name: str
    kind: str
    N: int
    K: int
    groups: int
    max_rank: int
    can_be_dense: bool

    @property
    def factorised(self) -> bool:
        """Whether the model holds it as two factors already."""
        return self.kind.startswith("lod_")

    @property
    def convolution(self) -> bool:
        """Whether it is a 2-d convolution."""
        return self.kind.endswith("conv2d")

    @property
    def dense_weights(self) -> int:
        """Weights of the dense matrix, over all groups."""
        return self.groups * self.N * self.K

    def weights(self, rank: int | str) -> int:
        """Weights at a rank, or dense."""
        if isinstance(rank, str):
            return self.dense_weights
        return self.groups * rank * (self.N + self.K)


def considered(
    model: nn.Module, include: Selector = None, exclude: Selector = None, *, fn: str
) -> dict[str, Layer]:
    """The layers to choose ranks for, dense and factorised, in module order.

    Args:
        model: any module.
        include: only these; as `classify`.
        exclude: not these; as `classify`.
        fn: the public function that errors name.

    Raises:
        TypeError: model is no module, or a selector of the wrong type.
        ValueError: a pattern matches nothing, or no layer is left.
    """
    found = {}
    candidates = classify(model, include, exclude, fn=fn)
    modules = dict(model.named_modules())
    included = selector(fn, "include", include, modules, default=True)
    excluded = selector(fn, "exclude", exclude, modules, default=False)
    for name, c in candidates.items():
        module = modules[name]
        if isinstance(module, LoDLayer):
            if not included(name, module) or excluded(name, module):
                continue
            # A dense layer has no activation of its own.
            mergeable = getattr(module, "activation", None) is None
            dense = mergeable and module.rank == module.max_rank
            found[name] = Layer(name, c.kind, c.N, c.K, c.groups, module.max_rank, dense)
        elif c.reason is None:
            found[name] = Layer(name, c.kind, c.N, c.K, c.groups, c.full_rank, True)
    if not found:
        raise ValueError(
            f"{fn}: model: expected at least one layer whose rank can be chosen, got none"
        )
    return found


def count_rows(
    model: nn.Module, names: Mapping[str, Any], batch: Any, *, fn: str
) -> dict[str, tuple[int, ...]]:
    """Rows of x (output positions of a convolution) in each call of each layer for one batch.

    A layer that the batch does not reach has no calls: an empty tuple.

    Args:
        model: run once, in eval mode without gradients.
        names: the layers to count, by name.
        batch: a tensor, tuple or dict.
        fn: the public function that errors name.
    """
    rows: dict[str, list[int]] = {name: [] for name in names}
    modules = dict(model.named_modules())

    def watch(name: str) -> Any:
        def count(module: nn.Module, args: Any, y: Tensor) -> None:
            channels = 1 if isinstance(module, nn.Conv2d | LoDConv2d) else -1
            size = y.shape[-3] if channels == 1 else y.shape[-1]
            rows[name].append(y.numel() // size if size else 0)

        return count

    handles = [modules[name].register_forward_hook(watch(name)) for name in names]
    try:
        with calibrating(model):
            run_batch(model, batch, fn=fn, argument="batch")
    finally:
        for handle in handles:
            handle.remove()
    return {name: tuple(found) for name, found in rows.items()}


@contextmanager
def at_full_rank(model: nn.Module, names: Mapping[str, Any]) -> Iterator[None]:
    """Run the named factorised layers at max_rank; their active ranks come back afterwards."""
    modules = dict(model.named_modules())
    layers = [m for name in names if isinstance(m := modules[name], LoDLayer)]
    before = [layer.rank for layer in layers]
    try:
        for layer in layers:
            layer.rank = layer.max_rank
        yield
    finally:
        for layer, rank in zip(layers, before, strict=True):
            layer.rank = rank


def first_tensor(output: Any) -> Tensor:
    """The first floating-point tensor in a model's output: a tensor, tuple, list or mapping.

    Raises:
        TypeError: there is none.
    """
    if isinstance(output, Tensor):
        if output.is_floating_point():
            return output
    elif isinstance(output, Mapping | tuple | list):
        for value in output.values() if isinstance(output, Mapping) else output:
            try:
                return first_tensor(value)
            except TypeError:
                continue
    raise TypeError(f"expected a floating-point tensor in the output, got {type(output).__name__}")


def storage_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def module_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of the layer's matrix."""
    weight = module.u if isinstance(module, LoDLayer) else module.weight
    assert isinstance(weight, Tensor)
    return weight.dtype
