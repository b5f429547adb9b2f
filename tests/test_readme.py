"""The README's table is what the committed rows say."""

from pathlib import Path

from maestro_kernels.benchmark.readme import main

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "bench" / "results" / "xeon-4-threads.jsonl"


def test_the_table_is_generated_from_the_committed_rows():
    assert main([str(ROWS), str(ROOT / "README.md"), "--check"]) == 0


def test_a_changed_figure_is_noticed(tmp_path):
    changed = (ROOT / "README.md").read_text(encoding="utf-8").replace("µs |", "ms |", 1)
    (tmp_path / "README.md").write_text(changed, encoding="utf-8")
    assert main([str(ROWS), str(tmp_path / "README.md"), "--check"]) != 0
