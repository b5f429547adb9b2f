"""Files for people from the records: `python -m bench.gpu.report --state FOLDER --out FOLDER`.

Writes table.json, rows.jsonl, report.html and profile.txt into the output folder, and criteria.txt
into the state's, for the summary.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.gpu import suite, table
from bench.gpu.state import Record, State
from maestro_kernels import hardware, tables
from maestro_kernels.benchmark import report, rows
from maestro_kernels.benchmark.rows import Row
from maestro_kernels.benchmark.summary import Outcome, outcomes
from maestro_kernels.files import write_text
from maestro_kernels.measure.wording import geometric_mean

__all__ = ["criteria", "rows_of", "strategies"]

_MOST = 15 << 20


@dataclass(frozen=True)
class Criterion:
    """What must hold: a ratio of outcomes, at least `target`, by geometric mean or for each."""

    text: str
    target: float
    ratio: Callable[[Outcome], float | None]
    applies: Callable[[Outcome], bool]
    worst: bool = False

    def line(self, found: Sequence[Outcome]) -> str:
        """The criterion, its value and whether it is met."""
        values = [r for o in found if self.applies(o) and (r := self.ratio(o)) is not None]
        value = (min(values) if self.worst else geometric_mean(values)) if values else None
        state = "no rows" if value is None else "met" if value >= self.target else "MISSED"
        number = "" if value is None else f"{value:.2f}"
        return f"{self.text:<46} at least {self.target:<5g} {number:>6}  {state}"


def _two(o: Outcome) -> float | None:
    return o.ratio(o.two)


def _best(o: Outcome) -> float | None:
    return o.ratio(o.best)


def _roof(o: Outcome) -> float | None:
    return o.ours.roofline


def _single(low: int, high: int) -> Callable[[Outcome], bool]:
    def applies(o: Outcome) -> bool:
        row = o.ours
        return row.op == "lod_linear" and row.mode == "forward" and low <= row.M <= high

    return applies


def _group(name: str, low: int, high: int) -> Callable[[Outcome], bool]:
    def applies(o: Outcome) -> bool:
        row = o.ours
        grouped = row.op == "lod_linear_grouped" and name in row.source and row.mode == "forward"
        return grouped and low <= row.M <= high

    return applies


_TOP = 1 << 30
_CRITERIA = (
    Criterion("M <= 64, over two cuBLAS calls", 1.6, _two, _single(1, 64)),
    Criterion("64 < M <= 4096, over the fastest baseline", 1.2, _best, _single(65, 4096)),
    Criterion("M >= 8192, over the fastest baseline", 1.05, _best, _single(8192, _TOP)),
    Criterion("q/k/v, M <= 64, over separate calls", 2.5, _two, _group("q/k/v", 1, 64)),
    Criterion("gate/up, M <= 64, over separate calls", 1.6, _two, _group("gate/up", 1, 64)),
    Criterion("q/k/v, M = 4096", 1.6, _two, _group("q/k/v", 4096, 4096)),
    Criterion("gate/up, M = 4096", 1.05, _two, _group("gate/up", 4096, 4096)),
    Criterion("roofline at M = 8192", 0.80, _roof, _single(8192, 8192), worst=True),
    Criterion("roofline beyond", 0.85, _roof, _single(8193, _TOP), worst=True),
    Criterion(
        "training, over the fastest baseline", 1.25, _best, lambda o: o.ours.mode == "training"
    ),
)
_NEVER_SLOWER = Criterion("", 0.98, _two, lambda o: True, worst=True)


def criteria(measured: Sequence[Row], first_use: Sequence[Row]) -> list[str]:
    """One line per criterion: speed on the device with cold caches, `auto` in every launch mode.

    Args:
        measured: rows by the measured table.
        first_use: rows of `auto` without one.
    """
    cold = [o for o in outcomes(measured) if o.ours.cache == "cold"]
    lines = [c.line([o for o in cold if o.ours.launch == "graph"]) for c in _CRITERIA]
    for name, found in (("table", cold), ("first use", outcomes(first_use))):
        for launch in ("graph", "eager"):
            some = [o for o in found if o.ours.launch == launch]
            lines.append(replace(_NEVER_SLOWER, text=f"auto by {name}, {launch}, worst").line(some))
    return lines


def strategies(found: Sequence[tables.Row]) -> list[str]:
    """Per regime: each strategy's geometric mean over two matmuls, and where it is the fastest."""
    ratios: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    wins: Counter[tuple[str, str]] = Counter()
    for row in found:
        mode = next((m for m in ("forward cold graph", "forward cold eager") if m in row.us), None)
        if mode is None:
            continue
        where = suite.regime(row.M) + (", groups" if row.layers > 1 else "")
        times = row.us[mode]
        for name, (_, median, _) in times.items():
            ratios[where, name].append(times[tables.BASELINE][1] / median)
        wins[where, min(times, key=lambda n: times[n][1])] += 1
    lines = ["strategy over two matmuls, geometric mean (calls), fastest in"]
    for (where, name), values in sorted(ratios.items()):
        mean = geometric_mean(values) or 0.0
        lines.append(f"  {where:<24} {name:<22} {mean:>5.2f} ({len(values)}) {wins[where, name]}")
    return lines


def rows_of(found: Sequence[Record]) -> list[Row]:
    """The benchmark rows in records; of what several processes timed, the first family's."""
    rows_of_case: dict[tuple[object, ...], Row] = {}
    for record in sorted(found, key=lambda r: r["family"]):
        for text in (record["result"] or {}).get("rows", ()):
            row = rows.parse(json.loads(text), record["item"])
            rows_of_case.setdefault((*row.case, row.provider), row)
    return rows.with_speedups(rows_of_case.values())


def write(state: State, out: Path) -> None:
    """Write every file that there is something for."""
    found = table.merged(state.of("table"))
    lines = []
    if found:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        place = "cpu" if os.environ.get("MK_GPU_STUB") == "1" else "cuda"
        made = tables.Table(
            tables.identity(hardware.current_device(place)),
            hardware.versions(),
            tuple(found),
            now,
            "python -m bench.gpu",
        )
        for folder in (state.folder, out):
            tables.save(made, folder / "table.json")
        lines += [*strategies(found), ""]
    measured = rows_of([*state.of("rows"), *state.of("training")])
    if measured:
        text = "".join(f"{row.to_json()}\n" for row in measured)
        write_text(out / "rows.jsonl", text)
        title = "Low-rank linear layers on a GPU"
        write_text(out / "report.html", report.html_report(measured, title=title))
    lines += criteria(measured, rows_of(state.of("first-use")))
    write_text(state.folder / "criteria.txt", "\n".join(lines) + "\n")
    profiles = "".join(p.read_text() for p in sorted(state.folder.glob("ncu-*.txt")))
    launched = [
        f"===== launches {r['item']}\n{json.dumps(r['result'], indent=1)}\n"
        for r in state.of("launches")
        if r["result"]
    ]
    if profiles or launched:
        write_text(out / "profile.txt", ("".join(launched) + profiles)[:_MOST])


def main(argv: list[str] | None = None) -> int:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    args = parser.parse_args(argv)
    accept = os.environ.get("MK_GPU_ACCEPT", "").split()
    write(State(args.state, args.commit, accept), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
