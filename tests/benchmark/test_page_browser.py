"""Pages in a real browser: they render from file://, without errors, legible on a phone."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch
from places import ROOT
from profile_support import make_profile
from torch import nn

from maestro_kernels import hardware
from maestro_kernels.benchmark import report as benchmark_report
from maestro_kernels.benchmark import rows
from maestro_kernels.cli import profile as cli
from maestro_kernels.cli.train import html_report as training_page
from maestro_kernels.search import profile_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here (.ci/run installs it)")

DEVICE = hardware.Device(
    "cpu", "Test CPU", "x86_64 test", 2, bandwidth=2e10, cache_bandwidth=2e11,
    peak_flops=(("float32", 1e11),), source="measured",
)  # fmt: skip
# Asked of the page inside a frame of a phone's width; a window cannot be that narrow.
MEASURE = """
<script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow;
  const size = e => parseFloat(view.getComputedStyle(e).fontSize);
  const drawings = [...page.querySelectorAll("svg")];
  const box = e => e.getBoundingClientRect();
  const wide = [...page.querySelectorAll("body *")].filter(e =>
    !e.closest(".scroll") && !e.closest("svg") && box(e).right > view.innerWidth + 0.5);
  document.body.dataset.found = JSON.stringify({
    inner: view.innerWidth, scroll: root.scrollWidth, wide: wide.map(e => e.outerHTML.slice(0, 80)),
    text: Math.min(...[...page.querySelectorAll("p, td, th, figcaption, .card span")].map(size)),
    drawings: drawings.map(s => [box(s).width, box(s).height]),
    labels: Math.min(...drawings.flatMap(s => [...s.querySelectorAll("text")])
      .map(t => Math.max(box(t).height, box(t).width))),
    clipped: drawings.flatMap(s => [...s.querySelectorAll("text")].filter(t => {
      const a = box(t), b = box(s);
      return a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1;
    }).map(t => t.textContent)),
    ink: view.getComputedStyle(page.body).color,
    paper: view.getComputedStyle(page.body).backgroundColor,
    cut: [...page.querySelectorAll(".scroll")].filter(e =>
      !e.closest("details") && e.scrollWidth > e.clientWidth).length,
  });
});
frame.srcdoc = document.querySelector("#page").content.textContent;
</script>
"""


def browse(path, *options):
    """(document after loading, console messages)."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--hide-scrollbars", "--enable-logging=stderr"]
    command += [
        f"--user-data-dir={path.parent / 'browser'}",
        "--virtual-time-budget=5000",
        *options,
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


def measured(page, tmp_path, width):
    """What a page of this width looks like from inside."""
    harness = tmp_path / "harness.html"
    frame = f'<iframe width="{width}" height="800" style="border:0"></iframe>'
    source = f'<template id="page">{html.escape(page)}</template>'
    harness.write_text(f"<!doctype html><body>{frame}{source}{MEASURE}", encoding="utf-8")
    dom, _ = browse(harness, "--dump-dom")
    return json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))


def run_of_digits():
    """Rows of a training run, as `maestro-kernels train` writes them."""
    layers = {
        name: {"N": N, "K": K, "kind": "linear", "rank": min(N, K)}
        for name, N, K in (("0", 128, 64), ("2", 128, 128), ("4", 10, 128))
    }
    sections = {"convert": {"init": "svd"}, "train": {"epochs": 5, "lr": 0.03}, "maestro": {}}
    start = {
        "event": "start",
        "config": {"task": "digits_task:make", "options": {}, **sections},
        "samples": 1257,
        "layers": layers,
        "device": "cpu",
        "threads": 1,
        "versions": {"torch": "2.13.0", "commit": None},
    }
    steps = [
        {"event": "step", "step": 10 * i + 10, "loss": 2.3 / (i + 1), "penalty": 0.1 / (i + 1)}
        for i in range(10)
    ]
    epochs = [
        {
            "event": "epoch", "epoch": i + 1, "step": 20 * i + 20, "train_loss": 2.0 / (i + 1),
            "metrics": {"accuracy": 0.9, "loss": 0.4}, "seconds": 3.0 * i,
            "ranks": {"0": 64 - 8 * i, "2": 128 - 20 * i, "4": 10}, "parameters": 40_000,
            "weights": 25_000 - 2_000 * i, "dense_weights": 25_856,
        }
        for i in range(5)
    ]  # fmt: skip
    return [start, *steps, *epochs]


@pytest.fixture(scope="module")
def pages():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(50)))
    names = tuple(str(i) for i in range(50))
    prof = make_profile(((512, 512), (1024, 512)), Ms=(1, 64), names=names)
    front = cli._front(model, prof, 64, 1.2)
    assert front is not None
    return {
        "profile": profile_report.page(prof, device=DEVICE, front=front, command="x " * 60),
        "benchmark": benchmark_report.html_report(
            rows.latest_run(rows.load(next((ROOT / "bench" / "results").glob("*-threads.jsonl"))))
        ),
        "training": training_page(run_of_digits()),
    }


@pytest.mark.parametrize("name", ["profile", "benchmark", "training"])
def test_page_renders_from_a_file_without_a_message(pages, name, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(pages[name], encoding="utf-8")
    dom, messages = browse(path, "--dump-dom")
    assert messages == []
    assert dom.count("<svg") == pages[name].count("<svg") > 0
    assert "</footer>" in dom
    shot = tmp_path / "shot.png"
    browse(path, f"--screenshot={shot}", "--window-size=1280,2000")
    # An empty page of this size is a few kilobytes.
    assert shot.read_bytes().startswith(b"\x89PNG")
    assert shot.stat().st_size > 60_000


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["profile", "benchmark", "training"])
def test_page_is_legible_at_this_width(pages, name, width, tmp_path):
    found = measured(pages[name], tmp_path, width)
    assert found["inner"] == width
    assert found["scroll"] <= width, found["wide"]
    assert found["wide"] == []
    # On a desk every table that is not folded fits; on a phone it scrolls inside its own box.
    assert width < 1280 or found["cut"] == 0
    assert found["text"] >= 13
    assert found["labels"] >= 9
    assert found["clipped"] == []
    assert found["ink"] != found["paper"]
    for wide, high in found["drawings"]:
        assert 0.8 * min(width, 500) <= wide + 70
        assert high > 100


def test_the_measurement_sees_what_is_wrong(pages, tmp_path):
    broken = pages["profile"].replace("</main>", '<div style="width:600px">x</div></main>')
    broken = broken.replace("<p>", '<p style="font-size:9px">', 1)
    found = measured(broken, tmp_path, 390)
    assert found["scroll"] > 390
    assert found["wide"]
    assert found["text"] == 9
    path = tmp_path / "loud.html"
    path.write_text(pages["profile"].replace("</body>", "<script>undefinedName()</script></body>"))
    assert any("undefinedName" in message for message in browse(path, "--dump-dom")[1])
