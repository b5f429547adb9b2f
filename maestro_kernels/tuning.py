"""What users say about measuring at first use: whether, ahead of time, and what others measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from maestro_kernels import choices, dispatch, hardware
from maestro_kernels.arguments import check_model
from maestro_kernels.nn.moments import run_batch
from maestro_kernels.ops import first_use

__all__ = ["set_tuning", "tune", "use_choices"]

Choices = dict[str, list[dict[str, Any]]]


def set_tuning(mode: str | None) -> None:
    """Say what decides which kernel runs, in this process.

    Args:
        mode: "first-use": a table, else what was measured when a call of the kind was first met
            (at most 50 ms, kept in the user's cache folder); "table": a table, or what `tune` and
            `use_choices` put here, and nothing is measured; "off": fixed rules. None is what
            MAESTRO_KERNELS_TUNE says, and without it "first-use".

    Raises:
        ValueError: another mode.
    """
    if mode is not None:
        choices.check_tuning("set_tuning: mode", mode)
    choices.set_tuning(mode)
    dispatch.replan()


def tune(model: nn.Module, batch: Any) -> Choices:
    """Measure every kind of call that `model(batch)` makes now, rather than when one is first met.

    The model runs once as it is: with gradients in training mode, then their cost counts too, and
    without in eval mode. Nothing of it changes but what its forward itself changes.

    Args:
        model: any module.
        batch: one input: a tensor (model(x)), a tuple (model(*t)) or a dict (model(**d)).

    Returns:
        What was measured, by device type, as JSON can hold it: `use_choices` takes it in this
        process or another. They count as an explicit table, so deterministic runs read them.

    Raises:
        TypeError: model is no module.

    Example:
        >>> import torch, maestro_kernels as mk
        >>> model = mk.convert(torch.nn.Linear(96, 64), 16)
        >>> choices = mk.tune(model.eval(), torch.randn(8, 96))
        >>> sorted(choices)
        ['cpu']
    """
    check_model("tune", model)
    before = choices.chosen()
    try:
        set_tuning("first-use")
        grads = torch.set_grad_enabled(model.training)
        with dispatch.recording() as met, first_use.thoroughly(), grads:
            run_batch(model, batch, fn="tune", argument="batch")
    finally:
        set_tuning(before)
    found: Choices = {}
    for place, bucket in met:
        device = hardware.current_device(place)
        items = choices.export([bucket], device)
        found.setdefault(device.kind, []).extend(i for i in items if i not in found[device.kind])
    use_choices(found)
    return found


def use_choices(found: Mapping[str, Any]) -> None:
    """Choose by what `tune` returned, here or in another process on the same kind of device.

    Processes that are to run the same kernels get them from one of them, for example by
    torch.distributed.broadcast_object_list; with set_tuning("table") nothing else is measured.

    Args:
        found: device type -> records.

    Raises:
        TypeError: found is no dict.
        ValueError: a device type that is not here, or records of something else; nothing is taken
            then.
    """
    if not isinstance(found, Mapping):
        raise TypeError(f"use_choices: found: expected a dict, got {type(found).__name__}")
    devices = {}
    for kind in found:
        if kind not in ("cpu", "cuda") or not hardware.is_here(torch.device(kind)):
            raise ValueError(
                f"use_choices: found: expected device types that are here, got {kind!r}"
            )
        devices[kind] = hardware.current_device(kind)
    parsed = {
        kind: choices.parse(items, f"use_choices: found[{kind!r}]") for kind, items in found.items()
    }
    for kind, items in parsed.items():
        choices.put(items, devices[kind])
    dispatch.replan()
