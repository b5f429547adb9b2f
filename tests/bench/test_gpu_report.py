"""What the records of the GPU run amount to: one table, criteria, strategies, slowest cases."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from bench.gpu import launches, report, suite, table
from bench.gpu.device import Stub
from bench.gpu.items import Item
from bench.gpu.worker import run_item
from maestro_kernels import tables
from maestro_kernels.benchmark import rows
from maestro_kernels.benchmark.providers import default_providers
from maestro_kernels.benchmark.run import Options, run_case
from maestro_kernels.hardware import current_device
from maestro_kernels.measure.cases import Case, Layer
from maestro_kernels.search import tuning
from maestro_kernels.search.strategies import for_table

TWO = tables.BASELINE


def row(M, us, layers=1):
    return tables.Row("bfloat16", layers, M, 4096, 4096, 64, True, us)


def times(**strategies):
    return {name.replace("__", ": "): (t, t, t) for name, t in strategies.items()}


def of(*found):
    return [
        {"item": f"case {i}", "outcome": "passed", "family": "f", "result": {"row": asdict(r)}}
        for i, r in enumerate(found)
    ]


def test_rows_of_several_processes_are_scaled_by_what_each_timed_beside_them():
    mode = "forward cold graph"
    a = row(16, {mode: {TWO: (9.0, 10.0, 11.0), **times(triton__row=5.0)}})
    b = row(16, {mode: {TWO: (19.0, 20.0, 21.0), **times(native__decode=8.0)}})
    (merged,) = table.merged(of(a, b))
    assert merged.us[mode][TWO] == (9.0, 10.0, 11.0)
    assert merged.us[mode]["triton: row"][1] == 5.0
    assert merged.us[mode]["native: decode"][1] == pytest.approx(4.0)
    assert len(table.merged(of(a, row(1, a.us), row(16, a.us, layers=3)))) == 3
    lost = {"item": "x", "outcome": "lost", "family": "f", "result": None}
    wrong = {**lost, "outcome": "failed", "result": {"row": None, "wrong": "y: max error"}}
    assert table.merged([lost, wrong]) == []


def test_strategies_are_compared_where_they_belong():
    mode = "forward cold graph"
    found = [
        row(16, {mode: {**times(triton__row=5.0), TWO: (10.0,) * 3}}),
        row(64, {mode: {**times(triton__row=20.0), TWO: (10.0,) * 3}}),
        row(9000, {mode: {**times(native__row=8.0), TWO: (10.0,) * 3}}),
    ]
    lines = [" ".join(line.split()) for line in report.strategies(found)]
    assert "M <= 64 triton: row 1.00 (2) 1" in lines
    assert f"M <= 64 {TWO} 1.00 (2) 1" in lines
    assert "M > 4096 native: row 1.25 (1) 1" in lines


@pytest.fixture(scope="module")
def measured():
    """Rows of two tiny cases, timed on this CPU."""
    found = []
    for M in (2, 3):
        case = Case("tiny", M, (Layer(24, 16, 8, 8),), "float32")
        chosen = [p for p in default_providers(case) if p.name in ("ours", "two matmuls")]
        options = Options("cpu", 0.01, ("cold",))
        found += run_case(case, chosen, current_device("cpu"), "2026-01-01T00:00:00", options)
    return found


def graphs(found, ours, two):
    return [
        rows.replace(r, launch=launch, p20_us=t, p50_us=t, p80_us=t)
        for r in found
        for launch in ("graph", "eager")
        for t in [ours[r.M] if r.provider == "ours" else two]
    ]


def test_criteria_take_device_times_and_auto_is_held_to_the_worst_case(measured):
    lines = report.criteria(graphs(measured, {2: 10.0, 3: 10.0}, 19.0), [])
    assert "at least 1.6     1.90  met" in lines[0]
    assert "no rows" in lines[1]
    assert [line.split()[-1] for line in lines[-4:]] == ["met", "met", "rows", "rows"]
    slow = graphs(measured, {2: 10.0, 3: 20.0}, 19.0)
    lines = report.criteria(slow, slow[:2])
    assert lines[-4].startswith("auto by table, graph, worst")
    assert lines[-4].endswith("0.95  MISSED")


def test_rows_in_records_become_rows_once(measured):
    texts = [r.to_json() for r in measured]
    families = [
        {"item": "a", "family": family, "result": {"rows": texts}}
        for family in ("auto", "compiled")
    ]
    found = report.rows_of(families)
    assert len(found) == len(measured)
    assert all(r.speedup for r in found if r.provider == "ours")


def test_slowest_cases_come_first(tmp_path, measured):
    path = tmp_path / "records.jsonl"
    with path.open("w") as file:
        for M, ours in ((2, 40.0), (3, 10.0)):
            some = graphs([r for r in measured if r.M == M], {M: ours}, 20.0)
            texts = [r.to_json() for r in some]
            line = {"stage": "rows", "family": "auto", "item": f"M{M}", "result": {"rows": texts}}
            file.write(json.dumps(line) + "\n")
    assert launches.slowest(path) == ["M2", "M3"]


def test_the_suite_begins_with_decode_the_square_layer_and_groups():
    cases = suite.cases()
    assert len({case.id for case in cases}) == len(cases)
    assert {case.dtype for case in (*cases, *suite.training())} == {"bfloat16"}
    assert all(c.M <= 64 and (c.K, c.layers[0].N) == (4096, 4096) for c in cases[:12])
    assert all(len(c.layers) > 1 for c in cases[12:20])
    ranks = {layer.rank for case in cases for layer in case.layers}
    assert {16, 127, 200, 637, 1024, 1592} <= ranks
    assert {case.id for case in suite.key()} <= {case.id for case in cases}
    assert {case.M for case in cases} >= {1, 16, 64, 256, 4096, 8192, 32768}


def test_a_strategy_that_is_wrong_or_raises_is_told_and_not_only_left_out():
    case = Case("tiny", 2, (Layer(24, 16, 8, 8),), "float32")
    two = next(p for p in for_table(case) if p.name == TWO)

    def raising(case, ring):
        def forward():
            raise RuntimeError("out of resource")

        return [forward for _ in ring]

    def wrong(case, ring):
        return [lambda i=i: [torch.zeros(2, 24)] for i in ring]

    chosen = [
        two,
        replace(two, name="a: raises", bind=raising),
        replace(two, name="b: wrong", bind=wrong),
    ]
    refused = {}
    us = tuning.measure(case, torch.device("cpu"), 0.001, lambda case: chosen, refused)
    assert set().union(*us.values()) == {TWO}
    assert refused["forward: a: raises"] == "RuntimeError: out of resource"
    assert "max error" in refused["forward: b: wrong"]


def test_what_of_a_result_failed_makes_the_item_fail_and_keeps_the_rest():
    device = Stub()
    item = Item("x", lambda: {"rows": ["kept"], "wrong": "ours: y: max error"})
    record = run_item(device, item, "rows/auto")
    assert (record["outcome"], record["note"]) == ("failed", "ours: y: max error")
    assert record["result"]["rows"] == ["kept"]
