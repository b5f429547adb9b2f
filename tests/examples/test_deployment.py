"""The evidence behind docs/guide/deployment.md: steps agree, and the page shows the rows kept."""

import importlib

import pytest
import torch
from places import ROOT

from maestro_kernels.measure.records import load

PAGE = ROOT / "docs" / "guide" / "deployment.md"


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


def test_both_training_steps_do_the_same():
    speed = importlib.import_module("training_speed")
    # Raises where parameters differ after three steps.
    steps = speed.steps_of("MLP, 128 rows")
    assert list(steps) == list(speed.NAMES)


def test_a_straightforward_step_that_ignores_ranks_is_noticed(monkeypatch):
    speed = importlib.import_module("training_speed")
    monkeypatch.setattr(speed, "_draw_masks", lambda sampler, layers: None)
    with pytest.raises(AssertionError, match="not close"):
        speed.steps_of("MLP, 128 rows")


def test_the_page_shows_the_rows_of_training_speed(tmp_path):
    speed = importlib.import_module("training_speed")
    rows = load(ROOT / "examples" / "results" / "training-speed.jsonl")
    order = [(case, measure) for case in speed.CASES for measure in ("ms", "MiB")]
    rows.sort(key=lambda row: order.index((row["case"], row["measure"])))
    assert speed.markdown(rows) in PAGE.read_text(encoding="utf-8")
    speed.draw(rows, tmp_path / "training-speed.svg")
    assert (tmp_path / "training-speed.svg").stat().st_size > 1000
    times = [speed.ratio(row) for row in rows if row["measure"] == "ms"]
    assert torch.tensor(times[:3]).log().mean().exp() > 1.5
    memory = [row for row in rows if row["measure"] == "MiB"]
    assert all(row["LoD"] <= row["straightforward"] for row in memory)


def test_the_page_shows_the_rows_of_the_distillation(tmp_path):
    report = importlib.import_module("distillation_report")
    rows = report.Rows(ROOT / "examples" / "results" / "distillation.jsonl", {})
    assert report.markdown(rows) in PAGE.read_text(encoding="utf-8")
    report.draw(rows, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "distillation-size.svg",
        "distillation-latency.svg",
    }
    for budget in report.BUDGETS:
        for method in ("LoD", "SVD"):
            found = rows.figures("weights", method=method, budget=budget)
            assert len(found) == 3
            assert max(found) <= budget * report.DENSE


def test_the_page_shows_the_rows_of_the_recovery():
    recovery = importlib.import_module("encoder_recovery")
    report = importlib.import_module("distillation_report")
    rows = report.Rows(ROOT / "examples" / "results" / "recovery.jsonl", {})
    assert recovery.markdown(rows) in PAGE.read_text(encoding="utf-8")
    other = report.Rows(ROOT / "examples" / "results" / "distillation.jsonl", {})
    for budget in recovery.BUDGETS:
        assert max(rows.figures("weights", budget=budget)) <= budget * report.DENSE
        found = rows.figures("cosine", budget=budget)
        assert len(found) == 3
        # Every seed is above every model of this size on the page.
        assert min(found) > max(other.figures("cosine", kind="fidelity", budget=budget))
