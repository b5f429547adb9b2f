"""What layers and groups notice of their values, and what refresh is for."""

import numpy as np
import pytest
import torch
from layer_support import plainly, siblings
from packing_support import make, needs_library
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.testing import assert_close

import maestro_kernels as mk


def behind_data(layer):
    layer.u.data.mul_(2)


def through_numpy(layer):
    layer.v.detach().numpy()[:] *= 2


def through_dlpack(layer):
    torch.from_dlpack(layer.v.detach()).mul_(2)


def by_a_storage_copy(layer):
    storage = layer.u.untyped_storage()
    storage.copy_(torch.randn(storage.nbytes() // 4).untyped_storage())


def in_place_to_the_vector(layer):
    layer.vector.mul_(1.5)


UNSEEN = [behind_data, through_numpy, through_dlpack, by_a_storage_copy, in_place_to_the_vector]


@pytest.mark.parametrize("change", UNSEEN)
@pytest.mark.parametrize("build", [
    pytest.param(lambda: {"only": mk.prepack(make(40, 24), form="fused")}, marks=needs_library),
    pytest.param(siblings, marks=needs_library),
    lambda: siblings(prepacked=False),
])  # fmt: skip
def test_refresh_says_that_values_changed(change, build):
    layers, x = build(), torch.randn(4, 40)
    layer = list(layers.values())[-1]
    layer.vector = parameters_to_vector(layer.parameters()).detach().clone()
    vector_to_parameters(layer.vector, layer.parameters())
    with torch.no_grad():
        before = [m(x) for m in layers.values()][-1]
        next(iter(layers.values()))(x)
        change(layer)
        mk.refresh(layer)
        assert_close(layer(x), plainly(layer, x, 16))
        assert not torch.equal(layer(x), before)


def test_refresh_takes_modules_only():
    with pytest.raises(TypeError, match=r"refresh: model: expected an nn\.Module, got list"):
        mk.refresh([make()])
    model = nn.Sequential(make(), nn.ReLU())
    assert mk.refresh(model) is model


@needs_library
def test_other_memory_is_noticed_though_it_lies_where_the_old_lay():
    layer, x = mk.prepack(make(40, 24), form="fused"), torch.randn(4, 40)
    addresses = []
    with torch.no_grad():
        for _ in range(20):
            # The memory between is free again at once, and the allocator likes to reuse it.
            layer.u.data = torch.empty(24, 16)
            layer.u.data = torch.randn(24, 16)
            addresses.append(layer.u.data_ptr())
            assert_close(layer(x), plainly(layer, x, 16))


def test_what_was_made_of_old_values_is_let_go():
    layer = mk.prepack(make(40, 24), form="unpacked")
    with torch.no_grad():
        layer(torch.randn(4, 40))
    held = layer.packed._state.made[0]
    assert held.u.data_ptr() == layer.u.data_ptr()
    layer.to(torch.bfloat16)
    assert layer.packed._state.made == ()


GROUPS = {
    "packed": pytest.param(siblings, marks=needs_library),
    "as it is": lambda: siblings(prepacked=False),
}


def activate(layer, x):
    layer.activation = "relu"


def other_u(layer, x):
    layer.u.data = torch.randn(24, 16)


def other_bias(layer, x):
    layer.bias.data = torch.randn(24)


def other_x(layer, x):
    x.data = torch.randn(4, 40)


@pytest.mark.parametrize("change", [activate, other_u, other_bias, other_x])
@pytest.mark.parametrize("build", GROUPS.values(), ids=GROUPS)
def test_a_change_between_siblings_counts(build, change):
    layers = build()
    x, last = torch.randn(4, 40), layers["v_proj"]
    with torch.no_grad():
        for _ in range(2):
            layers["q_proj"](x)
            change(last, x)
            expected = mk.lod_linear(x, last.u, last.v, last.bias, activation=last.activation)
            assert_close(last(x), expected)
            layers["k_proj"](x)


@pytest.mark.parametrize("build", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("what", ["u", "v", "bias", "x"])
def test_gradients_asked_for_between_siblings_are_given(build, what):
    layers = build().requires_grad_(False)
    x, last = torch.randn(4, 40), layers["v_proj"]
    layers["q_proj"](x)
    tensor = x if what == "x" else getattr(last, what)
    tensor.requires_grad_()
    last(x).sum().backward()
    assert tensor.grad is not None
    tensor.requires_grad_(False)
    layers["q_proj"](x)
    assert not layers["k_proj"](x).requires_grad


def test_a_backend_of_ones_own_is_respected_without_packing():
    layers, x = siblings(prepacked=False), torch.randn(4, 40)
    layers["v_proj"].backend = "reference"
    with torch.no_grad():
        for layer in layers.values():
            assert_close(layer(x), plainly(layer, x, 16))
            assert layers["q_proj"].group._own.waiting is None


def test_an_x_refilled_through_numpy_needs_refresh():
    values = np.ones((4, 40), dtype=np.float32)
    layers, x = siblings(prepacked=False), torch.from_numpy(values)
    with torch.no_grad():
        layers["q_proj"](x)
        values[:] = 3
        mk.refresh(layers)
        assert_close(layers["k_proj"](x), plainly(layers["k_proj"], x, 16))
