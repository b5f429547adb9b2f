"""A group takes the backward passes that its layers take by themselves."""

import gc

import pytest
import torch
from layer_support import gradients, siblings
from packing_support import make
from torch import nn
from torch.testing import assert_close


def training_pair():
    grouped = siblings(prepacked=False).train()
    alone = nn.ModuleDict({name: make(40, 24) for name in grouped}).train()
    alone.load_state_dict(grouped.state_dict())
    return grouped, alone


def in_turn(ys, retain=False):
    for y in ys:
        y.square().sum().backward(retain_graph=retain)


def only_one(ys):
    ys[1].sum().backward()


def together(ys):
    sum(y.square().sum() for y in ys).backward()


def two_then_one(ys):
    (ys[0].sum() + ys[2].square().sum()).backward()
    ys[1].sum().backward()


def again_where_kept(ys):
    in_turn(ys, retain=True)
    in_turn(ys)


@pytest.mark.parametrize("backward", [in_turn, only_one, together, two_then_one, again_where_kept])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_a_group_takes_the_backward_passes_that_layers_take(backward, activation):
    models = training_pair()
    found = []
    for model in models:
        for layer in model.values():
            layer.activation = activation
        x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
        h = x + 0
        backward([layer(h) for layer in model.values()])
        found.append([x.grad, *gradients(model)])
    assert [g is None for g in found[0]] == [g is None for g in found[1]]
    assert_close(*([g for g in grads if g is not None] for grads in found))


@pytest.mark.parametrize("backward", [in_turn, only_one, two_then_one])
def test_siblings_of_different_ranks_keep_them_in_separate_backward_passes(backward):
    models = training_pair()
    found = []
    for model in models:
        for layer, rank in zip(model.values(), (3, 13, 9), strict=True):
            layer.rank = rank
        x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
        h = x + 0
        backward([layer(h) for layer in model.values()])
        found.append([x.grad, *gradients(model)])
    assert_close(*([g for g in grads if g is not None] for grads in found))


def test_a_second_backward_without_a_graph_is_refused_as_ever():
    model, _ = training_pair()
    x = torch.randn(5, 40)
    ys = [layer(x) for layer in model.values()]
    ys[0].sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        ys[0].sum().backward()
    ys[1].sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        ys[1].sum().backward()
    ys[2].sum().backward()


def test_factors_written_to_between_backward_passes_are_refused():
    model, _ = training_pair()
    x = torch.randn(5, 40)
    ys = [layer(x) for layer in model.values()]
    ys[0].sum().backward()
    with torch.no_grad():
        model["k_proj"].u.mul_(2)
    with pytest.raises(RuntimeError, match="written to"):
        ys[1].sum().backward()


def test_second_derivatives_of_one_sibling():
    found = []
    for model in training_pair():
        # In float64, where both ways of a float32 sum would be right.
        model.double()
        x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        y = [layer(x) for layer in model.values()][1]
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        first.square().sum().backward()
        found.append([x.grad, model["k_proj"].u.grad, model["k_proj"].v.grad])
    assert_close(*found)


def test_what_a_joint_backward_needed_is_freed():
    model, _ = training_pair()
    x = torch.randn(5, 40)
    ys = [layer(x) for layer in model.values()]
    node = ys[0].grad_fn
    together(ys)
    assert node.later is None
    ys = [layer(x) for layer in model.values()]
    node = ys[0].grad_fn
    in_turn(ys)
    assert node.later is None
    gc.collect()
