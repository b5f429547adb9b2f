"""What encoder_distillation.py found: rows, tables and drawings."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from published import origin

from maestro_kernels.measure import plots, records
from maestro_kernels.measure.plots import Point

BUDGETS = (0.8, 0.6, 0.55, 0.5, 0.4, 0.3, 0.2)
# Budgets whose models are kept for timing.
TIMED = (0.6, 0.5, 0.4, 0.3, 0.2)
BATCHES = ("batch 1", "batch 64")
# Weights of the encoder's linear layers.
DENSE = 10_616_832
MARKS = (
    "<!-- distillation:begin, written by examples/encoder_distillation.py -->",
    "<!-- distillation:end -->",
)


class Rows:
    """rows.jsonl: figures by what they are of; written after each addition."""

    def __init__(self, path: Path, stamp: Mapping[str, Any]) -> None:
        self.path, self.stamp = path, dict(stamp)
        self.all = records.load(path) if path.is_file() else []

    def has(self, **key: Any) -> bool:
        """Whether there is such a row."""
        return any(key.items() <= row.items() for row in self.all)

    def add(self, key: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
        """Put a row in the place of an earlier one."""
        self.all = [row for row in self.all if not key.items() <= row.items()]
        self.all.append({**key, **figures, **self.stamp})
        records.write(self.path, self.all)

    def figures(self, field: str, **key: Any) -> list[Any]:
        """One field of all rows that fit, by seed where they have one."""
        found = [row for row in self.all if key.items() <= row.items()]
        return [row[field] for row in sorted(found, key=lambda row: row.get("seed", 0))]


METHODS = {"LoD": "LoD", "SVD": "data-aware SVD", "SVD, one share": "SVD, one share for all layers"}
TIMES = {
    "LoD, factors, prepacked": "LoD, factors, prepacked",
    "LoD": "LoD, [I; U]",
    "SVD": "SVD, [I; U]",
}


def draw(rows: Rows, folder: Path) -> None:
    """Fidelity against weights, and against latency."""
    folder.mkdir(parents=True, exist_ok=True)
    by_size: dict[str, list[Point]] = {name: [] for name in METHODS.values()}
    by_time: dict[str, list[Point]] = {name: [] for name in TIMES.values()}
    for method, name in METHODS.items():
        for budget in sorted(BUDGETS):
            key = {"method": method, "budget": budget}
            cosines = rows.figures("cosine", **key)
            mean = statistics.fmean(cosines)
            share = 100 * statistics.fmean(rows.figures("weights", **key)) / DENSE
            by_size[name].append(Point(share, mean, min(cosines), max(cosines)))
    for model, name in TIMES.items():
        key = {"method": model.removesuffix(", prepacked"), "seed": 0}
        for budget in TIMED:
            for ms in rows.figures("ms", model=f"{model} {budget}", batch=BATCHES[-1]):
                cosine = rows.figures("cosine", **key, budget=budget)[0]
                by_time[name].append(Point(ms[1], cosine))
        by_time[name].sort(key=lambda point: point.x)
    labels = {
        "size": ("Fidelity against size", "weights of the linear layers, %", by_size),
        "latency": ("Fidelity against latency, batch 64", "milliseconds", by_time),
    }
    for file, (title, xlabel, series) in labels.items():
        drawing = plots.line_plot(
            {name: points for name, points in series.items() if points},
            title=title,
            xlabel=xlabel,
            ylabel="mean cosine, held-out text",
            log=False,
        )
        path = folder / f"distillation-{file}.svg"
        path.write_text(plots.standalone(drawing), encoding="utf-8")


def markdown(rows: Rows) -> str:
    """The tables of docs/guide/deployment.md."""
    lines = [
        "| budget | LoD: cosine | Spearman | SVD: cosine | Spearman | SVD, one share: cosine |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    higher, apart = [], []
    for budget in BUDGETS:
        cells = []
        found = {}
        for method in METHODS:
            for field in ("cosine", "spearman"):
                values = rows.figures(field, method=method, budget=budget)
                found[method, field] = values
                spread = f" ±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):.3f}{spread}")
        pairs = [(found["LoD", f], found["SVD", f]) for f in ("cosine", "spearman")]
        if all(statistics.fmean(ours) > statistics.fmean(theirs) for ours, theirs in pairs):
            higher.append(f"{budget:.0%}")
        if all(min(ours) > max(theirs) for ours, theirs in pairs):
            apart.append(f"{budget:.0%}")
        lines.append(f"| {budget:.0%} | {' | '.join(cells[:5])} |")
    lines += [
        "",
        f"LoD's means are above the SVD's in both measures at {', '.join(higher)}; every seed is "
        f"above every seed of the SVD at {', '.join(apart)}.",
    ]
    lines += ["", "| model of seed 0 | cosine | " + " | ".join(BATCHES) + " |", "|---|--:|--:|--:|"]
    timed = [row["model"] for row in rows.all if row.get("batch") == BATCHES[0]]
    for model in timed:
        method, _, budget = model.replace(", prepacked", "").rpartition(" ")
        key = {"method": method, "seed": 0, "budget": float(budget)} if method else {}
        cells = [f"{rows.figures('cosine', **key)[0]:.3f}" if key else "1"]
        for batch in BATCHES:
            low, ms, high = rows.figures("ms", model=model, batch=batch)[0]
            cells.append(f"{ms:.1f} ms ({low:.1f}-{high:.1f})")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    first = next(row for row in rows.all if row["kind"] == "latency")
    trained = next(row for row in rows.all if row["kind"] == "fidelity")
    lines += [
        "",
        f"Timed on {origin(first)}; median and 20th to 80th percentile of whole forward passes in "
        f"turns. Trained and cut on {origin(trained)}.",
    ]
    return "\n".join(lines)
