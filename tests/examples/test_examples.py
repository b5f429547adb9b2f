"""The evidence under examples/: it runs, its figures are right, and the docs show its rows."""

import importlib
import sys
from xml.etree import ElementTree

import pytest
from places import ROOT

import maestro_kernels as mk
from maestro_kernels.measure.records import load


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


@pytest.fixture
def docs(tmp_path):
    """A copy of the page without what the examples write into it."""
    lines, inside = [], False
    for line in (ROOT / "docs" / "guide" / "examples.md").read_text().splitlines():
        inside = inside and ":end" not in line
        lines += [] if inside else [line]
        inside = inside or ":begin" in line
    page = tmp_path / "docs" / "guide" / "examples.md"
    page.parent.mkdir(parents=True)
    page.write_text("\n".join(lines) + "\n")
    return page.parent


def test_theory_comes_out_as_published(tmp_path, docs, capsys):
    theory = importlib.import_module("theory")
    rows = tmp_path / "theory.jsonl"
    assert theory.main(["--seeds", "1", "--rows", str(rows), "--docs", str(docs)]) == 0
    svd, pca, adaptivity, order = theory.load(rows)
    # Products may be 0.1 off: the order of sampling is random.
    assert svd.curves[-1][:3] == pytest.approx([9.542, 6.924, 3.594], abs=0.1)
    # 7e-3 is published to one digit.
    assert max(svd.distances[-1]) < 7.5e-3
    assert min(svd.distances[0]) > 1
    assert pca.curves[-1][:3] == pytest.approx([0.998, 0.987, 0.983], abs=0.1)
    assert max(pca.curves[-1][3:]) < 4.5e-7
    third = dict(zip(adaptivity.iterations, (c[2] for c in adaptivity.curves), strict=True))
    assert third[1200] == pytest.approx(0.998, abs=0.01)
    assert third[2200] == pytest.approx(0.012, abs=0.01)
    assert order.curves[-1][:3] == pytest.approx([3.665, 6.924, 9.547], abs=0.1)
    assert max(order.curves[-1][3:]) < 0.05
    text = (docs / "examples.md").read_text()
    assert capsys.readouterr().out.strip() in text
    assert {path.name for path in (docs / "figures").iterdir()} == {
        f"theory-{name}.svg" for name in ("svd", "pca", "adaptivity", "order")
    }


def test_digits_run_resume_and_keep_their_budgets(tmp_path, docs, capsys):
    pytest.importorskip("sklearn")
    digits = importlib.import_module("digits")
    path = tmp_path / "digits.jsonl"
    arguments = ["--quick", "--rows", str(path), "--docs", str(docs)]
    assert digits.main(arguments) == 0
    before = path.read_bytes()
    rows = digits.load(path)
    greedy = [row for row in rows if row["cut"] == "greedy"]
    assert {row["at"] for row in greedy} == set(digits.BUDGETS)
    assert all(row["weights"] <= row["at"] * row["dense_weights"] for row in greedy)
    whole = {(r["model"], r["method"]): r for r in rows if r["cut"] == "whole"}
    assert whole["mlp", "dense, then SVD"]["accuracy"] == pytest.approx(
        whole["mlp", "dense, then SVD"]["dense_accuracy"]
    )
    assert whole["mlp", "dense, then SVD"]["accuracy"] > 0.85
    text = (docs / "examples.md").read_text()
    assert "### CNN with BatchNorm" in text
    assert "dense: 0 of 1 runs end in NaN or near chance" in text
    capsys.readouterr()
    assert digits.main(arguments) == 0
    assert path.read_bytes() == before
    assert capsys.readouterr().out.strip() in text


def test_a_greedy_descent_takes_what_costs_least_and_is_nested(monkeypatch):
    pytest.importorskip("sklearn")
    digits = importlib.import_module("digits")
    model = digits.factorised(digits.digits("mlp").model)
    layers = list(mk.nn.lod_layers(model).values())

    def loss(model, data):
        # Nothing beyond rank 16 of the first layer matters; the head is dearest.
        first, second, head = (layer.rank for layer in layers)
        return max(0, 16 - first) * 5 + (128 - second) + 1000 * (10 - head)

    monkeypatch.setattr(digits, "calibration_loss", loss)
    seen = [[la.rank for la in layers] for _ in digits.greedy(model, None, (0.5, 0.85, 0.3))]
    # Steps are a sixteenth of each rank: 4, 8 and 1.
    assert seen == [[20, 128, 10], [16, 32, 10], [16, 8, 10]]
    now, dense = digits.weights(model)
    assert (now, dense) == (16 * 192 + 8 * 256 + 10 * 128, 64 * 128 + 128 * 128 + 10 * 128)


def test_comparisons_speak_of_every_seed():
    report = importlib.import_module("digits_report")
    rows = []
    for seed, (ours, theirs) in enumerate([(0.9, 0.8), (0.7, 0.6)]):
        for method, value in (("LoD", ours), (report.SVD, theirs)):
            about = {"model": "mlp", "method": method, "seed": seed, "cut": "greedy"}
            rows.append({**about, "at": 0.5, "accuracy": value})
            rows.append(
                {**about, "at": 0.25, "accuracy": value + (seed and method == "LoD") * -0.3}
            )
    assert report.comparison(rows, "mlp", "LoD") == (
        "- LoD: ahead on every seed at 0.5 (+10.0); neither at 0.25 (-5.0)."
    )
    assert report.spread([0.5]) == "50.0"
    assert report.spread([0.5, 0.7]) == "60.0 ± 14.1"


@pytest.mark.parametrize("name", ["theory", "digits"])
def test_the_docs_show_the_rows_that_are_kept(name):
    rows = ROOT / "examples" / "results" / f"{name}.jsonl"
    if name == "theory":
        theory = importlib.import_module("theory")
        text = theory.markdown(theory.load(rows))
    else:
        report = importlib.import_module("digits_report")
        text = report.markdown(load(rows))
    page = ROOT / "docs" / "guide" / "examples.md"
    assert text in page.read_text()
    for line in text.splitlines():
        if line.startswith("!["):
            figure = page.parent / line[line.index("(") + 1 : -1]
            drawing = ElementTree.fromstring(figure.read_text())
            assert drawing.tag == "{http://www.w3.org/2000/svg}svg"


def test_examples_are_modules_without_side_effects(capsys):
    for name in ("theory", "digits", "digits_report"):
        sys.modules.pop(name, None)
        importlib.import_module(name)
    assert capsys.readouterr().out == ""
