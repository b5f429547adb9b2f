"""Maestro on optimizers that accelerate has prepared."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import maestro_kernels as mk
from maestro_kernels import training

accelerate = pytest.importorskip("accelerate")
OPTIONS = {"lam": 3e-2, "threshold": 1e-2, "seed": 1}


def net():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    return mk.convert(dense, allow_larger=True)


def loader():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 12, generator=generator)
    return DataLoader(TensorDataset(x, torch.randn(64, 4, generator=generator)), batch_size=8)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def fit(model, optimizer, batches, backward, accumulate=None):
    maestro = training.Maestro(model, optimizer, **OPTIONS)
    ranks = []
    for _ in range(6):
        for x, y in maestro.epoch(batches):
            loss = (model(x) - y).square().mean()
            if accumulate is None:
                backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                continue
            with accumulate(model):
                backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        ranks.append([layer.max_rank for layer in mk.nn.lod_layers(model).values()])
    maestro.close()
    return ranks


@pytest.fixture
def accelerator():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda **options: accelerate.Accelerator(cpu=True, **options)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_a_prepared_optimizer_trains_and_shrinks_as_a_bare_one(accelerator):
    alone = net()
    expected = fit(alone, sgd(alone), loader(), torch.Tensor.backward)
    prepare = accelerator()
    model = net()
    model, optimizer, batches = prepare.prepare(model, sgd(model), loader())
    assert type(optimizer) is not torch.optim.SGD
    assert fit(model, optimizer, batches, prepare.backward) == expected
    # Training itself has made both layers smaller.
    assert expected[-1][0] < 12
    assert expected[-1][1] < 4
    torch.testing.assert_close(model.state_dict(), alone.state_dict(), rtol=0, atol=0)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_accumulated_gradients_count_the_penalty_once(accelerator, monkeypatch):
    prepare = accelerator(gradient_accumulation_steps=4)
    model = net()
    model, optimizer, batches = prepare.prepare(model, sgd(model), loader())
    added = []
    original = training.Maestro.add_penalty_gradient
    monkeypatch.setattr(
        training.Maestro,
        "add_penalty_gradient",
        lambda self: added.append(1) or original(self),
    )
    fit(model, optimizer, batches, prepare.backward, prepare.accumulate)
    assert len(added) == 6 * 8 / 4


def test_shrink_takes_prepared_optimizers(accelerator):
    model = net()
    model, optimizer = accelerator().prepare(model, sgd(model))
    model(torch.randn(3, 12)).sum().backward()
    optimizer.step()
    importance = mk.nn.lod_layers(model)["0"].importance()
    report = training.shrink(model, optimizer, threshold=float(importance[5]) * 0.999)
    assert report["0"] == (12, 6)
    assert model[0].max_rank == 6
    shapes = {tuple(state["momentum_buffer"].shape) for state in optimizer.state.values()}
    assert (16, 6) in shapes
