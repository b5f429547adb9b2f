"""The main job's part of the report page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.encoder_results import BATCHES, Form, table
from maestro_kernels.measure import plots, report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["sections"]


def sections(
    forms: Sequence[Form], answer: Sequence[str], notes: Sequence[str], counts: tuple[int, int]
) -> list[report.Html]:
    """Verdict, cosine over latency, fidelity over size, and the table; of whatever forms there are.

    Args:
        forms: measured.
        answer: the verdict.
        notes: what else a reader should know.
        counts: calibration and held-out sentences.
    """
    found = [report.verdict([*answer, *notes])]
    if not forms:
        return found
    timed = [f for f in forms if f.latency and f.run != "two matmuls"]
    drawings = [_over_latency(timed, batch) for batch in BATCHES] if timed else []
    drawings += [_over_size(forms)] if any(f.ranks != "dense" for f in forms) else []
    headers, body = table(forms)
    found.append(
        report.section(
            "How close and how fast",
            report.grid(*(report.figure(drawing) for drawing in drawings)),
            report.table(headers, body, numeric=range(3, len(headers))),
            lead=(
                f"all-MiniLM-L6-v2, {counts[1]} held-out sentences of Python's documentation; "
                f"{counts[0]} others calibrate. No fine-tuning. Interleaved runs of whole forward "
                "passes, medians; ratios above 1 mean faster. Searched ranks are chosen by the "
                "measured loss of the embeddings, uniform ones keep one share of every layer."
            ),
        )
    )
    return found


def _series(forms: Sequence[Form]) -> dict[str, list[Form]]:
    groups: dict[str, list[Form]] = {}
    for f in forms:
        groups.setdefault(f"{f.ranks} {f.dtype}", []).append(f)
    # The first is drawn in the accent colour.
    return dict(sorted(groups.items(), key=lambda item: not item[0].startswith("searched")))


def _over_latency(timed: Sequence[Form], batch: str) -> Figure:
    series = {
        name: [plots.Point(f.ms(batch), f.cosine) for f in sorted(group, key=lambda f: f.ms(batch))]
        for name, group in _series(timed).items()
    }
    return plots.line_plot(
        series,
        title=f"Cosine over latency, {batch}",
        xlabel="milliseconds",
        ylabel="mean cosine, held-out",
        log=False,
    )


def _over_size(forms: Sequence[Form]) -> Figure:
    kept = [f for f in forms if f.ranks != "dense" and f.dtype == "float32" and f.ours]
    series: dict[str, list[plots.Point]] = {}
    for f in sorted(kept, key=lambda f: (f.ranks != "searched", f.init, f.budget)):
        point = plots.Point(100 * f.weights / f.dense_weights, f.cosine)
        series.setdefault(f"{f.ranks}, {f.init} init", []).append(point)
    return plots.line_plot(
        series,
        title="Cosine over size",
        xlabel="weights kept, %",
        ylabel="mean cosine, held-out",
        log=False,
    )
