"""Ranks under checkpointing and inference mode."""

import pytest
import torch
from layer_support import gradients, siblings
from packing_support import make
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import maestro_kernels as mk


@pytest.mark.parametrize("grouped", [False, True])
def test_a_checkpoint_computes_again_at_the_rank_of_its_forward(grouped):
    model = (
        siblings(prepacked=False) if grouped else nn.ModuleDict({"only": make(40, 24)})
    ).train()

    def run(x):
        return sum(layer(x).square().sum() for layer in model.values())

    def grads(rank, replay):
        for layer in model.values():
            layer.rank = rank
        model.zero_grad()
        x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss = checkpoint(run, x, use_reentrant=True) if replay else run(x)
        for layer in model.values():
            layer.rank = 16
        loss.backward()
        return [x.grad, *gradients(model)]

    assert_close(grads(6, True), grads(6, False))


def test_forwards_that_wait_together_keep_their_ranks():
    layer = make(40, 24).train()
    x = torch.randn(5, 40, requires_grad=True)
    losses = []
    for rank in (3, 9, 5):
        layer.rank = rank
        losses.append(checkpoint(lambda x: layer(x).sum(), x * 1, use_reentrant=True))
    for rank, loss in zip((3, 9, 5), losses, strict=True):
        layer.zero_grad()
        loss.backward()
        assert layer.v.grad[:rank].abs().min() > 0
        assert layer.v.grad[rank:].abs().max() == 0


def test_a_rank_set_inside_a_checkpoint_is_refused_by_name():
    layer = make(40, 24).train()

    def run(x):
        layer.rank = 4
        x = layer(x)
        layer.rank = 8
        return (layer(torch.randn(5, 40)) + x).sum()

    loss = checkpoint(run, torch.randn(5, 40, requires_grad=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"LoDLinear\.forward: rank: expected one rank"):
        loss.backward()


def test_other_checkpoints_refuse_another_rank_themselves():
    layer = make(40, 24).train()
    loss = checkpoint(layer, torch.randn(5, 40, requires_grad=True), use_reentrant=False).sum()
    layer.rank = 4
    with pytest.raises(RuntimeError, match="different metadata"):
        loss.backward()


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_layer_built_under_inference_mode_takes_a_rank_outside(kind):
    with torch.inference_mode():
        layer = make(40, 24) if kind == "linear" else mk.LoDConv2d(8, 8, 3)
        moved = make(40, 24).to(torch.bfloat16)
    for made in (layer, moved):
        made.rank = 5
        assert (made.rank, made.active_rank.item()) == (5, 5)
    with torch.inference_mode():
        layer.rank = 3
    assert layer.active_rank.item() == 3
