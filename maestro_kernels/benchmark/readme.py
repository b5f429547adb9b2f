"""The kernels' table in the README, and how a generated block gets into a document."""

from __future__ import annotations

from collections.abc import Sequence

from maestro_kernels.benchmark.cases import joined
from maestro_kernels.benchmark.rows import Row
from maestro_kernels.benchmark.summary import device_line, outcomes, verdict
from maestro_kernels.measure import report
from maestro_kernels.measure.wording import duration, times

__all__ = ["markdown_table", "replace_block"]


def markdown_table(rows: Sequence[Row], *, cache: str = "cold") -> str:
    """One line per case in one cache state, the machine named, the verdict below.

    Args:
        rows: rows of one run.
        cache: "cold" (weights come from further away than the private caches) or "warm".

    Raises:
        ValueError: nothing to publish: no such rows, rows of a dirty work tree, or rows in which
            a result of ours was wrong.
    """
    chosen = [row for row in rows if row.cache == cache and row.launch == "eager"]
    found = outcomes(chosen)
    if not found:
        raise ValueError(f"markdown_table: rows: expected {cache} rows of ours, got none")
    first = found[0].ours
    if first.versions.get("dirty"):
        raise ValueError(
            "markdown_table: rows: expected a clean work tree, got rows measured with "
            "uncommitted changes"
        )
    wrong = [r for r in chosen if r.family == "ours" and r.gate in ("failed", "error")]
    if wrong:
        raise ValueError(
            f"markdown_table: rows: expected every result of ours to be right, got "
            f"{wrong[0].provider}: {wrong[0].reason}"
        )
    headers = (
        *("layer", "M", "rank", "dtype", "dense", "two matmuls", "fastest other path"),
        *("ours, as is", "ours", "ours vs fastest other", "low rank vs dense"),
    )
    body = []
    for o in found:
        row = o.ours
        mode = "" if row.mode == "forward" else f", {row.mode}"
        name = o.best.provider.split(", ")[-1] if o.best else ""
        other = f"{duration(o.best.p50_us)} ({name})" if o.best else ""
        cells = (
            *(row.source, str(row.M), joined(row.rank), row.dtype + mode),
            duration(o.dense.p50_us if o.dense else None),
            duration(o.two.p50_us if o.two else None),
            *(other, duration(o.plain.p50_us), duration(row.p50_us)),
            *(times(o.ratio(o.best)), times(o.pays)),
        )
        body.append(cells)
    commit = str(first.versions.get("commit") or "unknown")[:10]
    lines = [
        *report.markdown_table(headers, body, numeric=(1, 2, *range(4, len(headers)))),
        "",
        f"{device_line(first)}, {cache} caches, medians of interleaved samples, commit {commit}, "
        f"{first.run[:10]}. “Fastest other path” is the fastest way to run the same factors that "
        f"is not ours; packed means oneDNN weights reordered before the clock starts. “Ours” is "
        f"after `mk.prepack` for inference on a CPU, “as is” a plain call. Repeat with "
        f"`{first.command}`.",
        "",
        *(f"- {sentence}" for sentence in verdict(chosen)),
    ]
    return "\n".join(lines)


def replace_block(text: str, block: str, begin: str, end: str) -> str:
    """Put a block between the two markers of a document.

    Raises:
        ValueError: the markers are not there exactly once, in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"replace_block: text: expected {begin!r} and then {end!r}, once each")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{block}\n{end}{rest.partition(end)[2]}"
