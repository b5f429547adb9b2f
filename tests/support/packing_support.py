"""Layers that tests of packing share: how they are made, checked and changed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import maestro_kernels as mk
from maestro_kernels.backends import native, packed
from maestro_kernels.backends.reference import ACTIVATIONS, lod_linear_ref
from maestro_kernels.testing import assert_accurate

needs_library = pytest.mark.skipif(native.load_error() is not None, reason="no native library")
FORMS = [
    pytest.param(
        form,
        marks=pytest.mark.skipif(
            (form == "fused" and native.load_error() is not None)
            or ("ne" in form and not torch.backends.mkldnn.is_available()),
            reason="this build cannot",
        ),
    )
    for form in packed.FORMS
]


def make(K=40, N=24, R=16, rank=None, activation=None, dtype=torch.float32, bias=True):
    torch.manual_seed(3)
    layer = mk.LoDLinear(K, N, max_rank=R, bias=bias, activation=activation, dtype=dtype)
    layer.rank = R if rank is None else rank
    return layer.eval()


def check(layer, x, name="y"):
    """The layer's output for x, which is right."""
    with torch.no_grad():
        y = layer(x)
    check_output(layer, x, y, name)
    return y


def check_output(layer, x, y, name="y"):
    """y is the layer's output for x, against float64."""
    with torch.no_grad():
        r, act = layer.rank, layer.activation
        pair = ACTIVATIONS[act](F.linear(F.linear(x, layer.v[:r]), layer.u[:, :r], layer.bias))
        packing = layer.packed
        if packing and "merged dense" in (packing.form, *packing.choices.values()):
            # The library's result in the same dtype is then the dense layer's.
            merged = (layer.u[:, :r].double() @ layer.v[:r].double()).to(x.dtype)
            pair = ACTIVATIONS[act](F.linear(x, merged, layer.bias))
        doubled = [None if t is None else t.double() for t in (x, layer.u, layer.v, layer.bias)]
        assert_accurate(name, y, pair, lod_linear_ref(*doubled, rank=r, activation=act))


def step_fused(layer):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.5, fused=True)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def load(layer):
    layer.load_state_dict(make(R=16).state_dict() | {"u": torch.randn(24, 16)})


def write_in_place(layer):
    with torch.no_grad():
        layer.v.mul_(2)


def replace(layer):
    layer.u = nn.Parameter(torch.randn(24, 16))


def train_and_write_data(layer):
    layer.train()
    layer.u.data.mul_(3)
    layer.eval()


CHANGES = [
    step_fused,
    load,
    write_in_place,
    replace,
    train_and_write_data,
    lambda layer: layer.truncate(5),
    lambda layer: setattr(layer, "rank", 9),
    lambda layer: layer.to(torch.bfloat16).to(torch.float32),
]
