"""Where modules hang in a model, and others in their places: for good, or while a block runs."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from maestro_kernels.nn.kinds import open_form
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.nn.opened import Opened
from maestro_kernels.nn.structure import plain

Slots = dict[int, list[tuple[nn.Module, str]]]


def find_slots(model: nn.Module) -> Slots:
    """The (parent, attribute) places that hold each module, by the module's id."""
    slots: Slots = defaultdict(list)
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is not None:
                slots[id(child)].append((parent, key))
    return slots


def swap_layers(
    model: nn.Module, layers: Mapping[nn.Module, nn.Module], *, inplace: bool
) -> nn.Module:
    """The model with every key of `layers` replaced by its value, wherever it hangs."""
    if not inplace:
        # deepcopy takes what is in its memo for copied: the new layers instead of the old.
        return copy.deepcopy(model, {id(old): new for old, new in layers.items()})
    if model in layers:
        return layers[model]
    if not layers:
        return model
    slots = find_slots(model)
    for old, new in layers.items():
        for parent, key in slots[id(old)]:
            setattr(parent, key, new)
    return model


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by name, where those that can be opened are; the model is only read."""
    slots = find_slots(model)
    found: dict[str, nn.Module] = {}
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        made = open_form(module) if len(slots[id(module)]) < 2 else None
        if made is None:
            found[name] = module
            continue
        inside = f"{name}." if name else ""
        found |= {f"{inside}{part}" if part else name: m for part, m in made.named_modules()}
    return found


def open_all(model: nn.Module) -> nn.Module:
    """The model with all modules open that can be and hang in one place; changed in place.

    Their layers look at the memory of the parameters that held them.
    """
    slots = find_slots(model)
    forms = {m: open_form(m) for m in model.modules() if len(slots[id(m)]) < 2}
    return swap_layers(model, {m: form for m, form in forms.items() if form}, inplace=True)


def settle(model: nn.Module) -> nn.Module:
    """After `open_all`, close what has no factorised layer; the rest gets memory of its own."""
    closed: dict[nn.Module, nn.Module] = {}
    for form in model.modules():
        if isinstance(form, Opened):
            if any(isinstance(layer, LoDLayer) for layer in form.modules()):
                form.own()
            else:
                closed[form] = form.close()
    return swap_layers(model, closed, inplace=True)


@dataclass
class Opening:
    """A model while it is open.

    Attributes:
        model: itself, or its open form.
        closed: open form -> the module in whose place it hangs.
        kept: open forms that stay.
    """

    model: nn.Module
    closed: dict[Opened, nn.Module]
    kept: set[nn.Module] = field(default_factory=set)


@contextmanager
def opened(model: nn.Module, names: Collection[str] | None = None) -> Iterator[Opening]:
    """Open a model's modules for as long as the block runs; those in `kept` for longer.

    Args:
        model: changed in place, and back.
        names: which modules; None is all that can be and hang in one place.
    """
    slots = find_slots(model)
    forms: dict[nn.Module, nn.Module] = {}
    closed: dict[Opened, nn.Module] = {}
    for name, module in model.named_modules():
        if plain(name) not in names if names is not None else len(slots[id(module)]) > 1:
            continue
        made = open_form(module)
        if made is not None:
            forms[module], closed[made] = made, module
    opening = Opening(model, closed)
    try:
        opening.model = swap_layers(model, forms, inplace=True)
        yield opening
    finally:
        back: dict[nn.Module, nn.Module] = {
            form: old for form, old in closed.items() if form not in opening.kept
        }
        swap_layers(opening.model, back, inplace=True)
        for form in closed:
            if form in opening.kept:
                form.own()
