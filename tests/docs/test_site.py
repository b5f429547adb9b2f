"""The site of the documentation builds, holds every page and public name, and needs no network."""

import os
import re
import subprocess
import sys

import pytest
from places import ROOT

import maestro_kernels as mk

# Says no more than its source, which the page of its users shows.
ALIASES = {"Budget"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="needs requirements-dev.txt")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_every_page_is_there(site):
    docs = ROOT / "docs"
    pages = {page.relative_to(docs) for page in docs.rglob("*.md")}
    for page in pages:
        assert (site / page.with_suffix(".html")).is_file()
    index = (docs / "index.md").read_text(encoding="utf-8")
    assert {str(p) for p in pages} - set(re.findall(r"\((\S+\.md)\)", index)) == {"index.md"}


def test_every_public_name_is_on_the_page_of_the_api(site):
    text = (site / "api.html").read_text(encoding="utf-8")
    anchors = {
        name.rpartition(".")[2] for name in re.findall(r'id="(maestro_kernels\.[^"]*)"', text)
    }
    for module in (mk, mk.nn, mk.search, mk.training):
        names = {name for name in module.__all__ if not hasattr(getattr(module, name), "__path__")}
        assert names - anchors <= ALIASES


def test_nothing_comes_from_a_network(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//[^"]+"', text)
