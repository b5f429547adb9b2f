"""The tables of docs/guide/search.md are what the committed rows say, and so are its claims."""

import importlib
import itertools
import sys

import pytest
import torch
from places import ROOT
from torch import nn

import maestro_kernels as mk

MODELS = {
    "encoder": "Sentence encoder, held-out text",
    "gpt2": "GPT-2 small, random weights",
    "vit-s": "ViT-S, random weights",
}


@pytest.fixture(scope="module")
def examples():
    """Imports a module of examples/, which may import others of them."""
    before = set(sys.modules)
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "examples"))
    for name in set(sys.modules) - before:
        if (ROOT / "examples" / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture(scope="module")
def study(examples):
    return examples("allocation_study")


@pytest.fixture(scope="module")
def quality(examples):
    return examples("allocation_quality")


@pytest.fixture(params=MODELS)
def case(request, study):
    rows = study.read(ROOT / "bench" / "results" / f"allocation-{request.param}.jsonl")
    return request.param, rows


@pytest.mark.parametrize("short", MODELS)
def test_the_page_shows_the_rows(study, short):
    path = ROOT / "bench" / "results" / f"allocation-{short}.jsonl"
    page = (ROOT / "docs" / "guide" / "search.md").read_text(encoding="utf-8")
    begin, end = study.marks(short)
    shown = page.partition(begin)[2].partition(end)[0].strip()
    assert shown == study.block(path, short, MODELS[short])
    assert (ROOT / "docs" / "guide" / "figures" / f"allocation-{short}.svg").exists()


def test_every_rule_was_measured_at_every_target(study, case):
    _, rows = case
    targets = {row.target for row in rows}
    assert len(targets) >= 4
    assert {(row.rule, row.target) for row in rows} == {
        (rule, target) for rule in study.RULES for target in targets
    }


def test_predictions_hold_within_ten_per_cent(case):
    _, rows = case
    assert all(abs(row.predicted / row.ms - 1) < 0.1 for row in rows)


def test_allocated_ranks_beat_uniform_ones_at_equal_latency(study, case):
    short, rows = case
    measure = "cosine" if short == "encoder" else "output error"
    gains = []
    for row in rows:
        equal = study.at_equal_latency(rows, row, measure)
        if row.rule == "exact, loss" and equal is not None:
            gain = row.quality[measure] - equal
            gains.append(gain if short == "encoder" else -gain)
    assert len(gains) >= 3
    assert min(gains) > 0


def test_equal_latency_is_a_straight_line_between_uniform_models(study):
    def row(rule, ms, value):
        return study.Row("m", rule, 1.0, ms, ms, ms, ms, 10.0, 4, 1.0, {}, {"q": value})

    rows = [row("uniform", 4.0, 1.0), row("uniform", 8.0, 3.0), row("exact, loss", 5.0, 9.0)]
    assert study.at_equal_latency(rows, rows[2], "q") == 1.5
    # The dense model ends the line, with nothing lost; beyond the fastest there is no line.
    assert study.at_equal_latency(rows, row("exact, loss", 9.0, 0.0), "q") == 2.0
    assert study.at_equal_latency(rows, row("exact, loss", 3.0, 0.0), "q") is None
    assert study.at_equal_latency(rows, rows[0], "q") == 1.0
    errors = [study.Row("m", "uniform", 1.0, 4, 4, 4, 4, 8.0, 4, 1.0, {}, {"output error": 0.4})]
    slower = study.Row("m", "exact, loss", 1.0, 6, 6, 6, 6, 8.0, 4, 1.0, {}, {"output error": 0.1})
    assert study.at_equal_latency(errors, slower, "output error") == pytest.approx(0.2)


def test_a_small_model_is_its_prefixes_and_dense_layers(study):
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    full = mk.convert(model, allow_larger=True, inplace=False)
    small = study.small_model(full, model, {"0": 6, "1": "dense"})
    assert small[0].max_rank == 6
    assert torch.equal(small[0].v, full[0].v[:6])
    assert torch.equal(small[1].weight, model[1].weight)
    assert mk.ranks(full) == {"0": 24, "1": 24}


def test_the_table(study):
    rows = [
        study.Row("m", rule, 1.5, 10.0, 8.0, 7.0, 9.0, 16.0, 4, 0.25, {}, {"q": 0.5})
        for rule in ("uniform", "exact, loss")
    ]
    lines = study.table(rows, ["q"]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| 1.5× | exact, loss | 10.0 | 8.0 | +25.0% | 2.00× | 25.0% | 0.5000 |" in lines[3]


def test_the_page_shows_the_rows_of_the_comparison_at_equal_weights(quality):
    rows = quality.read(ROOT / quality.ROWS)
    page = (ROOT / "docs" / "guide" / "search.md").read_text(encoding="utf-8")
    begin, end = quality.MARKS
    assert page.partition(begin)[2].partition(end)[0].strip() == quality.block(rows)
    for name in quality.CASES:
        found = {(row["seed"], row["fraction"]) for row in rows if row["model"] == name}
        assert found == set(itertools.product(range(5), quality.FRACTIONS))


def test_allocated_ranks_are_better_than_uniform_ones_at_equal_weights(quality):
    rows = quality.read(ROOT / quality.ROWS)
    assert max(row["allocated"] / row["uniform"] for row in rows) < 1


def test_a_small_comparison_at_equal_weights(quality, monkeypatch):
    sizes = (48, 96, 64, 32)
    monkeypatch.setitem(quality.MLPS, "small", (sizes, nn.ReLU, (0.2, 0.6, 1.1)))
    monkeypatch.setitem(quality.CASES, "small", lambda seed: quality.mlp("small", seed))
    rows = quality.compare("small", 0)
    assert [row["fraction"] for row in rows] == list(quality.FRACTIONS)
    dense = sum(n * k for n, k in itertools.pairwise(sizes))
    for row in rows:
        assert row["allocated"] < row["uniform"]
        for ranks in row["ranks"].values():
            pairs = zip(ranks.values(), itertools.pairwise(sizes), strict=True)
            used = sum(n * k if r == "dense" else r * (n + k) for r, (n, k) in pairs)
            assert used <= row["fraction"] * dense
    assert rows[0]["passes"] <= 16 + 4 * 3
    assert "1 of 1 cases, worse in 0" in quality.verdict(rows[:1])
    assert "| small | 1 |" in quality.table(rows)


def test_planted_spectra_are_powers_of_the_index(quality):
    model = nn.Sequential(nn.Linear(24, 40), nn.Conv2d(3, 8, 3)).requires_grad_(False)
    norms = [float(layer.weight.norm()) for layer in model]
    quality.plant(model, iter((0.5, 1.5)).__next__)
    for layer, norm, exponent in zip(model, norms, (0.5, 1.5), strict=True):
        values = torch.linalg.svdvals(layer.weight.flatten(1))
        expected = torch.arange(1, len(values) + 1) ** -exponent
        torch.testing.assert_close(values / values[0], expected, rtol=1e-4, atol=1e-5)
        assert float(layer.weight.norm()) == pytest.approx(norm, rel=1e-5)
