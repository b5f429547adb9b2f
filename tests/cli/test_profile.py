"""`maestro-kernels profile`: targets, files, table, page; what a drawing shows."""

import io
import json
import re
import sys

import pytest
import torch
from profile_support import make_profile
from rich.console import Console
from torch import nn

from maestro_kernels import hardware, search
from maestro_kernels.cli import main
from maestro_kernels.cli import profile as cli
from maestro_kernels.search import drawings, layer_profile
from maestro_kernels.search import profile_report as report

DEVICE = hardware.Device(
    "cpu", "Test CPU", "x86_64 test", 2, bandwidth=2e10, cache_bandwidth=2e11,
    peak_flops=(("float32", 1e11),), source="measured",
)  # fmt: skip


def visible(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


@pytest.fixture(scope="module")
def front():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(3)))
    with torch.no_grad():
        for i, layer in enumerate(model):
            u, s, v = torch.linalg.svd(layer.weight)
            layer.weight.copy_((u * (s * torch.exp(-torch.arange(512) / (10.0 * (i + 1))))) @ v)
    names = ("0", "1", "2")
    prof = make_profile(((512, 512),), Ms=(64,), names=names)
    return prof, cli._front(model, prof, 64, 1.5)


def test_the_front_has_the_exact_one_below_simpler_rules(front):
    _, found = front
    chosen = found.chosen
    assert set(chosen) == {"0", "1", "2"}
    assert chosen.dense.ms / chosen.predicted.ms >= 1.5
    kept = [512 if rank == "dense" else rank for rank in chosen.values()]
    assert kept == sorted(kept)  # flatter spectra need more
    assert set(found.curves) >= {"exact", "uniform"}
    for name, points in found.curves.items():
        assert points == report.curve_points(points)
        # What a rule reaches in a given time is never better than the front's own allocation.
        for ms, error in points:
            best = [e for t, e in found.curves["exact"] if t <= ms * 1.001]
            assert name == "exact" or not best or error >= min(best) - 0.05


def test_curve_points_drop_what_is_beaten():
    points = [(1.0, 5.0), (2.0, 6.0), (3.0, 1.0), (0.5, 9.0)]
    assert report.curve_points(points) == [(0.5, 9.0), (1.0, 5.0), (3.0, 1.0)]


def test_page_is_self_contained_and_holds_every_drawing(front):
    prof, found = front
    page = report.page(prof, device=DEVICE, front=found, command="maestro-kernels profile x")
    assert not re.search(r"https?:|//[a-z]|<script|<link|<iframe|<img|@import|url\((?!#)", page)
    assert page.count("<svg") == 1 + 2 + 2  # latency, Pareto and ranks, warm and cold rooflines
    assert 'aria-label="Latency over rank, 512 to 512, 64 rows"' in page
    text = visible(page)
    for word in (
        "break-even",
        "just below a step",
        "worth choosing",
        "two matmuls",
        "prepacked",
        "chosen",
        "Rank of each layer",
        "Roofline, float32, cold",
        "Test CPU",
    ):
        assert word in text, word  # fmt: skip
    assert "maestro-kernels profile x" in text
    assert not re.search(r"var\(|filter", page.split("</style>", 1)[1])
    assert "Pareto" not in visible(report.page(prof))
    assert report.page(prof).count("<svg") == 1


def test_sentences_say_where_low_rank_pays():
    text = " ".join(report.sentences(make_profile(((512, 512),), Ms=(1,))))
    assert text.startswith("With half of its weights the layer runs 0.50× as fast as dense (512→")
    assert "Low rank beats the dense layer at every size measured" in text
    assert re.search(r"faster than dense up to rank 6\d, 2\d% of the rank", text)
    assert "largest ranks worth choosing: 16, 32, 64" in text
    slow = make_profile(((64, 64),), Ms=(1,), factors={"ours": 50.0, "two matmuls": 60.0})
    assert report.sentences(slow)[1].startswith("Low rank is slower than the dense layer at every")
    both = make_profile(((64, 64), (1024, 1024)), Ms=(64,))
    headline, second, *_ = report.sentences(both)
    assert re.fullmatch(
        r"With half of their weights the layers run [\d.]+× as fast as dense, from [\d.]+× "
        r"\(\d+→r→\d+ at 64 rows\) to [\d.]+× \(\d+→r→\d+ at 64 rows\)\.",
        headline,
    )
    assert second in (
        "Low rank beats the dense layer in 1 of 2 combinations of size and rows.",
        "Low rank beats the dense layer at every size measured, up to its break-even rank.",
    )


def test_terminal_table_names_the_fastest_strategy_and_the_step():
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(report.terminal_table(make_profile(((512, 512),), Ms=(1,), names=("a", "b"))))
    lines = console.export_text().splitlines()
    (line,) = [text for text in lines if "│ 64 " in text]
    assert "packed: fused" in line
    assert "just below a step" in line
    assert any("1 · 512→r→512" in text and "│ 2 " in text for text in lines)


def test_a_drawing_marks_break_even_and_steps():
    prof = make_profile(((512, 512),), Ms=(1,))
    figure = drawings.latency(prof, N=512, K=512, M=1)
    (axes,) = figure.axes
    labels = axes.get_legend_handles_labels()[1]
    assert {"ours (auto)", "dense layer", "just below a step", "worth choosing"} <= set(labels)
    limit = prof.break_even(N=512, K=512, M=1)
    assert any(abs(line.get_xdata()[0] - limit) < 1e-9 for line in axes.lines)
    ours = next(line for line in axes.lines if line.get_label() == "ours (auto)")
    assert list(ours.get_xdata()) == [16, 32, 64, 72, 96, 128]
    assert ours.get_ydata()[2] == pytest.approx(1e3 * prof.latency(N=512, K=512, rank=64, M=1))
    with pytest.raises(ValueError, match="roofline: device: expected known peaks"):
        drawings.roofline(prof, hardware.Device("cpu", "x", "y", 1))


def test_rank_chart_marks_dense_layers_and_splits_long_models(front):
    _, found = front
    bars = drawings.rank_chart(found.chosen).axes[0].patches
    assert len(bars) == 3
    ranks = found.chosen.values()
    assert "dense" in ranks
    for bar, rank in zip(bars, ranks, strict=True):
        assert round(bar.get_width()) == (512 if rank == "dense" else rank)
        assert (bar.get_facecolor()[3] == 0) == (rank == "dense")  # a dense one is hollow


# --- targets ---------------------------------------------------------------------------------


def test_targets_are_told_apart(tmp_path, monkeypatch):
    assert cli.load_target(["3072,768", "8,4"]) == [(3072, 768), (8, 4)]
    (tmp_path / "my_targets.py").write_text(
        "from torch import nn\n"
        "layer = nn.Linear(8, 16)\n"
        "def make():\n    return nn.Sequential(nn.Linear(8, 16), nn.Dropout())\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    try:
        assert cli.load_target(["my_targets:layer"]).out_features == 16
        made = cli.load_target(["my_targets:make"])
        assert isinstance(made, nn.Sequential)
        assert not made.training
        for text, message in (
            ("my_targets:missing", "expected 'my_targets:missing' to exist"),
            ("nowhere:x", "expected 'nowhere:x' to exist"),
            ("my_targets:number", "expected a torch model, got int"),
            ("8x8", "expected N,K, a Hugging Face folder"),
        ):
            with pytest.raises(ValueError, match=f"profile: target: {message}"):
                cli.load_target([text])
        with pytest.raises(ValueError, match="expected sizes N,K or one model"):
            cli.load_target(["8,8", "my_targets:layer"])
    finally:
        monkeypatch.undo()
        sys.modules.pop("my_targets", None)


def test_a_hugging_face_config_gives_sizes_and_a_folder_gives_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=40,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    meta = cli.load_target([str(tmp_path / "config.json")])
    assert all(p.is_meta for p in meta.parameters())
    sizes = {(s.N, s.K) for s in layer_profile.shapes_of(meta)}
    assert {(32, 32), (64, 32), (32, 64)} <= sizes
    transformers.BertModel(config).save_pretrained(tmp_path)
    model = cli.load_target([str(tmp_path)])
    assert not any(p.is_meta for p in model.parameters())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a Hugging Face configuration"):
        cli.load_target([str(tmp_path / "config.json")])


# --- the command -----------------------------------------------------------------------------


def test_the_command_leaves_profile_plots_and_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MAESTRO_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hardware, "measured_device", lambda device, *dtypes: DEVICE)
    monkeypatch.setattr(layer_profile, "ring_bytes", lambda device: 1 << 16)
    out = tmp_path / "out"
    words = ["profile", "48,40", "--ranks", "8,16", "--rows", "2,4", "--seconds", "0.001"]
    assert main([*words, "--device", "cpu", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "2 · 40→r→48" in text
    assert "report.html" in text
    names = {path.name for path in out.iterdir()}
    plots = ("latency-40-48-rows-2", "latency-40-48-rows-4", "roofline-cold", "roofline-warm")
    assert names == {"profile.json", "report.html", *(f"{name}.png" for name in plots)}
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
    prof = search.Profile.load(out / "profile.json")
    assert prof.batch_sizes == (2, 4)
    assert main([*words, "--device", "cpu", "--out", str(out), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["dtype"] == "float32"
    assert "--ranks 8,16" in (out / "report.html").read_text()
    assert str(tmp_path) not in (out / "report.html").read_text()


def test_wrong_arguments_are_one_line(capsys):
    for words, message in (
        (["8,8", "--rows", "x"], "--rows: expected integers >= 1 like 1,64, got 'x'"),
        (["8,8", "--threads", "0"], "--threads: expected an integer from 1 to"),
        (["no-such-thing"], "target: expected N,K"),
        (["1,8"], "target: expected N, K >= 2"),
        *(
            []
            if torch.cuda.is_available()
            else [
                (
                    ["8,8", "--device", "cuda"],
                    "--device: expected a device that is here",
                )
            ]
        ),
    ):
        assert main(["profile", *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
