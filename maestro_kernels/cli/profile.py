"""`maestro-kernels profile`: latency over rank of layer sizes or of a model, with a report."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from maestro_kernels.cli import options
from maestro_kernels.cli.output import (
    about,
    plots_can_be_drawn,
    progress,
    repeats,
    say,
    show,
    user_error,
)
from maestro_kernels.files import write_text
from maestro_kernels.measure.wording import count, first_line

if TYPE_CHECKING:
    from maestro_kernels.search.drawings import Front
    from maestro_kernels.search.latencies import Profile

_DTYPES = ("float32", "bfloat16", "float16")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# About as many ranks as `profile` measures where it chooses them, and ways to run each.
_RANKS_CHOSEN, _CANDIDATES = 16, 6


def register(commands: Any) -> None:
    """Add the sub-command."""
    command = commands.add_parser(
        "profile",
        help="latency over rank of layers or of a model: table, plots and one HTML page",
        description="Measure dense layers, two matmuls and every strategy of ours over ranks, find "
        "steps and break-even, and, for a model with weights, the ranks that lose least at a "
        "speed-up. An interrupted run goes on where it stopped.",
        epilog="example: maestro-kernels profile 3072,768 768,3072 --rows 1,64  (or a Hugging Face "
        "folder or config.json, or package.module:model)",
    )
    command.add_argument(
        "target",
        nargs="+",
        help="out,in sizes N,K; a Hugging Face folder or config.json; or module:object",
    )
    command.add_argument(
        "--rows", type=options.numbers, default=[1, 64], metavar="M,M,...", help="default: 1,64"
    )
    command.add_argument(
        "--ranks",
        type=options.numbers,
        metavar="r,r,...",
        help="exactly these; default: coarse to fine",
    )
    command.add_argument("--dtype", choices=_DTYPES, help="default: the model's, or float32")
    options.add_device(command)
    options.add_threads(command)
    command.add_argument(
        "--strategy", metavar="NAME", help="low-rank strategy that counts, e.g. prepacked"
    )
    command.add_argument(
        "--speedup", type=options.positive, default=1.5, help="of the ranks to choose"
    )
    command.add_argument(
        "--seconds", type=options.positive, default=0.025, help="per candidate and mode"
    )
    command.add_argument("--fresh", action="store_true", help="measure again what was measured")
    command.add_argument(
        "--out", type=options.new_folder, default=Path("reports/profile"), metavar="DIR"
    )
    command.add_argument("--json", action="store_true", help="print the profile as JSON")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, save profile, plots and page, print the table and the answer."""
    from maestro_kernels import hardware
    from maestro_kernels.search import profile_report as report
    from maestro_kernels.search.layer_profile import profile
    from maestro_kernels.search.strategies import strategy_names

    options.use_threads(args)
    if args.strategy:
        known = strategy_names(torch.device(args.device).type)
        if args.strategy not in known:
            raise ValueError(
                f"profile: --strategy: expected one of {', '.join(known)}, got {args.strategy!r}"
            )
    draws = plots_can_be_drawn("profile")
    if Path(args.target[0]).exists() or ":" in args.target[0]:
        say("profile", f"reading {args.target[0]}")
    target = load_target(args.target)
    say("profile", _plan(args, target))
    with progress("profile") as advance:
        found = profile(
            target,
            args.ranks,
            args.rows,
            None if args.dtype is None else getattr(torch, args.dtype),
            args.device,
            resume=not args.fresh,
            seconds=args.seconds,
            progress=advance,
        )
    if args.strategy:
        found = found.using(args.strategy)
    front = _front(target, found, args.rows[-1], args.speedup)
    device = hardware.measured_device(args.device, found.dtype)
    args.out.mkdir(parents=True, exist_ok=True)
    found.save(args.out / "profile.json")
    pngs = []
    if draws:
        # Folders are named without where they lie.
        targets = [Path(t).name if Path(t).exists() else t for t in args.target]
        names = ("rows", "ranks", "dtype", "strategy", "device", "threads")
        command = repeats(args, *names, targets=targets)
        page = report.page(found, device=device, front=front, command=command)
        write_text(args.out / "report.html", page)
        pngs = report.save_pngs(found, args.out, device=device, front=front)
    if args.json:
        record = json.loads((args.out / "profile.json").read_text(encoding="utf-8"))
        if front is not None:
            record["allocation"] = front.chosen.to_dict()
        print(json.dumps(record))
        return 0
    show(report.terminal_table(found))
    print("\n".join(report.sentences(found)))
    if front is not None:
        print(f"\n{front.chosen}")
    print(f"\nprofile  {args.out / 'profile.json'}")
    if draws:
        print(f"plots    {count(len(pngs), 'PNG file')} in {args.out}")
        print(f"report   {args.out / 'report.html'}")
    return 0


def _plan(args: argparse.Namespace, target: Any) -> str:
    """What is about to be measured, and about how long it takes where nothing is known yet."""
    from maestro_kernels.search.targets import shapes_of

    sizes = len(shapes_of(target))
    ranks = len(args.ranks) if args.ranks else _RANKS_CHOSEN
    each = _CANDIDATES * ranks * args.seconds * 2
    where = count(torch.get_num_threads(), "thread") if args.device == "cpu" else args.device
    return (
        f"{count(sizes, 'layer size')} with {' and '.join(map(str, args.rows))} rows on {where}, "
        f"{about(sizes * len(args.rows) * (2 * each + 4))}; what an earlier run measured is kept"
    )


def load_target(texts: list[str]) -> Any:
    """Sizes, a Hugging Face model (without weights on the meta device), or a Python object.

    Raises:
        ValueError: neither of these, or an object that is no model.
    """
    if all(re.fullmatch(r"\d+,\d+", text) for text in texts):
        return [tuple(map(int, text.split(","))) for text in texts]
    if len(texts) > 1:
        raise ValueError(f"profile: target: expected sizes N,K or one model, got {texts}")
    (text,) = texts
    path = Path(text)
    if path.exists():
        return _hugging_face(path)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", text):
        return _python_object(text)
    raise ValueError(
        f"profile: target: expected N,K, a Hugging Face folder or config.json, or module:object, "
        f"got {text!r}"
    )


def _hugging_face(path: Path) -> nn.Module:
    from maestro_kernels.benchmark.encoder import quiet_transformers

    transformers = quiet_transformers("profile")
    folder = path if path.is_dir() else path.parent
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        if path.is_dir() and any(p for form in _WEIGHTS for p in folder.glob(form)):
            model = transformers.AutoModel.from_pretrained(path, local_files_only=True)
        else:
            with torch.device("meta"):
                model = transformers.AutoModel.from_config(config)
    except Exception as error:  # what damaged weights raise is up to each format's reader
        why = first_line(error, type(error).__name__)
        raise ValueError(
            f"profile: target: expected a Hugging Face configuration, got {path.name!r}: {why}"
        ) from None
    return model.eval()


def _python_object(text: str) -> Any:
    """The object, or what it returns where it is no module but can be called."""
    module_name, _, attribute = text.partition(":")
    # As `python -m` does: what lies in the current folder can be named.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"profile: target: expected {text!r} to exist, got {error}") from None
    except Exception as error:  # the user's code, at its import
        raise ValueError(f"profile: target: {text!r} {user_error(error)}") from error
    if callable(found) and not isinstance(found, nn.Module):
        try:
            found = found()
        except Exception as error:  # the user's code
            raise ValueError(f"profile: target: {text!r} {user_error(error)}") from error
    if not isinstance(found, nn.Module):
        raise ValueError(f"profile: target: expected a torch model, got {type(found).__name__}")
    return found.eval()


def _front(target: Any, profile: Profile, M: int, speedup: float) -> Front | None:
    """Accuracy against latency of a model with weights; each layer sees M rows once."""
    from maestro_kernels import search
    from maestro_kernels.search.drawings import Front
    from maestro_kernels.search.profile_report import curve_points

    if not isinstance(target, nn.Module) or any(p.is_meta for p in target.parameters()):
        return None
    names = {name for shape in profile.shapes for name in shape.names}
    include = lambda name, _: name in names  # noqa: E731
    sens = search.sensitivity(target, method="svd", include=include)
    layers = {name: replace(one, rows=(M,)) for name, one in sens.layers.items()}
    sens = replace(sens, layers=layers)

    def allocate(times: float, method: str) -> Any:
        return search.allocate(
            target, search.Speedup(times), sens, profile, method=method, include=include
        )

    try:
        chosen = allocate(speedup, "exact")
    except ValueError as error:
        print(f"no ranks are {speedup:g} times as fast: {error}", file=sys.stderr)
        return None
    dense = chosen.dense.ms
    curves = {"exact": curve_points([(dense / value, e) for value, e in chosen.trade_off])}
    for method in ("threshold", "uniform"):
        points = []
        for k in range(1, 9):
            try:
                found = allocate(1 + (speedup - 1) * k / 4, method).predicted
            except ValueError:  # out of this rule's reach
                continue
            points.append((found.ms, found.error))
        if points:
            curves[method] = curve_points(points)
    return Front(curves, chosen)
