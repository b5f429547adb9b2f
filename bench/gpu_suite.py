"""The benchmark of the GPU acceptance run: `python -m bench.gpu_suite PART --out rows.jsonl`.

Cases are timed one by one and appended to the file as they end; a case whose rows are there already
is not timed again, so that a run can be cut off at any moment. The part "report" prints the
criteria.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from maestro_kernels import hardware
from maestro_kernels.benchmark import report, rows
from maestro_kernels.benchmark.cases import MODELS
from maestro_kernels.benchmark.providers import default_providers
from maestro_kernels.benchmark.run import Options, run_case
from maestro_kernels.benchmark.summary import Outcome, outcomes
from maestro_kernels.files import write_text
from maestro_kernels.measure.cases import Case
from maestro_kernels.measure.wording import geometric_mean

RANKS = (16, 32, 64, 127, 128, 200, 256, 512, 1024)
LAYERS = ("Llama-2-7B o", "Llama-3-8B up", "Llama-3-8B down")
QKV, GATE_UP = ("Llama-2-7B q/k/v", "Llama-3-8B q/k/v"), ("Llama-2-7B gate/up",)


def _cases(Ms: tuple[int, ...], ranks: tuple[int, ...], names: tuple[str, ...]) -> Iterator[Case]:
    for M, rank, name in itertools.product(Ms, ranks, names):
        yield MODELS[name].case(M, rank, dtype="bfloat16")


def decode(quick: bool) -> Iterator[Case]:
    """M up to 64."""
    Ms, ranks = ((1, 16), (64, 256)) if quick else ((1, 16, 64), RANKS)
    yield from _cases(Ms, ranks, LAYERS[:1] if quick else LAYERS)
    yield from _cases(Ms[:2], (64, 256), (*QKV[:1], *GATE_UP) if quick else (*QKV, *GATE_UP))


def middle(quick: bool) -> Iterator[Case]:
    """64 < M <= 4096."""
    Ms, ranks = ((256,), (128,)) if quick else ((128, 256, 1024, 4096), RANKS[1::2])
    yield from _cases(Ms, ranks, LAYERS[:1] if quick else LAYERS)
    yield from _cases((4096,), (128,) if quick else (64, 256), (*QKV, *GATE_UP))


def large(quick: bool) -> Iterator[Case]:
    """M of 8192 and beyond."""
    Ms, ranks = ((8192,), (128,)) if quick else ((8192, 16384, 32768), (64, 128, 256, 512))
    yield from _cases(Ms, ranks, LAYERS[:1] if quick else LAYERS[:2])


def training(quick: bool) -> Iterator[Case]:
    """Forward and backward with every gradient."""
    for M, rank in itertools.product((4096,) if quick else (1024, 4096, 8192), (128, 256)):
        yield MODELS[LAYERS[0]].case(M, rank, dtype="bfloat16", mode="training")


PARTS: dict[str, Callable[[bool], Iterator[Case]]] = {
    "decode": decode,
    "middle": middle,
    "large": large,
    "training": training,
}


@dataclass(frozen=True)
class Criterion:
    """What must hold: a ratio of outcomes, at least `target`, by geometric mean or for each."""

    text: str
    target: float
    ratio: Callable[[Outcome], float | None]
    applies: Callable[[Outcome], bool]
    worst: bool = False

    def value(self, found: list[Outcome]) -> float | None:
        values = [r for o in found if self.applies(o) and (r := self.ratio(o)) is not None]
        return (min(values) if self.worst else geometric_mean(values)) if values else None


def _single(o: Outcome) -> bool:
    return o.ours.op == "lod_linear" and o.ours.mode == "forward"


def _grouped(o: Outcome, name: str) -> bool:
    return o.ours.op == "lod_linear_grouped" and name in o.ours.source and o.ours.mode == "forward"


def criteria() -> list[Criterion]:
    """The speed part of the acceptance, device times (CUDA graph, cold)."""

    def two(o: Outcome) -> float | None:
        return o.ratio(o.two)

    def best(o: Outcome) -> float | None:
        return o.ratio(o.best)

    def roof(o: Outcome) -> float | None:
        return o.ours.roofline

    def rows_of(low: int, high: int) -> Callable[[Outcome], bool]:
        return lambda o: _single(o) and low <= o.ours.M <= high

    def group(name: str, low: int, high: int) -> Callable[[Outcome], bool]:
        return lambda o: _grouped(o, name) and low <= o.ours.M <= high

    top = 1 << 30
    return [
        Criterion("M <= 64, over two cuBLAS calls", 1.6, two, rows_of(1, 64)),
        Criterion("64 < M <= 4096, over the fastest baseline", 1.2, best, rows_of(65, 4096)),
        Criterion("M >= 8192, over the fastest baseline", 1.05, best, rows_of(8192, top)),
        Criterion("q/k/v, M <= 64, over separate calls", 2.5, two, group("q/k/v", 1, 64)),
        Criterion("gate/up, M <= 64, over separate calls", 1.6, two, group("gate/up", 1, 64)),
        Criterion("q/k/v, M = 4096", 1.6, two, group("q/k/v", 4096, 4096)),
        Criterion("gate/up, M = 4096", 1.05, two, group("gate/up", 4096, 4096)),
        Criterion("roofline at M = 8192", 0.80, roof, rows_of(8192, 8192), worst=True),
        Criterion("roofline beyond", 0.85, roof, rows_of(8193, top), worst=True),
        Criterion("training, over the fastest baseline", 1.25, best,
                  lambda o: o.ours.mode == "training"),
        Criterion("auto, worst case against two cuBLAS calls", 0.98, two, lambda o: True,
                  worst=True),
    ]  # fmt: skip


def check(found: list[Outcome]) -> list[str]:
    """One line per criterion."""
    # Device time counts: what a captured graph takes, with weights that come from memory.
    # A training step that cannot be captured counts as it is launched.
    cold = [o for o in found if o.ours.cache == "cold"]
    captured = {o.ours.case[:-1] for o in cold if o.ours.launch == "graph"}
    cold = [o for o in cold if o.ours.launch == "graph" or o.ours.case[:-1] not in captured]
    cold = [o for o in cold if o.ours.launch == "graph" or o.ours.mode == "training"]
    lines = []
    for c in criteria():
        value = c.value(cold)
        state = "no rows" if value is None else "met" if value >= c.target else "MISSED"
        number = "" if value is None else f"{value:.2f}"
        lines.append(f"{c.text:<46} at least {c.target:<5g} {number:>6}  {state}")
    return lines


def measure(
    part: str, out: Path, *, quick: bool, limit: float, device: str = "cuda", seconds: float = 0.4
) -> int:
    """Time the cases of a part that have no rows yet; 3 when time ran out before the last."""
    known = load_whole_lines(out)
    # What is appended later belongs to the same run as long as the commit does.
    commit = hardware.versions()["commit"]
    same = [r for r in known if r.versions.get("commit") == commit]
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    started = same[-1].run if same else now
    done = {row.case[:-2] for row in same}
    deadline = time.monotonic() + limit
    options = Options(
        device, seconds, compiled=not quick, command=f"python -m bench.gpu_suite {part}"
    )
    cases = list(PARTS[part](quick))
    record = hardware.measured_device(device, *dict.fromkeys(case.dtype for case in cases))
    for case in cases:
        if case_key(case) in done:
            continue
        if time.monotonic() > deadline:
            print(f"{part}: out of time before {case.id}")
            return 3
        found = run_case(case, default_providers(case), record, started, options)
        rows.append(out, found)
        for o in outcomes(found):
            if o.ours.cache == "cold":
                ratio = o.ratio(o.two) or 0.0
                print(f"{o.ours.launch:<6} {case.id:<60} {ratio:.2f}x two", flush=True)
    return 0


def case_key(case: Case) -> tuple[object, ...]:
    """The same as Row.case without cache and launch."""
    Ns, Rs, ranks = (tuple(getattr(s, name) for s in case.layers) for name in ("N", "R", "rank"))
    return (case.op, case.M, Ns, case.K, Rs, ranks, case.bias, case.dtype, case.mode)


def load_whole_lines(path: Path) -> list[rows.Row]:
    """The rows of a file; half a line at its end, left by a run that was cut off, is removed."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    return rows.load(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=(*PARTS, "report"))
    parser.add_argument("--out", type=Path, required=True, metavar="ROWS.jsonl")
    parser.add_argument("--page", type=Path, metavar="FILE", help="of report: the HTML page")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds")
    args = parser.parse_args(argv)
    if args.part == "report":
        found = rows.latest_run(load_whole_lines(args.out))
        if not found:
            print("report: expected rows, got none", file=sys.stderr)
            return 1
        if args.page is not None:
            title = "Low-rank linear layers on a GPU"
            write_text(args.page, report.html_report(found, title=title))
        print("\n".join(check(outcomes(found))))
        return 0
    if not torch.cuda.is_available():
        print("gpu_suite: expected a CUDA device, got none", file=sys.stderr)
        return 2
    return measure(args.part, args.out, quick=args.quick, limit=args.limit)


if __name__ == "__main__":
    sys.exit(main())
