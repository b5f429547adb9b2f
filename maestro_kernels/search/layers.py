"""The layers that a search considers, their costs per rank, and the rows of x they see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from maestro_kernels.nn.candidates import Selector, find_candidates, selector
from maestro_kernels.nn.conv import channels_dim
from maestro_kernels.nn.kinds import CONVOLUTIONS
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.nn.moments import calibrating, run_batch
from maestro_kernels.nn.swapping import opened

Function = TypeVar("Function", bound=Callable[..., Any])


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
        """Whether it is a convolution."""
        return self.kind in CONVOLUTIONS

    @property
    def dense_weights(self) -> int:
        """Weights of the dense matrix, over all groups."""
        return self.groups * self.N * self.K

    def weights(self, rank: int | str, form: str = "factors") -> int:
        """Entries of the matrices at a rank, which are multiply-adds per row of x too.

        Args:
            rank: or "dense".
            form: "factors"; "dense"; "pivoted", [I; U] in place of u.
        """
        if isinstance(rank, str) or form == "dense":
            return self.dense_weights
        return self.groups * rank * (self.N + self.K - (rank if form == "pivoted" else 0))


def on_open_model(function: Function) -> Function:
    """Decorate a function whose first argument is a model: it sees every matrix as a layer.

    Modules that keep several matrices in parameters of their own are open meanwhile.
    """

    @wraps(function)
    def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(model, nn.Module):
            return function(model, *args, **kwargs)
        with opened(model) as opening:
            return function(opening.model, *args, **kwargs)

    return call  # type: ignore[return-value]


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
    candidates = find_candidates(fn, model, include, exclude)
    modules = dict(model.named_modules())
    included = selector(fn, "include", include, modules, default=True)
    excluded = selector(fn, "exclude", exclude, modules, default=False)
    for name, c in candidates.items():
        module = modules[name]
        if isinstance(module, LoDLayer):
            if not included(name, module) or excluded(name, module):
                continue
            found[name] = factorised_layer(name, module, module.max_rank)
        elif c.reason is None:
            found[name] = Layer(name, c.kind, c.N, c.K, c.groups, c.full_rank, True)
    if not found:
        raise ValueError(
            f"{fn}: model: expected at least one layer whose rank can be chosen, got none"
        )
    return found


def factorised_layer(name: str, module: LoDLayer, top: int) -> Layer:
    """What a factorised layer is, whose ranks go up to `top`."""
    # A dense layer has no activation of its own.
    mergeable = getattr(module, "activation", None) is None
    N, K = module.matrix_shape
    return Layer(name, module.kind, N, K, module.groups, top, mergeable and module.rank == top)


@dataclass
class Observed:
    """What batches show of a layer.

    Attributes:
        rows: of x (output positions of a convolution), in each call for the first batch.
        x: input of the first call for any batch; None where no batch reaches it, or it is not kept.
    """

    rows: tuple[int, ...] = ()
    x: Tensor | None = None


def observe(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any],
    *,
    keep_inputs: bool = False,
) -> dict[str, Observed]:
    """Watch layers during one forward pass over each batch, in eval mode without gradients.

    Args:
        model: run.
        modules: the layers to watch, by name.
        batches: the first one tells the rows.
        run: run(model, batch).
        keep_inputs: copy the first input of each layer.
    """
    seen = {name: Observed() for name in modules}
    first = True

    def watch(found: Observed) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
            if first:
                size = y.shape[channels_dim(module)]
                found.rows += (y.numel() // size if size else 0,)
            if keep_inputs and found.x is None:
                x = args[0] if args else next(iter(kwargs.values()))
                found.x = x.detach().clone()

        return note

    handles = [
        module.register_forward_hook(watch(seen[name]), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        with calibrating(model):
            for batch in batches:
                run(model, batch)
                first = False
    finally:
        for handle in handles:
            handle.remove()
    return seen


def count_rows(
    model: nn.Module, names: Iterable[str], batch: Any, *, fn: str
) -> dict[str, tuple[int, ...]]:
    """Rows of x (output positions of a convolution) in each call of each layer for one batch.

    A layer that the batch does not reach has no calls: an empty tuple.

    Args:
        model: run once, in eval mode without gradients.
        names: the layers to count.
        batch: a tensor, tuple or dict.
        fn: the public function that errors name.
    """
    modules = dict(model.named_modules())
    run = partial(run_batch, fn=fn, argument="batch")
    seen = observe(model, {name: modules[name] for name in names}, [batch], run)
    return {name: one.rows for name, one in seen.items()}


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
