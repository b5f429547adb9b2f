"""What a profile says, for the terminal, as one self-contained page, and as PNG files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maestro_kernels.files import replacing
from maestro_kernels.measure import plots, report
from maestro_kernels.measure.cost import break_even_rank
from maestro_kernels.measure.report import Cell, Html
from maestro_kernels.measure.wording import DASH, count, duration, geometric_mean, times
from maestro_kernels.search import drawings
from maestro_kernels.search.latencies import Profile, break_even_text
from maestro_kernels.search.strategies import DENSE, DENSE_PACKED, PREPACKED, TWO
from maestro_kernels.search.targets import Shape

if TYPE_CHECKING:
    from rich.table import Table

    from maestro_kernels.hardware import Device
    from maestro_kernels.search.drawings import Front

# Sizes that get a drawing; the table has them all.
_DRAWN = 6


def sentences(profile: Profile) -> list[str]:
    """The answer in plain words: where low rank pays, and at which ranks."""
    cells = [(s, M) for s in profile.shapes for M in profile.batch_sizes]
    paying = [(s, M) for s, M in cells if profile.break_even(N=s.N, K=s.K, M=M) is not None]
    if not paying:
        first = "Low rank is slower than the dense layer at every rank that was measured."
    elif len(paying) == len(cells):
        first = "Low rank beats the dense layer at every size measured, up to its break-even rank."
    else:
        first = (
            f"Low rank beats the dense layer in {len(paying)} of {len(cells)} combinations of "
            f"size and rows."
        )
    found = [_headline(profile, cells), first]
    for s, M in paying[:3]:
        found.append(_sentence(profile, s, M))
    if "interpolation" in profile.errors:
        e = profile.errors["interpolation"]
        text = f"A rank left out is predicted from its neighbours within {e.median:.0%} (median)"
        found.append(f"{text} and {e.p90:.0%} (90th percentile of {e.count}).")
    if "fit" in profile.errors:
        e = profile.errors["fit"]
        found.append(
            f"A size left out is predicted by the fitted model within {e.median:.0%} (median) and "
            f"{e.p90:.0%} (90th percentile of {e.count})."
        )
    return found


def _headline(profile: Profile, cells: list[tuple[Shape, int]]) -> str:
    """What half of the weights buys here, the figure one would quote."""
    gains = {_place(s, M): _gain(profile, s, M) for s, M in cells}
    low, high = min(gains, key=gains.__getitem__), max(gains, key=gains.__getitem__)
    if len(gains) == 1:
        gain = times(gains[low])
        return f"With half of its weights the layer runs {gain} as fast as dense ({low})."
    return (
        f"With half of their weights the layers run {times(geometric_mean([*gains.values()]))} as "
        f"fast as dense, from {times(gains[low])} ({low}) to {times(gains[high])} ({high})."
    )


def _gain(profile: Profile, s: Shape, M: int) -> float:
    """How many times as fast as dense at the rank whose factors hold half of the weights."""
    half = round(break_even_rank(s.N, s.K) / 2) or 1
    dense = profile.latency(N=s.N, K=s.K, rank="dense", M=M)
    return dense / profile.latency(N=s.N, K=s.K, rank=half, M=M)


def _place(s: Shape, M: int) -> str:
    return f"{s.K}→r→{s.N} at {count(M, 'row')}"


def _sentence(profile: Profile, shape: Shape, M: int) -> str:
    N, K = shape.N, shape.K
    limit = profile.break_even(N=N, K=K, M=M)
    assert limit is not None
    ideal = break_even_rank(N, K)
    where = _place(shape, M)
    if math.isinf(limit):
        return f"{where}: faster than dense at all ranks measured."
    best = profile.preferred(N=N, K=K, M=M)
    ranks = ", ".join(map(str, best[-3:]))
    return (
        f"{where}: faster than dense up to rank {limit:.0f}, {limit / ideal:.0%} of the rank at "
        f"which both do the same work ({ideal:.0f}); largest ranks worth choosing: {ranks}."
    )


def terminal_table(profile: Profile) -> Table:
    """Every size: dense, break-even, and the fastest strategy at a few ranks."""
    device = profile.device
    title = f"{device['name']}, {count(device['num_cores'], 'core')}, {profile.dtype}, cold caches"
    headers = ("rows · in→r→out", "layers", *_headers(profile))
    lines: list[list[str | Cell]] = []
    for shape in profile.shapes:
        for M in profile.batch_sizes:
            where = [f"{M} · {shape.K}→r→{shape.N}", str(len(shape.names) or "")]
            for cells in _rows(profile, shape, M):
                lines.append([*where, *cells])
                where = ["", ""]
            lines.append([])
    return report.terminal_table(title, headers, lines, numeric=range(3, 7))


def _headers(profile: Profile) -> tuple[str, ...]:
    """Of what `_rows` gives."""
    times_of = ("dense", "two matmuls", _main_label(profile))
    return ("rank", *times_of, "vs dense", "fastest", "remark")


def _main_label(profile: Profile) -> str:
    return "ours" if profile.main == "ours" else profile.main


def _rows(profile: Profile, shape: Shape, M: int) -> list[list[str | Cell]]:
    """One line per measured rank: rank, dense, two matmuls, ours, ratio, fastest, remark."""
    size: dict[str, Any] = {"N": shape.N, "K": shape.K, "M": M}
    dense = profile.latency(**size, rank="dense")
    curve = profile.curve(**size)
    two = profile.curve(**size, strategy=TWO)
    below = {step.rank for step in profile.steps(**size)}
    preferred = set(profile.preferred(**size))
    names = [n for n in profile.strategies if n not in (DENSE, DENSE_PACKED)]
    curves = {n: profile.curve(**size, strategy=n) for n in names if n != PREPACKED}
    lines: list[list[str | Cell]] = []
    for rank, knot in curve.items():
        timed = {n: c[rank].ms for n, c in curves.items() if rank in c}
        fastest = min(timed, key=lambda n: timed[n])
        remark = "just below a step" if rank in below else "" if rank in preferred else DASH
        ratio = Cell(times(dense / knot.ms), "good" if knot.ms < dense else "bad")
        lines.append(
            [
                str(rank),
                duration(1e3 * dense),
                duration(1e3 * two[rank].ms if rank in two else None),
                duration(1e3 * knot.ms),
                ratio,
                f"{fastest} {duration(1e3 * timed[fastest])}",
                remark,
            ]
        )
    return lines


def page(
    profile: Profile,
    *,
    device: Device | None = None,
    front: Front | None = None,
    command: str = "",
) -> str:
    """One HTML file without scripts or requests.

    Args:
        profile: what was measured.
        device: with measured peaks, for the roofline; None leaves it out.
        front: accuracy against latency of a model; None leaves it out.
        command: what repeats it.
    """
    d = profile.device
    subtitle = f"{d['name']} ({d['arch']}), {count(d['num_cores'], 'core')}, {profile.dtype}"
    blocks = [report.verdict(sentences(profile)), _cards(profile), _latency(profile)]
    if front is not None:
        blocks.append(_accuracy(front))
    if device is not None and dict(device.peak_flops).get(profile.dtype):
        rooflines = [
            report.figure(drawings.roofline(profile, device, cache=c)) for c in ("cold", "warm")
        ]
        blocks.append(
            report.section(
                "Against the roofline",
                report.grid(*rooflines),
                lead="One point per rank, size and rows. The ceilings are short probes: the best "
                "library matmul, and reading from memory and from cache. Operations and bytes are "
                "those of the function, each operand once.",
            )
        )
    blocks += [_table(profile), _method(profile, command)]
    footer = f"Written by {command or 'maestro_kernels.search.layer_profile'}."
    return report.page("Rank and latency", blocks, subtitle=subtitle, footer=footer)


def _cards(profile: Profile) -> Html:
    ratios, limits = [], []
    for s in profile.shapes:
        for M in profile.batch_sizes:
            limit = profile.break_even(N=s.N, K=s.K, M=M)
            if limit is not None and math.isfinite(limit):
                limits.append(limit / break_even_rank(s.N, s.K))
            ratios.append(_gain(profile, s, M))
    mean = times(geometric_mean(ratios))
    share = f"{sum(limits) / len(limits):.0%}" if limits else DASH
    return report.cards(
        (
            (str(len(profile.points)), "times measured"),
            (str(len(profile.shapes)), "layer size" + "s" * (len(profile.shapes) != 1)),
            (
                mean,
                "speed-up over dense at half the weights, geometric mean",
            ),
            (share, "measured break-even rank as a share of equal work, mean"),
        )
    )


def _latency(profile: Profile) -> Html:
    figures = []
    for shape in profile.shapes[:_DRAWN]:
        for M in profile.batch_sizes:
            drawing = drawings.latency(profile, N=shape.N, K=shape.K, M=M)
            limit = break_even_text(profile.break_even(N=shape.N, K=shape.K, M=M))
            layers = f"{len(shape.names)} layers of the model. " if shape.names else ""
            figures.append(report.figure(drawing, f"{layers}Break-even: {limit}."))
    more = len(profile.shapes) - _DRAWN
    rest = f" {more} more sizes are in the table." if more > 0 else ""
    return report.section(
        "Latency over rank",
        report.grid(*figures),
        lead="Medians with cold caches, as in a model whose other layers ran in between; upright "
        "bars run from the 20th to the 80th percentile. Left of the dashed line low rank is "
        "faster than the dense layer. A rank is worth choosing if no larger one is as fast; a "
        "circled one lies just below a step, where the next costs far more. What is much slower "
        "than the dense layer leaves the picture." + rest,
    )


def _accuracy(front: Front) -> Html:
    chosen = front.chosen
    charts = [drawings.rank_chart(chosen, first=k) for k in range(0, len(chosen.layers), 40)]
    drawn = map(report.figure, (drawings.pareto(front), *charts))
    lines = [
        [
            c.layer.name or "(model)",
            str(c.rank),
            str(c.layer.max_rank),
            duration(None if c.ms is None else 1e3 * c.ms),
            duration(None if c.dense_ms is None else 1e3 * c.dense_ms),
            f"{c.error:.2g}",
        ]
        for c in chosen.layers
    ]
    headers = ("layer", "rank", "of", "ms at rank", "ms dense", "error")
    return report.section(
        "Accuracy against latency",
        report.prose(chosen.summary()),
        report.grid(*drawn),
        report.details(
            f"Show all {len(lines)} layers", report.table(headers, lines, numeric=range(1, 6))
        ),
        lead=f"Error is the sum over layers of the {chosen.unit}; time is the sum of the layers' "
        "own times. Every point of the front is an allocation of ranks that nothing beats.",
    )


def _table(profile: Profile) -> Html:
    headers = ("rows · in→r→out", *_headers(profile))
    lines: list[list[str | Cell]] = []
    for shape in profile.shapes:
        for M in profile.batch_sizes:
            where = f"{M} · {shape.K}→r→{shape.N}"
            lines += [[where, *cells] for cells in _rows(profile, shape, M)]
    return report.section(
        "Every rank measured",
        report.table(headers, lines, numeric=range(1, 6)),
        lead="A dash in the last column: a larger rank is as fast, or dense is.",
    )


def _method(profile: Profile, command: str) -> Html:
    text = (
        "Ranks were chosen coarse to fine: a few evenly spaced on a logarithmic axis, then where "
        "the curve bends, where it crosses the dense layer, and just above the ranks where tiles "
        "of kernels end. All candidates of a round take turns in one interleaved run. A strategy "
        "of ours is timed only where its result is as accurate as two library matmuls, held "
        "against float64. The dense layer is part of every round; a round in which it took "
        "much longer was measured again."
    )
    facts = {"command": command or None, **profile.device, **profile.versions}
    return report.section(
        "How this was measured",
        report.prose(text),
        report.facts("Machine and versions", facts),
    )


def save_pngs(
    profile: Profile, folder: Path, *, device: Device | None = None, front: Front | None = None
) -> list[Path]:
    """Write the drawings of the page as PNG files; gives their paths."""
    made = {
        f"latency-{s.K}-{s.N}-rows-{M}": drawings.latency(profile, N=s.N, K=s.K, M=M)
        for s in profile.shapes[:_DRAWN]
        for M in profile.batch_sizes
    }
    if device is not None and dict(device.peak_flops).get(profile.dtype):
        for cache in ("cold", "warm"):
            made[f"roofline-{cache}"] = drawings.roofline(profile, device, cache=cache)
    if front is not None:
        made["pareto"] = drawings.pareto(front)
        made["ranks"] = drawings.rank_chart(front.chosen)
    paths = []
    for name, figure in made.items():
        paths.append(folder / f"{name}.png")
        with replacing(paths[-1]) as file:
            figure.savefig(file, format="png", dpi=160, facecolor=plots.CARD)
    return paths


def curve_points(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points fastest first, without those that a faster one beats in error too."""
    kept: list[tuple[float, float]] = []
    for ms, error in sorted(points):
        if not kept or error < kept[-1][1]:
            kept.append((ms, error))
    return kept
