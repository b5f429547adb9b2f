"""Layers timed inside their model, on a clock that only their work moves."""

import copy
import ctypes

import pytest
import torch
from torch import nn

import maestro_kernels as mk
from maestro_kernels import search
from maestro_kernels.measure import heap
from maestro_kernels.search import model_profile

REST = 7.5
MS = 1_000_000


class Clock:
    """Nanoseconds that pass only where a layer says so."""

    def __init__(self):
        self.now = 0

    def perf_counter_ns(self):
        return self.now

    def perf_counter(self):
        return self.now * 1e-9


class Wait(nn.Module):
    """What a model does outside of the layers considered."""

    def __init__(self, clock):
        super().__init__()
        self.clock = [clock]

    def forward(self, x):
        self.clock[0].now += round(REST * MS)
        return x

    def __deepcopy__(self, memo):
        return Wait(self.clock[0])


def dense_ms(N, K, rows):
    return 1e-3 * rows * N * K


def low_ms(N, K, rank, rows):
    return 0.25 + 1e-3 * rows * rank * (N + K)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    dense, low = nn.Linear.forward, mk.LoDLinear.forward

    def dense_forward(layer, x):
        clock.now += round(dense_ms(*layer.weight.shape, x.numel() // x.shape[-1]) * MS)
        return dense(layer, x)

    def low_forward(layer, x):
        rows = x.numel() // x.shape[-1]
        clock.now += round(low_ms(layer.out_features, layer.in_features, layer.rank, rows) * MS)
        return low(layer, x)

    monkeypatch.setattr(model_profile, "time", clock)
    monkeypatch.setattr(nn.Linear, "forward", dense_forward)
    monkeypatch.setattr(mk.LoDLinear, "forward", low_forward)
    return clock


class Model(nn.Module):
    """Two layers of one size, one of another that is called twice, and the rest."""

    def __init__(self, clock):
        super().__init__()
        self.first = nn.Linear(48, 48)
        self.second = nn.Linear(48, 48)
        self.twice = nn.Linear(48, 96)
        self.wait = Wait(clock)

    def forward(self, x):
        x = self.wait(self.second(self.first(x)))
        return self.twice(x) + self.twice(x[:2]).sum()


X = torch.randn(5, 48)


def expected(ranks):
    total = REST
    for name, N, calls in (("first", 48, (5,)), ("second", 48, (5,)), ("twice", 96, (5, 2))):
        rank = ranks[name]
        for rows in calls:
            total += dense_ms(N, 48, rows) if rank == "dense" else low_ms(N, 48, rank, rows)
    return total


RANKS = [
    {"first": "dense", "second": "dense", "twice": "dense"},
    {"first": 8, "second": 24, "twice": 32},
    {"first": 13, "second": "dense", "twice": 17},
    # Below and beyond the ranks that are measured.
    {"first": 24, "second": 24, "twice": 48},
]


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_predictions_of_the_whole_model(clock, ranks):
    model = Model(clock)
    found = search.profile_model(model, X, seconds=0.0)
    assert found.total == pytest.approx(expected(RANKS[0]))
    assert found.rest == pytest.approx(REST)
    assert found.rows == {"first": (5,), "second": (5,), "twice": (5, 2)}
    assert found.model(ranks) == pytest.approx(expected(ranks))
    assert found.model({}) == pytest.approx(found.total)
    wanted = {n: r for n, r in ranks.items() if r != "dense"}
    small = mk.convert(
        model, {**wanted, "*": "dense"}, init="random", allow_larger=True, inplace=False
    )
    before = clock.now
    small(X)
    assert found.model(ranks) == pytest.approx((clock.now - before) / MS)


def test_ranks_that_are_measured(clock):
    found = search.profile_model(Model(clock), X, seconds=0.0, multiple_of=4)
    ranks = list(found.layers["first"])
    assert ranks[-1] == "dense"
    assert all(r % 4 == 0 for r in ranks[:-1])
    assert (min(ranks[:-1]), max(ranks[:-1])) == (4, 24)
    # Below the lowest rank nothing is made up.
    assert found.layer("first", 1) == found.layer("first", 4)
    assert found.layers["first"] == found.layers["second"]


def test_the_model_is_left_alone(clock):
    model = Model(clock).train()
    mk.convert(model, {"twice": 20}, init="random")
    model.twice.rank = 12
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    found = search.profile_model(model, X, seconds=0.0)
    assert found.ranks == {"first": "dense", "second": "dense", "twice": 12}
    assert found.total == pytest.approx(expected({**found.ranks}))
    assert found.layer("twice", 20) == pytest.approx(sum(low_ms(96, 48, 20, m) for m in (5, 2)))
    assert "dense" not in found.layers["twice"]
    assert model.training
    assert model.twice.rank == 12
    assert model.twice.max_rank == 20
    assert parameters == {name: id(p) for name, p in model.named_parameters()}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_factorised_layer_is_timed_dense_where_it_may_be(clock):
    model = mk.convert(Model(clock), init="random", allow_larger=True)
    found = search.profile_model(model, X, seconds=0.0)
    assert found.layer("first", "dense") == pytest.approx(dense_ms(48, 48, 5))
    dense = dict.fromkeys(found.layers, "dense")
    assert found.model(dense) == pytest.approx(expected(RANKS[0]))
    assert mk.ranks(model) == found.ranks == {"first": 48, "second": 48, "twice": 48}


def test_deploy_sees_every_copy_and_its_time_counts(clock):
    seen = []

    def slower(model):
        seen.append(mk.ranks(model)["first"])
        model.second = nn.Sequential(model.second, Wait(clock))
        return model

    # The replaced layer cannot be found by its name any more, so it is not considered.
    found = search.profile_model(Model(clock), X, seconds=0.0, deploy=slower, exclude="second")
    assert seen[0] == "dense"
    assert set(seen) == set(found.layers["first"])
    assert found.rest == pytest.approx(2 * REST + dense_ms(48, 48, 5))


def test_allocation_by_such_a_profile(clock):
    model = Model(clock)
    profile = search.profile_model(model, X, seconds=0.0, exclude="second")
    sens = search.sensitivity(model, method="svd", exclude="second")
    limit = 0.9 * profile.total
    found = search.allocate(
        model, search.Latency(limit), sens, profile, multiple_of=4, exclude="second"
    )
    assert set(found) == {"first", "twice"}
    ranks = {**found, "second": "dense"}
    assert found.predicted.ms == pytest.approx(expected(ranks))
    assert found.predicted.ms <= limit
    assert found.dense.ms == pytest.approx(profile.total)
    # Layers of the profile that are not considered stay as they are, in time too.
    fewer = search.allocate(model, search.Speedup(1.01), sens, profile, include="first")
    assert fewer.predicted.ms == pytest.approx(expected({**RANKS[0], **fewer}))
    measured = search.allocate(model, search.Latency(limit), sens, batch=X, exclude="second")
    assert measured.predicted.ms == pytest.approx(expected({**measured, "second": "dense"}))


def test_convolutions_of_different_strides_are_told_apart():
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2)
    )
    x = torch.randn(1, 8, 6, 6)
    before = copy.deepcopy(model.state_dict())
    found = search.profile_model(model, x, seconds=0.0, multiple_of=1)
    assert found.rows == {"0": (36,), "1": (36,), "2": (4,)}
    assert found.layers["0"] == found.layers["1"]
    assert found.layers["0"] != found.layers["2"]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_refused(clock):
    with pytest.raises(ValueError, match="profile_model: model: expected at least one layer"):
        search.profile_model(nn.ReLU(), X)
    with pytest.raises(NotImplementedError, match=r"expected layers on the CPU.*'first' on meta"):
        search.profile_model(Model(clock).to("meta"), X)
    with pytest.raises(TypeError, match="profile_model: batch: expected"):
        search.profile_model(Model(clock), 3)
    found = search.profile_model(Model(clock), X, seconds=0.0, exclude="second")
    with pytest.raises(ValueError, match="layer: name: expected a layer, got 'second'"):
        found.layer("second", 8)
    with pytest.raises(ValueError, match="allocate: profile: expected one of this model, got none"):
        search.allocate(Model(clock), search.Params(0.5), None, found)


def faults(times):
    """Minor page faults of allocating and freeing three pieces of 40 MB."""
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        pieces = [torch.zeros(10 << 20) for _ in range(3)]
        del pieces
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_memory_stays_in_the_process_while_models_are_timed():
    with heap.keeping_memory():
        faults(3)
        kept = faults(5)
    given_back = faults(5)
    assert given_back > 4 * kept + 10


def test_saved_and_loaded(clock, tmp_path):
    found = search.profile_model(Model(clock), X, seconds=0.0)
    found.save(tmp_path / "profile.json")
    again = search.ModelProfile.load(tmp_path / "profile.json")
    assert again == found
    assert again.model(RANKS[2]) == found.model(RANKS[2])
    (tmp_path / "other.json").write_text('{"schema": 1}')
    with pytest.raises(ValueError, match=r"other\.json: expected the fields .* of a model profile"):
        search.ModelProfile.load(tmp_path / "other.json")
    text = (tmp_path / "profile.json").read_text().replace('"schema": 1', '"schema": 2')
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"other\.json: schema: expected 1, got 2"):
        search.ModelProfile.load(tmp_path / "other.json")
