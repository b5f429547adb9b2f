"""Values and gradients of the penalties against autograd through the plain formulas."""

import math
import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_support import linear_model, lod, mixed

import maestro_kernels as mk
from maestro_kernels import training
from maestro_kernels.training import penalties

PENALTIES = [training.hierarchical_group_lasso, training.group_lasso]


def components(layer):
    return layer.v.reshape(layer.groups, layer.max_rank, -1)


def plain(model, name, scale_by_size):
    """The formulas as they are written, one norm at a time."""
    total = 0
    for layer in lod(model).values():
        u, v = layer.u, components(layer)
        for b in range(layer.max_rank):
            end = None if name == "hierarchical_group_lasso" else b + 1
            for group in (u[:, b:end], v[:, b:end]):
                total = total + group.norm() * (math.sqrt(group.numel()) if scale_by_size else 1)
    return total


def factors(model):
    return [p for layer in lod(model).values() for p in (layer.u, layer.v)]


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("scale", [False, True])
def test_value_and_gradient_in_float64(penalty, scale):
    model = mixed()
    model[4].rank = 3  # inactive components count too
    value, expected = penalty(model, scale_by_size=scale), plain(model, penalty.__name__, scale)
    assert value.shape == ()
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    got = torch.autograd.grad(value, factors(model))
    for a, b in zip(got, torch.autograd.grad(expected, factors(model)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_zero_tails_have_zero_gradients(penalty):
    model = mixed()
    keep = 3
    with torch.no_grad():
        for layer in lod(model).values():
            layer.u[:, keep:] = 0
            components(layer)[:, keep:] = 0
    value = penalty(model)
    got = torch.autograd.grad(value, factors(model))
    # Elsewhere the gradient is that of the model without the zeros.
    for layer in lod(model).values():
        layer.truncate(keep)
    expected = plain(model, penalty.__name__, False)
    torch.testing.assert_close(value, expected)
    whole = torch.autograd.grad(expected, factors(model))
    for i, (a, b) in enumerate(zip(got, whole, strict=True)):
        layer = list(lod(model).values())[i // 2]
        if i % 2 == 0:
            tail, head = a[:, keep:], a[:, :keep]
        else:
            a = a.reshape(layer.groups, -1, *a.shape[1:])
            tail, head = a[:, keep:], a[:, :keep].flatten(0, 1)
        assert (tail == 0).all()
        torch.testing.assert_close(head, b)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_all_zero(penalty):
    model = linear_model()
    for p in factors(model):
        nn.init.zeros_(p)
    value = penalty(model)
    assert value == 0
    assert all((g == 0).all() for g in torch.autograd.grad(value, factors(model)))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_second_derivatives(penalty):
    model = linear_model()
    first = torch.autograd.grad(penalty(model), factors(model), create_graph=True)
    name = penalty.__name__
    other = torch.autograd.grad(plain(model, name, False), factors(model), create_graph=True)
    weights = [torch.randn_like(g) for g in first]

    def product(gradients):
        dot = sum((g * w).sum() for g, w in zip(gradients, weights, strict=True))
        return torch.autograd.grad(dot, factors(model))

    for a, b in zip(product(first), product(other), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_frozen_factors_count_but_get_no_gradient(penalty):
    model = linear_model()
    expected = penalty(model)
    model[0].u.requires_grad_(False)
    value = penalty(model)
    assert value == expected
    value.backward()
    assert model[0].u.grad is None
    assert model[0].v.grad is not None
    for p in factors(model):
        p.requires_grad_(False)
    assert not penalty(model).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype):
    model = mixed(torch.float32).to(dtype)
    wide = mixed(torch.float32).to(dtype).double()
    value = training.hierarchical_group_lasso(model)
    expected = plain(wide, "hierarchical_group_lasso", False)
    assert value.dtype is torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    got = torch.autograd.grad(value, factors(model))
    for a, b in zip(got, torch.autograd.grad(expected, factors(wide)), strict=True):
        assert a.dtype is dtype
        torch.testing.assert_close(a.double(), b.to(dtype).double(), rtol=2**-7, atol=1e-3)


def test_large_half_precision_factors_do_not_overflow():
    model = linear_model(torch.float32).half()
    with torch.no_grad():
        for p in factors(model):
            p.fill_(300.0)
    value = training.hierarchical_group_lasso(model)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, factors(model)))


@pytest.mark.parametrize("eager_first", [False, True])
def test_one_compiled_graph(eager_first):
    """Whichever comes first, nothing of the compiler's is left for eager calls, or the reverse."""
    torch._dynamo.reset()
    model = linear_model()
    if eager_first:
        training.hierarchical_group_lasso(model, scale_by_size=True)

    def loss(x):
        penalty = training.hierarchical_group_lasso(model, scale_by_size=True)
        return model(x).sum() + penalty + training.group_lasso(model)

    x = torch.randn(3, 12, dtype=torch.float64)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    expected = torch.autograd.grad(loss(x), factors(model))
    torch.testing.assert_close(got, loss(x))
    for a, b in zip(torch.autograd.grad(got, factors(model)), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_funnel():
    model = mixed()
    start = training.funnel_start(model)
    for name, layer in lod(model).items():
        torch.testing.assert_close(start[name], components(layer).norm(dim=(0, 2)))
    with torch.no_grad():
        for layer in lod(model).values():
            layer.v.mul_(torch.rand_like(layer.v))
            components(layer)[:, -1] = 0

    def formula():
        total = 0
        for name, layer in lod(model).items():
            g = components(layer)[:, :-1].norm(dim=(0, 2))
            m = start[name][:-1]
            total = total + (m * g / (0.01 * m + g)).sum()
        return total

    value, expected = training.funnel(model, start), formula()
    torch.testing.assert_close(value, expected)
    vs = [layer.v for layer in lod(model).values()]
    got = torch.autograd.grad(value, vs)
    for a, b in zip(got, torch.autograd.grad(expected, vs), strict=True):
        torch.testing.assert_close(a, b)


def test_funnel_follows_shrunken_layers_and_names_what_is_missing():
    model = linear_model()
    start = training.funnel_start(model)
    model[0].truncate(4)
    assert training.funnel(model, start).isfinite()
    message = re.escape("funnel: start['0']: expected at least 4 values, got shape (3,)")
    with pytest.raises(ValueError, match=message):
        training.funnel(model, {**start, "0": start["0"][:3]})
    with pytest.raises(
        ValueError, match=re.escape("start['2']: expected at least 4 values, got none")
    ):
        training.funnel(model, {"0": start["0"]})


@pytest.mark.parametrize("penalty", [*PENALTIES, training.funnel_start])
def test_a_model_without_lod_layers(penalty):
    message = f"{penalty.__name__}: model: expected at least one LoD layer"
    with pytest.raises(ValueError, match=message):
        penalty(nn.Linear(3, 3))
    with pytest.raises(
        TypeError, match=f"{penalty.__name__}: model: expected an nn.Module, got int"
    ):
        penalty(3)


def test_no_factor_is_read_twice(monkeypatch):
    model, read = mixed(), []
    original = penalties._norms

    def spy(factor, *args):
        read.append(factor.data_ptr())
        return original(factor, *args)

    monkeypatch.setattr(penalties, "_norms", spy)
    training.hierarchical_group_lasso(model)
    assert sorted(read) == sorted(p.data_ptr() for p in factors(model))


def test_launches_per_layer():
    """On a device: one norm per factor forward, one product backward; the rest is for all."""

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    def count(layers):
        model = nn.Sequential(*(mk.LoDLinear(16, 8 + i % 3, device="meta") for i in range(layers)))
        training.hierarchical_group_lasso(model)  # fills the cache
        calls.clear()
        with Counter():
            torch.autograd.grad(training.hierarchical_group_lasso(model), factors(model))
        views = ("view", "select", "slice", "detach", "alias", "expand", "reshape")
        return sum(not any(v in str(f) for v in views) for f in calls)

    calls = []
    assert count(30) - count(12) == 18 * 4
