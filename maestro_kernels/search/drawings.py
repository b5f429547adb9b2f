"""Drawings of a profile and of an allocation, for the page and as files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from maestro_kernels.benchmark import plots
from maestro_kernels.benchmark.plots import PAGE, Palette
from maestro_kernels.measure.cost import Form, Size, count
from maestro_kernels.search import staircase
from maestro_kernels.search.strategies import AUTO, DENSE, DENSE_PACKED, PREPACKED, TWO

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from maestro_kernels.hardware import Device
    from maestro_kernels.search.allocation import Allocation
    from maestro_kernels.search.latencies import Profile

__all__ = ["Front", "latency", "pareto", "rank_chart", "roofline"]

# The order of colours and of the legend; what is drawn last lies on top.
_ORDER = (AUTO, PREPACKED, TWO, "native: fused", "triton: two_phase", "triton: row")
_MARKERS = "os^DvPXh"
# A latency below this is easier read in microseconds.
_MILLISECONDS = 1.0


def shown(profile: Profile) -> list[str]:
    """The low-rank strategies of a drawing; the forms behind "prepacked" stay in the table."""
    names = [n for n in profile.strategies if n not in (DENSE, DENSE_PACKED)]
    names = [n for n in names if not n.startswith("packed: ") or PREPACKED not in names]
    return sorted(names, key=lambda n: (_ORDER.index(n) if n in _ORDER else len(_ORDER), n))


def latency(
    profile: Profile, *, N: int, K: int, M: int, title: str = "", palette: Palette = PAGE
) -> Figure:
    """Latency over rank: every strategy, the dense layer, break-even, and ranks below a step."""
    dense = profile.latency(N=N, K=K, rank="dense", M=M)
    scale, unit = (1.0, "ms") if dense >= _MILLISECONDS else (1e3, "µs")
    title = title or f"{M} {'row' if M == 1 else 'rows'} · {K}→rank→{N}"
    figure, axes = plots.frame(title, "rank", f"{unit} per call", 4.0, palette)
    for i, name in enumerate(shown(profile)):
        curve = profile.curve(N=N, K=K, M=M, strategy=name)
        if not curve:
            continue
        main = name == profile.main
        colour = palette.series[i % len(palette.series)]
        ys = [scale * knot.ms for knot in curve.values()]
        axes.plot(
            list(curve),
            ys,
            color=colour,
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=5.5 if main else 4,
            linewidth=2.6 if main else 1.4,
            label=_label(name),
            zorder=5 if main else 3,
        )
        if main:
            noise = [scale * knot.noise for knot in curve.values()]
            low = [y - n for y, n in zip(ys, noise, strict=True)]
            high = [y + n for y, n in zip(ys, noise, strict=True)]
            axes.vlines(list(curve), low, high, color=colour, alpha=0.55, linewidth=1.2)
    axes.axhline(scale * dense, color=palette.ink, linewidth=1.6, label="dense layer")
    if (DENSE_PACKED, "cold", profile.launch) in profile.keys:
        packed = profile.latency(N=N, K=K, rank="dense", M=M, strategy=DENSE_PACKED)
        axes.axhline(scale * packed, color=palette.ink, linewidth=1.2, linestyle=":",
                     label="dense layer, packed")  # fmt: skip
    # What is much slower than both is let out of the picture, not allowed to flatten it.
    top = max([dense, *(knot.ms for knot in profile.curve(N=N, K=K, M=M).values())])
    axes.set_ylim(0, 1.35 * scale * top)
    _mark(profile, axes, (N, K, M), scale, palette)
    plots.legend(figure, axes, palette)
    return figure


def _mark(
    profile: Profile, axes: Any, size: tuple[int, int, int], scale: float, palette: Palette
) -> None:
    """Where low rank stops paying, and the ranks just below a step."""
    N, K, M = size
    curve = profile.curve(N=N, K=K, M=M)
    limit = profile.break_even(N=N, K=K, M=M)
    if limit is not None and math.isfinite(limit):
        axes.axvline(limit, color=palette.soft, linewidth=1.2, linestyle="--", zorder=2)
        axes.annotate(
            f"break-even {limit:.0f} ",
            (limit, 0.975),
            xycoords=("data", "axes fraction"),
            ha="right",
            va="top",
            fontsize=9.5,
            color=palette.soft,
        )
    worth = profile.preferred(N=N, K=K, M=M)
    if worth:
        axes.plot(
            worth,
            [0.035] * len(worth),
            transform=axes.get_xaxis_transform(),
            linestyle="",
            marker="|",
            markersize=13,
            markeredgewidth=2,
            color=palette.series[0],
            label="worth choosing",
            zorder=6,
        )
    steps = [step.rank for step in staircase.steps(curve)]
    if steps:
        axes.plot(
            steps,
            [scale * curve[rank].ms for rank in steps],
            linestyle="",
            marker="o",
            markersize=11,
            markerfacecolor="none",
            markeredgecolor=palette.series[1],
            markeredgewidth=1.8,
            label="just below a step",
            zorder=6,
        )


def _label(name: str) -> str:
    return {AUTO: "ours (auto)", TWO: "two matmuls"}.get(name, name)


def roofline(
    profile: Profile, device: Device, *, cache: str = "cold", palette: Palette = PAGE
) -> Figure:
    """TFLOP/s over FLOP per byte of every strategy, under what the device can do.

    Raises:
        ValueError: the device's peaks are not known for this dtype.
    """
    peak = dict(device.peak_flops).get(profile.dtype)
    if not peak or not device.bandwidth:
        raise ValueError(f"roofline: device: expected known peaks for {profile.dtype}, got none")
    title = f"Roofline, {profile.dtype}, {cache} caches"
    figure, axes = plots.frame(title, "FLOP per byte", "TFLOP/s", 4.0, palette)
    size = {"float32": 4, "float64": 8}.get(profile.dtype, 2)
    series: dict[str, list[tuple[float, float]]] = {}
    for p in profile.points:
        if (p.cache, p.launch) != (cache, profile.launch) or p.strategy.startswith("packed: "):
            continue
        form: Form = "fused" if p.rank else "dense"
        cost = count(form, [Size(p.M, p.N, p.K, p.rank, p.bias)], size)
        point = (cost.flops / cost.bytes, cost.flops / p.p50 / 1e9)
        series.setdefault(p.strategy, []).append(point)
    xs = [x for points in series.values() for x, _ in points]
    left, right = min([*xs, peak / device.bandwidth]) / 2, max([*xs, peak / device.bandwidth]) * 2
    for rate, style, name in (
        (device.bandwidth, "-", "roof from memory"),
        (device.cache_bandwidth, "--", "roof from cache"),
    ):
        if rate:
            corner = min(max(peak / rate, left), right)
            roof = [(x, min(x * rate, peak)) for x in (left, corner, right)]
            axes.plot(
                [x for x, _ in roof],
                [y / 1e12 for _, y in roof],
                color=palette.soft,
                linestyle=style,
                linewidth=1.4,
                label=name,
            )
    names = [*(n for n in shown(profile) if n in series), *({DENSE, DENSE_PACKED} & set(series))]
    for i, name in enumerate(names):
        axes.plot(
            [x for x, _ in series[name]],
            [y for _, y in series[name]],
            linestyle="",
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=5.5,
            color=palette.series[i % len(palette.series)],
            alpha=0.85,
            label=_label(name),
        )
    plots.plain_log(axes.xaxis)
    plots.plain_log(axes.yaxis)
    axes.minorticks_off()
    plots.legend(figure, axes, palette)
    return figure


@dataclass(frozen=True)
class Front:
    """Accuracy against latency.

    Attributes:
        curves: name of a rule -> (ms, error) points, fastest first.
        chosen: the allocation whose ranks are shown.
    """

    curves: Mapping[str, Sequence[tuple[float, float]]]
    chosen: Allocation


def pareto(front: Front, palette: Palette = PAGE) -> Figure:
    """Error over milliseconds: the front, simpler rules, the dense model, the chosen point."""
    figure, axes = plots.frame(
        "Accuracy against latency", "predicted ms of the layers", "error", 4.0, palette
    )
    for i, (name, points) in enumerate(front.curves.items()):
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=palette.series[i],
            linewidth=2.6 if i == 0 else 1.4,
            marker="" if i == 0 else _MARKERS[i],
            markersize=5,
            label=name,
            zorder=4 if i == 0 else 3,
        )
    dense, chosen = front.chosen.dense.ms, front.chosen.predicted
    assert dense is not None
    assert chosen.ms is not None
    axes.plot([dense], [0.0], "s", color=palette.ink, markersize=7, label="dense", zorder=5)
    axes.plot(
        [chosen.ms],
        [chosen.error],
        marker="*",
        linestyle="",
        color=palette.series[1],
        markersize=16,
        markeredgecolor=palette.card,
        label="chosen",
        zorder=6,
    )
    worst = max((y for points in front.curves.values() for _, y in points), default=0.0)
    if chosen.error > 0:
        # The fastest models are wrong by far more than anyone would choose.
        axes.set_ylim(-0.3 * chosen.error, min(1.05 * worst, 6 * chosen.error))
    plots.legend(figure, axes, palette)
    return figure


def rank_chart(allocation: Allocation, palette: Palette = PAGE, *, first: int = 0) -> Figure:
    """The rank of each layer as a bar, up to 40 layers from `first` on; dense ones are hollow."""
    rows = allocation.layers[first : first + 40]
    part = "" if len(allocation.layers) <= 40 else f", layers {first + 1}–{first + len(rows)}"
    figure, axes = plots.frame(
        f"Rank of each layer{part}", "rank", "", 1.1 + 0.2 * len(rows), palette
    )
    for i, row in enumerate(rows):
        dense = isinstance(row.rank, str)
        rank = row.layer.max_rank if isinstance(row.rank, str) else row.rank
        axes.barh(
            i,
            rank,
            height=0.68,
            color="none" if dense else palette.series[0],
            edgecolor=palette.soft if dense else palette.series[0],
            linewidth=0.9,
            zorder=3,
        )
        axes.annotate(
            str(row.rank),
            (rank, i),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=palette.ink,
            zorder=4,
        )
    axes.set_yticks(range(len(rows)), [_short(row.layer.name) for row in rows], fontsize=8.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.14)
    axes.grid(visible=False, axis="y")
    return figure


def _short(name: str, limit: int = 26) -> str:
    return name if len(name) <= limit else "…" + name[-limit + 1 :]
