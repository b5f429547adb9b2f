"""`maestro-kernels bench`: time every path on layers of real models, with a report at the end."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from maestro_kernels.files import write_text

if TYPE_CHECKING:
    from maestro_kernels.benchmark.cases import Case
    from maestro_kernels.benchmark.rows import Row
    from maestro_kernels.benchmark.run import Options


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
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--threads", type=int, help="CPU threads torch uses")
    command.add_argument("--seconds", type=float, default=2.5, help="per case and cache state")
    command.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    command.add_argument("--out", type=Path, default=Path("reports/bench"), metavar="DIR")
    command.add_argument("--compare", type=Path, metavar="ROWS.jsonl", help="an earlier run")
    command.add_argument("--json", action="store_true", help="print the rows as JSON lines")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, save rows and report; 1 when a result of ours was wrong or something got slower."""
    from maestro_kernels.benchmark import report, rows
    from maestro_kernels.benchmark.run import Options
    from maestro_kernels.benchmark.summary import verdict

    # Found out before anything is measured: a missing plotter must not cost a run.
    if importlib.util.find_spec("matplotlib") is None:
        raise NotImplementedError(
            "bench: report: expected matplotlib for the plots, got none; "
            "pip install 'maestro-kernels[bench]'"
        )
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"bench: --threads: expected at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    cases = _cases(args)
    # Read before anything is measured: a damaged file must not cost a run.
    earlier = rows.latest_run(rows.load(args.compare)) if args.compare else None
    options = Options(
        args.device, args.seconds, compiled=not args.no_compile, command=_command(args)
    )
    measured = _measure(cases, options, show=not args.json)
    comparison = rows.compare(earlier, measured) if earlier else None
    rows.append(args.out / "rows.jsonl", measured)
    page = args.out / "report.html"
    write_text(page, report.html_report(measured, comparison=comparison))
    if args.json:
        print("\n".join(row.to_json() for row in measured))
    else:
        _print(report.terminal_table(measured), *verdict(measured))
        if comparison is not None:
            _print(report.comparison_table(comparison))
        print(f"\nrows    {args.out / 'rows.jsonl'}\nreport  {page}")
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


def _command(args: argparse.Namespace) -> str:
    """What repeats the measurement; where its files went is nobody else's business."""
    words = ["maestro-kernels", "bench"]
    for shape in args.shape or ():
        words += ["--shape", shape]
    if not args.shape:
        words += ["--suite", args.suite]
    for dtype in args.dtype or ():
        words += ["--dtype", dtype]
    if args.mode:
        words += ["--mode", args.mode]
    words += ["--device", args.device, "--seconds", f"{args.seconds:g}"]
    words += ["--threads", str(torch.get_num_threads())]
    return shlex.join([*words, *(["--no-compile"] if args.no_compile else [])])


def _measure(cases: list[Case], options: Options, *, show: bool) -> list[Row]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from maestro_kernels.benchmark.run import run as run_cases

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not show) as progress:
        task = progress.add_task("probing the device", total=len(cases))
        started = 0

        def on_case(case: Case) -> None:
            nonlocal started
            progress.update(task, description=f"{case.source}, M {case.M}", completed=started)
            started += 1

        measured = list(run_cases(cases, options, on_case=on_case))
        progress.update(task, description="done", completed=len(cases))
    return measured


def _print(*blocks: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        # In a log a table must not be folded to 80 columns.
        console = Console(highlight=False, width=160)
    for block in blocks:
        console.print(block)
