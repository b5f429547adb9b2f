"""Maestro in a loop of one's own, and the checkpoints of such a loop."""

import pickle
import random

import numpy
import pytest
import torch
from torch import nn
from training_support import batch, fade, full_ranks, linear_model, lod, mixed

import maestro_kernels as mk
from maestro_kernels import training
from maestro_kernels.training.loop import first_non_finite

X, Y = batch()


def criterion(model):
    return (model(X) - Y).square().mean()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def run(model, maestro, optimizer, epochs=2, steps=3):
    for _ in range(epochs):
        for _ in maestro.epoch(range(steps)):
            optimizer.zero_grad()
            criterion(model).backward()
            optimizer.step()


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_two_lines_do_what_the_written_out_loop_does():
    ours, theirs = mixed(), mixed()
    optimizer, other = sgd(ours), sgd(theirs)
    for model in (ours, theirs):
        fade(lod(model)["0"], 1)
        fade(lod(model)["6"], 2)
    maestro = training.Maestro(ours, optimizer, lam=1e-3, threshold=1e-6, seed=3)
    run(ours, maestro, optimizer)

    sampler = training.SinglePairSampler(theirs, seed=3)
    for _ in range(2):
        for _ in range(3):
            sampler.step()
            other.zero_grad()
            penalty = training.hierarchical_group_lasso(theirs)
            (criterion(theirs) + 1e-3 * penalty).backward()
            other.step()
        sampler.reset()
        training.shrink(theirs, other, threshold=1e-6)
    # The comparison is worth something only where layers did shrink.
    assert full_ranks(ours)["6"] == 2
    assert full_ranks(ours) == full_ranks(theirs)
    torch.testing.assert_close(parameters(ours), parameters(theirs), rtol=1e-12, atol=1e-14)
    assert (maestro.epochs, maestro.steps) == (2, 6)


@pytest.mark.parametrize(
    ("penalty", "function"),
    [
        ("hierarchical", training.hierarchical_group_lasso),
        ("group", training.group_lasso),
        ("funnel", None),
    ],
)
def test_the_gradient_of_the_penalty_is_added_once_per_optimizer_step(penalty, function):
    model = linear_model()
    start = training.funnel_start(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    maestro = training.Maestro(model, optimizer, lam=0.5, penalty=penalty)
    with torch.no_grad():
        model[0].u *= 1.5
    value = function(model) if function else training.funnel(model, start)
    wanted = torch.autograd.grad(0.5 * value, [model[0].u, model[2].v])
    before = parameters(model)
    # No gradient of its own, then a second backward without a step: the penalty is not in it.
    x = torch.randn(3, 12, dtype=torch.float64)
    (0 * model(x).sum()).backward()
    (0 * model(x).sum()).backward()
    optimizer.step()
    for name, gradient in zip(("0.u", "2.v"), wanted, strict=True):
        moved = before[name] - parameters(model)[name]
        torch.testing.assert_close(moved, gradient, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(maestro.last_penalty, 0.5 * value.detach())
    maestro.close()
    optimizer.zero_grad()
    after = parameters(model)
    optimizer.step()
    torch.testing.assert_close(parameters(model), after, rtol=0, atol=0)


def test_a_scale_that_a_fused_optimizer_divides_by_is_multiplied_in():
    model = linear_model()
    optimizer = sgd(model)
    maestro = training.Maestro(model, optimizer, lam=0.5, attach=False)
    maestro.add_penalty_gradient()
    plain = model[0].u.grad.clone()
    optimizer.zero_grad()
    optimizer.grad_scale = torch.tensor(8.0)
    maestro.add_penalty_gradient()
    torch.testing.assert_close(model[0].u.grad, 8 * plain)


@pytest.mark.parametrize("call", ["positional", "keyword"])
def test_a_closure_is_refused_because_it_would_lose_the_penalty(call):
    model = linear_model()
    optimizer = sgd(model)
    maestro = training.Maestro(model, optimizer, lam=1e-3)
    before = parameters(model)

    def closure():
        return torch.zeros(())

    arguments = ((closure,), {}) if call == "positional" else ((), {"closure": closure})
    with pytest.raises(NotImplementedError, match=r"Maestro: optimizer.step: expected no closure"):
        optimizer.step(*arguments[0], **arguments[1])
    torch.testing.assert_close(parameters(model), before, rtol=0, atol=0)
    maestro.close()
    optimizer.step(closure)


def test_a_loop_left_early_leaves_full_ranks_and_does_not_count_the_epoch():
    model = mixed()
    maestro = training.Maestro(model, sgd(model), sampler="independent", seed=1)
    full = full_ranks(model)
    for i in maestro.epoch(range(9)):
        if i == 3:
            assert mk.ranks(model) != full
            break
    assert mk.ranks(model) == full
    assert (maestro.epochs, maestro.steps) == (0, 3)


def test_frozen_factors_get_no_gradient_of_the_penalty_and_change_places():
    model = linear_model()
    optimizer = sgd(model)
    maestro = training.Maestro(model, optimizer, lam=0.1, freeze_period=1, shrink_every=0)
    x = torch.randn(3, 12, dtype=torch.float64)
    for frozen in ("v", "u"):
        before = parameters(model)
        for _ in maestro.epoch(range(2)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        moved = {n for n, p in parameters(model).items() if not torch.equal(p, before[n])}
        assert {n for n in moved if n[-2:] in (".u", ".v")} == {
            f"{i}.{'uv'.replace(frozen, '')}" for i in (0, 2)
        }
    state = maestro.state_dict()
    maestro.close()
    assert all(p.requires_grad for p in model.parameters())
    # A run that goes on within an epoch freezes at once: the third epoch is v's again.
    maestro.load_state_dict(state)
    assert [p.requires_grad for p in (model[0].u, model[0].v)] == [True, False]


def test_shrinking_waits_for_its_epoch():
    model = linear_model()
    fade(model[0], 5)
    optimizer = sgd(model)
    maestro = training.Maestro(model, optimizer, shrink_every=2, multiple_of=4)
    for _ in maestro.epoch(range(0)):
        pass
    assert (model[0].max_rank, maestro.last_shrink) == (12, {})
    for _ in maestro.epoch(range(0)):
        pass
    assert (model[0].max_rank, model[0].rank) == (8, 5)
    assert maestro.last_shrink == {"0": (12, 5)}


def test_wrong_arguments_are_named():
    model = linear_model()
    optimizer = sgd(model)
    make = training.Maestro
    with pytest.raises(ValueError, match="Maestro: model: expected at least one LoD layer"):
        make(nn.Linear(2, 2), optimizer)
    with pytest.raises(TypeError, match=r"Maestro: optimizer: expected .*Optimizer, got int"):
        make(model, 3)
    with pytest.raises(ValueError, match=r"Maestro: penalty: expected one of .*, got 'l2'"):
        make(model, optimizer, penalty="l2")
    with pytest.raises(ValueError, match=r"Maestro: sampler: expected one of .*, got 'pair'"):
        make(model, optimizer, sampler="pair")
    with pytest.raises(TypeError, match="got object without step"):
        make(model, optimizer, sampler=object())
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="Maestro: lam: expected a finite number >= 0"):
            make(model, optimizer, lam=value)
    with pytest.raises(ValueError, match=r"Maestro: shrink_every: .*-1"):
        make(model, optimizer, shrink_every=-1)


def test_the_first_layer_that_is_not_finite_is_named():
    model = mixed()
    assert first_non_finite(model, lambda: model(X)) is None
    assert training.check_loss(torch.tensor(2.0), model, 1) == 2.0

    def overflow(module, inputs):
        return (inputs[0] * 1e308 * 1e10,)

    handle = model[2].register_forward_pre_hook(overflow)
    with pytest.raises(
        training.NonFiniteLoss, match=r"got nan at step 7; first non-finite: input of layer '2'"
    ):
        training.check_loss(torch.tensor(float("nan")), model, 7, lambda: model(X))
    handle.remove()
    with torch.no_grad():
        model[6].v[1, 1] = float("inf")
    with pytest.raises(training.NonFiniteLoss, match=r"got inf at step 8; .* parameter '6.v'"):
        training.check_loss(torch.tensor(float("inf")), model, 8)


def test_an_epoch_does_not_end_on_parameters_that_are_not_finite():
    model = linear_model()
    maestro = training.Maestro(model, sgd(model), shrink_every=0)
    batches = maestro.epoch(range(2))
    next(batches)
    next(batches)
    with torch.no_grad():
        model[2].bias[0] = float("nan")
    with pytest.raises(training.NonFiniteLoss, match=r"after step 2, got .* parameter '2.bias'"):
        next(batches)
    assert maestro.epochs == 0


def noisy_run(model, maestro, optimizer, epochs):
    """Uses every global random state."""
    for _ in range(epochs):
        for _ in maestro.epoch(range(3)):
            optimizer.zero_grad()
            noise = random.random() + numpy.random.rand() + torch.rand(())
            (criterion(model) * noise).backward()
            optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("penalty", ["hierarchical", "funnel"])
def test_a_checkpoint_continues_bit_for_bit_in_a_fresh_model(tmp_path, kind, penalty):
    def setup():
        model = mixed()
        extra = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        optimizer = kind(model.parameters(), lr=0.01, **extra)
        settings = {"lam": 1e-3, "threshold": 1e-6, "freeze_period": 2, "seed": 5}
        return model, optimizer, training.Maestro(model, optimizer, penalty=penalty, **settings)

    model, optimizer, maestro = setup()
    fade(lod(model)["6"], 2)
    random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
    noisy_run(model, maestro, optimizer, 3)
    path = training.save_checkpoint(model, tmp_path / "a.pt", optimizer, maestro, epoch=3)
    noisy_run(model, maestro, optimizer, 3)
    assert full_ranks(model)["6"] == 2

    again, optimizer2, maestro2 = setup()
    random.seed(9), numpy.random.seed(9), torch.manual_seed(9)
    assert training.load_checkpoint(again, path, optimizer2, maestro2) == {"epoch": 3}
    noisy_run(again, maestro2, optimizer2, 3)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert (maestro2.epochs, maestro2.steps) == (maestro.epochs, maestro.steps) == (6, 18)
    assert maestro2.sampler.state_dict() == maestro.sampler.state_dict()


def test_random_states_stay_on_request(tmp_path):
    model = linear_model()
    path = training.save_checkpoint(model, tmp_path / "a.pt", sgd(model))
    torch.manual_seed(4)
    wanted = torch.rand(3)
    torch.manual_seed(4)
    training.load_checkpoint(model, path, sgd(model), random_state=False)
    assert torch.equal(torch.rand(3), wanted)


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    model = mixed()
    optimizer = sgd(model)
    maestro = training.Maestro(model, optimizer)
    path = training.save_checkpoint(model, tmp_path / "a.pt", optimizer, maestro)
    bare = training.save_checkpoint(model, tmp_path / "b.pt", optimizer)

    def refused(match, where=path, other=None, **settings):
        target = other or mixed()
        goal = sgd(target)
        holder = training.Maestro(target, goal, **settings)
        with torch.no_grad():
            next(target.parameters()).add_(1)
        before = parameters(target)
        with pytest.raises(ValueError, match=match):
            training.load_checkpoint(target, where, goal, holder)
        torch.testing.assert_close(parameters(target), before, rtol=0, atol=0)
        assert holder.epochs == 0

    wider = mk.convert(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 7, 3)), allow_larger=True)
    refused("load_checkpoint: optimizer: expected groups of", other=wider)
    same_count = mixed()
    same_count[4] = mk.LoDLinear(96, 24, dtype=torch.float64)
    refused("expected a checkpoint of this architecture", other=same_count)
    refused("expected one of the sampler 'FullSampler'", sampler="full")
    refused("expected one of the penalty 'funnel'", penalty="funnel")
    refused("expected a checkpoint with its state", where=bare)

    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("load_checkpoint: path: expected a whole checkpoint, got 'a.pt'")
    path.write_text("no checkpoint at all")
    refused("another kind of file|expected a whole checkpoint")
    torch.save({"model": 1}, path)
    refused("'a.pt', another kind of file")
    path.write_bytes(pickle.dumps(nn.Linear, protocol=2))
    refused("another kind of file|expected a whole checkpoint")
    with pytest.raises(FileNotFoundError, match=r"got no file .*none.pt"):
        training.load_checkpoint(model, tmp_path / "none.pt", optimizer)


def test_a_model_that_is_not_finite_does_not_replace_a_good_checkpoint(tmp_path):
    model = linear_model()
    optimizer = sgd(model)
    path = training.save_checkpoint(model, tmp_path / "a.pt", optimizer)
    good = path.read_bytes()
    with torch.no_grad():
        model[0].u[0, 0] = float("nan")
    with pytest.raises(training.NonFiniteLoss, match=r"non-finite parameter '0.u'.* not written"):
        training.save_checkpoint(model, path, optimizer)
    assert path.read_bytes() == good


def test_a_write_cut_short_leaves_the_earlier_file(tmp_path, monkeypatch):
    model = linear_model()
    path = training.save_checkpoint(model, tmp_path / "a.pt", sgd(model), n=1)
    monkeypatch.setattr("maestro_kernels.files.os.fsync", lambda fd: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training.save_checkpoint(model, path, sgd(model), n=2)
    monkeypatch.undo()
    assert training.load_checkpoint(model, path, sgd(model)) == {"n": 1}
    training.save_checkpoint(model, path, sgd(model), n=3)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_model_may_take_the_ranks_of_what_it_loads():
    small, fresh = mixed(), mixed()
    for name in lod(small):
        fade(lod(small)[name], 1)
    training.shrink(small, threshold=1e-6)
    state = small.state_dict()
    with pytest.raises(RuntimeError, match="of a truncated layer fits"):
        fresh.load_state_dict(state)
    training.resize_on_load(fresh)
    # Models with the hook are still copied between processes.
    fresh = pickle.loads(pickle.dumps(fresh))
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh.state_dict(), state, rtol=0, atol=0)
    assert full_ranks(fresh) == dict.fromkeys(lod(fresh), 1)
    assert torch.equal(fresh(X), small(X))
    with pytest.raises(RuntimeError, match=r"4\.u: expected shape"):
        fresh.load_state_dict({**state, "4.u": state["4.u"][:3]})
    other = mixed()
    training.resize_on_load(other).remove()
    with pytest.raises(RuntimeError, match="of a truncated layer fits"):
        other.load_state_dict(state)
