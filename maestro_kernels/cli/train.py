"""`maestro-kernels train`: LoD training from a configuration file, resumable, with a report."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

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
    command.add_argument("config", type=Path, metavar="CONFIG", help="a .toml or .json file")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the run; default: reports/train/CONFIG"
    )
    command.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in DIR, if there is one"
    )
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--json", action="store_true", help="print the last row as JSON")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, report; 1 when training diverged."""
    from maestro_kernels.training.config import load_config
    from maestro_kernels.training.loop import NonFiniteLoss
    from maestro_kernels.training.report import write_report

    # Found out before anything is trained: a missing plotter must not cost a run.
    if importlib.util.find_spec("matplotlib") is None:
        raise NotImplementedError(
            "train: report: expected matplotlib for the plots, got none; "
            "pip install 'maestro-kernels[bench]'"
        )
    config = load_config(args.config)
    folder = args.out or Path("reports/train") / args.config.stem
    try:
        result = _train(args, config, folder)
    except NonFiniteLoss as error:
        page = write_report(folder, stopped=str(error))
        print(f"maestro-kernels train: {error}\nreport  {page}", file=sys.stderr)
        return 1
    _finish(args, folder, result, write_report(folder))
    return 0


def _train(args: argparse.Namespace, config: TrainConfig, folder: Path) -> Result:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from maestro_kernels.training.runner import train

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    # On standard error, so that --json leaves standard output to the result.
    with Progress(*columns, console=Console(stderr=True), disable=args.json) as progress:
        task = progress.add_task(config.task, total=None, note="")
        note = ""

        def show(event: dict[str, Any]) -> None:
            nonlocal note
            if event.get("event") == "epoch":
                note = _note(event)
                return
            place = f"epoch {event['epoch'] + 1}/{config.train.epochs}"
            progress.update(
                task,
                description=place,
                total=event["steps"],
                completed=event["step"],
                note=f"training loss {event['loss']:.3f}{note}",
            )

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


def _finish(args: argparse.Namespace, folder: Path, result: Result, page: Path) -> None:
    from maestro_kernels.training.metrics import load_rows
    from maestro_kernels.training.report import verdict

    paths = {
        "model": folder / "model",
        "metrics": folder / "metrics.jsonl",
        "report": page,
    }
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
