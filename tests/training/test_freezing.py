"""Freezing one factor per phase saves its gradient, and ranks move to what hardware likes."""

import re
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_support import batch, fade, linear_model, lod, mixed, train_step

import maestro_kernels as mk
from maestro_kernels import training


class Products(TorchDispatchMode):
    """The shapes of all matrix products that run."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.shapes[tuple(out.shape)] += 1
        return out


def wanted(model):
    return {key for la in lod(model).values() for key in "uv" if getattr(la, key).requires_grad}


def test_phases_alternate():
    model = linear_model()
    freezer = training.SequentialFreezing(model, period=2)
    assert [freezer.epoch(n) for n in range(6)] == ["v", "v", "u", "u", "v", "v"]
    assert wanted(model) == {"u"}
    assert model[0].bias.requires_grad
    freezer.reset()
    assert wanted(model) == {"u", "v"}
    assert freezer.epoch(3) == "u"  # any epoch, in any order: resuming needs no state
    assert wanted(model) == {"v"}


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_backward_skips_the_frozen_factors_product(epoch):
    M, K, N, R = 32, 24, 20, 6
    layer = mk.LoDLinear(K, N, R)
    layer.backend = "matmul"
    x, dy = torch.randn(M, K, requires_grad=True), torch.randn(M, N)

    def backward():
        y = layer(x)
        with Products() as products:
            y.backward(dy)
        return products.shapes

    whole = backward()
    assert whole[N, R] == whole[R, K] == 1
    frozen = training.SequentialFreezing(nn.Sequential(layer)).epoch(epoch)
    shape, other = ((R, K), (N, R)) if frozen == "v" else ((N, R), (R, K))
    saved = whole - backward()
    assert saved[shape] == 1
    assert backward()[other] == 1
    assert getattr(layer, frozen).grad is None


def test_a_first_layer_with_v_frozen_needs_one_product():
    """Without a gradient of x, dH has no use either."""
    layer = mk.LoDLinear(24, 20, 6)
    layer.backend = "matmul"
    training.SequentialFreezing(nn.Sequential(layer)).epoch(0)
    y = layer(torch.randn(32, 24))
    with Products() as products:
        y.backward(torch.randn(32, 20))
    assert products.shapes == {(20, 6): 1}


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_frozen_factors_do_not_move_and_the_rest_trains_as_ever(kind):
    """Neither decay, nor momentum, nor a gradient left over."""
    make = {
        "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    }[kind]
    model = mixed()
    optimizer = make(model.parameters())
    freezer = training.SequentialFreezing(model)
    for epoch in range(3):
        frozen = freezer.epoch(epoch)
        before = {n: (la.u.clone(), la.v.clone()) for n, la in lod(model).items()}
        for i in range(3):
            x, y = batch(seed=i)
            # zero_grad(set_to_none=False) would keep a stale zero gradient: it decays.
            optimizer.zero_grad(set_to_none=False)
            (model(x) - y).square().mean().backward()
            optimizer.step()
        for name, layer in lod(model).items():
            u, v = before[name]
            assert torch.equal(layer.u, u) == (frozen == "u")
            assert torch.equal(layer.v, v) == (frozen == "v")


def test_what_was_frozen_before_stays_frozen():
    model = linear_model()
    model[0].u.requires_grad_(False)
    freezer = training.SequentialFreezing(model)
    for epoch in range(3):
        freezer.epoch(epoch)
        assert not model[0].u.requires_grad
    freezer.reset()
    assert not model[0].u.requires_grad
    assert model[0].v.requires_grad


def test_shrinking_in_the_middle_of_a_phase():
    model = mixed()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    freezer = training.SequentialFreezing(model)
    freezer.epoch(0)
    train_step(model, optimizer, batch())
    for layer in lod(model).values():
        fade(layer, 2)
    training.shrink(model, optimizer)
    assert wanted(model) == {"u"}
    v = model[4].v.clone()
    train_step(model, optimizer, batch())
    assert torch.equal(model[4].v, v)
    freezer.epoch(1)
    assert wanted(model) == {"v"}
    train_step(model, optimizer, batch(), training.hierarchical_group_lasso)
    assert not torch.equal(model[4].v, v)
    training.shrink(model, optimizer, dense=True)
    freezer.epoch(2)  # layers that became dense have no phase


def test_freezing_errors():
    model = linear_model()
    with pytest.raises(ValueError, match="SequentialFreezing: period: expected an int >= 1, got 0"):
        training.SequentialFreezing(model, period=0)
    with pytest.raises(ValueError, match="SequentialFreezing: model: expected at least one LoD"):
        training.SequentialFreezing(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"SequentialFreezing\.epoch: n: expected an int >= 0"):
        training.SequentialFreezing(model).epoch(-1)


def ranked(*ranks):
    model = nn.Sequential(*(mk.LoDLinear(100, 120, 100) for _ in ranks))
    for layer, rank in zip(model, ranks, strict=True):
        layer.rank = rank
    return model


def test_ranks_move_to_the_nearest_multiple():
    model = ranked(0, 1, 8, 16, 23, 24, 25, 90, 100)
    assert list(training.quantize_ranks(model).values()) == [0, 16, 16, 16, 16, 16, 32, 96, 96]
    assert list(training.quantize_ranks(model, 64).values()) == [0, *[64] * 7, 100]
    assert list(mk.ranks(model).values()) == [0, 1, 8, 16, 23, 24, 25, 90, 100]
    mk.set_ranks(model, training.quantize_ranks(model, 8))
    assert list(mk.ranks(model).values()) == [0, 8, 8, 16, 24, 24, 24, 88, 96]


def test_a_rule_of_ones_own():
    calls = []

    def rule(N, K, rank):
        calls.append((N, K, rank))
        return rank + 1

    assert training.quantize_ranks(ranked(0, 5, 7), rule) == {"0": 0, "1": 6, "2": 8}
    assert calls == [(120, 100, 5), (120, 100, 7)]


def test_ranks_move_below_a_cliff():
    def stairs(N, K, rank):
        """Time of tiles of 32 components, and a little for each."""
        return N * K * (-(-rank // 32) + rank / 1000)

    model = ranked(33, 20, 40, 96, 100)
    moved = training.quantize_ranks(model, training.below_cliff(stairs))
    assert list(moved.values()) == [32, 32, 32, 96, 96]
    near = training.quantize_ranks(model, training.below_cliff(stairs, reach=4))
    assert list(near.values()) == [32, 24, 44, 96, 96]
    # A flat curve asks for all there is.
    most = training.quantize_ranks(model, training.below_cliff(lambda N, K, rank: 1.0))
    assert list(most.values()) == [48, 35, 55, 100, 100]
    assert training.quantize_ranks(model, training.below_cliff(stairs, reach=0)) == mk.ranks(model)


def test_ranks_below_a_cliff_stay_within_a_truncated_layer():
    model = ranked(20, 40)
    mk.truncate(model)
    # A flat curve asks for more components than the factors still hold.
    rule = training.below_cliff(lambda N, K, rank: 1.0)
    assert training.quantize_ranks(model, rule) == {"0": 20, "1": 40}
    assert rule(120, 100, 20) == 35
    mk.set_ranks(model, {"0": 12})
    mk.set_ranks(model, training.quantize_ranks(model, rule))
    assert mk.ranks(model) == {"0": 20, "1": 40}


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (0, ValueError, "rule: expected an int >= 1, got 0"),
        (1.5, TypeError, "rule: expected an int >= 1, got float"),
        (lambda N, K, r: 2.0, TypeError, "rule(120, 100, 5): expected an int, 1 <="),
        (lambda N, K, r: 0, ValueError, "rule(120, 100, 5): expected an int, 1 <="),
        (lambda N, K, r: 101, ValueError, "rule(120, 100, 5): expected an int, 1 <="),
    ],
)
def test_wrong_rules(rule, error, message):
    with pytest.raises(error, match="^" + re.escape(f"quantize_ranks: {message}")):
        training.quantize_ranks(ranked(5), rule)
