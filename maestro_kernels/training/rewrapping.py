"""Shrinking under data parallelism: take the wrapper off, shrink, put it on again."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from maestro_kernels.training.freezing import thawed
from maestro_kernels.training.layers import require_layers, unwrapped
from maestro_kernels.training.optimizer_state import Optimizers, check_optimizers
from maestro_kernels.training.shrinking import Report, ShrinkOptions, shrink_plain, wrappers
from maestro_kernels.training.unshard import replaced_everywhere, unshard


def rewrap(
    model: nn.Module,
    optimizer: Optimizers,
    wrap_fn: Callable[[nn.Module], nn.Module],
    threshold: float = 1e-5,
    *,
    min_rank: int = 1,
    multiple_of: int = 1,
    min_saving: float = 0.125,
    dense: bool = False,
) -> tuple[nn.Module, Report]:
    """Shrink a model inside DDP or FSDP2: gather, unwrap, `shrink`, and wrap again.

    All processes call it, at the same place between `optimizer.step()` and the next backward;
    gradients are dropped. Modules stay the same objects, so samplers and freezers go on. With
    FSDP2 every process needs room for the whole model and its optimizer state meanwhile.

    Args:
        model: wrapped by DistributedDataParallel, sharded by `fully_shard`, or plain. What
            torch.compile put around it is taken off too.
        optimizer: the optimizer of these parameters, several, or None. It keeps its state.
        wrap_fn: gets the bare model and returns the wrapped one: `DistributedDataParallel`, or a
            function that calls `fully_shard`, and torch.compile, as at the start.
        threshold: this and the other options are those of `shrink`.
        min_rank: see shrink.
        multiple_of: see shrink.
        min_saving: see shrink.
        dense: see shrink.

    Returns:
        The wrapped model, which takes the place of `model`, and the report of `shrink`.

    Raises:
        TypeError: an argument of the wrong type, or wrap_fn returns no module.
        ValueError: as in `shrink`; processes whose factors differ keep the least rank of any, and
            all of them raise where one would. The model is then as it was, and still wrapped.
        NotImplementedError: another wrapper (FSDP1, tensor parallelism), or one inside the model.

    Example:
        >>> from torch.nn.parallel import DistributedDataParallel as DDP
        >>> model = DDP(model)  # doctest: +SKIP
        >>> model, report = training.rewrap(model, optimizer, DDP)  # doctest: +SKIP
    """
    fn = "rewrap"
    options = ShrinkOptions(fn, threshold, min_rank, multiple_of, min_saving, dense)
    if not callable(wrap_fn):
        raise TypeError(f"{fn}: wrap_fn: expected a function, got {type(wrap_fn).__name__}")
    layers = require_layers(fn, model)
    optimizers = check_optimizers(fn, optimizer)
    bare = unwrapped(model)
    sharded = _is_sharded(fn, bare)
    groups = [] if sharded else _groups_of(model)
    _drop_gradients(bare, optimizers)
    if sharded:
        groups = unshard(fn, bare, optimizers)
    try:
        report = shrink_plain(fn, bare, layers, optimizers, options, lambda n: _least(n, groups))
    except Exception:
        if sharded:
            # fully_shard works in place: this model, not another one, has to be sharded again.
            _wrap(fn, bare, wrap_fn, optimizers)
        raise
    return _wrap(fn, bare, wrap_fn, optimizers), report


def _is_sharded(fn: str, bare: nn.Module) -> bool:
    """Whether fully_shard was applied to the model or parts of it; raises for other wrappers."""
    inside = wrappers(bare)
    for name, wrapper in inside.items():
        if wrapper != "FSDPModule":
            raise NotImplementedError(
                f"{fn}: model: expected DDP around the whole model, fully_shard or neither, "
                f"got {wrapper} at {name or 'the model itself'!r}"
            )
    for name, parameter in bare.named_parameters():
        if not inside and type(parameter.data) is not Tensor:
            raise NotImplementedError(
                f"{fn}: model: expected parameters sharded by fully_shard alone, "
                f"got a {type(parameter.data).__name__} at {name!r}"
            )
    return bool(inside)


def _groups_of(model: nn.Module) -> list[object]:
    """The process group of the DDP wrapper around a model, if there is one."""
    while True:
        if type(model).__name__ == "DistributedDataParallel":
            return [model.process_group]
        inner = model._modules.get("_orig_mod")
        if inner is None:
            return []
        model = inner


def _least(counts: Tensor, groups: Iterable[object]) -> Tensor:
    """Element-wise minimum over all processes; -1, not finite, wins."""
    for group in groups:
        torch.distributed.all_reduce(
            counts,
            op=torch.distributed.ReduceOp.MIN,
            group=group,  # type: ignore[arg-type]
        )
    return counts


def _drop_gradients(model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    model.zero_grad(set_to_none=True)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def _wrap(
    fn: str,
    bare: nn.Module,
    wrap_fn: Callable[[nn.Module], nn.Module],
    optimizers: list[Optimizer],
) -> nn.Module:
    """Wrap, and let the optimizers follow where that made other parameters."""
    places = [
        (module, key, parameter)
        for module in bare.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None
    ]
    with thawed(bare):
        wrapped = wrap_fn(bare)
        if not isinstance(wrapped, nn.Module):
            raise TypeError(
                f"{fn}: wrap_fn: expected it to return the wrapped module, "
                f"got {type(wrapped).__name__}"
            )
    fresh: dict[nn.Parameter, nn.Parameter] = {}
    for module, key, old in places:
        new = module._parameters.get(key)
        if new is None:
            raise NotImplementedError(
                f"{fn}: wrap_fn: expected DistributedDataParallel, fully_shard or another wrapper "
                f"that keeps the modules' parameters, got one that took {key!r} from a "
                f"{type(module).__name__}"
            )
        if new is not old:
            fresh[old] = new
    replaced_everywhere(bare, fresh, optimizers)
    return wrapped
