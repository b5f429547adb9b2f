"""Errors over rank against the errors that factors of that rank really make."""

import copy

import numpy as np
import pytest
import torch
from convert_support import assert_unchanged, mlp, snapshot
from torch import nn

import maestro_kernels as mk
from maestro_kernels import search
from maestro_kernels.search.sensitivities import Sensitivity


class HFConv1D(nn.Module):
    """Hugging Face's transposed linear: weight (K, N)."""

    def __init__(self, N, K):
        super().__init__()
        self.nf = N
        self.weight = nn.Parameter(torch.randn(K, N))
        self.bias = nn.Parameter(torch.zeros(N))

    def forward(self, x):
        return x @ self.weight + self.bias


HFConv1D.__name__ = HFConv1D.__qualname__ = "Conv1D"
HFConv1D.__module__ = "transformers.pytorch_utils"


def correlated(rows, features):
    """Inputs that do not fill their space, so that data and weights disagree."""
    return torch.randn(rows, 5) @ torch.randn(5, features) + 0.1 * torch.randn(rows, features)


def images():
    return torch.randn(3, 4, 9, 7).cumsum(2)


LAYERS = {
    "wide": (lambda: nn.Linear(12, 20, bias=False), lambda: correlated(50, 12)),
    "tall": (lambda: nn.Linear(20, 12, bias=False), lambda: correlated(50, 20)),
    "hf": (lambda: HFConv1D(12, 20), lambda: correlated(50, 20)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), images),
    "grouped conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), images),
}


def relative(y, reference):
    return float((y - reference).double().square().sum() / reference.double().square().sum())


@pytest.fixture(params=LAYERS)
def case(request):
    make, data = LAYERS[request.param]
    return nn.Sequential(make()), [data(), data()]


@torch.no_grad()
def test_data_is_the_output_error_of_the_best_factors(case):
    model, batches = case
    found = search.sensitivity(model, batches).layers["0"]
    reference = torch.cat([model(x) for x in batches])
    assert found.errors.shape == (found.layer.max_rank + 1,)
    for rank in range(1, found.layer.max_rank + 1):
        small = mk.convert(
            model, rank=rank, init="data", batches=batches, allow_larger=True, inplace=False
        )
        y = torch.cat([small(x) for x in batches])
        assert found.error(rank) == pytest.approx(relative(y, reference), rel=1e-4, abs=1e-10)
    assert found.error(0) == 1
    assert found.error("dense") == found.errors[-1] == 0
    assert found.rows == (y.numel() // 2 // y.shape[-3 if y.dim() == 4 else -1],)


@torch.no_grad()
def test_svd_is_the_error_of_the_best_weight(case):
    model, _ = case
    found = search.sensitivity(model, method="svd").layers["0"]
    weight = model[0].weight
    for rank in range(1, found.layer.max_rank + 1):
        small = mk.convert(model, rank=rank, allow_larger=True, inplace=False)[0]
        error = relative(small.weight.reshape(-1), _like(small, weight).reshape(-1))
        assert found.error(rank) == pytest.approx(error, rel=1e-4, abs=1e-10)
    assert found.rows == ()
    total = float(weight.double().square().sum())
    assert np.square(found.values).sum() == pytest.approx(total)
    assert np.all(np.diff(found.values) <= 0)


def _like(small, weight):
    return weight if small.weight.shape == weight.shape else weight.mT


@torch.no_grad()
@pytest.mark.parametrize("method", ["svd", "data"])
@pytest.mark.parametrize("groups", [1, 2])
def test_prefixes_of_given_factors(method, groups):
    # Random factors are neither orthogonal nor sorted: only the prefix itself tells its error.
    if groups == 1:
        model = nn.Sequential(mk.LoDLinear(12, 20, max_rank=9, bias=False))
        nn.init.normal_(model[0].u), nn.init.normal_(model[0].v)
        batches = [correlated(50, 12)]
    else:
        conv = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False)
        model = mk.convert(
            nn.Sequential(conv), init="random", allow_larger=True, inplace=True, rank=3
        )
        batches = [images()]
    layer = model[0]
    layer.rank = 2
    found = search.sensitivity(model, batches, method=method).layers["0"]
    assert layer.rank == 2
    layer.rank = layer.max_rank
    whole = model(batches[0]) if method == "data" else layer.weight.clone()
    for rank in range(layer.max_rank + 1):
        layer.rank = rank
        part = model(batches[0]) if method == "data" else layer.weight.clone()
        assert found.error(rank) == pytest.approx(relative(part, whole), rel=1e-4, abs=1e-9)


@torch.no_grad()
def test_importance():
    model = nn.Sequential(nn.Linear(8, 8), mk.LoDLinear(12, 20, max_rank=9))
    layer = model[1]
    found = search.sensitivity(model, method="importance")
    assert list(found.layers) == ["1"]
    norms = [float(layer.u[:, r:].norm() * layer.v[r:].norm()) for r in range(10)]
    expected = np.square(np.array(norms) / norms[0])
    np.testing.assert_allclose(found.layers["1"].errors, expected, rtol=1e-5, atol=1e-12)
    with pytest.raises(ValueError, match="expected factorised layers with method='importance'"):
        search.sensitivity(nn.Sequential(nn.Linear(8, 8)), method="importance")


def whole_model(model, name, rank, batches):
    """The model with one layer at a rank, as `convert` would make it."""
    return mk.convert(
        model, {name: rank}, init="data", batches=batches, allow_larger=True, inplace=False
    )


@torch.no_grad()
@pytest.mark.parametrize("own", [True, False])
def test_loss_is_measured_on_the_whole_model(own):
    model = mlp()
    batches = [correlated(30, 16), correlated(20, 16)]

    def first_column(model, batch):
        return model(batch)[:, 0].square().mean()

    before = snapshot(model)
    found = search.sensitivity(
        model, batches, first_column if own else None, method="loss", points=3
    )
    assert_unchanged(model, before)
    for name, one in found.layers.items():
        # Break-even is 9.6; a half and a quarter of it follow.
        assert [rank for rank, _ in one.measured] == [2, 5, 10]
        for rank, increase in one.measured:
            small = whole_model(model, name, rank, batches)
            if own:
                losses = [first_column(small, x) - first_column(model, x) for x in batches]
                expected = float(sum(losses)) / 2
            else:
                expected = search.output_error(small, model, batches)
            assert increase == pytest.approx(expected, rel=1e-3, abs=1e-8)
        if not own:
            increases = [increase for _, increase in one.measured]
            assert increases == sorted(increases, reverse=True)
            assert [one.error(rank) for rank, _ in one.measured] == pytest.approx(increases)
            # Straight lines in the share lost; below the lowest rank in proportion to it.
            share = search.sensitivity(model, batches).layers[name].error
            assert one.error(1) == pytest.approx(increases[0] * share(1) / share(2))
            t = (share(3) - share(5)) / (share(2) - share(5))
            assert one.error(3) == pytest.approx(increases[1] + t * (increases[0] - increases[1]))
        assert one.errors[-1] == 0
        assert np.all(np.diff(one.errors) <= 1e-15)


@torch.no_grad()
def test_loss_on_batches_that_made_no_factors():
    model = mlp()
    batches = [correlated(30, 16) for _ in range(3)]
    found = search.sensitivity(model, batches, method="loss", points=1, held_out=1)
    for name, one in found.layers.items():
        ((rank, increase),) = one.measured
        small = whole_model(model, name, rank, batches[1:])
        assert increase == pytest.approx(
            search.output_error(small, model, batches[:1]), rel=1e-3, abs=1e-8
        )


def test_loss_of_factorised_layers():
    model = mk.convert(mlp(), rank=6)
    batches = [torch.randn(30, 16)]
    model[0].rank = 4
    found = search.sensitivity(model, batches, method="loss", points=2).layers["2"]
    assert model[0].rank == 4
    model[0].rank = 6
    reference = copy.deepcopy(model)
    for rank, increase in found.measured:
        model[2].rank = rank
        assert increase == pytest.approx(search.output_error(model, reference, batches), rel=1e-4)
    assert len(found.measured) == 2


def test_total_is_the_sum_and_names_are_checked():
    found = search.sensitivity(mlp(), [torch.randn(30, 16)])
    one, two = found.layers["0"], found.layers["2"]
    assert found.error({"0": 3, "2": 5}) == one.error(3) + two.error(5)
    assert found.error({"0": 3, "2": "dense"}) == one.error(3)
    with pytest.raises(
        ValueError, match=r"sensitivity: ranks: expected names of layers .* got '1'"
    ):
        found.error({"1": 3})
    with pytest.raises(ValueError, match=r"sensitivity: 0: expected an int, 0 <= 0 <= 16, got 17"):
        found.error({"0": 17})


def test_saved_and_loaded(tmp_path):
    found = search.sensitivity(mlp(), [torch.randn(30, 16)], method="loss", points=2)
    found.save(tmp_path / "sensitivity.json")
    again = Sensitivity.load(tmp_path / "sensitivity.json")
    assert (again.method, again.unit) == (found.method, found.unit)
    assert list(again.layers) == list(found.layers)
    for name, one in found.layers.items():
        other = again.layers[name]
        assert (other.layer, other.rows, other.measured) == (one.layer, one.rows, one.measured)
        np.testing.assert_array_equal(other.errors, one.errors)
        np.testing.assert_array_equal(other.values, one.values)
    (tmp_path / "other.json").write_text('{"schema": 2, "layers": []}')
    with pytest.raises(ValueError, match="expected a sensitivity of schema 1"):
        Sensitivity.load(tmp_path / "other.json")


def test_huge_and_tiny_values_stay_finite():
    model = nn.Sequential(nn.Linear(12, 20, bias=False, dtype=torch.float64))
    batches = [correlated(50, 12).double()]
    expected = search.sensitivity(model, batches).layers["0"]
    for scale in (1e-150, 1e140):
        with torch.no_grad():
            scaled = copy.deepcopy(model)
            scaled[0].weight.mul_(scale)
        found = search.sensitivity(scaled, [batches[0] * 1e10]).layers["0"]
        np.testing.assert_allclose(found.errors, expected.errors, atol=1e-9)
        np.testing.assert_allclose(found.values, expected.values * scale * 1e10, rtol=1e-6)


def test_progress_and_selection():
    seen = []
    found = search.sensitivity(
        mlp(),
        method="svd",
        exclude="0",
        progress=lambda text, done, total: seen.append((done, total)),
    )
    assert list(found.layers) == ["2"]
    assert seen == [(1, 1)]


BATCH = [torch.randn(4, 16)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "pca"}, ValueError, r"method: expected one of \('svd', .*got 'pca'"),
        ({}, ValueError, "batches: expected batches with method='data', got None"),
        ({"batches": BATCH[0]}, TypeError, "batches: expected an iterable of batches"),
        ({"batches": []}, ValueError, "batches: expected at least one batch"),
        ({"batches": BATCH, "loss_fn": max}, ValueError, "loss_fn: expected None with method"),
        (
            {"batches": BATCH, "loss_fn": 1, "method": "loss"},
            TypeError,
            "loss_fn: expected a function, got int",
        ),
        (
            {"batches": BATCH, "loss_fn": lambda m, b: float("nan"), "method": "loss"},
            ValueError,
            "loss_fn: expected a finite loss, got nan with the model as it is",
        ),
        ({"batches": BATCH, "method": "loss", "points": 0}, ValueError, "points: expected an int"),
        (
            {"batches": [torch.full((4, 16), torch.inf)]},
            ValueError,
            "batches: expected finite inputs",
        ),
    ],
)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=f"sensitivity: {message}"):
        search.sensitivity(mlp(), **arguments)


def test_refused_models():
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"finite weights, got NaN or infinity in 2\.weight"):
        search.sensitivity(model, method="svd")
    with pytest.raises(ValueError, match=r"weights in memory, got 0\.weight on the meta device"):
        search.sensitivity(mlp(device="meta"), method="svd")
    with pytest.raises(ValueError, match="at least one layer whose rank can be chosen"):
        search.sensitivity(nn.Sequential(nn.ReLU()), method="svd")
    with pytest.raises(TypeError, match="expected a floating-point tensor in the output"):
        search.sensitivity(IntOutput(), [torch.randn(2, 8)], method="loss")


class IntOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x).argmax(-1)
