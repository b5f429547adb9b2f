"""Undoing FSDP2's `fully_shard`: the same modules with whole, plain parameters.

torch has no call for it. `fully_shard` leaves its marks in four places, all undone here: the
modules' class, their hooks, their __dict__ and a table of torch's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_NOTES = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
_FSDP = "torch.distributed.fsdp"


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to this very module."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def unshard(fn: str, model: nn.Module, optimizers: Iterable[Optimizer]) -> list[Any]:
    """Give an FSDP2 model whole, plain parameters and plain modules, and the optimizers too.

    All processes call it together. Gradients are dropped.

    Returns:
        The process groups that the parameters were spread over.

    Raises:
        NotImplementedError: parameters sharded by something else than data parallelism. Nothing has
            changed then.
    """
    registered = _registered(fn)
    roots = {n: m for n, m in model.named_modules() if is_sharded(m)}
    for module in roots.values():
        # After a forward without a backward the root still holds its gathered parameters.
        module.reshard()  # type: ignore[operator]
    sharded = {n: p for n, p in model.named_parameters() if type(p.data) is not Tensor}
    for name, parameter in sharded.items():
        placements = getattr(parameter, "placements", ())
        inside = any(not root or name.startswith(f"{root}.") for root in roots)
        if not inside or sum(not place.is_replicate() for place in placements) > 1:
            raise NotImplementedError(
                f"{fn}: model: expected parameters sharded by fully_shard alone, got a "
                f"{type(parameter.data).__name__} at {name!r} with the placements {placements}"
            )
    meshes = {p.device_mesh: None for p in sharded.values()}  # type: ignore[attr-defined]
    replaced_everywhere(model, {p: _plain(p) for p in sharded.values()}, optimizers)
    for module in roots.values():
        _strip(module)
        registered.pop(module, None)
    for module in model.modules():
        _strip_hooks(module)
    return [group for mesh in meshes for group in mesh.get_all_groups()]


def whole(value: Any) -> Any:
    """A DTensor gathered from all processes; anything else as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def like_parameter(value: Any, parameter: Tensor) -> Any:
    """A piece of optimizer state laid out like its parameter, which may be a DTensor.

    Every process holds all of `value`, so nothing is sent.
    """
    if not hasattr(parameter, "device_mesh") or not isinstance(value, Tensor) or value.dim() == 0:
        return value
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = [
        Replicate() if p.is_shard() and value.shape[p.dim] != parameter.shape[p.dim] else p
        for p in parameter.placements  # type: ignore[attr-defined]
    ]
    return distribute_tensor(value, parameter.device_mesh, placements, src_data_rank=None)


def replaced_everywhere(
    model: nn.Module,
    fresh: Mapping[nn.Parameter, nn.Parameter],
    optimizers: Iterable[Optimizer],
) -> None:
    """Swap parameters in modules and optimizers; state is gathered or laid out like the new one."""
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter in fresh:
                module._parameters[key] = fresh[parameter]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [fresh.get(p, p) for p in group["params"]]
        # The keys leave one by one: at no time are all states there twice.
        for old, new in fresh.items():
            if old not in optimizer.state:
                continue
            state = optimizer.state.pop(old)
            optimizer.state[new] = {k: like_parameter(whole(v), new) for k, v in state.items()}


def _plain(parameter: nn.Parameter) -> nn.Parameter:
    with torch.no_grad():
        full = whole(parameter.data)
    return nn.Parameter(full, requires_grad=parameter.requires_grad)


def _registered(fn: str) -> Any:
    """The table of the modules that fully_shard manages; it takes none twice."""
    try:
        from torch.distributed._composable_state import _module_state_mapping
    except ImportError as error:
        raise NotImplementedError(
            f"{fn}: model: expected a torch whose fully_shard can be undone, "
            f"got {torch.__version__}"
        ) from error
    return _module_state_mapping


def _strip(module: nn.Module) -> None:
    """Take fully_shard's class and entries off a module."""
    mro = type(module).__mro__
    names = [cls.__name__ for cls in mro]
    module.__class__ = mro[names.index("FSDPModule") + 1]
    for key in list(vars(module)):
        if key.startswith("__composable_api_state_key") or _from_fsdp(vars(module)[key]):
            del vars(module)[key]


def _strip_hooks(module: nn.Module) -> None:
    for key in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
        vars(module).pop(key, None)
    for key in _HOOKS:
        hooks = vars(module).get(key, {})
        for index in [i for i, hook in hooks.items() if _from_fsdp(hook)]:
            del hooks[index]
            for note in _NOTES:
                vars(module).get(note, {}).pop(index, None)


def _from_fsdp(value: Any) -> bool:
    """Whether a function, however wrapped, is written in torch's FSDP."""
    return any(
        getattr(f, "__globals__", {}).get("__name__", "").startswith(_FSDP) for f in _layers(value)
    )


def _layers(value: Any) -> Iterator[Any]:
    """A callable and what it wraps: load hooks, partials, bound methods, disabled functions."""
    while value is not None:
        yield value
        if isinstance(value, functools.partial):
            value = value.func
        else:
            value = next(
                (
                    inner
                    for name in ("hook", "__func__", "__wrapped__", "_torchdynamo_orig_callable")
                    if callable(inner := getattr(value, name, None))
                ),
                None,
            )
