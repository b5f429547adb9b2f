"""Optimizer state is cut with the factors, and the steps on what is kept do not change."""

import copy

import pytest
import torch
from torch import nn
from training_support import batch, fade, linear_model, lod, mixed, train_step

import maestro_kernels as mk
from maestro_kernels import training

EXACT = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "sgd-momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
}
OTHERS = {
    # The same formula; but vectors and their rest round differently, and the sizes changed.
    "adamw-fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.1),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.01),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
}


def cut_like(tensor, whole, small, groups):
    """The prefix of `tensor`, of the shape of `whole`, that a factor of shape `small` has."""
    if whole.shape == small.shape:
        return tensor
    if whole.shape[0] == small.shape[0]:
        return tensor[:, : small.shape[1]]
    parts = tensor.unflatten(0, (groups, -1))[:, : small.shape[0] // groups]
    return parts.flatten(0, 1)


def pairs(big, small):
    """(whole parameter, sliced parameter, groups of its layer)."""
    groups = {id(layer.v): layer.groups for layer in lod(small).values()}
    return [
        (p, q, groups.get(id(q), 1))
        for p, q in zip(big.parameters(), small.parameters(), strict=True)
    ]


KEEP = {"0": 2, "2": 4, "4": 7, "6": 3}


def trained(make, optimizer_of, steps=3):
    """A model after some steps at the ranks it will keep, and its optimizer."""
    model = make()
    optimizer = optimizer_of(model.parameters())
    for i in range(steps):
        train_step(model, optimizer, batch(seed=i))
    for name, layer in lod(model).items():
        fade(layer, KEEP[name])
        layer.rank = KEEP[name]
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", EXACT)
def test_the_same_gradients_give_bitwise_the_same_steps(kind, dtype):
    whole = mixed(dtype)
    optimizer = EXACT[kind](whole.parameters())
    for i in range(3):
        train_step(whole, optimizer, batch(dtype=dtype, seed=i))
    for name, layer in lod(whole).items():
        fade(layer, KEEP[name])
    small, small_optimizer = copy.deepcopy((whole, optimizer))
    report = training.shrink(small, small_optimizer)
    assert {name: new for name, (_, new) in report.items()} == KEEP
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for p, q, groups in pairs(whole, small):
            p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
            q.grad = cut_like(p.grad, p, q, groups).clone()
        optimizer.step()
        small_optimizer.step()
        for p, q, groups in pairs(whole, small):
            assert torch.equal(cut_like(p.detach(), p, q, groups), q.detach())
            for key, value in optimizer.state[p].items():
                have = small_optimizer.state[q][key]
                if isinstance(value, torch.Tensor) and value.dim():
                    assert torch.equal(cut_like(value, p, q, groups), have)
                else:
                    assert have == value


@pytest.mark.parametrize("kind", [*EXACT, *OTHERS])
def test_training_goes_on_as_with_the_active_rank_alone(kind):
    optimizer_of = {**EXACT, **OTHERS}[kind]
    whole, optimizer = trained(mixed, optimizer_of)
    small, small_optimizer = copy.deepcopy((whole, optimizer))
    training.shrink(small, small_optimizer)
    assert {name: layer.max_rank for name, layer in lod(small).items()} == KEEP
    for i in range(5):
        a = train_step(whole, optimizer, batch(seed=10 + i))
        b = train_step(small, small_optimizer, batch(seed=10 + i))
        assert a == pytest.approx(b, rel=1e-9)
    for p, q, groups in pairs(whole, small):
        torch.testing.assert_close(
            cut_like(p.detach(), p, q, groups), q.detach(), rtol=1e-8, atol=1e-10
        )


@pytest.mark.parametrize("kind", EXACT)
def test_masking_instead_of_slicing_is_the_same_training(kind):
    """With the penalty too: dead components neither come back nor weigh on the living."""
    models = []
    for min_saving in (0.0, 1.1):
        model = mixed()
        optimizer = EXACT[kind](model.parameters())
        for i in range(3):
            train_step(model, optimizer, batch(seed=i))
        for name, layer in lod(model).items():
            fade(layer, KEEP[name])
        training.shrink(model, optimizer, min_saving=min_saving)
        sampler = training.SinglePairSampler(model)
        for i in range(6):
            sampler.step()
            train_step(model, optimizer, batch(seed=i), training.hierarchical_group_lasso)
        models.append(model)
    small, whole = models
    for p, q, groups in pairs(whole, small):
        torch.testing.assert_close(
            cut_like(p.detach(), p, q, groups), q.detach(), rtol=1e-8, atol=1e-10
        )


def test_memory_is_freed():
    model = linear_model()
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(3, 12, dtype=torch.float64)
    model(x).sum().backward()
    optimizer.step()
    fade(model[0], 4)
    training.shrink(model, optimizer)
    for p, shape in ((model[0].u, (16, 4)), (model[0].v, (4, 12))):
        for tensor in (p, p.grad, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]):
            assert tensor.shape == shape
            assert tensor.untyped_storage().nbytes() == tensor.numel() * 8
    assert len(optimizer.state) == len(list(model.parameters()))


def test_param_groups_and_schedulers_stay():
    model = linear_model()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    group = optimizer.param_groups[0]
    params, names = group["params"], list(group["param_names"])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    fade(model[0], 4)
    training.shrink(model, optimizer)
    assert optimizer.param_groups[0] is group
    assert group["params"] is params
    assert [id(p) for p in params] == [id(p) for p in model.parameters()]
    assert group["param_names"] == names
    optimizer.step()
    scheduler.step()
    assert group["lr"] == 0.05


def test_several_optimizers():
    model = linear_model()
    us = [layer.u for layer in lod(model).values()]
    vs = [layer.v for layer in lod(model).values()]
    optimizers = [torch.optim.SGD(us, 0.1), torch.optim.Adam(vs)]
    fade(model[0], 4)
    training.shrink(model, optimizers)
    assert optimizers[0].param_groups[0]["params"][0] is model[0].u
    assert optimizers[1].param_groups[0]["params"][0] is model[0].v


def estimates(optimizer, parameter):
    """Adafactor's estimate of every squared gradient."""
    state = optimizer.state[parameter]
    row, col = state["row_var"], state["col_var"]
    return row @ col / row.mean(-2, keepdim=True)


@pytest.mark.parametrize("min_saving", [0.0, 1.1])
def test_adafactor_keeps_its_estimates_of_what_is_kept(min_saving):
    model, data = mixed(), batch()
    optimizer = torch.optim.Adafactor(model.parameters(), 0.01)
    for i in range(3):
        train_step(model, optimizer, batch(seed=i))
    before = {name: estimates(optimizer, p) for name, p in model.named_parameters() if p.dim() > 1}
    whole = dict(model.named_parameters())
    keep = {"0": 2, "2": 4, "4": 7, "6": 3}
    for name, layer in lod(model).items():
        fade(layer, keep[name])
    training.shrink(model, optimizer, min_saving=min_saving)
    for name, layer in lod(model).items():
        r, groups = keep[name], layer.groups
        u, v = estimates(optimizer, layer.u), estimates(optimizer, layer.v)
        torch.testing.assert_close(u[:, :r], before[f"{name}.u"][:, :r])
        expected = before[f"{name}.v"].unflatten(0, (groups, -1))[:, :r]
        torch.testing.assert_close(v.unflatten(0, (groups, -1))[:, :r], expected)
        for key in ("row_var", "col_var"):
            for p, label in ((layer.u, "u"), (layer.v, "v")):
                assert optimizer.state[p][key].dim() == whole[f"{name}.{label}"].dim()
    train_step(model, optimizer, data)
    assert all(p.isfinite().all() for p in model.parameters())


def test_adafactor_row_and_column_means_stay_equal():
    """Both are the mean squared gradient; the optimizer divides one by the other."""
    model = linear_model()
    optimizer = torch.optim.Adafactor(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 12, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    fade(model[0], 4)
    training.shrink(model, optimizer)
    for p in (model[0].u, model[0].v):
        state = optimizer.state[p]
        torch.testing.assert_close(state["row_var"].mean(), state["col_var"].mean())


class Shampoo(torch.optim.Optimizer):
    """A preconditioner per matrix: state that no prefix describes."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.dim() == 2:
                    self.state[p].setdefault("left", p.grad @ p.grad.T)


class Lists(Shampoo):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["history"] = [p.clone()]


@pytest.mark.parametrize(
    ("kind", "key", "got"), [(Shampoo, "left", "shape"), (Lists, "history", "list")]
)
def test_unknown_state_is_refused_by_name(kind, key, got):
    model = nn.Sequential(mk.LoDLinear(8, 8, 8), mk.LoDLinear(8, 6, 6))
    optimizer = kind(model.parameters())
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    fade(model[0], 3)
    match = rf"shrink: optimizer: .* for \S+, got {kind.__name__} state '{key}' of {got}"
    with pytest.raises(NotImplementedError, match=match):
        training.shrink(model, optimizer)
    assert model[0].max_rank == 8


def test_optimizers_with_state_elsewhere_are_refused_by_name():
    model = linear_model()
    with pytest.raises(NotImplementedError, match="got LBFGS"):
        training.shrink(model, torch.optim.LBFGS(model.parameters()))
