"""Refinement: choices of an additive model against a loss that is not additive."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import maestro_kernels as mk
from maestro_kernels import search
from maestro_kernels.search import allocator, knapsack
from maestro_kernels.search.refine import refine


def problem(seed, layers=4, ranks=8):
    """Costs and predicted errors, and a true loss in which layers weigh otherwise and interact."""
    rng = np.random.default_rng(seed)
    costs = [np.arange(1, ranks + 1) * rng.integers(1, 4).astype(float) for _ in range(layers)]
    errors = [np.exp(-np.arange(ranks) * rng.uniform(0.2, 0.8)) for _ in range(layers)]
    weights = rng.uniform(0.2, 5.0, layers)

    def loss(choice):
        parts = np.array([w * e[j] for w, e, j in zip(weights, errors, choice, strict=True)])
        return float(parts.sum() + 0.3 * np.outer(parts, parts).sum())

    return list(zip(costs, errors, strict=True)), loss


def cost(options, choice):
    return sum(costs[j] for (costs, _), j in zip(options, choice, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_comes_close_to_the_true_optimum_within_the_budget(seed):
    options, loss = problem(seed)
    limit = 0.5 * sum(costs[-1] for costs, _ in options)
    start = knapsack.exact(options, limit).choice
    found, record = refine(options, [start], limit, loss, 200)
    fitting = [
        c
        for c in itertools.product(*(range(len(e)) for _, e in options))
        if cost(options, c) <= limit
    ]
    best = min(map(loss, fitting))
    assert cost(options, found) <= limit
    assert record.loss == loss(found)
    assert record.starts == (loss(start),)
    # Where the weights differ a lot, the additive optimum is far from the true one.
    assert record.loss <= best + 0.1 * (loss(start) - best) + 1e-12


@pytest.mark.parametrize("passes", [0, 1, 5, 9, 40])
def test_measures_no_more_often_than_it_may_and_never_ends_worse(passes):
    options, loss = problem(3)
    limit = 0.5 * sum(costs[-1] for costs, _ in options)
    starts = [knapsack.exact(options, limit).choice, (0,) * len(options), (0,) * len(options)]
    calls = []

    def counted(choice):
        calls.append(choice)
        return loss(choice)

    _, record = refine(options, starts, limit, counted, passes)
    assert len(calls) == len(set(calls)) == record.passes <= max(passes, 2) == record.limit
    assert record.loss <= min(record.starts)


def test_a_better_start_is_where_it_starts():
    options, loss = problem(1)
    worse, better = (0,) * len(options), (2,) * len(options)
    found, record = refine(options, [worse, better], cost(options, better), loss, 0)
    assert found == better
    assert record.loss == loss(better) < loss(worse)


@pytest.mark.parametrize("seed", range(4))
def test_a_loss_below_zero_falls_too(seed):
    options, loss = problem(seed)
    limit = 0.5 * sum(costs[-1] for costs, _ in options)
    start = knapsack.exact(options, limit).choice
    _, record = refine(options, [start], limit, lambda choice: loss(choice) - 100, 200)
    assert record.loss <= record.starts[0]


@pytest.mark.parametrize("seed", range(4))
def test_choices_beyond_hope_are_left_alone(seed):
    """Low ranks of one layer break the model: alone (its error is infinite), or with others."""
    options, finite = problem(seed)
    options = [(costs, errors.copy()) for costs, errors in options]
    options[0][1][:3] = np.inf
    limit = 0.5 * sum(costs[-1] for costs, _ in options)

    def loss(choice):
        broken = choice[0] < 3 or (choice[1] < 2 and choice[2] < 2)
        return np.inf if broken else finite(choice)

    start = (3, 2, 2, 0)
    assert cost(options, start) <= limit
    found, record = refine(options, [start], limit, loss, 200)
    assert cost(options, found) <= limit
    assert record.loss == loss(found) < loss(start)
    # A layer whose own error is infinite where it stands may stay there.
    options[1][1][2] = np.inf
    found, record = refine(options, [start], limit, loss, 200)
    assert found[1] == 2
    assert record.loss == loss(found) < loss(start)
    hopeless, record = refine(options, [(0, 0, 0, 0)], limit, loss, 200)
    assert (hopeless, record.passes) == ((0, 0, 0, 0), 1)


def test_what_cannot_be_had_is_not_measured():
    options, loss = problem(2)
    limit = 0.5 * sum(costs[-1] for costs, _ in options)
    start = (1,) * len(options)
    asked = []

    def fits(choice):
        asked.append(choice)
        return False

    found, record = refine(options, [start], limit, loss, 200, fits)
    assert found == start
    assert record.loss == loss(start)
    assert all(cost(options, choice) <= limit * (1 + 1e-9) for choice in asked)
    assert asked


def net(seed=0):
    """Three layers whose spectra fall at different speeds, wide of each other in scale."""
    torch.manual_seed(seed)
    sizes, decays = (64, 96, 96, 32), (0.2, 0.5, 0.9)
    layers = []
    for K, N, decay in zip(sizes, sizes[1:], decays, strict=False):
        layer = nn.Linear(K, N)
        u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        s = torch.arange(1, len(s) + 1) ** -decay
        layer.weight.data = (u * (s * 2 * (K * N) ** 0.25 / s.norm())) @ v
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


@pytest.fixture
def batches():
    torch.manual_seed(5)
    mix = torch.randn(64, 64)
    return [torch.randn(128, 64) @ mix for _ in range(6)]


def error(model, allocation, batches, held):
    small = allocation.apply(model, batches, inplace=False)
    return search.output_error(small, model, held)


@pytest.mark.parametrize("method", ["exact", "greedy"])
def test_never_worse_than_uniform_ranks_whatever_the_errors_say(batches, method):
    model = net()
    sens = search.sensitivity(model, batches, method="data")
    for one in sens.layers.values():
        # What the first layer loses is said not to matter, so the solver cuts it to nothing.
        one.errors[:] *= {"0": 1e-6, "2": 1.0, "4": 1.0}[one.layer.name]
    budget = search.Params(0.5)
    options = {"multiple_of": 4, "method": method}
    misled = search.allocate(model, budget, sens, **options)
    uniform = search.allocate(model, budget, sens, multiple_of=4, method="uniform")
    found = search.allocate(model, budget, sens, batches=batches[:4], **options)
    errors = [error(model, a, batches[:4], batches[:4]) for a in (misled, uniform, found)]
    assert errors[0] > errors[1] >= errors[2] * (1 - 1e-6)
    assert found.refined.loss == pytest.approx(errors[2], rel=1e-3)
    assert found.refined.starts == pytest.approx(errors[:2], rel=1e-3)
    # Also on batches that nothing was chosen by.
    held = [error(model, a, batches[:4], batches[4:]) for a in (misled, uniform, found)]
    assert held[2] < min(held[:2])
    assert found.predicted.weights <= 0.5 * found.dense.weights
    assert np.isnan(found.gap)
    assert "measured loss" in found.summary()


def test_refined_ranks_are_better_on_batches_not_seen(batches):
    """Errors of the layers' own outputs know nothing of what the others do with them."""
    gains = []
    for seed in range(4):
        model = net(seed)
        sens = search.sensitivity(model, batches[:4], method="svd")
        plain = search.allocate(model, search.Params(0.5), sens, multiple_of=4)
        found = search.allocate(model, search.Params(0.5), sens, multiple_of=4, batches=batches[:4])
        assert found.refined.loss <= min(found.refined.starts)
        held = [error(model, a, batches[:4], batches[4:]) for a in (plain, found)]
        gains.append(held[1] / held[0])
    assert max(gains) <= 1.001
    assert min(gains) < 0.95


def test_the_model_is_left_bit_for_bit_also_when_the_loss_raises(batches):
    model = nn.Sequential(net(), mk.LoDLinear(32, 32, max_rank=24))
    model[1].rank = 9
    before = copy.deepcopy(model.state_dict())
    sens = search.sensitivity(model, batches, method="data")
    calls = []

    def loss(m, batch):
        calls.append(m)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return m(batch).square().mean()

    with pytest.raises(KeyboardInterrupt):
        search.allocate(model, search.Params(0.6), sens, batches=batches[:1], loss_fn=loss)
    assert len(calls) == 7
    assert model[1].rank == 9
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_refines_factorised_layers_by_their_ranks(batches):
    model = mk.convert(net(), init="data", batches=batches, allow_larger=True)
    sens = search.sensitivity(model, batches[:4], method="data")
    found = search.allocate(model, search.Params(0.5), sens, multiple_of=4, batches=batches[:4])
    assert found.refined.loss <= min(found.refined.starts)
    assert mk.ranks(model) == {
        name: layer.max_rank for name, layer in mk.nn.lod_layers(model).items()
    }
    reference = copy.deepcopy(model)
    mk.set_ranks(model, found)
    assert search.output_error(model, reference, batches[:4]) == pytest.approx(
        found.refined.loss, rel=1e-3
    )


def test_measured_sensitivities_lend_their_factors(batches, tmp_path, monkeypatch):
    model = net()
    sens = search.sensitivity(model, batches, method="loss", held_out=2)
    budget = search.Params(0.5)
    known = search.allocate(model, budget, sens, batches=batches[:2])
    sens.save(tmp_path / "s.json")
    loaded = search.Sensitivity.load(tmp_path / "s.json")
    assert all(one.factors is None for one in loaded.layers.values())
    again = search.allocate(model, budget, loaded, batches=batches[:2])
    assert again.refined.starts != known.refined.starts
    monkeypatch.setattr(allocator, "input_moments", None)
    assert dict(search.allocate(model, budget, sens, batches=batches[:2])) == dict(known)


def test_says_beforehand_how_often_it_may_measure(batches):
    model, told = net(), []
    search.allocate(
        model, search.Params(0.5), batches=batches[:1], passes=11,
        progress=lambda text, done, total: told.append((text, done, total)),
    )  # fmt: skip
    assert told[0] == ("refining 3 layers: at most 11 passes", 0, 11)
    assert [done for _, done, _ in told[1:-1]] == list(range(1, len(told) - 1))
    assert len(told) <= 13
