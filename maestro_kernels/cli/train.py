"""`maestro-kernels train`: LoD training from a configuration file, resumable, with a report."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maestro_kernels.cli import options
from maestro_kernels.cli.output import plots_can_be_drawn, progress, say
from maestro_kernels.files import write_text
from maestro_kernels.measure import plots
from maestro_kernels.measure import report as html
from maestro_kernels.measure.records import load
from maestro_kernels.measure.wording import count

Rows = Sequence[Mapping[str, Any]]
_DRAWN = {"loss": "Loss at sampled ranks", "penalty": "λ · penalty", "weights": "Weights deployed"}


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


def verdict(rows: Rows) -> list[str]:
    """What the run came to, in plain words."""
    epochs = [row for row in rows if row["event"] == "epoch"]
    if not epochs:
        return ["No epoch was finished."]
    last, layers, planned = epochs[-1], rows[0]["layers"], rows[0]["config"]["train"]["epochs"]
    share = f"{last['weights'] / last['dense_weights']:.0%} of the dense weights are left"
    figures = ", ".join(
        f"{name} not finite" if value is None else f"{name} {value:.4g}"
        for name, value in last["metrics"].items()
    )
    tested = f", with test {figures}" if figures else ""
    lines = [f"After {last['epoch']} of {planned} epochs {share}{tested}."]
    kept = {name: rank / layers[name]["rank"] for name, rank in last["ranks"].items()}
    least, lost = min(kept, key=kept.__getitem__), sum(part < 1 for part in kept.values())
    if not lost:
        return [*lines, "No layer lost rank: the penalty is too weak for the threshold, or off."]
    most = f"{least!r}, from {layers[least]['rank']} to {last['ranks'][least]}"
    return [*lines, f"{lost} of {len(kept)} factorised layers lost rank; most of all {most}."]


def html_report(rows: Rows, stopped: str = "") -> str:
    """The page of one run, from the rows of its metrics; `stopped` is why it ended early."""
    start = rows[0]
    facts = {**start["config"], "device": start["device"], "versions": start["versions"]}
    blocks = [
        *([html.warning(f"Stopped early: {stopped}")] if stopped else []),
        html.verdict(verdict(rows)),
        html.section("How it went", html.grid(*_drawings(rows))),
        html.facts("Configuration and versions", {k: json.dumps(v) for k, v in facts.items()}),
    ]
    footer = "Written by maestro-kernels train; every figure comes from metrics.jsonl."
    return html.page(f"LoD training: {start['config']['task']}", blocks, footer=footer)


def _drawings(rows: Rows) -> list[html.Html]:
    curves: dict[str, Any] = defaultdict(lambda: defaultdict(list))
    for row in rows[1:]:
        figures = {title: row.get(key) for key, title in _DRAWN.items()}
        figures |= {f"Test {name}": value for name, value in row.get("metrics", {}).items()}
        for title, value in figures.items():
            if value is not None:
                curves[title][title].append((row["step"], value))
        for name, rank in row.get("ranks", {}).items():
            curves["Rank of layers"][name].append((row["step"], rank))
    drawn = (plots.curves(lines, title=title, xlabel="step") for title, lines in curves.items())
    return [html.figure(drawing) for drawings in drawn for drawing in drawings]
