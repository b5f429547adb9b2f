"""The ranks of a whole model: read them, set them, drop what lies beyond them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from maestro_kernels.arguments import check_int, check_model, renamed
from maestro_kernels.nn.candidates import classify
from maestro_kernels.nn.conversion import dense_form
from maestro_kernels.nn.grouping import ungroup
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.nn.swapping import swap_layers


def lod_layers(model: nn.Module) -> dict[str, LoDLayer]:
    """The factorised layers of a model by name, in module order.

    Raises:
        TypeError: model is no module.
    """
    return find_layers("lod_layers", model)


def find_layers(fn: str, model: nn.Module) -> dict[str, LoDLayer]:
    """`lod_layers` for the public function that errors name."""
    check_model(fn, model)
    return {name: m for name, m in model.named_modules() if isinstance(m, LoDLayer)}


def ranks(model: nn.Module) -> dict[str, int | str]:
    """{name: active rank}, and "dense" for the layers that could be factorised but are not."""
    found: dict[str, int | str] = {}
    layers = find_layers("ranks", model)
    for name, candidate in classify(model).items():
        if name in layers:
            found[name] = layers[name].rank
        elif candidate.reason is None:
            found[name] = "dense"
    return found


# Under a name that `set_ranks` does not take for its argument.
_ranks = ranks


@renamed(new="ranks")
def set_ranks(model: nn.Module, ranks: Mapping[str, int | str]) -> nn.Module:
    """Set active ranks; "dense" replaces a layer by the dense form of its active prefix.

    Layers that `ranks` does not name keep theirs. Everything is checked before anything changes.

    Args:
        model: a model with factorised layers.
        ranks: {name: rank or "dense"}, names as `mk.ranks(model)` gives them.

    Returns:
        The model; a new module only where the model itself is a layer that became dense.

    Raises:
        TypeError: a rank is no int and not "dense".
        ValueError: an unknown name, or a rank outside 0..max_rank.
    """
    layers = find_layers("set_ranks", model)
    if not isinstance(ranks, Mapping):
        raise TypeError(
            f"set_ranks: ranks: expected a mapping of names to ranks, got {type(ranks).__name__}"
        )
    known = _ranks(model)
    numbers: dict[str, int] = {}
    dense: dict[nn.Module, nn.Module] = {}
    for name, value in ranks.items():
        if name not in known:
            some = ", ".join(list(known)[:4]) or "no such layer"
            raise ValueError(
                f"set_ranks: ranks: expected names of layers ({some}, ...), got {name!r}"
            )
        if isinstance(value, str):
            if value != "dense":
                raise ValueError(
                    f"set_ranks: ranks[{name!r}]: expected an int or 'dense', got {value!r}"
                )
            if name in layers:
                dense[layers[name]] = dense_form(layers[name], share=True)
        elif name not in layers:
            raise ValueError(
                f"set_ranks: ranks[{name!r}]: expected 'dense', because the layer is dense "
                f"(convert factorises it), got {value!r}"
            )
        else:
            numbers[name] = check_int(
                "set_ranks", f"ranks[{name!r}]", value, 0, layers[name].max_rank
            )
    for name, number in numbers.items():
        layers[name].rank = number
    if dense:
        ungroup(model, only=dense)
        return swap_layers(model, dense, inplace=True)
    return model


def truncate(model: nn.Module, multiple_of: int = 1) -> nn.Module:
    """Drop every layer's components beyond its active rank, rounded up to `multiple_of`.

    Rounding stays within max_rank and leaves the active rank, and so the function, alone. The
    parameters are new: make the optimizer afterwards.
    """
    check_int("truncate", "multiple_of", multiple_of, 1)
    for layer in find_layers("truncate", model).values():
        layer.truncate(multiple_of=multiple_of)
    return model
