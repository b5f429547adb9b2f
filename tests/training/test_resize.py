"""A shrunken checkpoint goes into a fresh model bit for bit, and training goes on unchanged."""

import copy
import io
import re

import pytest
import torch
from torch import nn
from training_support import batch, fade, full_ranks, linear_model, lod, mixed, train_step

import maestro_kernels as mk
from maestro_kernels import training
from maestro_kernels.training.layers import full_rank

KEEP = {"0": 2, "2": 4, "4": 7, "6": 3}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
}
OPTIONS = {
    "sliced": {},
    "rounded": {"multiple_of": 8},
    "masked": {"min_saving": 1.1},
    "dense": {"dense": True},
    "empty": {"min_rank": 0},
}


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def shrunken(options, optimizer_of=OPTIMIZERS["adamw"]):
    model = mixed()
    optimizer = optimizer_of(model.parameters())
    for i in range(2):
        train_step(model, optimizer, batch(seed=i))
    for name, layer in lod(model).items():
        fade(layer, 0 if "min_rank" in options and name in ("0", "4") else KEEP[name])
    training.shrink(model, optimizer, **options)
    return model, optimizer


def assert_same_state(got, expected):
    got, expected = got.state_dict(), expected.state_dict()
    assert list(got) == list(expected)
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loads_bit_for_bit(options):
    saved, _ = shrunken(options)
    fresh = mixed()
    with torch.no_grad():
        for p in fresh.parameters():
            p.add_(1)
    assert training.load_shrunken(fresh, through_a_file(saved.state_dict())) is fresh
    assert [type(m) for m in fresh] == [type(m) for m in saved]
    assert_same_state(fresh, saved)
    for a, b in zip(lod(fresh).values(), lod(saved).values(), strict=True):
        assert (a.max_rank, a.rank, full_rank(a)) == (b.max_rank, b.rank, full_rank(b))
    x, _ = batch()
    assert torch.equal(fresh(x), saved(x))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("options", [v for k, v in OPTIONS.items() if k != "empty"])
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_training_goes_on_bit_for_bit(options, kind, optimizer_first):
    saved, optimizer = shrunken(options, OPTIMIZERS[kind])
    sampler = training.SinglePairSampler(saved, seed=4)
    for i in range(3):
        sampler.step()
        train_step(saved, optimizer, batch(seed=i), training.hierarchical_group_lasso)
    sampler.reset()
    state = through_a_file(
        {
            "model": saved.state_dict(),
            "optimizer": optimizer.state_dict(),
            "sampler": sampler.state_dict(),
        }
    )
    fresh = mixed()
    if optimizer_first:
        resumed = OPTIMIZERS[kind](fresh.parameters())
        training.load_shrunken(fresh, state["model"], resumed)
    else:
        training.load_shrunken(fresh, state["model"])
        resumed = OPTIMIZERS[kind](fresh.parameters())
    resumed.load_state_dict(state["optimizer"])
    again = training.SinglePairSampler(fresh)
    again.load_state_dict(state["sampler"])
    for i in range(8):
        assert sampler.step() == again.step()
        for model, opt in ((saved, optimizer), (fresh, resumed)):
            train_step(model, opt, batch(seed=i), training.hierarchical_group_lasso)
        if i == 4:
            for model, opt, s in ((saved, optimizer, sampler), (fresh, resumed, again)):
                s.reset()
                for layer in lod(model).values():
                    fade(layer, 2)
                training.shrink(model, opt)
    assert_same_state(fresh, saved)


def test_layers_grow_back():
    """The model at hand may also be the smaller one."""
    whole, small = mixed(), mixed()
    for layer in lod(small).values():
        layer.truncate(2)
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    training.load_shrunken(small, whole.state_dict(), optimizer)
    assert full_ranks(small) == full_ranks(whole)
    assert_same_state(small, whole)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert held == [id(p) for p in small.parameters()]


def test_tied_frozen_and_marked_factors_stay_so():
    def tied():
        model = nn.Sequential(*(mk.LoDLinear(12, 12, 12) for _ in range(2)))
        model[1].u = model[0].u
        model[0].v.requires_grad_(False)
        model[0].u.no_decay = True
        return model

    saved, fresh = tied(), tied()
    for layer in saved:
        fade(layer, 4, 1e-12)
    training.shrink(saved)
    assert saved[0].max_rank == 4
    optimizer = torch.optim.SGD(fresh.parameters(), 0.1)
    training.load_shrunken(fresh, saved.state_dict(), optimizer)
    assert fresh[0].u is fresh[1].u
    assert fresh[0].u.no_decay
    assert not fresh[0].v.requires_grad
    assert fresh[1].v.requires_grad
    assert_same_state(fresh, saved)
    held = optimizer.param_groups[0]["params"]
    assert {id(p) for p in held} == {id(p) for p in fresh.parameters()}


def test_sampled_ranks_are_loaded_and_full_ranks_with_them():
    saved, _ = shrunken({})
    sampler = training.FixedSampler(saved, 0.5)
    sampler.step()
    fresh = training.load_shrunken(mixed(), saved.state_dict())
    assert mk.ranks(fresh) == mk.ranks(saved) != KEEP
    training.FullSampler(fresh).reset()
    assert mk.ranks(fresh) == KEEP


def test_a_lone_layer():
    saved = mk.LoDLinear(8, 6)
    fade(saved, 2)
    training.shrink(saved)
    fresh = mk.LoDLinear(8, 6)
    assert training.load_shrunken(fresh, saved.state_dict()) is fresh
    assert_same_state(fresh, saved)
    dense = mk.LoDLinear(8, 6).to_linear()
    new = training.load_shrunken(mk.LoDLinear(8, 6), dense.state_dict())
    assert type(new) is nn.Linear
    assert_same_state(new, dense)


def another(change):
    state = copy.deepcopy(linear_model().state_dict())
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("2.v"), "no '2.v'"),
        (lambda s: s.update(extra=torch.zeros(1)), "an unknown 'extra'"),
        (
            lambda s: s.update({"0.u": torch.zeros(16, 13)}),
            "'0.u' of shape (16, 13) instead of (16, 12)",
        ),
        (
            lambda s: s.update({"0.u": torch.zeros(16, 5)}),
            "'0.v' of shape (12, 12) instead of (5, 12)",
        ),
        (
            lambda s: s.update({"0.u": torch.zeros(9, 12)}),
            "'0.u' of shape (9, 12) instead of (16, 12)",
        ),
        (lambda s: s.update({"2.bias": 3}), "'2.bias' of shape int instead of (4,)"),
        (
            lambda s: s.update({"0.bias": torch.zeros(3)}),
            "'0.bias' of shape (3,) instead of (16,)",
        ),
        (lambda s: [s.pop(k) for k in list(s)], "no '0.u', no '0.v', no '0.bias', no '0.active"),
    ],
)
def test_another_architecture_is_refused_and_nothing_changes(change, message):
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    before = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    expected = (
        f"load_shrunken: state_dict: expected a checkpoint of this architecture, got {message}"
    )
    with pytest.raises(ValueError, match="^" + re.escape(expected)):
        training.load_shrunken(model, another(change), optimizer)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_wrong_arguments():
    with pytest.raises(TypeError, match="load_shrunken: state_dict: expected a mapping of names"):
        training.load_shrunken(linear_model(), 3)
    with pytest.raises(ValueError, match="load_shrunken: model: expected at least one LoD layer"):
        training.load_shrunken(nn.Linear(3, 3), {})
    with pytest.raises(TypeError, match=r"load_shrunken: optimizer: expected a torch\.optim"):
        training.load_shrunken(linear_model(), linear_model().state_dict(), 3)
