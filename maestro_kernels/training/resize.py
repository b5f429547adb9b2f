"""Loading the state_dict of a shrunken model into a fresh one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maestro_kernels.nn import LoDLayer, lod_layers, ungroup
from maestro_kernels.nn.conversion import dense_form
from maestro_kernels.nn.swapping import swap_layers
from maestro_kernels.training.layers import require_layers, set_full_rank
from maestro_kernels.training.optimizer_state import Optimizers, check_optimizers, replace_parameter
from maestro_kernels.training.shrinking import hold_dense, refuse_wrapped


def load_shrunken(
    model: nn.Module, state_dict: Mapping[str, Any], optimizer: Optimizers = None
) -> nn.Module:
    """Load a state_dict whose LoD layers hold other ranks, resizing the model's layers to fit.

    Layers that became dense in the checkpoint become dense here. What is loaded is, bit for bit,
    what was saved; components that are zero at the end of both factors count as dead, as after
    `shrink`.

    Args:
        model: the architecture as it was before shrinking: converted, of any ranks.
        state_dict: from `model.state_dict()` of a model that `shrink` or `truncate` resized.
        optimizer: an optimizer already made for `model`: it gets the resized parameters, without
            state. Then load its own state_dict. One made afterwards needs nothing.

    Returns:
        The model; a new module only where the model is itself a layer that became dense.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a checkpoint of another architecture, or a wrapped model. The model is then
            unchanged.
    """
    fn = "load_shrunken"
    require_layers(fn, model)
    refuse_wrapped(fn, model)
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"{fn}: state_dict: expected a mapping of names to tensors, "
            f"got {type(state_dict).__name__}"
        )
    optimizers = check_optimizers(fn, optimizer)
    widths, dense = _compare(fn, model, state_dict)
    swaps: dict[nn.Module, nn.Module] = {la: dense_form(la, share=True) for la in dense}
    fresh: dict[nn.Parameter, nn.Parameter] = {}
    for layer, width in widths.items():
        for key in ("u", "v"):
            old = getattr(layer, key)
            if old not in fresh:
                fresh[old] = _resized(old, _shape(layer, key, width))
                replace_parameter(optimizers, old, fresh[old])
            setattr(layer, key, fresh[old])
        set_full_rank(layer, width)
    for layer in dense:
        weight = swaps[layer].weight
        assert isinstance(weight, nn.Parameter)
        hold_dense(optimizers, layer, weight)
    if swaps:
        ungroup(model, only=swaps)
        model = swap_layers(model, swaps, inplace=True)
    model.load_state_dict(dict(state_dict))
    for layer in lod_layers(model).values():
        rank = layer.rank
        set_full_rank(layer, max(_living(layer), rank))
        layer.rank = rank
    return model


def resize_on_load(model: nn.Module) -> Any:
    """Let `model.load_state_dict` take the ranks of what it loads; returns a removable handle.

    For trainers that load checkpoints by themselves, before they make the optimizer.
    """
    return model.register_load_state_dict_pre_hook(_resize_hook)


# A function of the module, not a closure: models with this hook can still be pickled.
def _resize_hook(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name, layer in lod_layers(module).items():
        u: Any = state_dict.get(f"{prefix}{name}.u" if name else f"{prefix}u")
        width = _width(layer, u)
        # Whatever else is wrong with it, load_state_dict itself will say so.
        if width and len(u) == len(layer.u) and width != layer.max_rank:
            layer.u = _resized(layer.u, _shape(layer, "u", width))
            layer.v = _resized(layer.v, _shape(layer, "v", width))
            set_full_rank(layer, width)


def _compare(
    fn: str, model: nn.Module, state: Mapping[str, Any]
) -> tuple[dict[LoDLayer, int], list[LoDLayer]]:
    """The layers to resize and those to make dense; raises unless all the rest fits."""
    expected = {key: tuple(t.shape) for key, t in model.state_dict().items() if _is_tensor(t)}
    widths: dict[LoDLayer, int] = {}
    dense: list[LoDLayer] = []
    for name, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, LoDLayer):
            continue
        prefix = f"{name}." if name else ""
        if prefix + "u" not in state and prefix + "weight" in state:
            for key in ("u", "v", "active_rank"):
                expected.pop(prefix + key, None)
            expected[prefix + "weight"] = tuple(layer.weight.shape)
            if layer not in dense:
                dense.append(layer)
            continue
        width = _width(layer, state.get(prefix + "u"))
        if width is not None:
            expected[prefix + "u"] = _shape(layer, "u", width)
            expected[prefix + "v"] = _shape(layer, "v", width)
            if width != layer.max_rank:
                widths[layer] = width
    problems = [f"no {key!r}" for key in expected if key not in state]
    own = model.state_dict()
    for key, value in state.items():
        if key not in expected:
            if key not in own or _is_tensor(own[key]):
                problems.append(f"an unknown {key!r}")
        elif not _is_tensor(value) or tuple(value.shape) != expected[key]:
            got = tuple(value.shape) if _is_tensor(value) else type(value).__name__
            problems.append(f"{key!r} of shape {got} instead of {expected[key]}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(
            f"{fn}: state_dict: expected a checkpoint of this architecture, got "
            + ", ".join(problems[:4])
            + more
        )
    return widths, dense


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _width(layer: LoDLayer, u: Any) -> int | None:
    """The components that a checkpoint holds of a layer, or None where it cannot be its u."""
    if not isinstance(u, Tensor) or u.dim() != 2 or u.shape[1] > min(layer.matrix_shape):
        return None
    return int(u.shape[1])


def _shape(layer: LoDLayer, key: str, width: int) -> tuple[int, ...]:
    if key == "u":
        return (layer.u.shape[0], width)
    return (layer.groups * width, *layer.v.shape[1:])


def _resized(old: nn.Parameter, shape: tuple[int, ...]) -> nn.Parameter:
    new = nn.Parameter(
        torch.zeros(shape, dtype=old.dtype, device=old.device), requires_grad=old.requires_grad
    )
    vars(new).update(vars(old))
    return new


def _living(layer: LoDLayer) -> int:
    """The components up to the last one that is not zero in both factors."""
    if layer.u.is_meta:
        return layer.max_rank
    with torch.no_grad():
        v = layer.v.flatten(1).unflatten(0, (layer.groups, layer.max_rank))
        used = (layer.u != 0).any(0) | (v != 0).any(2).any(0)
        return int(used.nonzero().amax()) + 1 if bool(used.any()) else 0
