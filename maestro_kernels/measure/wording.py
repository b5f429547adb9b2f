"""Figures as people write them: durations, ratios, counts, moments."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable

TIMES = "\N{MULTIPLICATION SIGN}"
DASH = "\N{EN DASH}"


def duration(microseconds: float | None) -> str:
    """Three significant digits with a unit, or a dash."""
    if microseconds is None:
        return DASH
    scale, unit = (1, "µs") if microseconds < 1e3 else (1e3, "ms")
    value = microseconds / scale
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def times(ratio: float | None) -> str:
    """A ratio with a multiplication sign, or a dash."""
    if ratio is None:
        return DASH
    return f"{ratio:.{1 if ratio >= 9.95 else 2}f}{TIMES}"


def geometric_mean(values: Iterable[float]) -> float | None:
    """The mean that treats 2 and 1/2 alike; None for no values."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def count(number: int, noun: str) -> str:
    """A number with its noun: 1 thread, 2 threads."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def first_line(error: BaseException, otherwise: str = "no message") -> str:
    """What an error says, without what follows its first line."""
    return (str(error).strip() or otherwise).splitlines()[0]


def when(time: str) -> str:
    """An ISO 8601 time as 2026-01-31, 09:05 UTC."""
    moment = datetime.datetime.fromisoformat(time).astimezone(datetime.timezone.utc)
    return f"{moment:%Y-%m-%d, %H:%M} UTC"
