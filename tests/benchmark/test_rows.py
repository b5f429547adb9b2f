import dataclasses
import json

import pytest
from benchmark_support import failed, row

from maestro_kernels.benchmark.rows import append, compare, latest_run, load, with_speedups
from maestro_kernels.benchmark.summary import outcomes, verdict
from maestro_kernels.measure.noise import beyond_noise
from maestro_kernels.measure.wording import DASH, TIMES, duration, geometric_mean, times


def test_rows_survive_a_round_trip_and_files_only_grow(tmp_path):
    path = tmp_path / "sub" / "rows.jsonl"
    first = [row(), failed("two matmuls"), row(N=(8, 64), R=(4, 8), rank=(4, 0), op="grouped")]
    append(path, first)
    head = path.read_bytes()
    append(path, [row("dense", run="2026-01-02T00:00:00+00:00")])
    assert path.read_bytes().startswith(head)
    loaded = load(path)
    assert loaded[:3] == first
    assert [r.provider for r in latest_run(loaded)] == ["dense"]
    record = json.loads(path.read_text().splitlines()[0])
    assert (record["N"], record["rank"], record["schema"]) == (64, 7, 1)


def swap(old, new):
    return lambda line: line.replace(old, new)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda line: line[: len(line) // 2], "expected a JSON object, got"),
        (lambda line: "[1, 2]", "expected a JSON object, got list"),
        (swap('"schema": 1', '"schema": 9'), "schema: expected 1, got 9"),
        (swap('"cache"', '"cash"'), r".* missing \['cache'\], unknown \['cash'\]"),
        (swap('"M": 16', '"M": "16"'), "M: expected int, got '16'"),
        (swap('"rank": 7', '"rank": []'), "rank: expected tuple"),
        (swap('"p50_us": 100.0', '"p50_us": -1'), "p50_us: expected float"),
        (swap('"gate": "passed"', '"gate": "ok"'), "gate: expected"),
        (swap('"passed"', '"failed"'), "p50_us: expected a time exactly"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, damage, message):
    path = tmp_path / "rows.jsonl"
    append(path, [row(), row()])
    first, second = path.read_text().splitlines()
    assert damage(second) != second
    path.write_text(f"{first}\n{damage(second)}\n")
    with pytest.raises(ValueError, match=rf"load: rows\.jsonl, line 2: {message}"):
        load(path)


def test_speedups_are_against_the_fastest_alternative_that_passed():
    rows = with_speedups(
        [
            row("ours", 50.0),
            row("two matmuls", 100.0),
            row("two matmuls, compiled", 80.0),
            failed("two matmuls, oneDNN packed"),
            row("dense", 200.0),
            row("dense, compiled", 400.0),
            row("two matmuls", 10.0, cache="cold"),
        ]
    )
    ours = rows[0]
    assert (ours.baseline, ours.speedup, ours.speedup_dense) == ("two matmuls, compiled", 1.6, 4.0)
    assert rows[3].baseline is None
    assert rows[3].speedup is None
    assert rows[6].speedup == 1.0


def test_compare_finds_a_slow_down_and_ignores_noise():
    def run(ours, other, spread=0.02):
        return [row("ours", ours, spread), row("two matmuls", other)]

    slower = compare(run(100.0, 100.0), run(112.0, 100.0))
    assert [c.new.provider for c in slower.regressions] == ["ours"]
    assert slower.regressions[0].ratio == pytest.approx(1.12)
    # Below the 5 % margin, or inside a wide spread, nothing is said.
    assert compare(run(100.0, 100.0), run(104.0, 100.0)).regressions == []
    assert compare(run(100.0, 100.0, 0.3), run(112.0, 100.0, 0.3)).regressions == []
    faster = compare(run(112.0, 100.0), run(100.0, 100.0))
    assert faster.regressions == []
    assert {c.new.provider: c.verdict for c in faster.changes}["ours"] == "faster"


def test_compare_takes_out_the_drift_of_the_machine():
    old = [row("ours", 100.0), row("two matmuls", 100.0), row("dense", 300.0)]
    new = [row("ours", 130.0), row("two matmuls", 130.0), row("dense", 390.0)]
    same = compare(old, new)
    assert same.drift == pytest.approx(1.3)
    assert same.regressions == []
    # Standing still while everything else sped up is a regression too.
    new = [row("ours", 100.0), row("two matmuls", 70.0), row("dense", 210.0)]
    assert [c.new.provider for c in compare(old, new).regressions] == ["ours"]


def test_compare_takes_out_a_busy_moment_that_hit_one_case():
    old = [row(p, t, M=M) for M in (1, 2, 3) for p, t in (("ours", 100.0), ("two matmuls", 100.0))]
    busy = [dataclasses.replace(row(r.provider, 180.0), M=2) if r.M == 2 else r for r in old]
    found = compare(old, busy)
    assert found.drift == 1.0
    assert found.regressions == []
    alone = [row("ours", 130.0, M=r.M) if r.provider == "ours" and r.M == 2 else r for r in old]
    assert [c.new.M for c in compare(old, alone).regressions] == [2]


def test_compare_reports_what_was_lost_and_what_has_no_counterpart():
    old = [row("ours", 100.0), row("two matmuls", 100.0)]
    new = [failed("ours"), row("two matmuls", 100.0), row("dense", 1.0, threads=4)]
    found = compare(old, new)
    assert [(c.new.provider, c.verdict) for c in found.regressions] == [("ours", "lost")]
    assert found.unmatched == 1
    other_device = [row("ours", 500.0, device={"name": "other"})]
    assert compare(old, other_device).changes == ()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ((99, 100, 101), (109, 110, 111), "slower"),
        ((109, 110, 111), (99, 100, 101), "faster"),
        ((99, 100, 101), (103, 104, 105), "same"),  # below 5 %
        ((99, 100, 112), (111, 115, 116), "same"),  # intervals meet
        ((80, 100, 101), (101.5, 110, 130), "same"),  # differs by less than the spreads
    ],
)
def test_beyond_noise(old, new, expected):
    assert beyond_noise(old, new) == expected


def test_outcomes_and_verdict_say_who_wins():
    rows = [
        row("ours", 50.0),
        row("two matmuls", 100.0),
        row("dense", 200.0),
        row("ours", 100.0, M=64),
        row("two matmuls", 80.0, M=64),
        row("dense", 40.0, M=64),
        failed("two matmuls, compiled"),
    ]
    won, lost = outcomes(rows)
    assert (won.against(won.best), won.ratio(won.two), won.pays) == ("faster", 2.0, 4.0)
    assert (lost.against(lost.best), lost.against(lost.dense)) == ("slower", "slower")
    assert lost.pays == 0.5
    text = " ".join(verdict(rows))
    assert "beats the fastest dense layer in 1 of 2" in text
    assert "faster in 1, equal within noise in 0 and slower in 1 of 2" in text
    assert "dense wins most clearly at Test up, M 64" in text
    assert "“two matmuls, compiled”" in text
    assert "accuracy check" in verdict([failed("ours")])[0]


def test_inference_is_judged_after_prepack_where_it_was_measured():
    packed = dataclasses.replace(row("ours, prepacked", 40.0), config="prepacked: fused")
    (one,) = outcomes([row("ours", 60.0), packed, row("two matmuls", 80.0)])
    assert (one.ours.p50_us, one.plain.p50_us, one.ratio(one.two)) == (40.0, 60.0, 2.0)
    text = verdict([row("ours", 60.0), packed, row("two matmuls", 80.0)])[-1]
    assert f"which chose fused 1 times; a call on the factors as they are takes 1.50{TIMES}" in text
    refused = failed("ours, prepacked", gate="failed")
    (one,) = outcomes([row("ours", 60.0), refused])
    assert one.ours is one.plain


def test_numbers_for_people():
    durations = {0.123: "0.12 µs", 9.5: "9.50 µs", 45.67: "45.7 µs", 456.7: "457 µs"}
    durations |= {4567: "4.57 ms", 4567890: "4568 ms", None: DASH}
    assert {value: duration(value) for value in durations} == durations
    ratios = {0.5: f"0.50{TIMES}", 1.234: f"1.23{TIMES}", 12.34: f"12.3{TIMES}", None: DASH}
    assert {value: times(value) for value in ratios} == ratios
    assert geometric_mean([2.0, 0.5]) == pytest.approx(1.0)
    assert geometric_mean([]) is None
