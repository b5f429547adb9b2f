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


def _nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.zeros(2, 40), torch.zeros(3, 40)], layout=layout)


def _freed() -> torch.Tensor:
    x = torch.zeros(4, 40)
    x.untyped_storage().resize_(0)
    return x


INPUTS = {
    "no x": (lambda: None, TypeError, ": x: expected a Tensor, got NoneType"),
    "a list": (lambda: [[1.0] * 40], TypeError, ": x: expected a Tensor, got list"),
    "sparse x": (lambda: torch.zeros(4, 40).to_sparse(), TypeError, ": x: expected a dense tensor"),
    "nested x": (lambda: _nested(torch.strided), TypeError, ": x: expected a dense tensor"),
    "jagged x": (lambda: _nested(torch.jagged), TypeError, ": x: expected a dense tensor"),
    "quantised x": (
        lambda: torch.quantize_per_tensor(torch.zeros(4, 40), 0.1, 0, torch.quint8),
        TypeError,
        ": x: expected a dense tensor, got quantised",
    ),
    "freed x": (_freed, ValueError, ": x: expected a storage of at least 640 bytes, got 0"),
}


def _call(build: Any, make_x: Any) -> Any:
    def call(folder: Path) -> None:
        layer = build()
        with torch.no_grad():
            # What was packed and planned for a good call takes the next one too.
            layer(torch.zeros(4, 40))
            layer(make_x())

    return call


def _free_factor(build: Any) -> Any:
    def call(folder: Path) -> None:
        layer = build()
        with torch.no_grad():
            layer(torch.zeros(4, 40))
            layer.v.untyped_storage().resize_(0)
            layer(torch.zeros(4, 40))

    return call


ROWS: list[Row] = [
    *(
        Row(f"{kind}: {name}", _call(build, x), error, message)
        for kind, build in LAYERS.items()
        for name, (x, error, message) in INPUTS.items()
    ),
    *(
        Row(
            f"{kind}: freed v", _free_factor(build), ValueError, "lod_linear: v: expected a storage"
        )
        for kind, build in LAYERS.items()
    ),
    Row(
        "refresh of a list",
        lambda folder: mk.refresh([mk.LoDLinear(4, 4)]),
        TypeError,
        "refresh: model: expected an nn.Module, got list",
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
