"""Drawings of a profile and of an allocation, for the page and as files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from maestro_kernels.measure import plots, wording
from maestro_kernels.measure.cost import Form, Size, count
from maestro_kernels.measure.plots import CARD, INK, SERIES, SOFT, Point
from maestro_kernels.search import curves
from maestro_kernels.search.strategies import AUTO, DENSE, DENSE_PACKED, PREPACKED, TWO

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from maestro_kernels.hardware import Device
    from maestro_kernels.search.allocation import Allocation
    from maestro_kernels.search.latencies import Profile

# The order of colours and of the legend; what is drawn last lies on top.
_TRITON = ("triton: two_phase", "triton: row", "triton: expand")
_ORDER = (AUTO, PREPACKED, TWO, "native: fused", *_TRITON)
# A latency below this is easier read in microseconds.
_MILLISECONDS = 1.0


def shown(profile: Profile) -> list[str]:
    """The low-rank strategies of a drawing; the forms behind "prepacked" stay in the table."""
    names = [n for n in profile.strategies if n not in (DENSE, DENSE_PACKED)]
    names = [n for n in names if not n.startswith("packed: ") or PREPACKED not in names]
    return sorted(names, key=lambda n: (_ORDER.index(n) if n in _ORDER else len(_ORDER), n))


def latency(profile: Profile, *, N: int, K: int, M: int) -> Figure:
    """Latency over rank: every strategy, the dense layer, break-even, and ranks below a step."""
    dense = profile.latency(N=N, K=K, rank="dense", M=M)
    scale, unit = (1.0, "ms") if dense >= _MILLISECONDS else (1e3, "µs")
    rows = wording.count(M, "row")
    figure, axes = plots.frame(f"{rows} · {K}→rank→{N}", "rank", f"{unit} per call", 4.0)
    figure.set_label(f"Latency over rank, {K} to {N}, {rows}")
    for i, name in enumerate(shown(profile)):
        curve = profile.curve(N=N, K=K, M=M, strategy=name)
        if not curve:
            continue
        main = name == profile.main
        points = [
            Point(rank, scale * knot.ms, *_interval(knot, scale) if main else ())
            for rank, knot in curve.items()
        ]
        plots.add_line(axes, i, _label(name), points, main=main)
    axes.axhline(scale * dense, color=INK, linewidth=1.6, label="dense layer")
    if (DENSE_PACKED, "cold", profile.launch) in profile.keys:
        packed = profile.latency(N=N, K=K, rank="dense", M=M, strategy=DENSE_PACKED)
        axes.axhline(scale * packed, color=INK, linewidth=1.2, linestyle=":",
                     label="dense layer, packed")  # fmt: skip
    # What is much slower than both is let out of the picture, not allowed to flatten it.
    top = max([dense, *(knot.ms for knot in profile.curve(N=N, K=K, M=M).values())])
    axes.set_ylim(0, 1.35 * scale * top)
    _mark(profile, axes, (N, K, M), scale)
    plots.legend(figure, axes)
    return figure


def _mark(profile: Profile, axes: Any, size: tuple[int, int, int], scale: float) -> None:
    """Where low rank stops paying, and the ranks just below a step."""
    N, K, M = size
    curve = profile.curve(N=N, K=K, M=M)
    limit = profile.break_even(N=N, K=K, M=M)
    if limit is not None and math.isfinite(limit):
        axes.axvline(limit, color=SOFT, linewidth=1.2, linestyle="--", zorder=2)
        axes.annotate(
            f"break-even {limit:.0f} ",
            (limit, 0.975),
            xycoords=("data", "axes fraction"),
            ha="right",
            va="top",
            fontsize=9.5,
            color=SOFT,
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
            color=SERIES[0],
            label="worth choosing",
            zorder=6,
        )
    steps = [step.rank for step in curves.steps(curve)]
    if steps:
        axes.plot(
            steps,
            [scale * curve[rank].ms for rank in steps],
            linestyle="",
            marker="o",
            markersize=11,
            markerfacecolor="none",
            markeredgecolor=SERIES[1],
            markeredgewidth=1.8,
            label="just below a step",
            zorder=6,
        )


def _interval(knot: curves.Knot, scale: float) -> tuple[float, float]:
    return scale * (knot.ms - knot.noise), scale * (knot.ms + knot.noise)


def _label(name: str) -> str:
    return {AUTO: "ours (auto)", TWO: "two matmuls"}.get(name, name)


def roofline(profile: Profile, device: Device, *, cache: str = "cold") -> Figure:
    """TFLOP/s over FLOP per byte of every strategy, under what the device can do.

    Raises:
        ValueError: the device's peaks are not known for this dtype.
    """
    peak = dict(device.peak_flops).get(profile.dtype)
    if not peak or not device.bandwidth:
        raise ValueError(f"roofline: device: expected known peaks for {profile.dtype}, got none")
    itemsize = getattr(torch, profile.dtype).itemsize
    found: dict[str, list[Point]] = {}
    for p in profile.points:
        if (p.cache, p.launch) != (cache, profile.launch) or p.strategy.startswith("packed: "):
            continue
        form: Form = "fused" if p.rank else "dense"
        cost = count(form, [Size(p.M, p.N, p.K, p.rank, p.bias)], itemsize)
        point = Point(cost.flops / cost.bytes, cost.flops / p.p50 / 1e9)
        found.setdefault(p.strategy, []).append(point)
    return plots.roofline_plot(
        {_label(n): found[n] for n in (*shown(profile), DENSE, DENSE_PACKED) if n in found},
        title=f"Roofline, {profile.dtype}, {cache} caches",
        peak=peak,
        bandwidth=device.bandwidth,
        cache_bandwidth=device.cache_bandwidth,
    )


@dataclass(frozen=True)
class Front:
    """Accuracy against latency.

    Attributes:
        curves: name of a rule -> (ms, error) points, fastest first.
        chosen: the allocation whose ranks are shown.
    """

    curves: Mapping[str, Sequence[tuple[float, float]]]
    chosen: Allocation


def pareto(front: Front) -> Figure:
    """Error over milliseconds: the front, simpler rules, the dense model, the chosen point."""
    labels = ("Accuracy against latency", "predicted ms of the layers", "error")
    figure, axes = plots.frame(*labels, 4.0)
    for i, (name, points) in enumerate(front.curves.items()):
        line = [Point(ms, error) for ms, error in points]
        plots.add_line(axes, i, name, line, main=i == 0, markers=i > 0)
    dense, chosen = front.chosen.dense.ms, front.chosen.predicted
    assert dense is not None
    assert chosen.ms is not None
    axes.plot([dense], [0.0], "s", color=INK, markersize=7, label="dense", zorder=5)
    axes.plot(
        [chosen.ms],
        [chosen.error],
        marker="*",
        linestyle="",
        color=SERIES[1],
        markersize=16,
        markeredgecolor=CARD,
        label="chosen",
        zorder=6,
    )
    worst = max((y for points in front.curves.values() for _, y in points), default=0.0)
    if chosen.error > 0:
        # The fastest models are wrong by far more than anyone would choose.
        axes.set_ylim(-0.3 * chosen.error, min(1.05 * worst, 6 * chosen.error))
    plots.legend(figure, axes)
    return figure


def rank_chart(allocation: Allocation, *, first: int = 0) -> Figure:
    """The rank of each layer as a bar, up to 40 layers from `first` on; dense ones are hollow."""
    rows = allocation.layers[first : first + 40]
    part = "" if len(allocation.layers) <= 40 else f", layers {first + 1}–{first + len(rows)}"
    figure, axes = plots.frame(f"Rank of each layer{part}", "rank", "", 1.1 + 0.2 * len(rows))
    for i, row in enumerate(rows):
        dense = isinstance(row.rank, str)
        rank = row.layer.max_rank if isinstance(row.rank, str) else row.rank
        axes.barh(
            i,
            rank,
            height=0.68,
            color="none" if dense else SERIES[0],
            edgecolor=SOFT if dense else SERIES[0],
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
            color=INK,
            zorder=4,
        )
    axes.set_yticks(range(len(rows)), [_short(row.layer.name) for row in rows], fontsize=8.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.14)
    axes.grid(visible=False, axis="y")
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 26 else "…" + name[-25:]
