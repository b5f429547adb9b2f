"""Plots as inline SVG whose colours follow the page, so that one drawing serves light and dark.

matplotlib draws with placeholder colours; they are replaced by the CSS variables of page.html.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from maestro_kernels.benchmark.html import Html
from maestro_kernels.benchmark.summary import TIMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "PAGE",
    "Palette",
    "Point",
    "Ratio",
    "frame",
    "legend",
    "light",
    "line_plot",
    "plain_log",
    "ratio_plot",
    "roofline_plot",
    "standalone",
    "svg",
]

# Placeholder -> CSS variable. The placeholders occur nowhere else in matplotlib's output.
_COLOURS = {"#010a01": "--ink", "#020a02": "--soft", "#030a03": "--line", "#040a04": "--card"}
_INK, _SOFT, _LINE, _CARD = _COLOURS
_SERIES = tuple(f"#05{i:02d}05" for i in range(8))
_COLOURS.update({colour: f"--s{i}" for i, colour in enumerate(_SERIES)})
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")


@dataclass(frozen=True)
class Palette:
    """Colours of a drawing: the page's placeholders, or values for a file of its own."""

    ink: str
    soft: str
    line: str
    card: str
    series: tuple[str, ...]


PAGE = Palette(_INK, _SOFT, _LINE, _CARD, _SERIES)

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
) -> Html:
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
        colour, marker = _SERIES[k % len(_SERIES)], _MARKERS[k % len(_MARKERS)]
        xs = [p.x for p in points]
        axes.plot(
            xs,
            [p.y for p in points],
            color=colour,
            marker=marker if markers else None,
            markersize=5,
            linewidth=2.6 if k == 0 else 1.6,
            label=name,
            zorder=4 if k == 0 else 3,
        )
        low = [p.y if p.low is None else p.low for p in points]
        high = [p.y if p.high is None else p.high for p in points]
        axes.vlines(xs, low, high, color=colour, alpha=0.55, linewidth=1.2)
    for level in levels:
        axes.axhline(level, color=_SOFT, linewidth=1, linestyle="--", zorder=2)
    if log:
        axes.set_xscale("log", base=2)
        plain_log(axes.yaxis)
        ticks = sorted({p.x for points in series.values() for p in points})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
    legend(figure, axes)
    return svg(figure, title)


def ratio_plot(
    ratios: Sequence[Ratio],
    *,
    title: str,
    xlabel: str,
    names: tuple[str, str] = ("warm", "cold"),
) -> Html:
    """Horizontal dots on a logarithmic axis around 1: right is faster, left slower, 5 % grey.

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
    axes.axvline(1.0, color=_INK, linewidth=1.2, zorder=2)
    for i, ratio in enumerate(ratios):
        for value, filled, offset in ((ratio.first, True, -0.13), (ratio.second, False, 0.13)):
            if value is None:
                continue
            near = 1 / 1.05 < value < 1.05
            colour = _SOFT if near else _SERIES[0] if value > 1 else _SERIES[1]
            y = i + (offset if ratio.second is not None else 0)
            axes.plot([1.0, value], [y, y], color=colour, linewidth=1.4, alpha=0.55, zorder=3)
            axes.plot(
                [value],
                [y],
                marker="o",
                markersize=6,
                markeredgewidth=1.6,
                color=colour,
                markerfacecolor=colour if filled else _CARD,
                zorder=4,
            )
    axes.set_yticks(range(len(ratios)), [r.label for r in ratios])
    axes.set_ylim(len(ratios) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    for filled, name in ((True, names[0]), (False, names[1])):
        face = _SOFT if filled else _CARD
        axes.plot([], [], "o", color=_SOFT, markerfacecolor=face, markersize=6, label=name)
    legend(figure, axes)
    return svg(figure, title)


def roofline_plot(
    series: Mapping[str, Sequence[Point]],
    *,
    title: str,
    peak: float,
    bandwidth: float,
    cache_bandwidth: float | None = None,
) -> Html:
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
                color=_SOFT,
                linestyle=style,
                linewidth=1.4,
                label="roof from memory" if style == "-" else "roof from cache",
            )
    for k, (name, points) in enumerate(series.items()):
        axes.plot(
            [p.x for p in points],
            [p.y for p in points],
            linestyle="",
            marker=_MARKERS[k % len(_MARKERS)],
            markersize=6,
            color=_SERIES[k % len(_SERIES)],
            alpha=0.9,
            label=name,
        )
    plain_log(axes.xaxis)
    plain_log(axes.yaxis)
    axes.minorticks_off()
    legend(figure, axes)
    return svg(figure, title)


def svg(figure: Figure, label: str) -> Html:
    """A drawing as inline SVG with the page's colours and font, and an accessible name."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "maestro"}):
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Inside HTML neither namespaces nor a fixed size are wanted; a page without any URL is easy
    # to check for requests.
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    # Element ids are repeatable and must still differ between the drawings of one page.
    own = hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>f{own}-", text)
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, f"var({variable})")
    return Html(text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1))


def light() -> Palette:
    """The light colours of the page, for files."""
    colours = _light_colours()
    series = tuple(colours[f"--s{i}"] for i in range(len(_SERIES)))
    ink, soft, line, card = (colours[f"--{n}"] for n in ("ink", "soft", "line", "card"))
    return Palette(ink, soft, line, card, series)


def _light_colours() -> dict[str, str]:
    page = resources.files("maestro_kernels.benchmark").joinpath("page.html")
    light = page.read_text(encoding="utf-8").partition("@media")[0]
    return dict(re.findall(r"(--\w+): (#\w+);", light))


def standalone(drawing: Html) -> str:
    """A drawing as an SVG file of its own, in the light colours of the page."""
    colours = _light_colours()
    text = re.sub(r"var\((--\w+)\)", lambda match: colours[match[1]], drawing)
    size = re.search(r'viewBox="[\d.]+ [\d.]+ ([\d.]+) ([\d.]+)"', text)
    assert size is not None
    attributes = (
        f'xmlns="http://www.w3.org/2000/svg" width="{size[1]}pt" height="{size[2]}pt" '
        f'style="background: {colours["--card"]}"'
    )
    return text.replace("<svg", f"<svg {attributes}", 1) + "\n"


def frame(
    title: str, xlabel: str, ylabel: str, height: float, palette: Palette = PAGE
) -> tuple[Figure, Axes]:
    """An empty drawing in the style of the page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=96, layout="constrained")
    axes: Any = figure.add_subplot()
    figure.suptitle(title, color=palette.ink, fontsize=11.5, fontweight="bold", x=0.02, ha="left")
    axes.set_xlabel(xlabel, color=palette.soft, fontsize=10)
    axes.set_ylabel(ylabel, color=palette.soft, fontsize=10)
    axes.tick_params(colors=palette.ink, labelsize=9.5, length=0)
    axes.grid(visible=True, color=palette.line, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.06)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(palette.line)
    return figure, axes


def plain_log(axis: Any) -> None:
    """A logarithmic axis with 0.01, 100 and 10,000 instead of powers of ten."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_formatter(lambda value, position: f"{value:,.10g}")


def legend(figure: Any, axes: Any, palette: Palette = PAGE) -> None:
    """Names below the drawing."""
    box = figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower left",
        ncols=2,
        frameon=False,
        fontsize=9.5,
        labelcolor=palette.ink,
        handlelength=1.6,
        columnspacing=1.2,
    )
    box.set_zorder(5)
