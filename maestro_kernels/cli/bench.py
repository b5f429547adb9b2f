"""`maestro-kernels bench`: time every path on layers of real models, with a report at the end."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from maestro_kernels.cli import options
from maestro_kernels.cli.output import about, plots_can_be_drawn, progress, repeats, say, show
from maestro_kernels.files import write_text
from maestro_kernels.measure.wording import count

if TYPE_CHECKING:
    from maestro_kernels.benchmark.rows import Row
    from maestro_kernels.benchmark.run import Options
    from maestro_kernels.measure.cases import Case


def register(commands: Any) -> None:
    """Add the sub-command."""
    command = commands.add_parser(
        "bench",
        help="time dense, two matmuls and every path of ours; table, plots and one HTML page",
        description="Time dense layers, two matmuls and every path of ours against each other. "
        "Nothing is timed before it passed its accuracy check.",
        epilog="example: maestro-kernels bench --shape 16,4096,4096,256 --dtype bfloat16",
    )
    command.add_argument("--suite", choices=("quick", "model", "full"), default="quick")
    command.add_argument(
        "--shape",
        action="append",
        metavar="M,N,K,R[,RANK]",
        help="time this shape instead of a suite; may be given several times",
    )
    command.add_argument(
        "--dtype", action="append", choices=("float32", "bfloat16", "float16"), help="repeatable"
    )
    command.add_argument("--mode", choices=("forward", "training"), help="default: as in the suite")
    options.add_device(command)
    options.add_threads(command)
    command.add_argument(
        "--seconds", type=options.positive, default=2.5, help="per case and cache state"
    )
    command.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    command.add_argument(
        "--out", type=options.new_folder, default=Path("reports/bench"), metavar="DIR"
    )
    command.add_argument(
        "--compare", type=options.text_file, metavar="ROWS.jsonl", help="an earlier run"
    )
    command.add_argument("--json", action="store_true", help="print the rows as JSON lines")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, save rows and report; 1 when a result of ours was wrong or something got slower."""
    from maestro_kernels.benchmark import report, rows
    from maestro_kernels.benchmark.run import Options
    from maestro_kernels.benchmark.summary import verdict

    options.use_threads(args)
    cases = _cases(args)
    # Read before anything is measured: a damaged file must not cost a run.
    earlier = rows.latest_run(rows.load(args.compare)) if args.compare else None
    which = "shape" if args.shape else "suite"
    command = repeats(args, which, "dtype", "mode", "device", "seconds", "threads", "no_compile")
    how = Options(args.device, args.seconds, compiled=not args.no_compile, command=command)
    draws = plots_can_be_drawn("bench")
    say("bench", _plan(cases, how))
    measured = _measure(cases, how)
    comparison = rows.compare(earlier, measured) if earlier else None
    rows.append(args.out / "rows.jsonl", measured)
    files = {"rows": args.out / "rows.jsonl"}
    if draws:
        files["report"] = args.out / "report.html"
        write_text(files["report"], report.html_report(measured, comparison=comparison))
    if args.json:
        print("\n".join(row.to_json() for row in measured))
    else:
        show(report.terminal_table(measured), *verdict(measured), width=160)
        if comparison is not None:
            show(report.comparison_table(comparison), width=160)
        print("\n" + "\n".join(f"{name:<7} {path}" for name, path in files.items()))
    broken = [r for r in measured if r.family == "ours" and r.gate in ("failed", "error")]
    for row in broken:
        print(f"{row.provider} on {row.shape} {row.dtype}: {row.reason}", file=sys.stderr)
    return int(bool(broken or (comparison and comparison.regressions)))


def _cases(args: argparse.Namespace) -> list[Case]:
    from maestro_kernels.benchmark.cases import parse_shape, suite

    device_type = torch.device(args.device).type
    if not args.shape:
        modes = [args.mode] if args.mode else None
        return suite(args.suite, dtypes=args.dtype, modes=modes, device_type=device_type)
    return [
        parse_shape(text, dtype=dtype, mode=args.mode or "forward")
        for text in args.shape
        for dtype in args.dtype or ["float32"]
    ]


def _plan(cases: list[Case], how: Options) -> str:
    """What is about to run and for how long: samples, copies for cold caches, compilation."""
    from maestro_kernels.measure.timing import launch_modes

    sampling = how.seconds * len(how.caches) * len(launch_modes(how.device))
    each = 1.5 * sampling + 2 + (8 if how.compiled else 0)
    where = count(torch.get_num_threads(), "thread") if how.device == "cpu" else how.device
    return f"{count(len(cases), 'case')} on {where}, {about(len(cases) * each)}"


def _measure(cases: list[Case], how: Options) -> list[Row]:
    from maestro_kernels.benchmark.run import run as run_cases

    with progress("bench") as advance:
        advance("probing the device", 0, len(cases))
        started = 0

        def on_case(case: Case) -> None:
            nonlocal started
            advance(f"{case.source}, M {case.M}", started, len(cases))
            started += 1

        measured = list(run_cases(cases, how, on_case=on_case))
        advance("done", len(cases), len(cases))
    return measured
