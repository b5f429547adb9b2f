"""What the Lightning and the Hugging Face callback share; neither framework is imported here."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from maestro_kernels.training.loop import Maestro, NonFiniteLoss, first_non_finite


class Callback:
    """A Maestro that a framework's events drive.

    Attributes:
        options: as `Maestro` takes them.
        maestro: of the run, None before it starts.
    """

    # The event that makes the Maestro.
    _first_event: str

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = check_options("MaestroCallback", options)
        self.maestro: Maestro | None = None

    def _running(self) -> Maestro:
        if self.maestro is None:
            raise RuntimeError(
                f"MaestroCallback: expected {self._first_event} first, got another event"
            )
        return self.maestro

    def _check_finite(self, model: nn.Module, step: int, kept: str) -> None:
        where = first_non_finite(model)
        if where is not None:
            raise NonFiniteLoss(
                f"MaestroCallback: expected a finite model after step {step}, got a non-finite "
                f"{where}; {kept}"
            )


def check_options(fn: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `Maestro`, checked by name before a long run starts.

    Raises:
        TypeError: an argument that Maestro does not take.
    """
    known = [n for n in inspect.signature(Maestro).parameters if n not in _OURS]
    for name in options:
        if name not in known:
            raise TypeError(f"{fn}: {name}: expected one of {', '.join(known)}, got an unknown one")
    return dict(options)


def packed(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a Maestro in plain numbers, lists and strings, as JSON holds them."""
    start = state["funnel_start"]
    plain = None if start is None else {name: t.tolist() for name, t in start.items()}
    return {**state, "funnel_start": plain}


def unpacked(state: Mapping[str, Any]) -> dict[str, Any]:
    """What `packed` packed."""
    start = state["funnel_start"]
    tensors = None if start is None else {name: torch.tensor(v) for name, v in start.items()}
    return {**state, "funnel_start": tensors}


_OURS = ("model", "optimizer", "attach")
