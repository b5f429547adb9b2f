"""What all of training asks of a model: its LoD layers, their names and their full ranks."""

from __future__ import annotations

from torch import nn

from maestro_kernels.nn import LoDLayer
from maestro_kernels.nn.active_ranks import find_layers

# A plain attribute, so that copies and pickles of a layer keep it; `state_dict` stays as it was.
_FULL_RANK = "_training_full_rank"
# The child that holds the model in what torch.compile and data parallelism put around it.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
}


def full_rank(layer: LoDLayer) -> int:
    """The components still alive: max_rank, or less where `shrink` zeroed a tail it did not cut."""
    return min(vars(layer).get(_FULL_RANK, layer.max_rank), layer.max_rank)


def set_full_rank(layer: LoDLayer, rank: int) -> None:
    """Declare components beyond `rank` dead, and run the layer at `rank`."""
    vars(layer)[_FULL_RANK] = rank
    layer.rank = rank
    # Its factors may be new ones: what nn.prepack made of the old is not used again.
    layer.changed()


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's and DistributedDataParallel's wrappers."""
    while (child := _WRAPPERS.get(type(model).__name__)) is not None:
        inner = model._modules.get(child)
        if inner is None:
            break
        model = inner
    return model


def require_layers(fn: str, model: nn.Module) -> dict[str, LoDLayer]:
    """The LoD layers by name, in module order; names do not depend on compilation or DDP.

    Raises:
        TypeError: model is no module.
        ValueError: model has no LoD layer.
    """
    inner = unwrapped(model) if isinstance(model, nn.Module) else model
    layers = find_layers(fn, inner)
    if not layers:
        raise ValueError(
            f"{fn}: model: expected at least one LoD layer (convert makes them), "
            f"got {type(model).__name__} without one"
        )
    return {name.replace("_orig_mod.", ""): layer for name, layer in layers.items()}
