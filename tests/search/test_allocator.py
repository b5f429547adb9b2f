"""Allocation against enumeration, and its predictions against the models that result."""

import copy
import itertools
import json
import math
import re

import pytest
import torch
from torch import nn

import maestro_kernels as mk
from maestro_kernels import search
from maestro_kernels.search import allocator
from maestro_kernels.search.layers import storage_bytes

SIZES = {"0": (24, 16), "2": (32, 24), "4": (16, 32)}


def mlp():
    layers = [nn.Linear(K, N) for N, K in SIZES.values()]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], nn.Embedding(9, 5))
    model[5].forward = lambda x: x
    return model


class Machine:
    """A latency profile: work, a fixed cost per call, and a step at every 4 ranks."""

    def latency(self, *, N, K, rank, M):
        if rank == "dense":
            return 1e-3 + 1e-6 * M * N * K
        return 2e-3 + 1e-6 * M * (4 * math.ceil(rank / 4)) * (N + K)


BATCHES = [torch.randn(40, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.fixture
def model():
    return mlp()


@pytest.fixture
def sens(model):
    return search.sensitivity(model, BATCHES)


def ms(ranks):
    return sum(
        Machine().latency(N=N, K=K, rank=ranks[name], M=40) for name, (N, K) in SIZES.items()
    )


def weights(ranks):
    sizes = SIZES.items()
    return sum(N * K if ranks[n] == "dense" else ranks[n] * (N + K) for n, (N, K) in sizes)


DENSE = dict.fromkeys(SIZES, "dense")
COSTS = {
    search.Params: lambda ranks: weights(ranks) / weights(DENSE),
    search.MACs: lambda ranks: weights(ranks) / weights(DENSE),
    search.Memory: lambda ranks: (
        4 * weights(ranks) + 4 * (72 + 45) + 4 * sum(r != "dense" for r in ranks.values())
    ),
    search.Latency: ms,
    search.Speedup: lambda ranks: ms(DENSE) / ms(ranks),
}


def every_model(multiple_of=1):
    ranges = []
    for N, K in SIZES.values():
        low = range(multiple_of, min(N, K) + 1, multiple_of)
        ranges.append([*(r for r in low if r * (N + K) < N * K), "dense"])
    return [dict(zip(SIZES, one, strict=True)) for one in itertools.product(*ranges)]


def meets(budget, ranks):
    cost = COSTS[type(budget)](ranks)
    if isinstance(budget, search.Speedup):
        return cost >= budget.x * (1 - 1e-9)
    return cost <= next(iter(vars(budget).values())) * (1 + 1e-9)


BUDGETS = [
    search.Params(0.4), search.Params(0.7), search.Params(1), search.MACs(0.5),
    search.Memory(4000), search.Memory(6500),
    search.Latency(0.05), search.Latency(0.07), search.Speedup(1.1), search.Speedup(2),
]  # fmt: skip


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_exact_is_the_best_of_all_models(model, sens, budget, multiple_of):
    timed = isinstance(budget, search.Latency | search.Speedup)
    found = search.allocate(
        model, budget, sens, Machine() if timed else None, multiple_of=multiple_of
    )
    errors = [sens.error(r) for r in every_model(multiple_of) if meets(budget, r)]
    assert meets(budget, found)
    assert sens.error(found) == pytest.approx(found.predicted.error)
    assert found.predicted.error == pytest.approx(min(errors), abs=1e-12)
    assert found.gap == 0
    assert found.predicted.of(budget, found.dense) == pytest.approx(COSTS[type(budget)](found))
    # Equally good and larger models must not be refused by a budget just above theirs.
    greedy = search.allocate(
        model, budget, sens, Machine() if timed else None, multiple_of=multiple_of, method="greedy"
    )
    assert meets(budget, greedy)
    assert found.predicted.error <= greedy.predicted.error + 1e-12
    assert greedy.predicted.error <= found.predicted.error + greedy.gap + 1e-12


@pytest.mark.parametrize("method", ["exact", "greedy", "uniform", "threshold"])
@pytest.mark.parametrize(
    "budget",
    [search.Params(1e-4), search.MACs(1e-4), search.Memory(64), search.Latency(1e-5),
     search.Speedup(1e4)],
    ids=str,
)  # fmt: skip
def test_an_impossible_budget_is_told_the_best_there_is(model, sens, budget, method):
    with pytest.raises(ValueError, match="allocate: budget: expected one that ranks") as caught:
        search.allocate(model, budget, sens, Machine(), method=method, multiple_of=2)
    text = re.search(r"reaches is (\w+)\(\w+=([\d.e+-]+)\)", str(caught.value))
    kind, best = getattr(search, text[1]), float(text[2])
    assert kind is type(budget)
    found = search.allocate(model, kind(best), sens, Machine(), method=method, multiple_of=2)
    assert meets(kind(best), found)
    harder = best * (1.002 if kind is search.Speedup else 0.998)
    with pytest.raises(ValueError, match="expected one that ranks can meet"):
        search.allocate(model, kind(harder), sens, Machine(), method=method, multiple_of=2)


def test_ranks_lie_just_below_steps_and_pay(model, sens):
    chosen = set()
    for limit in (0.032, 0.04, 0.045, 0.05, 0.06, 0.07):
        found = search.allocate(model, search.Latency(limit), sens, Machine(), multiple_of=1)
        for choice in found.layers:
            if choice.rank != "dense":
                N, K = SIZES[choice.layer.name]
                assert choice.rank % 4 == 0 or choice.rank == N * K // (N + K)
                assert choice.ms < choice.dense_ms
                chosen.add(choice.rank)
    assert {4, 8} <= chosen
    # A profile rules such ranks out of other budgets too.
    found = search.allocate(model, search.Params(0.45), sens, Machine(), multiple_of=1)
    assert all(r == "dense" or r % 4 == 0 for r in found.values())
    without = search.allocate(model, search.Params(0.45), sens, multiple_of=1)
    assert any(r != "dense" and r % 4 for r in without.values())


class NeverFaster(Machine):
    def latency(self, *, N, K, rank, M):
        return 1.0 if rank == "dense" else 1.5 + 0.01 * rank


def test_where_low_rank_is_not_faster_the_layers_stay(model, sens):
    found = search.allocate(model, search.Latency(100), sens, NeverFaster())
    assert dict(found) == DENSE
    with pytest.raises(ValueError, match=r"reaches is Speedup\(x=1\.0\); 3 layers can only be"):
        search.allocate(model, search.Speedup(1.01), sens, NeverFaster())


def test_applied_models_cost_what_was_predicted(model, sens):
    found = search.allocate(model, search.Params(0.5), sens, multiple_of=2)
    before = copy.deepcopy(model.state_dict())
    small = found.apply(model, BATCHES, inplace=False)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert mk.ranks(model) == DENSE
    assert mk.ranks(small) == dict(found)
    assert storage_bytes(small) == found.predicted.bytes
    report = mk.summary(small)
    assert report.weights == found.predicted.weights
    assert found.predicted.macs == 40 * found.predicted.weights
    expected = mk.convert(
        copy.deepcopy(model), lambda name, _: found[name], init="data", batches=BATCHES
    )
    torch.testing.assert_close(small(BATCHES[0]), expected(BATCHES[0]))
    plain = found.apply(model)
    assert plain is model
    assert search.output_error(small, mlp_like(before), BATCHES) < search.output_error(
        plain, mlp_like(before), BATCHES
    )


def mlp_like(state):
    model = mlp()
    model.load_state_dict(state)
    return model


def test_factorised_models(model):
    reference = copy.deepcopy(model)
    mk.convert(model, init="data", batches=BATCHES, allow_larger=True, exclude="4")
    model[2].rank = 12
    found = search.allocate(
        model, search.Params(0.5), search.sensitivity(model, BATCHES), multiple_of=4
    )
    # At its full rank a layer may become dense; below it, dense weights are gone.
    assert "dense" not in [found.layers[1].rank]
    contract = copy.deepcopy(model)
    mk.set_ranks(contract, {n: r for n, r in found.items() if n != "4"})
    mk.truncate(contract)
    small = found.apply(model, BATCHES)
    assert mk.ranks(small) == dict(found)
    assert storage_bytes(small) == found.predicted.bytes
    assert all(m.max_rank == m.rank for m in small.modules() if isinstance(m, mk.LoDLinear))
    for name in ("0", "2"):
        a, b = small.get_submodule(name), contract.get_submodule(name)
        assert torch.equal(a.weight + 0, b.weight + 0)
    assert search.output_error(small, reference, BATCHES) < 0.2


def test_layers_of_full_rank_may_be_merged(model):
    mk.convert(model, allow_larger=True)
    sens = search.sensitivity(model, BATCHES)
    found = search.allocate(model, search.Params(1), sens)
    assert dict(found) == DENSE
    assert [type(m) for m in found.apply(model)[::2]] == [nn.Linear] * 3


def test_layers_without_sensitivity_stay(model):
    sens = search.sensitivity(model, BATCHES, exclude="2")
    found = search.allocate(model, search.Params(0.4), sens, multiple_of=2)
    assert set(found) == {"0", "4"}
    assert found.predicted.weights <= 0.4 * (16 * 24 + 16 * 32)
    assert storage_bytes(found.apply(model)) == found.predicted.bytes
    assert mk.ranks(model)["2"] == "dense"


def test_rank_zero_only_if_asked(model, sens):
    tiny = search.Params(0.01)
    with pytest.raises(ValueError, match="expected one that ranks can meet"):
        search.allocate(model, tiny, sens, multiple_of=1)
    found = search.allocate(model, tiny, sens, multiple_of=1, min_rank=0)
    assert set(found.values()) == {0}
    small = found.apply(model)
    assert mk.ranks(small) == dict(found)
    # Nothing but the biases is left.
    assert torch.equal(small(BATCHES[0]), small(BATCHES[1]))
    assert storage_bytes(small) == found.predicted.bytes


def test_rules_choose_what_they_say(model, sens):
    for method in ("uniform", "threshold"):
        found = search.allocate(model, search.Params(0.5), sens, method=method, multiple_of=1)
        assert weights(found) <= 0.5 * weights(DENSE)
        assert math.isnan(found.gap)
    uniform = search.allocate(model, search.Params(0.5), sens, method="uniform", multiple_of=1)
    assert dict(uniform) in [
        mk.ranks(mk.convert(model, rank=f / 1000, init="random", inplace=False))
        for f in range(440, 560)
    ]


def test_trade_off_is_a_falling_convex_front(model, sens):
    found = search.allocate(model, search.Params(0.5), sens, multiple_of=1)
    points = found.trade_off
    assert points[-1] == (1.0, 0.0)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    assert all(s < 0 for s in slopes)
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(slopes))
    for value, error in points:
        again = search.allocate(model, search.Params(value), sens, multiple_of=1)
        assert again.predicted.error == pytest.approx(error, abs=1e-9)


def test_printed_and_saved(model, sens):
    found = search.allocate(model, search.Latency(0.05), sens, Machine(), multiple_of=4)
    text = str(found)
    for choice in found.layers:
        rank = "dense" if choice.rank == "dense" else f"{choice.rank} of {choice.layer.max_rank}"
        assert re.search(rf"^{choice.layer.name} +{rank} ", text, re.MULTILINE)
    assert f"{found.predicted.ms:.2f} ms" in text
    data = json.loads(json.dumps(found.to_dict()))
    assert data["ranks"] == dict(found)
    assert data["budget"] == {"Latency": 0.05}
    assert data["predicted"]["ms"] == found.predicted.ms
    assert len(found) == 3
    with pytest.raises(KeyError):
        found["5"]


def test_verified(model, sens):
    found = search.allocate(model, search.Params(0.5), sens, Machine(), multiple_of=4)
    small = found.apply(model, BATCHES, inplace=False)
    report = found.verify(small, BATCHES[0], model, seconds=0.02)
    assert report.ms > 0
    assert report.before > 0
    assert report.ratio == found.predicted.ms / report.ms
    assert report.output_error == search.output_error(small, model, BATCHES[:1])
    assert f"predicted {found.predicted.ms:.2f} ms" in str(report)
    with pytest.raises(ValueError, match=r"verify: model: expected '\d' at rank \d+, got dense"):
        found.verify(model, BATCHES[0])


def test_a_profile_of_layers_is_anchored_by_the_model(model, sens, monkeypatch):
    class Timed:
        def __init__(self, ms):
            self.ms = ms

    def takes(total):
        monkeypatch.setattr(
            allocator, "measure_models", lambda models, batch, seconds: {"model": Timed(total)}
        )

    takes(ms(DENSE) + 0.5)
    found = search.allocate(
        model, search.Speedup(1.02), sens, Machine(), batch=BATCHES[0], multiple_of=4
    )
    assert found.dense.ms == pytest.approx(ms(DENSE) + 0.5)
    assert found.predicted.ms == pytest.approx(ms(found) + 0.5)
    assert found.predicted.ms <= found.dense.ms / 1.02
    # Layers that take longer by themselves than the model does are scaled to fit into it.
    takes(ms(DENSE) / 2)
    found = search.allocate(
        model, search.Speedup(1.2), sens, Machine(), batch=BATCHES[0], multiple_of=4
    )
    assert found.dense.ms == pytest.approx(ms(DENSE) / 2)
    assert found.predicted.ms == pytest.approx(ms(found) / 2)


class Broken(Machine):
    def latency(self, *, N, K, rank, M):
        return float("nan")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budget": 0.5}, TypeError, "budget: expected Params, MACs"),
        ({"method": "random"}, ValueError, "method: expected one of"),
        ({"multiple_of": 0}, ValueError, "multiple_of: expected an int >= 1"),
        ({"min_rank": -1}, ValueError, "min_rank: expected an int >= 0"),
        ({"sensitivity": {}}, TypeError, "sensitivity: expected a Sensitivity or None, got dict"),
        ({"profile": 3}, TypeError, "profile: expected one from profile_model or profile, got int"),
        ({"profile": Broken()}, ValueError, "profile: expected positive latencies, got nan"),
        ({"budget": search.Latency(1)}, ValueError, r"batch: expected the batch .*Latency\(ms=1"),
    ],
)
def test_refused(model, sens, change, error, message):
    arguments = {"budget": search.Params(0.5), "sensitivity": sens, **change}
    with pytest.raises(error, match=f"allocate: {message}"):
        search.allocate(model, **arguments)


def test_refused_for_another_model(model, sens):
    other = nn.Sequential(nn.Linear(16, 20))
    with pytest.raises(ValueError, match="sensitivity: expected one of this model, whose '0' is"):
        search.allocate(other, search.Params(0.5), sens)
    with pytest.raises(ValueError, match=r"expected errors of the model's layers \('layer'\)"):
        search.allocate(nn.ModuleDict({"layer": nn.Linear(8, 8)}), search.Params(0.5), sens)
    with pytest.raises(ValueError, match=r"apply: model: expected the layers .* none named '2'"):
        search.allocate(model, search.Params(1), sens).apply(nn.Sequential(nn.Linear(16, 24)))
    convolution = nn.Sequential(nn.Conv2d(16, 16, 3))
    batch = torch.randn(1, 16, 8, 8)
    with pytest.raises(NotImplementedError, match="'0' is a convolution, got Machine"):
        search.allocate(convolution, search.Params(0.5), None, Machine(), batch=batch)
    unknown_rows = search.sensitivity(model, method="svd")
    with pytest.raises(ValueError, match=r"batch: expected a batch that reaches '0'.* got None"):
        search.allocate(model, search.Latency(1), unknown_rows, Machine())


def test_with_a_measured_profile():
    model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 48))
    batch = torch.randn(40, 48)
    profile = search.profile(
        model, ranks=[8, 16, 24], rows=(40,), seconds=1e-3, resume=False, progress=False
    )
    sens = search.sensitivity(model, [batch])
    found = search.allocate(model, search.Params(1), sens, profile)
    for choice in found.layers:
        layer = choice.layer
        one = profile.latency(N=layer.N, K=layer.K, rank=choice.rank, M=40)
        assert choice.ms == pytest.approx(one)
        assert choice.dense_ms == profile.latency(N=layer.N, K=layer.K, rank="dense", M=40)
    assert found.predicted.ms == pytest.approx(sum(choice.ms for choice in found.layers))
