"""The README's table is what the committed rows say, its links lead somewhere."""

import re

import pytest
from places import ROOT

from bench.publish import main


def test_every_table_is_generated_from_the_rows_it_names():
    assert main(["--root", str(ROOT), "--check"]) == 0
    assert len(re.findall(r":begin, from ", (ROOT / "README.md").read_text("utf-8"))) == 2


def test_a_changed_figure_is_noticed(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    changed = (ROOT / "README.md").read_text(encoding="utf-8").replace("µs |", "ms |", 1)
    (tmp_path / "README.md").write_text(changed, encoding="utf-8")
    assert main(["--root", str(tmp_path), "--check"]) == 1
    assert "README.md: differs from its rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "page",
    sorted(p.relative_to(ROOT) for p in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]),
    ids=str,
)
def test_links_and_images_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", text)
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    missing = [link for link in local if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing
