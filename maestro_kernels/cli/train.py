"""`maestro-kernels train`: LoD training from a configuration file, resumable, with a report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from maestro_kernels.cli import options
from maestro_kernels.cli.output import count, plots_can_be_drawn, progress, say
from maestro_kernels.files import write_text
from maestro_kernels.measure.records import load


def register(commands: Any) -> None:
    """Add the sub-command."""
    command = commands.add_parser(
        "train",
        help="train with sampled ranks and shrinking layers; metrics, plots, one HTML page",
        description="Train with LoD (Maestro): rank sampling, group lasso, progressive shrinking. "
        "CONFIG names a module:function, in its folder or installed, that returns a training.Task. "
        "A killed run goes on with --resume and ends with the same bits.",
        epilog="example: maestro-kernels train examples/digits.toml --out runs/digits",
    )
    command.add_argument("config", type=options.text_file, metavar="CONFIG", help=".toml or .json")
    out = "folder of the run; default: reports/train/CONFIG"
    command.add_argument("--out", type=options.new_folder, metavar="DIR", help=out)
    command.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in DIR, if there is one"
    )
    options.add_device(command)
    command.add_argument("--json", action="store_true", help="print the last row as JSON")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, report; 1 when training diverged."""
    from maestro_kernels.training.config import load_config
    from maestro_kernels.training.loop import NonFiniteLoss
    from maestro_kernels.training.report import html_report, verdict
    from maestro_kernels.training.runner import Run

    draws = plots_can_be_drawn("train")
    config = load_config(args.config)
    folder = args.out or Path("reports/train") / args.config.stem
    say("train", f"{config.task}, {count(config.train.epochs, 'epoch')}, in {folder}")
    job, resumed_at, stopped = Run(config, folder, args.config.parent, args.device), None, ""
    try:
        with progress("train") as advance:
            resumed_at = job.train(args.resume, advance)
    except NonFiniteLoss as error:
        stopped = f"{error}; the checkpoint of step {job.saved_step} is kept"
        say("train", stopped)
    rows = load(job.metrics, fn="train")
    paths = {"model": folder / "model", "metrics": job.metrics}
    if draws:
        paths["report"] = folder / "report.html"
        write_text(paths["report"], html_report(rows, stopped))
    if stopped:
        if draws:
            say("train", f"report {paths['report']}")
        return 1
    if args.json:
        files = {name: str(path) for name, path in paths.items()}
        print(json.dumps({**job.at.last, "resumed_at": resumed_at, **files}))
        return 0
    if resumed_at is not None:
        print(f"resumed after step {resumed_at}")
    print("\n".join([*verdict(rows), "", *(f"{name:<8} {path}" for name, path in paths.items())]))
    return 0
