"""`maestro-kernels train`: LoD training from a configuration file, resumable, with a report."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maestro_kernels.cli import options
from maestro_kernels.cli.output import about, count, plots_can_be_drawn, progress, say

if TYPE_CHECKING:
    from maestro_kernels.training.config import TrainConfig
    from maestro_kernels.training.runner import Result


def register(commands: Any) -> None:
    """Add the sub-command."""
    command = commands.add_parser(
        "train",
        help="train with sampled ranks and shrinking layers; metrics, plots, one HTML page",
        description=(
            "Train a task with LoD (Maestro): rank sampling, group lasso and progressive "
            "shrinking. CONFIG names a built-in task (digits) or a module:function of yours that "
            "returns a training.Task. A killed run goes on with --resume and ends with the same "
            "bits."
        ),
        epilog="example: maestro-kernels train examples/digits.toml --out runs/digits",
    )
    command.add_argument(
        "config", type=options.text_file, metavar="CONFIG", help="a .toml or .json file"
    )
    command.add_argument(
        "--out",
        type=options.new_folder,
        metavar="DIR",
        help="folder of the run; default: reports/train/CONFIG",
    )
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
    from maestro_kernels.training.report import write_report

    draws = plots_can_be_drawn("train")
    config = load_config(args.config)
    folder = args.out or Path("reports/train") / args.config.stem
    try:
        result = _train(args, config, folder)
    except NonFiniteLoss as error:
        say("train", str(error))
        if draws:
            print(f"report  {write_report(folder, stopped=str(error))}", file=sys.stderr)
        return 1
    _finish(args, folder, result, write_report(folder) if draws else None)
    return 0


def _train(args: argparse.Namespace, config: TrainConfig, folder: Path) -> Result:
    from maestro_kernels.training.runner import train

    epochs = config.train.epochs
    say("train", f"{config.task}, {count(epochs, 'epoch')}, in {folder}")
    with progress("train") as advance:
        note, first, told = "", None, False

        def show(event: dict[str, Any]) -> None:
            nonlocal note, first, told
            if event.get("event") == "epoch":
                note = _note(event)
                return
            now, steps = time.monotonic(), event["steps"]
            done = event["epoch"] * steps + event["step"]
            first = first or (now, done)
            if not told and now - first[0] > 1:
                # A second of steps says how long the rest takes; no earlier figure could.
                told = True
                rest = (now - first[0]) * (epochs * steps - done) / (done - first[1])
                say("train", f"{count(steps, 'step')} an epoch, {about(rest)} left")
            place = f"epoch {event['epoch'] + 1}/{epochs}"
            advance(f"{place}, training loss {event['loss']:.3f}{note}", done, epochs * steps)

        beside = args.config.resolve().parent
        return train(
            config,
            folder,
            resume=args.resume,
            device=args.device,
            beside=beside,
            progress=show,
        )


def _note(row: dict[str, Any]) -> str:
    figures = [f"{name} {v:.3g}" for name, v in row["metrics"].items() if v is not None][:1]
    return ", ".join(["", *figures, f"weights {row['weights'] / row['dense_weights']:.0%}"])


def _finish(args: argparse.Namespace, folder: Path, result: Result, page: Path | None) -> None:
    from maestro_kernels.training.metrics import load_rows
    from maestro_kernels.training.report import verdict

    paths = {
        "model": folder / "model",
        "metrics": folder / "metrics.jsonl",
    }
    if page is not None:
        paths["report"] = page
    if args.json:
        row = {key: value for key, value in result.last.items() if key != "event"}
        files = {name: str(path) for name, path in paths.items()}
        print(json.dumps({**row, "resumed_at": result.resumed_at, **files}))
        return
    if result.resumed_at is not None:
        print(f"resumed after step {result.resumed_at}")
    print("\n".join(verdict(load_rows(paths["metrics"]))))
    print()
    for name, path in paths.items():
        print(f"{name:<8} {path}")
