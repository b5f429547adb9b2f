"""extract: what it keeps, that sizes are nested, and that nothing it is given changes."""

import copy
import importlib
import re

import pytest
import torch
from convert_support import assert_unchanged, snapshot
from places import ROOT
from torch import nn
from training_support import batch, full_ranks, lod, mixed

import maestro_kernels as mk
from maestro_kernels import search, training
from maestro_kernels.nn.pivoted import PivotedLinear

BUDGETS = (0.9, 0.6, 0.4, 0.25, 0.12)


def decaying(N, K, seed, decay):
    """A full-rank layer whose singular values fall as decay**i."""
    generator = torch.Generator().manual_seed(seed)
    R = min(N, K)
    left, right = (torch.randn(n, R, generator=generator, dtype=torch.float64) for n in (N, K))
    u, v = torch.linalg.qr(left).Q, torch.linalg.qr(right).Q.T
    values = decay ** torch.arange(R, dtype=torch.float64)
    return mk.LoDLinear.from_factors(nn.Parameter(u * values), nn.Parameter(v.contiguous()))


def two_layers(decays=(0.5, 0.98)):
    """The first layer's components fade fast, the second's hardly."""
    return nn.Sequential(decaying(32, 24, 0, decays[0]), nn.Tanh(), decaying(24, 32, 1, decays[1]))


def inputs(n=40, features=24, count=2):
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(n, features, generator=generator, dtype=torch.float64) for _ in range(count)
    ]


def squared_error(model, pair):
    x, y = pair
    return (model(x) - y).square().mean()


def stored(model):
    """Bytes that the deployed layers really hold, beyond biases; dense layers included."""
    total = 0
    for m in model.modules():
        if isinstance(m, mk.nn.LoDLayer | PivotedLinear):
            total += m.u.nbytes + m.v.nbytes
            total += m.order.nbytes if isinstance(m, PivotedLinear) else 0
        elif isinstance(m, nn.Linear | nn.Conv2d):
            total += m.weight.nbytes
    return total


@pytest.mark.parametrize("errors", ["measured", "additive"])
@pytest.mark.parametrize("fraction", BUDGETS)
def test_the_model_fits_the_budget_and_reports_it(errors, fraction):
    model = two_layers()
    data = inputs()
    small = training.extract(model, search.Params(fraction), batches=data, errors=errors)
    report = training.extraction_report(small)
    dense = 2 * 24 * 32
    assert stored(small) / 8 == pytest.approx(report.cost)
    assert report.cost <= report.limit == fraction * dense
    assert report.unit == "weights"
    with torch.no_grad():
        errors = [(small(x) - model(x)).square().sum() / model(x).square().sum() for x in data]
    assert report.loss == pytest.approx(float(sum(errors)) / 2, rel=1e-6, abs=1e-12)
    assert report.full_loss == 0


def test_components_go_where_they_are_missed_least():
    small = training.extract(two_layers(), search.Params(0.5), batches=inputs())
    ranks = training.extraction_report(small).ranks
    assert ranks["0"] < 12 <= ranks["2"]
    turned = training.extract(two_layers((0.98, 0.5)), search.Params(0.5), batches=inputs())
    ranks = training.extraction_report(turned).ranks
    assert ranks["2"] < 12 <= ranks["0"]


@pytest.mark.parametrize("errors", ["measured", "additive"])
def test_the_loss_is_near_that_of_the_best_ranks(errors):
    """Exhaustive search over the ranks of both layers, by the model's own prefixes."""
    model, data = two_layers((0.7, 0.85)), inputs()
    whole = copy.deepcopy(model)
    best = float("inf")
    limit = 0.5 * 2 * 24 * 32
    for first in range(1, 25):
        for second in range(1, 25):
            if 56 * (first + second) <= limit:
                model[0].rank, model[2].rank = first, second
                best = min(best, search.output_error(model, whole, data))
    mk.set_ranks(model, {"0": 24, "2": 24})
    options = {"batches": data, "errors": errors, "levels": 24, "forms": ("factors",)}
    walked = training.extract(model, search.Params(0.5), refine=False, **options)
    assert training.extraction_report(walked).loss <= 1.3 * best
    small = training.extract(model, search.Params(0.5), **options)
    assert training.extraction_report(small).loss <= 1.001 * best


@pytest.mark.parametrize("errors", ["measured", "additive"])
def test_smaller_budgets_are_prefixes_of_larger_ones(errors):
    model, data = mixed(), [batch(16)[0], batch(16, seed=2)[0]]
    path = training.ExtractionPath(model, search.Params, batches=data, errors=errors)
    found = {}
    for fraction in (0.3, 0.9, 0.15, 0.6):
        small = path.extract(search.Params(fraction))
        found[fraction] = training.extraction_report(small).ranks
        alone = training.extract(
            model, search.Params(fraction), batches=data, errors=errors, refine=False
        )
        assert training.extraction_report(alone).ranks == found[fraction]
    for small, large in ((0.15, 0.3), (0.3, 0.6), (0.6, 0.9)):
        assert all(found[small][n] <= found[large][n] for n in found[small])
        assert found[small] != found[large]
    costs = [step.cost for step in path.steps]
    assert costs == sorted(costs, reverse=True)


def test_factors_are_prefixes_of_the_model_s_own():
    model = two_layers()
    small = training.extract(model, search.Params(0.4), batches=inputs(), forms=("factors",))
    for name, layer in lod(small).items():
        whole = lod(model)[name]
        assert layer.max_rank == layer.rank < whole.max_rank
        assert torch.equal(layer.u, whole.u[:, : layer.rank])
        assert torch.equal(layer.v, whole.v[: layer.rank])
    assert len({p.data_ptr() for p in [*model.parameters(), *small.parameters()]}) == 8


def normalised():
    """A convolution that loses much of its output's variance with its rank, and BatchNorm."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(4, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten()
    ).double()
    model = mk.convert(model, rank=None, allow_larger=True)
    x = torch.randn(64, 4, 6, 6, dtype=torch.float64)
    for _ in range(60):
        model(x)
    return model.eval(), x


def test_batchnorm_is_recalibrated():
    model, x = normalised()
    path = training.ExtractionPath(model, search.Params, batches=[x])
    small = path.extract(search.Params(0.2))
    z = small[0](x)
    assert not torch.allclose(model[1].running_var, z.var((0, 2, 3)), rtol=0.1)
    torch.testing.assert_close(small[1].running_mean, z.mean((0, 2, 3)))
    torch.testing.assert_close(small[1].running_var, z.var((0, 2, 3)))
    assert not small.training
    assert small[1].momentum == model[1].momentum
    # The search saw what the extracted model does, not what stale statistics would make of it.
    assert path.steps[-1].loss == pytest.approx(training.extraction_report(small).loss, rel=1e-2)


def test_recalibration_that_fails_changes_nothing():
    model, x = normalised()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=re.escape("batches: expected at least one batch")):
        training.recalibrate_batchnorm(model, [])
    with pytest.raises(ValueError, match=re.escape("expected finite inputs of '1'")):
        training.recalibrate_batchnorm(model, [x * float("nan")])
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert not any(m.training for m in model.modules())
    two = nn.ModuleDict({"used": nn.BatchNorm1d(3), "idle": nn.BatchNorm1d(3)})
    with pytest.raises(ValueError, match=re.escape("expected batches that reach 'idle'")):
        training.recalibrate_batchnorm(
            two, [torch.randn(4, 3)], run=lambda model, batch: model["used"](batch)
        )
    assert torch.equal(two["used"].running_mean, torch.zeros(3))


@pytest.mark.parametrize("training_mode", [True, False])
def test_the_model_it_is_given_stays_as_it_was(training_mode):
    model = mixed().train(training_mode)
    mk.set_ranks(model, dict.fromkeys(full_ranks(model), 2))
    before, ranks = snapshot(model), mk.ranks(model)
    small = training.extract(model, search.MACs(0.3), batches=[batch()[0]])
    assert_same(model, before, ranks)
    assert small.training is training_mode

    def fails_late(model, x, calls=[0]):  # noqa: B006
        calls[0] += 1
        if calls[0] == 5:
            raise RuntimeError("in the middle")
        return model(x).square().mean()

    with pytest.raises(RuntimeError, match="in the middle"):
        training.extract(model, search.MACs(0.3), batches=[batch()[0]], loss_fn=fails_late)
    assert_same(model, before, ranks)


def assert_same(model, before, ranks):
    assert mk.ranks(model) == ranks
    report = vars(model).pop("_maestro_conversion")
    assert_unchanged(model, before)
    vars(model)["_maestro_conversion"] = report


def test_a_loss_of_one_s_own_decides():
    """Only the first output counts, which the first component of the second layer makes."""
    model = nn.Sequential(decaying(16, 16, 0, 0.9), decaying(16, 16, 1, 0.9))
    with torch.no_grad():
        model[1].u.zero_()
        model[1].u[0, 0] = 1
        model[1].u[1:, 1:] = torch.eye(15)
    data = [(x, model(x)) for x in inputs(30, 16)]

    def first_output(model, pair):
        return (model(pair[0]) - pair[1])[:, 0].square().mean()

    small = training.extract(model, search.Params(0.6), batches=data, loss_fn=first_output)
    ranks = training.extraction_report(small).ranks
    assert ranks["1"] == 1
    assert ranks["0"] > 4


def test_multiply_adds_count_positions():
    """The convolution has few weights and most of the work."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 64, 8))
    model = mk.convert(model, rank=None, allow_larger=True)
    x = torch.randn(4, 3, 8, 8)
    small = training.extract(model, search.MACs(0.5), batches=[x])
    report = training.extraction_report(small)
    assert report.limit == 0.5 * 4 * (64 * 16 * 27 + 1024 * 8)
    layers = {layer.name: layer for layer in mk.summary(small).layers}
    assert report.cost == 4 * (64 * layers["0"].macs + layers["2"].macs)


def test_bytes_count_the_whole_model():
    model = two_layers()
    model.register_buffer("table", torch.zeros(100))
    whole = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    limit = whole // 2
    small = training.extract(model, search.Memory(limit), batches=inputs())
    held = sum(t.nbytes for t in [*small.parameters(), *small.buffers()])
    assert 0.8 * limit < held <= limit
    assert training.extraction_report(small).cost == held


def slow_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))
    return mk.convert(model, rank=None, allow_larger=True), [torch.randn(128, 256)]


def test_measured_latency():
    model, data = slow_model()
    options = {"batches": data, "levels": 3, "errors": "additive"}
    path = training.ExtractionPath(model, search.Latency, **options)
    with pytest.raises(ValueError, match=re.escape("budget: expected at least")):
        path.extract(search.Latency(1e-6))
    start, end = path.steps[0].cost, path.steps[-1].cost
    assert 0 < end < start
    small = path.extract(search.Latency((start + end) / 2))
    report = training.extraction_report(small)
    assert report.unit == "ms"
    assert end <= report.cost <= report.limit < start
    assert min(report.ranks.values()) < 256


def test_speedup_is_against_the_dense_model():
    model, data = slow_model()
    path = training.ExtractionPath(model, search.Speedup, batches=data, levels=3)
    assert path.dense > 0
    report = training.extraction_report(path.extract(search.Speedup(1.2)))
    assert report.limit == pytest.approx(path.dense / 1.2)
    assert report.cost <= report.limit


def test_forms_are_the_cheapest_allowed():
    model, data = two_layers(), inputs()
    small = training.extract(model, search.Params(1.0), batches=data)
    assert set(training.extraction_report(small).forms.values()) <= {"pivoted", "dense"}
    report = training.extraction_report(
        training.extract(model, search.Params(0.6), batches=data, forms=("factors", "dense"))
    )
    assert set(report.forms.values()) <= {"factors", "dense"}
    free = training.extraction_report(training.extract(model, search.MACs(0.6), batches=data))
    assert "pivoted" in free.forms.values()
    assert free.loss < report.loss


def test_a_form_that_is_too_inaccurate_is_not_used(monkeypatch):
    model, data = two_layers(), inputs()
    ratios = []

    def ratio(layer, pivoted, x):
        ratios.append(layer.rank)
        return 3.9 if len(ratios) % 2 else 4.1

    module = importlib.import_module("maestro_kernels.training.deployment")
    monkeypatch.setattr(module, "error_ratio", ratio)
    small = training.extract(model, search.Params(0.9), batches=data)
    report = training.extraction_report(small)
    assert ratios
    assert stored(small) / 8 == pytest.approx(report.cost)
    assert report.cost <= report.limit
    monkeypatch.setattr(module, "error_ratio", lambda *args: 4.1)
    report = training.extraction_report(training.extract(model, search.Params(0.4), batches=data))
    assert "pivoted" not in report.forms.values()
    assert report.cost <= report.limit


def test_layers_with_an_activation_and_groups():
    torch.manual_seed(0)
    model = nn.Sequential(
        mk.LoDLinear(16, 24, activation="gelu"), nn.Linear(24, 24), mk.LoDLinear(24, 8)
    )
    x = torch.randn(32, 16)
    small = training.extract(model, search.Params(0.95), batches=[x], levels=32)
    assert training.extraction_report(small).forms["0"] != "dense"
    with torch.no_grad():
        difference = (small(x) - model(x)).square().sum() / model(x).square().sum()
    assert training.extraction_report(small).loss == pytest.approx(float(difference), rel=1e-3)
    assert isinstance(small[1], nn.Linear)


def test_the_extracted_model_is_saved_and_loaded(tmp_path):
    torch.manual_seed(1)
    dense = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    model = mk.convert(dense, rank=None, allow_larger=True, inplace=False)
    x = torch.randn(16, 20)
    small = training.extract(model, search.Params(0.5), batches=[x])
    mk.save_pretrained(small, tmp_path / "m")
    loaded = mk.load_pretrained(tmp_path / "m", copy.deepcopy(dense))
    assert torch.equal(loaded(x), small(x))


def test_min_rank_and_multiple_of():
    path = training.ExtractionPath(
        two_layers(), search.Params, batches=inputs(), min_rank=0, forms=("factors",)
    )
    small = path.extract(search.Params(1e-9))
    assert training.extraction_report(small).ranks == {"0": 0, "2": 0}
    assert small(inputs()[0]).abs().max() == 0
    model = mk.convert(nn.Sequential(nn.Linear(64, 64)), rank=None, allow_larger=True)
    for fraction in (0.9, 0.5, 0.3):
        small = training.extract(
            model, search.Params(fraction), batches=[torch.randn(64, 64)], multiple_of=8
        )
        assert training.extraction_report(small).ranks["0"] % 8 == 0


def test_errors_name_what_was_expected():
    model, data = two_layers(), inputs()
    half = search.Params(0.5)

    def refuses(kind, text, model=model, budget=half, **options):
        with pytest.raises(kind, match=re.escape(text)):
            training.extract(model, budget, **{"batches": data, **options})

    refuses(TypeError, "budget: expected Params, MACs", budget=0.5)
    refuses(ValueError, "expected at least one LoD layer", model=nn.Linear(3, 3))
    refuses(ValueError, "extract: batches: expected at least one batch, got none", batches=[])
    refuses(TypeError, "batches: expected an iterable of batches", batches=data[0])
    refuses(ValueError, "budget: expected at least", budget=search.Params(1e-4))
    refuses(ValueError, "method: expected one of", method="random")
    refuses(ValueError, "errors: expected one of", errors="random")
    refuses(ValueError, "passes: expected an int >= 0", passes=-1)
    refuses(ValueError, "forms: expected some of", forms=("pivoted",))
    refuses(ValueError, "levels: expected", levels=0)
    refuses(TypeError, "loss_fn: expected a function, got int", loss_fn=3)
    refuses(ValueError, "loss_fn: expected a scalar, got shape (40, 24)", loss_fn=lambda m, x: m(x))
    refuses(
        ValueError,
        "loss_fn: expected a finite loss at full rank, got nan",
        loss_fn=lambda m, x: m(x).sum() * float("nan"),
    )
    with pytest.raises(TypeError, match=re.escape("budget: expected Params, got MACs")):
        training.ExtractionPath(model, batches=data).extract(search.MACs(0.5))
    idle = nn.ModuleDict({"used": two_layers(), "idle": two_layers()})
    refuses(
        ValueError,
        "batches: expected batches that reach 'idle.0', got none",
        model=idle,
        loss_fn=lambda m, x: m["used"](x).square().mean(),
    )


@pytest.mark.parametrize("errors", ["measured", "additive"])
def test_ranks_at_which_the_loss_is_not_finite_are_the_last_resort(errors):
    def brittle(model, x):
        model(x)
        return float("nan") if model[2].rank < 12 else float(24 - model[2].rank)

    path = training.ExtractionPath(
        two_layers(), batches=inputs(), loss_fn=brittle, errors=errors, forms=("factors",)
    )
    with pytest.raises(ValueError, match="expected at least"):
        path.extract(search.Params(1e-9))
    layers = [step.layer for step in path.steps if step.loss > 100]
    assert layers
    assert set(layers) == {"2"}


@pytest.mark.parametrize("errors", ["measured", "additive"])
@pytest.mark.parametrize("kind", [search.Params, search.MACs])
def test_refined_models_are_never_worse_than_the_path_or_uniform_ranks(errors, kind):
    """The first layers' outputs hardly count, which layers alone do not show."""
    torch.manual_seed(3)
    model = nn.Sequential(
        decaying(32, 24, 0, 0.8), nn.Tanh(), decaying(40, 32, 1, 0.9), nn.Tanh(),
        decaying(16, 40, 2, 0.95),
    )  # fmt: skip
    data = inputs()
    path = training.ExtractionPath(model, kind, batches=data, errors=errors)
    better = 0
    for fraction in (0.2, 0.3, 0.5, 0.7):
        walked = training.extraction_report(path.extract(kind(fraction)))
        assert walked.refined is None
        told = []
        small = training.extract(
            model, kind(fraction), batches=data, errors=errors,
            progress=lambda *now, told=told: told.append(now),
        )  # fmt: skip
        found = training.extraction_report(small)
        assert found.refined.starts[0] == pytest.approx(walked.loss)
        assert found.loss == pytest.approx(found.refined.loss, rel=1e-6)
        assert found.refined.loss <= min(found.refined.starts)
        assert found.cost <= found.limit
        assert found.refined.passes <= found.refined.limit == 16 + 4 * 3
        assert ("refining 3 layers: at most 28 passes", 0, 28) in told
        better += found.loss < 0.999 * walked.loss
    assert better


def test_refining_a_path_s_model_leaves_the_path_alone():
    model, data = two_layers((0.7, 0.85)), inputs()
    path = training.ExtractionPath(model, batches=data)
    refined = training.extraction_report(path.extract(search.Params(0.3), refine=True))
    walked = training.extraction_report(path.extract(search.Params(0.3)))
    assert refined.loss <= walked.loss
    assert (
        walked.ranks
        == training.extraction_report(
            training.ExtractionPath(model, batches=data).extract(search.Params(0.3))
        ).ranks
    )
    alone = training.extract(model, search.Params(0.3), batches=data)
    assert training.extraction_report(alone).ranks == refined.ranks


def test_a_refined_model_fits_in_forms_that_are_accurate(monkeypatch):
    """Ranks whose [I; U] form is refused cost more than the path's choices say."""
    module = importlib.import_module("maestro_kernels.training.deployment")
    monkeypatch.setattr(module, "error_ratio", lambda *args: 4.1)
    for fraction in (0.7, 0.5, 0.3):
        small = training.extract(two_layers((0.7, 0.85)), search.Params(fraction), batches=inputs())
        report = training.extraction_report(small)
        assert "pivoted" not in report.forms.values()
        assert stored(small) / 8 == pytest.approx(report.cost)
        assert report.cost <= report.limit


def test_a_path_goes_on_after_an_error():
    calls, data = [], inputs()

    def loss(model, x):
        calls.append(1)
        if len(calls) in (9, 61):
            raise KeyboardInterrupt
        return model(x).square().mean()

    path = training.ExtractionPath(two_layers((0.7, 0.85)), batches=data, loss_fn=loss)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            path.extract(search.Params(0.2))
    ranks = training.extraction_report(path.extract(search.Params(0.2))).ranks
    passes, calls[:] = len(calls), [1] * 100
    again = training.ExtractionPath(two_layers((0.7, 0.85)), batches=data, loss_fn=loss)
    assert ranks == training.extraction_report(again.extract(search.Params(0.2))).ranks
    # Two passes began in vain.
    assert passes <= len(calls) - 100 + 2 * len(data)


def test_old_names_still_work():
    model, data = two_layers(), inputs()
    for method, errors in (("greedy", "measured"), ("additive", "additive")):
        with pytest.warns(DeprecationWarning, match=f"is now errors='{errors}'") as caught:
            old = training.extract(model, search.Params(0.4), batches=data, method=method)
        assert caught[0].filename == __file__
        new = training.extract(model, search.Params(0.4), batches=data, errors=errors)
        assert training.extraction_report(old) == training.extraction_report(new)
    shares = []
    with pytest.warns(DeprecationWarning, match="one of a share"):
        training.extract(model, search.Params(0.4), batches=data, progress=shares.append)
    assert shares
    assert all(0 <= share <= 1 for share in shares)


def test_the_snippet_of_the_docs(tmp_path, monkeypatch):
    page = ROOT / "docs" / "guide" / "deployment.md"
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
        exec(compile(block, str(page), "exec"), names)
    assert names["small"](names["batches"][0]).shape == (256, 64)
    costs = [training.extraction_report(names["models"][f]).cost for f in (0.8, 0.5, 0.3)]
    assert costs == sorted(costs, reverse=True)
