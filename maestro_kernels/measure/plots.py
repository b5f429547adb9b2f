"""Plots in one style: lines, ratios and the roofline, as matplotlib figures.

What a page or a file shows of them is what matplotlib writes; nothing is rewritten afterwards.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from maestro_kernels.measure.noise import MARGIN
from maestro_kernels.measure.wording import TIMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The light colours of the page, too; in the dark the page turns its drawings' colours round.
INK, SOFT, LINE, CARD = "#1c1e21", "#5d6269", "#e3e0d8", "#ffffff"
SERIES = (
    *("#0b6e5f", "#c2571a", "#3c5fb0", "#a23b72"),
    *("#7d7a72", "#8a6d00", "#4a4843", "#5b8c2a"),
)
MARKERS = "os^DvPXh"

# Points of a curve that can still be told apart, and letters of a name in a legend of two columns.
_POINTS, _LETTERS = 240, 24
# Two of these fit beside each other on a desk and one fills a phone; text stays readable on both.
_WIDTH = 4.6


@dataclass(frozen=True)
class Point:
    """One measured point of a series: low and high bound its spread, where there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Ratio:
    """One line of a ratio plot: a label and up to two ratios, e.g. warm and cold."""

    label: str
    first: float | None
    second: float | None = None


def line_plot(
    series: Mapping[str, Sequence[Point]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    log: bool = True,
    markers: bool = True,
    levels: Sequence[float] = (),
    height: float = 3.9,
) -> Figure:
    """Lines with markers and an upright bar from low to high at each point.

    Args:
        series: name -> points in order of x; the first series is drawn in the accent colour.
        title: heading inside the drawing; also its accessible name.
        xlabel: label of the horizontal axis.
        ylabel: label of the vertical axis.
        log: logarithmic axes, x to base 2.
        markers: whether points are marked; a curve of hundreds of points is clearer without.
        levels: heights of dashed lines across, values to compare with.
        height: in inches at 96 pixels; the width is fixed.
    """
    figure, axes = frame(title, xlabel, ylabel, height)
    for k, (name, points) in enumerate(series.items()):
        add_line(axes, k, name, points, main=k == 0, markers=markers)
    for level in levels:
        axes.axhline(level, color=SOFT, linewidth=1, linestyle="--", zorder=2)
    if log:
        axes.set_xscale("log", base=2)
        plain_log(axes.yaxis)
        ticks = sorted({p.x for points in series.values() for p in points})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
    legend(figure, axes)
    return figure


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]], *, title: str, xlabel: str
) -> list[Figure]:
    """Long lines without markers, as many to a drawing as there are colours.

    Args:
        series: name -> points (x, y) in order of x; long ones are thinned, dotted names shortened.
        title: heading of the drawing; of several, with the place of the first line in them all.
        xlabel: label of the horizontal axis.
    """
    names, drawn = list(series), []
    for first in range(0, len(names), len(SERIES)):
        lines = {}
        for name in names[first : first + len(SERIES)]:
            # Backwards, so that the last point is always there.
            few = series[name][:: -1 - len(series[name]) // _POINTS]
            lines[_short(name)] = [Point(x, y) for x, y in few]
        heading = f"{title} {first + 1} and on" if len(names) > len(SERIES) else title
        options: dict[str, Any] = {"xlabel": xlabel, "ylabel": "", "log": False, "markers": False}
        drawn.append(line_plot(lines, title=heading, **options))
    return drawn


def _short(name: str) -> str:
    """What fits a legend: enc.lay.0.att.self.query."""
    *parents, last = name.split(".")
    return name if len(name) <= _LETTERS else ".".join([*(p[:3] for p in parents), last])


def ratio_plot(
    ratios: Sequence[Ratio],
    *,
    title: str,
    xlabel: str,
    names: tuple[str, str] = ("warm", "cold"),
) -> Figure:
    """Horizontal dots on a logarithmic axis around 1: right is faster, left slower, noise grey.

    Args:
        ratios: one line each, drawn from top to bottom.
        title: heading and accessible name.
        xlabel: what the ratio is.
        names: legend of the filled and of the hollow dot.
    """
    figure, axes = frame(title, xlabel, "", 1.35 + 0.25 * len(ratios))
    values = [v for r in ratios for v in (r.first, r.second) if v]
    left, right = min([0.8, *values]) / 1.15, max([1.25, *values]) * 1.15
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    # About six labels fit; they are taken outwards from 1, which always has one.
    spacing = max(1.3, (right / left) ** (1 / 6))
    ticks = [1.0]
    for step in (0.8, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 1.25, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50):
        if left <= step <= right and all(max(step / t, t / step) >= spacing for t in ticks):
            ticks.append(step)
    axes.set_xticks(ticks, [f"{t:g}{TIMES}" for t in ticks])
    axes.minorticks_off()
    axes.axvline(1.0, color=INK, linewidth=1.2, zorder=2)
    for i, ratio in enumerate(ratios):
        for value, filled, offset in ((ratio.first, True, -0.13), (ratio.second, False, 0.13)):
            if value is None:
                continue
            near = 1 / (1 + MARGIN) < value < 1 + MARGIN
            colour = SOFT if near else SERIES[0] if value > 1 else SERIES[1]
            y = i + (offset if ratio.second is not None else 0)
            axes.plot([1.0, value], [y, y], color=colour, linewidth=1.4, alpha=0.55, zorder=3)
            axes.plot(
                [value],
                [y],
                marker="o",
                markersize=6,
                markeredgewidth=1.6,
                color=colour,
                markerfacecolor=colour if filled else CARD,
                zorder=4,
            )
    axes.set_yticks(range(len(ratios)), [r.label for r in ratios])
    axes.set_ylim(len(ratios) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    for filled, name in ((True, names[0]), (False, names[1])):
        face = SOFT if filled else CARD
        axes.plot([], [], "o", color=SOFT, markerfacecolor=face, markersize=6, label=name)
    legend(figure, axes)
    return figure


def roofline_plot(
    series: Mapping[str, Sequence[Point]],
    *,
    title: str,
    peak: float,
    bandwidth: float,
    cache_bandwidth: float | None = None,
) -> Figure:
    """Measured FLOP/s over FLOP per byte, under the ceilings of the device.

    Args:
        series: name -> points (x FLOP per byte, y TFLOP/s).
        title: heading and accessible name.
        peak: FLOP/s of the device.
        bandwidth: bytes/s from memory.
        cache_bandwidth: bytes/s from cache, drawn dashed where it is known.
    """
    figure, axes = frame(title, "FLOP per byte", "TFLOP/s", 3.9)
    xs = [p.x for points in series.values() for p in points]
    left, right = min([*xs, peak / bandwidth]) / 2, max([*xs, peak / bandwidth]) * 2
    for rate, style in ((bandwidth, "-"), (cache_bandwidth, "--")):
        if rate:
            corner = min(max(peak / rate, left), right)
            line = [(left, left * rate), (corner, corner * rate), (right, peak)]
            axes.plot(
                [x for x, _ in line],
                [min(y, peak) / 1e12 for _, y in line],
                color=SOFT,
                linestyle=style,
                linewidth=1.4,
                label="roof from memory" if style == "-" else "roof from cache",
            )
    for k, (name, points) in enumerate(series.items()):
        axes.plot(
            [p.x for p in points],
            [p.y for p in points],
            linestyle="",
            marker=MARKERS[k % len(MARKERS)],
            markersize=6,
            color=SERIES[k % len(SERIES)],
            alpha=0.9,
            label=name,
        )
    plain_log(axes.xaxis)
    plain_log(axes.yaxis)
    axes.minorticks_off()
    legend(figure, axes)
    return figure


def add_line(
    axes: Axes,
    index: int,
    name: str,
    points: Sequence[Point],
    *,
    main: bool = False,
    markers: bool = True,
) -> None:
    """Draw one series: a line in the colour of its index, and an upright bar where points spread.

    Args:
        axes: to draw on.
        index: of the series; chooses colour and marker.
        name: for the legend.
        points: in order of x.
        main: stand out.
        markers: mark the points.
    """
    colour = SERIES[index % len(SERIES)]
    axes.plot(
        [p.x for p in points],
        [p.y for p in points],
        color=colour,
        marker=MARKERS[index % len(MARKERS)] if markers else None,
        markersize=5,
        linewidth=2.6 if main else 1.6,
        label=name,
        zorder=5 if main else 3,
    )
    bars = [(p.x, p.low, p.high) for p in points if p.low is not None and p.high is not None]
    if bars:
        axes.vlines(*zip(*bars, strict=True), color=colour, alpha=0.55, linewidth=1.2)


def inline(figure: Figure) -> str:
    """The drawing as an <svg> element that can stand in a page, without background."""
    text = _svg(figure, {}, transparent=True)
    text = text[text.index("<svg") :]
    # HTML knows these names, and a page without any address is easily seen to make no request.
    for name, at in (("xmlns", "2000/svg"), ("xmlns:xlink", "1999/xlink")):
        text = text.replace(f' {name}="http://www.w3.org/{at}"', "", 1)
    return text


def standalone(figure: Figure) -> str:
    """The drawing as the text of an SVG file."""
    return _svg(figure, {"Title": figure.get_label()}, facecolor=CARD)


def _svg(figure: Figure, metadata: dict[str, Any], **options: Any) -> str:
    """What matplotlib writes, the same in every run; text stays text."""
    import matplotlib

    own = _identity(figure)
    for k, artist in enumerate(figure.findobj()):
        artist.set_gid(f"f{own}-{k}")
    metadata = {**dict.fromkeys(("Date", "Creator", "Format", "Type")), **metadata}
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": own}):
        figure.savefig(buffer, format="svg", metadata=metadata, **options)
    return buffer.getvalue()


def _identity(figure: Figure) -> str:
    """A name made of what is drawn: ids of elements must differ between drawings of one page."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
    from matplotlib.text import Text

    # Ticks and their texts come into being when a figure is laid out.
    figure.draw_without_rendering()
    drawn = hashlib.sha256()
    for artist in figure.findobj():
        if isinstance(artist, Line2D):
            drawn.update(np.asarray(artist.get_xydata()).tobytes())
        elif isinstance(artist, Rectangle | Text):
            drawn.update(str(artist).encode())
    return drawn.hexdigest()[:8]


def frame(title: str, xlabel: str, ylabel: str, height: float) -> tuple[Figure, Axes]:
    """An empty drawing in the style of all; its title is its accessible name, too."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=96, layout="constrained")
    figure.set_label(title)
    axes: Any = figure.add_subplot()
    figure.suptitle(title, color=INK, fontsize=11.5, fontweight="bold", x=0.02, ha="left")
    axes.set_xlabel(xlabel, color=SOFT, fontsize=10)
    axes.set_ylabel(ylabel, color=SOFT, fontsize=10)
    axes.tick_params(colors=INK, labelsize=9.5, length=0)
    axes.grid(visible=True, color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.06)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(LINE)
    return figure, axes


def plain_log(axis: Any) -> None:
    """A logarithmic axis with 0.01, 100 and 10,000 instead of powers of ten."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_formatter(lambda value, position: f"{value:,.10g}")


def legend(figure: Any, axes: Any) -> None:
    """Names below the drawing."""
    box = figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower left",
        ncols=2,
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
        handlelength=1.6,
        columnspacing=1.2,
    )
    box.set_zorder(5)
