"""Tables, sentences and drawings of the digits example, made from its rows."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from published import origin

from maestro_kernels.measure import plots
from maestro_kernels.measure.plots import Point

Row = dict[str, Any]

SVD = "dense, then SVD"
NAMES = {"mlp": "MLP 64-128-128-10", "cnn": "CNN with BatchNorm"}
CHANCE = 0.1


def by_seed(rows: Sequence[Row], model: str, method: str, cut: str, at: float) -> dict[int, Row]:
    """Rows of one cell of the table, by seed."""
    wanted = (model, method, cut, at)
    return {
        r["seed"]: r for r in rows if (r["model"], r["method"], r["cut"], r.get("at")) == wanted
    }


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, in percent."""
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def methods(rows: Sequence[Row]) -> list[str]:
    """Methods in the order in which they were run."""
    return list(dict.fromkeys(r["method"] for r in rows if r["cut"] == "whole"))


def sizes(rows: Sequence[Row], cut: str) -> list[float]:
    """Budgets or widths, the largest first."""
    return sorted({r["at"] for r in rows if r["cut"] == cut}, reverse=True)


def table(rows: Sequence[Row], model: str, cut: str) -> list[str]:
    """Accuracy of every method at every size, as Markdown."""
    points = sizes(rows, cut)
    first = "weights at most" if cut == "greedy" else "share of each rank"
    heads = ["whole model", "its weights", *(f"{at:.4g}" for at in points)]
    lines = [f"| {first} | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
    for method in methods(rows):
        whole = list(by_seed(rows, model, method, "whole", 1.0).values())
        if not whole:
            continue
        share = statistics.fmean(r["weights"] / r["dense_weights"] for r in whole)
        cells = [spread([r["accuracy"] for r in whole]), f"{share:.2f}"]
        for at in points:
            found = by_seed(rows, model, method, cut, at).values()
            cells.append(spread([r["accuracy"] for r in found]) if found else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def comparison(rows: Sequence[Row], model: str, method: str) -> str:
    """Where a method is ahead of SVD on every seed, behind on every seed, or neither."""
    found: dict[str, list[str]] = defaultdict(list)
    for at in sizes(rows, "greedy"):
        ours = by_seed(rows, model, method, "greedy", at)
        theirs = by_seed(rows, model, SVD, "greedy", at)
        gaps = [ours[s]["accuracy"] - theirs[s]["accuracy"] for s in ours.keys() & theirs.keys()]
        if gaps:
            kind = "ahead" if min(gaps) > 0 else "behind" if max(gaps) < 0 else "mixed"
            found[kind].append(f"{at:g} ({100 * statistics.fmean(gaps):+.1f})")
    said = {
        "ahead": "ahead on every seed at",
        "behind": "behind on every seed at",
        "mixed": "neither at",
    }
    parts = [f"{words} {', '.join(found[kind])}" for kind, words in said.items() if found[kind]]
    return f"- {method}: {'; '.join(parts)}."


def trap(rows: Sequence[Row]) -> str:
    """What a learning rate of 0.1 did, in a sentence."""
    parts = []
    for method in ("dense", "factors, no LoD", "LoD"):
        found = [r for r in rows if r["cut"] == "lr 0.1" and r["method"] == method]
        right = [r["accuracy"] for r in found if r["finite"] and r["accuracy"] > 2 * CHANCE]
        lost = len(found) - len(right)
        kept = f", the others reach {spread(right)} %" if right and lost else ""
        kept = f", {spread(right)} %" if right and not lost else kept
        parts.append(f"{method}: {lost} of {len(found)} runs end in NaN or near chance{kept}")
    return f"At learning rate 0.1 with momentum 0.9 (MLP): {'; '.join(parts)}."


def markdown(rows: Sequence[Row]) -> str:
    """What docs/guide/examples.md shows of the rows."""
    lines = []
    for model, name in NAMES.items():
        here = [r for r in rows if r["model"] == model]
        if not here:
            continue
        seeds, dense = len({r["seed"] for r in here}), by_seed(here, model, SVD, "whole", 1.0)
        whole = spread([r["dense_accuracy"] for r in dense.values()])
        size = next(iter(dense.values()))["dense_weights"]
        lines += [
            f"### {name}",
            "",
            f"Dense: {whole} % with {size:,} weights; {seeds} seeds, {here[0]['epochs']} epochs, "
            f"lasso with λ {max(r.get('lam', 0) for r in here):g}. Accuracy in percent (mean ± "
            "standard deviation) after the greedy descent to a share of the dense weights:",
            "",
            *table(here, model, "greedy"),
            "",
            f"![Accuracy against size, {name}](figures/digits-{model}.svg)",
            "",
            "Against dense, then SVD, in points of accuracy:",
            "",
            *(comparison(here, model, method) for method in methods(here) if method != SVD),
            "",
            "The same share of every rank, classifier whole:",
            "",
            *table(here, model, "width"),
            "",
        ]
    if any(r["cut"] == "lr 0.1" for r in rows):
        lines += [trap(rows), ""]
    lines += [f"Trained on {one}." for one in dict.fromkeys(map(origin, rows))]
    return "\n".join(lines).rstrip()


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Accuracy against size, one drawing per model, the band from the worst to the best seed."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for model in sorted({r["model"] for r in rows}):
        series = {}
        # The first is drawn in the accent colour.
        for method in sorted(methods(rows), key=lambda m: m != "LoD and lasso"):
            points = []
            for at in reversed(sizes(rows, "greedy")):
                found = [r["accuracy"] for r in by_seed(rows, model, method, "greedy", at).values()]
                if found:
                    low, mean, high = min(found), statistics.fmean(found), max(found)
                    points.append(Point(100 * at, 100 * mean, 100 * low, 100 * high))
            series[method] = points
        drawing = plots.line_plot(
            series,
            title=f"Digits, {model.upper()}: accuracy against size",
            xlabel="% of the dense weights",
            ylabel="test accuracy, %",
            log=False,
            height=4.4,
        )
        paths.append(folder / f"digits-{model}.svg")
        paths[-1].write_text(plots.standalone(drawing), encoding="utf-8")
    return paths
