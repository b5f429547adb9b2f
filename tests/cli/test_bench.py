import importlib.util
import json
import sys

import pytest

from maestro_kernels.benchmark.rows import load
from maestro_kernels.cli import main

SHAPE = ["bench", "--shape", "3,24,16,8,7", "--seconds", "0.02", "--no-compile"]


def test_one_shape_end_to_end(tmp_path, capsys):
    assert main([*SHAPE, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "command line" in printed
    assert "Against two plain matmuls" in printed
    rows = load(tmp_path / "rows.jsonl")
    assert {r.cache for r in rows} == {"warm", "cold"}
    assert {"ours", "two matmuls", "dense"} <= {r.provider for r in rows if r.gate == "passed"}
    page = (tmp_path / "report.html").read_text()
    assert "http" not in page
    assert rows[0].command.startswith("maestro-kernels bench --shape 3,24,16,8,7 --device")
    assert str(tmp_path) not in page + "".join(r.to_json() for r in rows)


def test_json_rows_go_to_standard_output(tmp_path, capsys):
    assert main([*SHAPE, "--json", "--dtype", "bfloat16", "--out", str(tmp_path)]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {record["dtype"] for record in records} == {"bfloat16"}
    assert len(records) == len(load(tmp_path / "rows.jsonl"))


def test_compare_reports_a_slow_down_and_fails(tmp_path, capsys):
    assert main([*SHAPE, "--out", str(tmp_path / "old")]) == 0
    earlier = tmp_path / "earlier.jsonl"
    lines = []
    for line in (tmp_path / "old" / "rows.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["provider"] == "ours":
            for name in ("p20_us", "p50_us", "p80_us"):
                record[name] /= 1000
        lines.append(json.dumps(record))
    earlier.write_text("\n".join(lines))
    capsys.readouterr()
    assert main([*SHAPE, "--out", str(tmp_path / "new"), "--compare", str(earlier)]) == 1
    assert "since the earlier run" in capsys.readouterr().out
    assert "Since the earlier run" in (tmp_path / "new" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1,2"], "parse_shape: text: expected M,N,K,R"),
        (["--shape", "1,2,3,4", "--compare", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(tmp_path, capsys, arguments, message):
    assert main(["bench", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_rows_and_tables_are_still_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([*SHAPE, "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "Against two plain matmuls" in out
    assert err.count("they need matplotlib; pip install") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rows.jsonl"]


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert "example: maestro-kernels bench" in capsys.readouterr().out
