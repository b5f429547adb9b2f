"""`maestro-kernels tune`: measure this device's table, which `auto` then follows."""

from __future__ import annotations

import argparse
import itertools
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from maestro_kernels import dispatch, hardware, tables
from maestro_kernels.cli import options
from maestro_kernels.cli.output import about, progress, repeats, say, show
from maestro_kernels.measure.wording import count

if TYPE_CHECKING:
    from maestro_kernels.tables import Row, Table

_DTYPES = ("float32", "bfloat16", "float16")
# Strategies times modes of a call, with what lies between samples.
_MODES = {"cpu": 40, "cuda": 80}


def register(commands: Any) -> None:
    """Add the sub-command."""
    command = commands.add_parser(
        "tune",
        help="measure this device's table, which auto then follows",
        description="Time every strategy against two matmuls and write the table of this device. "
        "auto prefers it to the one that ships with the package; explain names its row. What was "
        "measured by an interrupted run is not measured again.",
        epilog="example: maestro-kernels tune --shape 768,768 --shape 3072,768 --dtype float32",
    )
    options.add_device(command)
    command.add_argument("--dtype", action="append", choices=_DTYPES, help="repeatable")
    command.add_argument(
        "--shape", action="append", metavar="N,K", help="tune this layer size; repeatable"
    )
    command.add_argument(
        "--group",
        action="append",
        metavar="N+N+N,K",
        help="tune layers that read one input, like 768+768+768,768; repeatable",
    )
    command.add_argument(
        "--rows", type=options.numbers, metavar="M,M,...", help="rows of x to measure"
    )
    command.add_argument("--quick", action="store_true", help="every second M and rank")
    options.add_threads(command, "CPU threads torch uses; part of the device")
    command.add_argument(
        "--seconds", type=options.positive, default=0.03, help="per strategy and mode"
    )
    command.add_argument(
        "--limit",
        type=options.positive,
        default=math.inf,
        metavar="SECONDS",
        help="stop then, with what was measured; the next call goes on (exit status 3)",
    )
    command.add_argument(
        "--out", type=options.new_file, metavar="FILE", help="not where auto looks"
    )
    command.add_argument("--fresh", action="store_true", help="measure again what was measured")
    command.add_argument("--json", action="store_true", help="print the table as JSON")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, validate, write, and say what auto will do differently."""
    from maestro_kernels.search import tuning

    options.use_threads(args)
    shapes = [_sizes("--shape", text, 1) for text in args.shape or ()]
    groups = [_sizes("--group", text, 2) for text in args.group or ()]
    chosen = bool(args.shape or args.group)
    plans = []
    for name in args.dtype or (["bfloat16"] if "cuda" in args.device else ["float32"]):
        plan = tuning.plan(
            args.device,
            getattr(torch, name),
            shapes=[(Ns[0], K) for Ns, K in shapes] if chosen else None,
            groups=groups if chosen else None,
            rows=args.rows,
            quick=args.quick,
        )
        if not plan.cases:
            raise ValueError(f"tune: --shape: expected calls that can be measured here, got {plan}")
        plans.append(plan)
    wanted = sum(len(plan.cases) for plan in plans)
    say("tune", _announcement(args, wanted))
    parts: list[Table] = []
    names = ("device", "dtype", "shape", "group", "rows", "quick", "threads", "seconds")
    command, begin = repeats(args, *names), time.monotonic()
    for plan in plans:
        with progress("tune") as advance:
            parts.append(
                tuning.tune(
                    plan,
                    seconds=args.seconds,
                    cache=not args.fresh,
                    command=command,
                    limit=args.limit - (time.monotonic() - begin),
                    progress=advance,
                )
            )
    rows = sum(len(part.rows) for part in parts)
    if not rows:
        raise ValueError(f"tune: --limit: expected time for one call, got {args.limit:g}")
    device = hardware.current_device(args.device)
    path = args.out or tables.user_path(device)
    table = _merged(parts, path, device)
    tables.save(table, path)
    dispatch.forget()
    if args.json:
        print(table.to_json(), end="")
    else:
        show(_grid(table), width=120)
        rest = wanted - rows
        left = f"; {count(rest, 'call')} {'is' if rest == 1 else 'are'} left" if rest else ""
        print(f"\n{count(len(table.rows), 'row')} in {path}{left}")
    return 0 if rows == wanted else 3


def _merged(parts: list[Table], path: Path, device: hardware.Device) -> Table:
    """The new rows, and those of an earlier table of this device and these versions beside them."""
    rows = {str(row) + str(row.aligned): row for part in parts for row in part.rows}
    try:
        earlier = tables.load(path, device)
    except (FileNotFoundError, ValueError):
        earlier = None
    here = hardware.libraries()
    if earlier and all(earlier.versions.get(name) == here[name] for name in here):
        rows = {str(row) + str(row.aligned): row for row in earlier.rows} | rows
    last = parts[-1]
    return tables.Table(
        last.device, last.versions, tuple(rows.values()), last.created, last.command
    )


def _sizes(option: str, text: str, least: int) -> tuple[tuple[int, ...], int]:
    """N,K or N+N,K as ((N, ...), K)."""
    try:
        left, right = text.split(",")
        Ns, K = tuple(int(n) for n in left.split("+")), int(right)
    except ValueError:
        Ns, K = (), 0
    if len(Ns) < least or (least == 1 and len(Ns) > 1) or min((*Ns, K)) < 2:
        form = "N,K" if least == 1 else "N+N,K"
        raise ValueError(f"tune: {option}: expected {form} with sizes >= 2, got {text!r}")
    return Ns, K


def _announcement(args: argparse.Namespace, cases: int) -> str:
    """What is about to be measured, and about how long it takes where nothing is known yet."""
    kind = torch.device(args.device).type
    where = count(torch.get_num_threads(), "thread") if kind == "cpu" else args.device
    seconds = cases * (_MODES[kind] * args.seconds + 1)
    limit = f", at most {args.limit:g} s" if math.isfinite(args.limit) else ""
    return (
        f"{count(cases, 'call')} on {where}, {about(seconds)}{limit}; what an earlier run "
        "measured is kept"
    )


def _grid(table: Table) -> Any:
    from maestro_kernels.measure import report

    modes = {mode: _in_words(mode) for mode in _modes(table)}
    headers = ("rows · in→rank→out", *modes.values(), "prepack")
    lines = []
    for row in table.rows:
        cells = [_best(row, mode) for mode in modes]
        lines.append((str(row), *cells, row.fastest_form or ""))
    return report.terminal_table("what auto runs now, against two matmuls", headers, lines)


def _modes(table: Table) -> list[tables.Mode]:
    """The modes that some row has times of."""
    every = itertools.product((False, True), repeat=2)
    modes = [tables.Mode(training, captured) for captured, training in every]
    return [mode for mode in modes if any(row.strategies(mode) for row in table.rows)]


def _in_words(mode: tables.Mode) -> str:
    return ("training" if mode.training else "auto") + (", captured" if mode.captured else "")


def _best(row: Row, mode: tables.Mode) -> str:
    """What runs, and how many times as fast it is; two matmuls where nothing beats them."""
    names = row.strategies(mode)
    winners = [s for s in names if row.wins(s, mode) and not s.startswith("packed: ")]
    if not winners:
        return tables.BASELINE if names else ""
    best = max(winners, key=lambda s: row.speedup(s, mode))
    return f"{best} {row.speedup(best, mode):.2f}×"
