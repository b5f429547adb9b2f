"""Rows as people read them: a terminal table and one self-contained HTML page.

Nothing is measured here, and nothing is shown that does not come out of a row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from maestro_kernels.benchmark.rows import Change, Comparison, Row
from maestro_kernels.benchmark.summary import Outcome, device_line, outcomes, refusals, verdict
from maestro_kernels.measure import plots, report
from maestro_kernels.measure.cases import joined
from maestro_kernels.measure.report import Cell, Html
from maestro_kernels.measure.wording import DASH, duration, geometric_mean, times, when

if TYPE_CHECKING:
    from rich.table import Table

_TONES = {"faster": "good", "slower": "bad", "same": "", None: "muted"}
# Lines of one ratio plot; more become several drawings, or labels would be too small.
_LINES = 16
# Drawn first and in this order; others follow.
_ORDER = (
    "ours, prepacked",
    "ours",
    "two matmuls",
    "two matmuls, oneDNN packed",
    "dense",
    "dense, oneDNN packed",
)


def terminal_table(rows: Sequence[Row]) -> Table:
    """One line per measurement: times of the best of each kind, and the ratios that count."""
    found = outcomes(rows)
    packed = any(o.ours is not o.plain for o in found)
    headers = (
        *("layer", "rows · in→rank→out", "kind", "dense", "two matmuls", "fastest other"),
        *["as is"] * packed,
        *("ours", "vs fastest", "vs dense"),
    )
    lines: list[list[str | Cell]] = [
        [
            *(o.ours.source, o.ours.shape, _kind(o.ours)),
            *(_time(o.dense), _time(o.two), _other(o), *[_time(o.plain)] * packed, _time(o.ours)),
            Cell(times(o.ratio(o.best)), _TONES[o.against(o.best)]),
            times(o.ratio(o.dense)),
        ]
        for o in found
    ]
    numeric = {i for i, name in enumerate(headers) if i > 2 and name != "fastest other"}
    return report.terminal_table("median time per call", headers, lines, numeric=numeric)


def comparison_table(comparison: Comparison) -> Table | str:
    """What changed since an earlier run, for the terminal."""
    title = "since the earlier run (ratios have the drift of their case taken out)"
    lines = _changes(comparison)
    if not lines:
        return f"{title}: nothing changed beyond noise in {len(comparison.changes)} measurements"
    return report.terminal_table(title, _CHANGE_HEADERS, lines, numeric=(4, 5, 6))


def html_report(
    rows: Sequence[Row],
    *,
    title: str = "Low-rank linear layers, measured",
    comparison: Comparison | None = None,
) -> str:
    """The page of one run.

    Args:
        rows: rows of one run.
        title: heading of the page.
        comparison: against an earlier run, if there is one.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("html_report: rows: expected at least one row, got none")
    first = rows[0]
    commit = str(first.versions.get("commit") or "no commit")[:10]
    subtitle = f"{device_line(first)} · {when(first.run)} · commit {commit}"
    answer, *rest = sections(rows)
    blocks = [] if comparison is None else [comparison_section(comparison)]
    return report.page(
        title,
        [answer, *blocks, *rest],
        subtitle=subtitle,
        footer=f"Written by {first.command or 'maestro_kernels.benchmark'}; every figure comes "
        f"from its rows.",
    )


def sections(rows: Sequence[Row]) -> list[Html]:
    """Everything about a run, to be put on a page of its own or below other findings."""
    found = outcomes(rows)
    blocks: list[Html | None] = [report.verdict(verdict(rows)), _cards(found)]
    if rows[0].versions.get("dirty"):
        blocks.append(
            report.warning(
                "The work tree held uncommitted changes when this was measured: good for "
                "working, not for publishing."
            )
        )
    if found:
        blocks += [_ratio_section(found), _latency_section(rows), _table_section(found)]
        blocks.append(_roofline_section(rows))
    return [block for block in (*blocks, _all_rows(rows), _refused(rows), _method(rows)) if block]


def comparison_section(comparison: Comparison) -> Html:
    """What got slower or faster since an earlier run."""
    worse = len(comparison.regressions)
    lead = (
        f"{len(comparison.changes)} measurements are in both runs; of ours {worse} got slower or "
        f"lost. What is not ours moved by {times(comparison.drift)} in the median; ratios have the "
        f"drift of their own case taken out. {comparison.unmatched} rows have no counterpart."
    )
    lines = _changes(comparison)
    block = (
        report.table(_CHANGE_HEADERS, lines, numeric=(4, 5, 6))
        if lines
        else report.prose("Nothing changed beyond noise.")
    )
    return report.section("Since the earlier run", block, lead=lead)


_CHANGE_HEADERS = (
    "layer",
    "rows · in→rank→out",
    "kind",
    "provider",
    "before",
    "now",
    "time ratio",
)


def _changes(comparison: Comparison) -> list[list[str | Cell]]:
    """A line per measurement that changed beyond noise."""
    return [_change(c) for c in comparison.changes if c.verdict != "same"]


def _change(change: Change) -> list[str | Cell]:
    tone = "good" if change.verdict == "faster" else "bad"
    text = "lost" if change.verdict == "lost" else times(change.ratio)
    where = (*_where(change.new), change.new.provider)
    return [*where, _time(change.old), _time(change.new), Cell(text, tone)]


def _cards(found: Sequence[Outcome]) -> Html:
    best = geometric_mean([r for o in found if (r := o.ratio(o.best)) is not None])
    two = geometric_mean([r for o in found if (r := o.ratio(o.two)) is not None])
    dense = geometric_mean([r for o in found if (r := o.ratio(o.dense)) is not None])
    return report.cards(
        (
            (str(len(found)), "measurements of ours that passed the accuracy gate"),
            (times(two), "speed-up over two plain matmuls, geometric mean"),
            (times(best), "over the fastest other path for the same factors"),
            (times(dense), "over the fastest dense layer"),
        )
    )


def _ratio_section(found: Sequence[Outcome]) -> Html:
    cases: defaultdict[str, dict[str, Outcome]] = defaultdict(dict)
    for o in found:
        if o.ours.launch == "eager":
            cases[_label(o.ours)][o.ours.cache] = o

    def drawings(title: str, ratio: Any) -> list[Html]:
        lines = [
            plots.Ratio(label, *(ratio(by[c]) if c in by else None for c in ("warm", "cold")))
            for label, by in cases.items()
        ]
        parts = [lines[i : i + _LINES] for i in range(0, len(lines), _LINES)]
        return [
            report.figure(
                plots.ratio_plot(
                    part,
                    title=title if len(parts) == 1 else f"{title} ({k} of {len(parts)})",
                    xlabel="← slower · faster →",
                )
            )
            for k, part in enumerate(parts, start=1)
        ]

    best = drawings("Ours against the fastest other path", lambda o: o.ratio(o.best))
    dense = drawings("Ours against the fastest dense layer", lambda o: o.ratio(o.dense))
    pairs = [figure for pair in zip(best, dense, strict=True) for figure in pair]
    return report.section(
        "Where it pays",
        report.grid(*pairs),
        lead="Right of the line ours is faster. The other path is whichever way to run the same "
        "factors was fastest in that case; packed weights are packed before the clock starts.",
    )


def _latency_section(rows: Sequence[Row]) -> Html | None:
    families: defaultdict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row.p50_us and row.launch == "eager" and row.cache == _main_cache(rows):
            families[row.source, row.N, row.K, row.R, row.rank, row.dtype, row.mode].append(row)
    figures = []
    for key, group in families.items():
        if len({row.M for row in group}) < 3:
            continue
        source, _, _, _, rank, dtype, mode = key
        names = sorted({row.provider for row in group}, key=_rank_of_provider)
        series = {
            name: [
                plots.Point(row.M, row.times[1], row.times[0], row.times[2])
                for row in sorted(group, key=lambda r: r.M)
                if row.provider == name and row.times
            ]
            for name in names[:6]
        }
        title = f"{source}, rank {joined(rank)}, {dtype}, {mode}"
        drawing = plots.line_plot(series, title=title, xlabel="rows of x (M)", ylabel="µs per call")
        figures.append(report.figure(drawing))
    if not figures:
        return None
    return report.section(
        "Time over batch size",
        report.grid(*figures),
        lead=f"Median per call, {_main_cache(rows)} caches; the upright bars run from the 20th "
        f"to the 80th percentile. Both axes are logarithmic.",
    )


def _table_section(found: Sequence[Outcome]) -> Html:
    headers = (
        *("layer", "rows · in→rank→out", "kind", "ours", "vs two", "vs fastest", "vs dense"),
        *("unpacked", "two matmuls", "fastest other", "dense", "roofline"),
    )
    lines = [
        [
            *_where(o.ours),
            _time(o.ours),
            *(Cell(times(o.ratio(r)), _TONES[o.against(r)]) for r in (o.two, o.best, o.dense)),
            *(_time(o.plain), _time(o.two), _other(o), _time(o.dense)),
            _percent(o.ours.roofline),
        ]
        for o in found
    ]
    return report.section(
        "Every measurement of ours",
        report.table(headers, lines, numeric=range(3, 12)),
        lead="Medians. Ours is after prepack for inference on a CPU; unpacked is a plain call on "
        "the factors as they are. A coloured ratio is a difference beyond noise: more than 5 %, "
        "more than both spreads, and intervals that do not meet. Roofline is the share of the "
        "ideal time for one pass over all operands.",
    )


def _roofline_section(rows: Sequence[Row]) -> Html | None:
    figures = []
    device = rows[0].device
    cache = _main_cache(rows)
    for dtype in dict.fromkeys(row.dtype for row in rows):
        peak = (device.get("peak_flops") or {}).get(dtype)
        series: defaultdict[str, list[plots.Point]] = defaultdict(list)
        chosen = ("ours, prepacked", "ours", "two matmuls", "two matmuls, oneDNN packed", "dense")
        for name in chosen:
            for row in rows:
                here = row.provider == name and row.dtype == dtype and row.cache == cache
                if here and row.tflops and row.gbs:
                    series[name].append(plots.Point(1e3 * row.tflops / row.gbs, row.tflops))
        if peak and device.get("bandwidth") and series:
            drawing = plots.roofline_plot(
                series,
                title=f"Roofline, {dtype}, {cache} caches",
                peak=peak,
                bandwidth=device["bandwidth"],
                cache_bandwidth=device.get("cache_bandwidth"),
            )
            figures.append(report.figure(drawing))
    if not figures:
        return None
    source = "measured by short probes" if device.get("source") == "measured" else "assumed"
    return report.section(
        "Against the roofline",
        report.grid(*figures),
        lead=f"One point per case. The ceilings are {source}: the best library matmul, and "
        f"reading from memory and from cache. Low rank sits left of dense because it does fewer "
        f"operations per byte.",
    )


def _all_rows(rows: Sequence[Row]) -> Html:
    headers = (
        *("layer", "rows · in→rank→out", "kind", "provider", "p20", "median", "p80", "samples"),
        *("TFLOP/s", "GB/s", "roofline", "plan or reason"),
    )
    lines = []
    for row in rows:
        figures: list[str | Cell]
        if row.times is None:
            figures = [Cell(row.gate, "muted" if row.gate == "unavailable" else "bad")]
            figures = [DASH, *figures, DASH, DASH, DASH, DASH, DASH]
        else:
            figures = [*map(duration, row.times), f"{row.samples} · {row.calls}"]
            figures += [f"{row.tflops:.3f}", f"{row.gbs:.1f}", _percent(row.roofline)]
        note = Cell(row.reason or row.config, "wide" if row.reason else "")
        lines.append([*_where(row), row.provider, *figures, note])
    folded = report.details(
        f"Show all {len(rows)} rows", report.table(headers, lines, numeric=range(4, 11))
    )
    return report.section(
        "All providers",
        folded,
        lead="Samples are written as samples · calls per sample. TFLOP/s and GB/s count the "
        "operations and bytes of the function, each operand once.",
    )


def _refused(rows: Sequence[Row]) -> Html | None:
    lines: list[list[str | Cell]] = [
        [
            name,
            Cell(gate, "muted" if gate == "unavailable" else "bad"),
            str(count),
            Cell(reason, "wide"),
        ]
        for name, gate, reason, count in refusals(rows)
    ]
    if not lines:
        return None
    return report.section(
        "What has no time, and why",
        report.table(("provider", "gate", "rows", "reason"), lines, numeric=(2,)),
        lead="A provider that cannot run a case or fails the accuracy gate gets a row without a "
        "time, and counts for no comparison.",
    )


def _method(rows: Sequence[Row]) -> Html:
    first = rows[0]
    ring = max(row.ring_bytes for row in rows)
    largest = max(first.device.get("l2_bytes") or 0, first.device.get("l3_bytes") or 0)
    text = (
        "Before it is timed, every provider must come as close to a float64 result as two library "
        "matmuls in the same dtype do, within a factor of two, on the very tensors that are timed. "
        "Candidates then take turns, in an order that is rotated and reversed, so that a busy "
        "moment hits all of them. Warm rows repeat one set of tensors; cold rows walk through "
        "copies of weights and inputs"
    )
    text += f" of up to {ring / 2**20:.0f} MiB" if ring else ""
    text += f" (the largest cache here has {largest / 2**20:.0f} MiB)." if largest else "."
    facts = {
        "command": first.command,
        "device": device_line(first),
        "started": when(first.run),
        **first.versions,
        **{f"device {k}": v for k, v in first.device.items() if v and k not in ("name", "kind")},
    }
    return report.section(
        "How this was measured",
        report.prose(text),
        report.facts("Machine and versions", facts),
    )


def _main_cache(rows: Sequence[Row]) -> str:
    return "cold" if any(row.cache == "cold" for row in rows) else "warm"


def _rank_of_provider(name: str) -> tuple[int, str]:
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)


def _label(row: Row) -> str:
    short = {"float32": "", "bfloat16": " bf16", "float16": " fp16"}.get(row.dtype, row.dtype)
    train = " train" if row.mode == "training" else ""
    return f"{row.source}  M {row.M}  r {joined(row.rank)}{short}{train}"


def _where(row: Row) -> list[str | Cell]:
    # A group's shape is long, and has no space where a browser would fold it.
    return [row.source, Cell(row.shape.replace("→", "→\u200b"), "fold"), Cell(_kind(row), "fold")]


def _kind(row: Row) -> str:
    launch = "" if row.launch == "eager" else f" {row.launch}"
    train = "" if row.mode == "forward" else f" {row.mode}"
    return f"{row.dtype} {row.cache}{launch}{train}"


def _time(row: Row | None) -> str:
    return duration(row.p50_us if row else None)


def _other(outcome: Outcome) -> str:
    if outcome.best is None:
        return DASH
    name = outcome.best.provider.split()[-1].removesuffix("matmuls") or "plain"
    return f"{_time(outcome.best)} ({name})"


def _percent(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:.0f} %"
