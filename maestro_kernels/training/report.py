"""The page of a training run: ranks, losses and sizes, all from the rows of its metrics file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maestro_kernels.benchmark import html, plots
from maestro_kernels.benchmark.html import Cell, Html
from maestro_kernels.benchmark.plots import Point
from maestro_kernels.files import write_text
from maestro_kernels.training.metrics import load_rows

__all__ = ["html_report", "verdict", "write_report"]

# As many as the page has colours.
_LINES = 8
# Characters of a name that fit.
_LEGEND = 24
# More points than pixels say nothing.
_POINTS = 240


def write_report(folder: str | Path, *, stopped: str = "") -> Path:
    """Write report.html beside a run's metrics.jsonl.

    Args:
        folder: of the run.
        stopped: why the run ended early, shown on top.

    Raises:
        FileNotFoundError: no metrics there.
        ValueError: the file holds no run.
    """
    folder = Path(folder)
    page = folder / "report.html"
    text = html_report(load_rows(folder / "metrics.jsonl"), stopped=stopped)
    write_text(page, text)
    return page


def html_report(rows: Sequence[dict[str, Any]], *, stopped: str = "") -> str:
    """The page of one run.

    Args:
        rows: as `load_rows` returns them.
        stopped: why the run ended early, shown on top.

    Raises:
        ValueError: no "start" row first.
    """
    if not rows or rows[0]["event"] != "start":
        raise ValueError("html_report: rows: expected a 'start' row first, got none")
    start = rows[0]
    epochs = [row for row in rows if row["event"] == "epoch"]
    steps = [row for row in rows if row["event"] == "step"]
    config, versions = start["config"], start["versions"]
    commit = str(versions.get("commit") or "no commit")[:10]
    blocks: list[Html | None] = [html.warning(f"Stopped early: {stopped}") if stopped else None]
    if epochs:
        blocks += [html.verdict(verdict(rows)), _cards(epochs)]
        blocks += [_rank_section(start, epochs), _size_section(epochs)]
    else:
        blocks.append(html.verdict(["No epoch was finished."]))
    blocks += [_loss_section(steps, epochs), _layer_section(start, epochs), _method(start)]
    return html.page(
        f"LoD training: {config['task']}",
        [block for block in blocks if block],
        subtitle=f"{start['samples']:,} samples · {start['device']} · torch {versions['torch']} · "
        f"commit {commit}",
        footer="Written by maestro-kernels train; every figure comes from metrics.jsonl.",
    )


def verdict(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the run came to, in plain words."""
    start = rows[0]
    epochs = [row for row in rows if row["event"] == "epoch"]
    if not epochs:
        return ["No epoch was finished."]
    last, planned = epochs[-1], start["config"]["train"]["epochs"]
    share = last["weights"] / last["dense_weights"]
    figures = ", ".join(f"{name} {_figure(value)}" for name, value in last["metrics"].items())
    lines = [
        f"After {last['epoch']} of {planned} epochs {share:.0%} of the dense weights are left"
        + (f", with test {figures}." if figures else ".")
    ]
    shrunk = [
        (name, rank) for name, rank in last["ranks"].items() if rank < start["layers"][name]["rank"]
    ]
    if not shrunk:
        lines.append(
            "No layer lost rank: the penalty is too weak for the threshold, or switched off."
        )
        return lines
    name, rank = min(shrunk, key=lambda pair: pair[1] / start["layers"][pair[0]]["rank"])
    lines.append(
        f"{len(shrunk)} of {len(last['ranks'])} factorised layers lost rank; most of all {name!r}, "
        f"from {start['layers'][name]['rank']} to {rank}."
    )
    beyond = [
        name for name, rank in last["ranks"].items() if rank >= _break_even(start["layers"][name])
    ]
    if beyond:
        lines.append(
            f"{_names(beyond)} {'is' if len(beyond) == 1 else 'are'} at or past break-even, where "
            "the dense form is not larger; sizes here count the smaller form."
        )
    return lines


def _cards(epochs: Sequence[dict[str, Any]]) -> Html:
    last = epochs[-1]
    entries = [
        (_figure(value), f"test {name}, last epoch") for name, value in last["metrics"].items()
    ]
    entries += [
        (f"{last['weights']:,}", f"weights deployed, of {last['dense_weights']:,} dense"),
        (f"{last['parameters']:,}", "parameters stored by the model at the end"),
        (f"{last['seconds']:.0f} s", f"training time, {last['step']:,} steps"),
    ]
    return html.cards(entries)


def _rank_section(start: dict[str, Any], epochs: Sequence[dict[str, Any]]) -> Html:
    names = list(epochs[-1]["ranks"])
    shown = _short(names)
    parts = [names[i : i + _LINES] for i in range(0, len(names), _LINES)]
    figures = []
    for k, part in enumerate(parts, start=1):
        series = {
            shown[name]: [
                Point(0, start["layers"][name]["rank"]),
                *_thinned([Point(row["epoch"], row["ranks"][name]) for row in epochs]),
            ]
            for name in part
        }
        title = "Rank of each layer" + (f" ({k} of {len(parts)})" if len(parts) > 1 else "")
        figures.append(_curve(series, title, "epoch", "rank"))
    return html.section(
        "How the ranks moved",
        html.grid(*figures),
        lead="Rank after each epoch. Dropped components are gone from parameters and optimizer.",
    )


def _size_section(epochs: Sequence[dict[str, Any]]) -> Html:
    weights = [Point(row["epoch"], 100 * row["weights"] / row["dense_weights"]) for row in epochs]
    figures = [_curve({"weights": _thinned(weights)}, "Weights left", "epoch", "% of dense")]
    for name in epochs[-1]["metrics"]:
        values = [(row["epoch"], row["metrics"][name]) for row in epochs]
        points = [Point(x, y) for x, y in values if y is not None]
        if points:
            figures.append(_curve({name: _thinned(points)}, f"Test {name}", "epoch", name))
    return html.section("Size and quality", html.grid(*figures))


def _loss_section(steps: Sequence[dict[str, Any]], epochs: Sequence[dict[str, Any]]) -> Html | None:
    figures = []
    if len(steps) > 1:
        task = {"task loss": _thinned([Point(row["step"], row["loss"]) for row in steps])}
        figures.append(_curve(task, "Loss of sampled steps", "step", "loss"))
        points = [Point(r["step"], r["penalty"]) for r in steps if r["penalty"] is not None]
        if points:
            series = {"λ · penalty": _thinned(points)}
            figures.append(_curve(series, "Penalty", "step", "λ · penalty"))
    if epochs:
        mean = {"mean loss": _thinned([Point(r["epoch"], r["train_loss"]) for r in epochs])}
        figures.append(_curve(mean, "Mean loss per epoch", "epoch", "loss"))
    if not figures:
        return None
    return html.section(
        "Losses",
        html.grid(*figures),
        lead="The training loss is taken at sampled ranks, so it is noisier than, and not "
        "comparable with, the loss of the whole model.",
    )


def _layer_section(start: dict[str, Any], epochs: Sequence[dict[str, Any]]) -> Html:
    lines: list[list[str | Cell]] = []
    last = epochs[-1]["ranks"] if epochs else {}
    for name, layer in start["layers"].items():
        dense = layer["N"] * layer["K"]
        if layer["rank"] is None:
            cells: list[str | Cell] = ["dense", "dense", "", "100 %"]
        else:
            rank = last.get(name, layer["rank"])
            share = min(1.0, rank / _break_even(layer))
            tone = "good" if share < 1 else "muted"
            cells = [str(layer["rank"]), str(rank), f"{_break_even(layer):.1f}"]
            cells.append(Cell(f"{share:.0%}".replace("%", " %"), tone))
        lines.append([name, f"{layer['N']} × {layer['K']}", f"{dense:,}", *cells])
    headers = ("layer", "N × K", "dense weights", "rank at start", "rank", "break-even", "left")
    return html.section(
        "Every layer",
        html.table(headers, lines, numeric=range(2, 7)),
        lead="Below the break-even rank N K / (N + K) two factors are smaller than one matrix.",
    )


def _method(start: dict[str, Any]) -> Html:
    config = start["config"]
    facts = [("task", config["task"])]
    for section in ("options", "convert", "train", "maestro"):
        facts += [(f"{section}.{key}", str(value)) for key, value in config[section].items()]
    facts += [(name, str(value)) for name, value in start["versions"].items() if value is not None]
    facts.append(("threads", str(start["threads"])))
    return html.section(
        "Configuration",
        html.details(
            "Every setting and version",
            html.table(("what", "value"), [(k, Cell(v, "wide")) for k, v in facts]),
        ),
    )


def _curve(series: dict[str, list[Point]], title: str, xlabel: str, ylabel: str) -> Html:
    drawing = plots.line_plot(
        series, title=title, xlabel=xlabel, ylabel=ylabel, log=False, markers=False
    )
    return html.figure(drawing)


def _thinned(points: list[Point]) -> list[Point]:
    """At most about _POINTS of them, the last one always."""
    every = -(-len(points) // _POINTS)
    kept = points[::every] if points else []
    return kept if not points or kept[-1] is points[-1] else [*kept, points[-1]]


def _break_even(layer: dict[str, Any]) -> float:
    return float(layer["N"] * layer["K"] / (layer["N"] + layer["K"]))


def _short(names: Sequence[str]) -> dict[str, str]:
    """Names for a legend of two columns: enc.lay.0.att.self.query, whole where they are short."""
    short = {}
    for name in names:
        *parents, last = name.split(".")
        fits = len(name) <= _LEGEND
        short[name] = name if fits else ".".join([*(part[:3] for part in parents), last])
    return short if len(set(short.values())) == len(names) else {name: name for name in names}


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
