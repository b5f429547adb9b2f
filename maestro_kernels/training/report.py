"""The page of a training run: ranks, losses and sizes, all from the rows of its metrics file."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from maestro_kernels.measure import plots
from maestro_kernels.measure import report as html

__all__ = ["html_report", "verdict"]

Rows = Sequence[Mapping[str, Any]]
# Lines of a drawing, for which there are colours, and points of a line.
_LINES, _POINTS = 8, 240
_DRAWN = {"loss": "Loss at sampled ranks", "penalty": "λ · penalty", "weights": "Weights deployed"}


def verdict(rows: Rows) -> list[str]:
    """What the run came to, in plain words."""
    epochs = [row for row in rows if row["event"] == "epoch"]
    if not epochs:
        return ["No epoch was finished."]
    last, layers, planned = epochs[-1], rows[0]["layers"], rows[0]["config"]["train"]["epochs"]
    share = f"{last['weights'] / last['dense_weights']:.0%} of the dense weights are left"
    figures = ", ".join(f"{k} {_figure(value)}" for k, value in last["metrics"].items())
    tested = f", with test {figures}" if figures else ""
    lines = [f"After {last['epoch']} of {planned} epochs {share}{tested}."]
    kept = {name: rank / layers[name]["rank"] for name, rank in last["ranks"].items()}
    least, lost = min(kept, key=kept.__getitem__), sum(part < 1 for part in kept.values())
    if not lost:
        return [*lines, "No layer lost rank: the penalty is too weak for the threshold, or off."]
    most = f"{least!r}, from {layers[least]['rank']} to {last['ranks'][least]}"
    return [*lines, f"{lost} of {len(kept)} factorised layers lost rank; most of all {most}."]


def html_report(rows: Rows, stopped: str = "") -> str:
    """The page of one run; `stopped` is why it ended early."""
    start = rows[0]
    facts = {**start["config"], "device": start["device"], "versions": start["versions"]}
    table = [(key, html.Cell(json.dumps(value), "wide")) for key, value in facts.items()]
    blocks = [
        *([html.warning(f"Stopped early: {stopped}")] if stopped else []),
        html.verdict(verdict(rows)),
        html.section("How it went", html.grid(*_drawings(rows))),
        html.section("Configuration", html.details("and versions", html.table(("", ""), table))),
    ]
    footer = "Written by maestro-kernels train; every figure comes from metrics.jsonl."
    return html.page(f"LoD training: {start['config']['task']}", blocks, footer=footer)


def _drawings(rows: Rows) -> list[html.Html]:
    drawn: dict[str, Any] = defaultdict(lambda: defaultdict(list))
    for row in rows[1:]:
        figures = {title: row.get(key) for key, title in _DRAWN.items()}
        figures |= {f"Test {name}": value for name, value in row.get("metrics", {}).items()}
        for title, value in figures.items():
            if value is not None:
                drawn[title][title].append(plots.Point(row["step"], value))
        for i, (name, rank) in enumerate(row.get("ranks", {}).items()):
            title = f"Rank of layers {i // _LINES * _LINES + 1} and on"
            drawn[title][_short(name)].append(plots.Point(row["step"], rank))
    options: dict[str, Any] = {"xlabel": "step", "ylabel": "", "log": False, "markers": False}
    return [
        # Backwards, so that the last point is always there.
        html.figure(
            plots.line_plot(
                {name: line[:: -1 - len(line) // _POINTS] for name, line in lines.items()},
                title=title,
                **options,
            )
        )
        for title, lines in drawn.items()
    ]


def _short(name: str) -> str:
    """What fits a legend of two columns: enc.lay.0.att.self.query."""
    *parents, last = name.split(".")
    return name if len(name) <= 24 else ".".join([*(part[:3] for part in parents), last])


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
