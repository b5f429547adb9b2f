"""Values of options, checked while the command line is read: a wrong one must not cost a run."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch

# More threads than this for each CPU only wait for each other, and far more crash OpenMP.
_THREADS_PER_CPU = 4


def add_device(command: Any) -> None:
    """--device: cpu, cuda or cuda:INDEX, and it must be here."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    command.add_argument("--device", type=_device, default=default, help="cpu, cuda or cuda:INDEX")


def add_threads(command: Any, text: str = "CPU threads torch uses") -> None:
    """--threads."""
    command.add_argument("--threads", type=_threads, metavar="THREADS", help=text)


def use_threads(args: argparse.Namespace) -> None:
    """Do what --threads says, if it was given."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def numbers(text: str) -> list[int]:
    """Integers >= 1, separated by commas, sorted."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected integers >= 1 like 1,64, got {text!r}")
    return sorted({int(part) for part in parts})


def text_file(text: str) -> Path:
    """A file to read."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got the folder {text!r}")
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"expected a file, got no file {text!r}")
    if not os.access(path, os.R_OK):
        raise argparse.ArgumentTypeError(f"expected a file that can be read, got {text!r}")
    return path


def new_folder(text: str) -> Path:
    """A folder to write files to: there, or to be made."""
    path = Path(text)
    if path.is_dir():
        _check_writable(path, text)
    elif os.path.lexists(path):
        raise argparse.ArgumentTypeError(f"expected a folder, got the file {text!r}")
    else:
        _check_parent(path, text)
    return path


def new_file(text: str) -> Path:
    """A file to write, new or replaced."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got the folder {text!r}")
    _check_parent(path, text)
    return path


def _device(text: str) -> str:
    try:
        place = torch.device(text)
    except RuntimeError:
        place = torch.device("meta")
    if place.type not in ("cpu", "cuda") or (place.type == "cpu" and place.index):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:INDEX, got {text!r}")
    here = torch.cuda.device_count() if place.type == "cuda" else 1
    if (place.index or 0) >= here:
        seen = f"{here} CUDA device{'' if here == 1 else 's'}" if here else "no CUDA device"
        raise argparse.ArgumentTypeError(
            f"expected a device that is here, got {text!r}: torch sees {seen}"
        )
    return text


def _threads(text: str) -> int:
    most = _THREADS_PER_CPU * (os.cpu_count() or 1)
    if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"expected an integer from 1 to {most}, got {text!r}")
    return int(text)


def _check_parent(path: Path, text: str) -> None:
    """The nearest folder above that exists takes new entries."""
    there = path.absolute().parent
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"expected a path below folders, got {text!r}: {there}")
    _check_writable(there, text)


def _check_writable(folder: Path, text: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(
            f"expected a path that can be written, got {text!r}: no permission for {folder}"
        )
