"""Wrong calls: layers."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import maestro_kernels as mk
from messages import Row


def _siblings(form: str | None, prepacked: bool = True) -> nn.Module:
    names = ("q_proj", "k_proj", "v_proj")
    model = mk.group(nn.ModuleDict({name: mk.LoDLinear(40, 24, 16) for name in names}).eval())
    return mk.prepack(model, form=form) if prepacked else model


LAYERS = {
    "layer": lambda: mk.LoDLinear(40, 24, 16).eval(),
    "prepacked layer": lambda: mk.prepack(mk.LoDLinear(40, 24, 16).eval()),
    "group": lambda: _siblings(None, False)["q_proj"],
    "prepacked group": lambda: _siblings(None)["q_proj"],
}


INPUTS = {
    "no x": (lambda: None, TypeError, ": x: expected a Tensor, got NoneType"),
    "a list": (lambda: [[1.0] * 40], TypeError, ": x: expected a Tensor, got list"),
}


def _call(build: Any, make_x: Any) -> Any:
    def call(folder: Path) -> None:
        layer = build()
        with torch.no_grad():
            # What was packed and planned for a good call takes the next one too.
            layer(torch.zeros(4, 40))
            layer(make_x())

    return call


ROWS: list[Row] = [
    *(
        Row(f"{kind}: {name}", _call(build, x), error, message)
        for kind, build in LAYERS.items()
        for name, (x, error, message) in INPUTS.items()
    ),
    Row(
        "refresh of a list",
        lambda folder: mk.refresh([mk.LoDLinear(4, 4)]),
        TypeError,
        "refresh: module: expected an nn.Module, got list",
    ),
    Row(
        "summary of half a row",
        lambda folder: mk.summary(mk.LoDLinear(4, 4), rows=0.5),
        TypeError,
        "summary: rows: expected an int >= 1, got float",
    ),
    Row(
        "summary of no rows",
        lambda folder: mk.summary(mk.LoDLinear(4, 4), rows=0),
        ValueError,
        "summary: rows: expected an int >= 1, got 0",
    ),
]
