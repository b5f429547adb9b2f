import io
import re

import pytest
from benchmark_support import failed, row
from rich.console import Console

from bench import publish
from maestro_kernels.benchmark import report
from maestro_kernels.benchmark.rows import append, compare, with_speedups
from maestro_kernels.measure import report as html


def run_rows(ours=1.0):
    rows = []
    for M in (1, 16, 256):
        for cache in ("warm", "cold"):
            where = {"M": M, "cache": cache, "ring_bytes": 1 << 28 if cache == "cold" else 0}
            scale = M**0.5 * (1 if cache == "warm" else 1.5)
            rows += [
                row("ours", 50.0 * scale * ours, config="matmul: two matmuls", **where),
                row("two matmuls", 60.0 * scale, **where),
                row("two matmuls, oneDNN packed", 45.0 * scale, **where),
                row("two matmuls, compiled", 70.0 * scale, **where),
                row("dense", 120.0 * scale, **where),
                failed("dense, compiled", **where),
                failed("ours, triton", gate="unavailable", **where),
            ]
    return with_speedups(rows)


def visible(page):
    return re.sub(r"<[^>]+>", " ", page)


def test_page_makes_no_request_and_runs_no_script():
    page = report.html_report(run_rows())
    assert not re.search(r"https?:|//[a-z]|<script|<link|<iframe|<img|@import|url\((?!#)", page)
    assert re.search(r"url\(#", page)
    assert page.startswith("<!doctype html>")
    assert page.count("<svg") == 4


def test_page_shows_every_provider_and_every_reason():
    rows = run_rows()
    text = visible(report.html_report(rows))
    for name in {r.provider for r in rows}:
        assert name in text
    assert "failed" in text
    assert "unavailable" in text
    assert "test CPU, 2 threads" in text
    # One line per row, and per case and cache state of ours.
    assert text.count("20 · 3") == sum(r.gate == "passed" for r in rows)


def test_page_follows_light_and_dark_and_fits_a_phone():
    page = report.html_report(run_rows())
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport" content="width=device-width' in page
    # The colours of drawings are turned round in the dark, by the page's style and nothing else.
    assert page.count("filter: var(--drawing);") == 1
    assert not re.search(r"var\(|filter", page.split("</style>", 1)[1])
    used = set(re.findall(r"var\((--\w+)\)", page))
    light, dark = (set(re.findall(r"(--\w+):", part)) for part in page.split("@media", 2)[:2])
    assert used <= light
    assert used <= dark
    assert page.count("<table") == page.count('<div class="scroll"')
    assert re.search(r"figure svg \{ display: block; width: 100%; height: auto; max-width", page)


def test_element_ids_are_unique_and_resolve():
    page = report.html_report(run_rows())
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page))
    for a, b in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page):
        assert (a or b) in ids


def test_page_is_the_same_for_the_same_rows():
    assert report.html_report(run_rows()) == report.html_report(run_rows())


def test_dirty_rows_and_foreign_text_are_marked_and_escaped():
    rows = [
        row("ours", source="<b>&", versions={"dirty": True, "torch": "x"}),
        row("two matmuls", source="<b>&"),
    ]
    page = report.html_report(rows)
    assert "uncommitted changes" in page
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;" in page
    with pytest.raises(ValueError, match="html_report: rows: expected at least one row, got none"):
        report.html_report([])


def test_page_without_a_passing_row_of_ours_still_says_why():
    text = visible(report.html_report([failed("ours"), row("dense")]))
    assert "Nothing of ours passed its accuracy check" in text
    assert "why" in text


def test_comparison_is_shown():
    found = compare(run_rows(), run_rows(ours=1.5))
    text = visible(report.html_report(run_rows(ours=1.5), comparison=found))
    assert "Since the earlier run" in text
    assert "of ours 6 got slower" in text
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.comparison_table(found))
    assert console.export_text().count("ours") == 6
    unchanged = report.comparison_table(compare(run_rows(), run_rows()))
    assert "nothing changed beyond noise in 30 measurements" in unchanged


def test_terminal_table_has_a_line_per_measurement():
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.terminal_table(run_rows()))
    text = console.export_text()
    assert text.count("Test up") == 6
    assert "45.0 µs (packed)" in text
    assert "0.90" in text


def test_tables_are_written_checked_and_refuse_dirty_rows(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    rows_path, document = tmp_path / "rows.jsonl", tmp_path / "README.md"
    append(rows_path, run_rows())
    begin = "<!-- benchmark:begin, from {}, written by make publish -->"
    end = "<!-- benchmark:end -->"
    document.write_text(f"head\n{begin.format('rows.jsonl')}\nstale\n{end}\ntail\n")
    arguments = ["--root", str(tmp_path)]
    assert publish.main([*arguments, "--check"]) == 1
    assert "stale" in document.read_text()
    assert publish.main(arguments) == 0
    assert publish.main([*arguments, "--check"]) == 0
    text = document.read_text()
    assert text.startswith("head\n")
    assert text.endswith(f"\n{end}\ntail\n")
    assert "stale" not in text
    assert "| Test up | 16 | 7 | float32 | 720 µs | 360 µs | 270 µs (oneDNN packed) |" in text
    assert "test CPU, 2 threads" in text
    assert "abc" in text
    append(rows_path, [row("ours", cache="cold", run="2026-02-01", versions={"dirty": True})])
    capsys.readouterr()
    assert publish.main(arguments) == 2
    assert "uncommitted changes" in capsys.readouterr().err
    for marker, message in (
        (begin.format("gone.jsonl"), "expected the rows gone.jsonl, got no such file"),
        ("<!-- odd:begin, from rows.jsonl, written by make publish -->", "got 'odd'"),
    ):
        kind = marker.split()[1].partition(":")[0]
        document.write_text(f"{marker}\nx\n<!-- {kind}:end -->")
        assert publish.main(arguments) == 2
        assert message in capsys.readouterr().err
    document.write_text(f"{begin.format('-')}\nnothing yet\n{end}")
    assert publish.main(arguments) == 0
    assert "nothing yet" in document.read_text()


def test_a_run_is_published_under_its_own_name(tmp_path):
    out, root = tmp_path / "out", tmp_path / "root"
    (root / "docs").mkdir(parents=True)
    (root / "bench" / "results").mkdir(parents=True)
    out.mkdir()
    document = root / "README.md"
    document.write_text(
        "<!-- benchmark:begin, from -, written by make publish -->\n<!-- benchmark:end -->"
    )
    assert publish.main([str(out), "--root", str(root)]) == 2
    append(out / "cpu-avx2-2-threads.jsonl", run_rows())
    assert publish.main([str(out), "--root", str(root)]) == 0
    assert (root / "bench" / "results" / "cpu-avx2-2-threads.jsonl").is_file()
    assert "from bench/results/cpu-avx2-2-threads.jsonl, written" in document.read_text()
    assert publish.main(["--root", str(root), "--check"]) == 0


def test_readme_table_refuses_wrong_results_and_missing_rows():
    with pytest.raises(ValueError, match="expected every result of ours to be right"):
        publish.markdown_table([*run_rows(), failed("ours, native", cache="cold")])
    with pytest.raises(ValueError, match="expected cold rows of ours, got none"):
        publish.markdown_table([r for r in run_rows() if r.cache == "warm"])


def test_the_page_reads_as_people_write():
    page = report.html_report(run_rows())
    assert "`" not in page
    assert re.search(r"\d{4}-\d\d-\d\d, \d\d:\d\d UTC", page)
    assert not re.search(r"\dT\d\d:\d\d", page)
    assert "1 threads" not in page
    assert html.prose("after `prepack` < 1") == "<p>after <code>prepack</code> &lt; 1</p>"
