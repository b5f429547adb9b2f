"""Here, before and between the calls: build what is carried, print the commands, take what came."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from bench.gpu.plan import CALLS
from bench.gpu.state import ARCHIVE, KERNELS

__all__ = ["CARRIED", "command", "commit", "register"]

ROOT = Path(__file__).resolve().parents[2]
# Ignored by git, so it is named among what is carried.
CARRIED = Path("out/gpu")
LIBRARY = "_native.so"
# Hopper alone: six architectures take six times as long to compile and are larger than may travel.
_TARGET = "90a"


def register(commands: Any) -> None:
    """Add the sub-commands."""
    one = commands.add_parser("prepare", help="build what is carried, and print the commands")
    one.add_argument(
        "--python",
        help="Python whose torch is that of the GPU machine; without it no library is carried",
    )
    one.add_argument("--target", default=_TARGET, help="architecture, as nvcc names it")
    one.set_defaults(run=_prepare)
    one = commands.add_parser("take", help="keep what a call left for the next one")
    one.add_argument("folder", type=Path, help="where its files came to lie")
    one.set_defaults(run=_take)


def commit() -> str:
    """The commit of this work tree, with -dirty behind it where that is so; "unknown" outside."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def command(number: int, commit: str) -> str:
    """What is run on the GPU machine, in the repository's root; OUT is set there."""
    return f'MAESTRO_KERNELS_COMMIT={commit} python3 -m bench.gpu {number} --out "$OUT"'


def _prepare(args: argparse.Namespace) -> int:
    folder = ROOT / CARRIED
    folder.mkdir(parents=True, exist_ok=True)
    if args.python:
        _build(args.python, args.target, folder / LIBRARY)
    found = folder / LIBRARY
    print(
        f"library: {f'{found.stat().st_size:,} bytes' if found.exists() else 'none, Triton alone'}"
    )
    print(f"carry: {CARRIED}")
    for number in CALLS:
        print(command(number, commit()))
    return 0


def _build(python: str, target: str, library: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "MK_NATIVE": "1",
            "MK_CMAKE_ARGS": f"-DMK_CUDA_GENCODE={target}",
        }
        options = ["--build-lib", f"{folder}/lib", "--build-temp", f"{folder}/temp"]
        subprocess.run(
            [python, "setup.py", "--quiet", "build_ext", *options],
            cwd=ROOT,
            env=environment,
            check=True,
        )
        shutil.copyfile(Path(folder, "lib", "maestro_kernels", LIBRARY), library)


def _take(args: argparse.Namespace) -> int:
    folder = ROOT / CARRIED
    folder.mkdir(parents=True, exist_ok=True)
    for name in (ARCHIVE, KERNELS):
        if (args.folder / name).exists():
            shutil.copyfile(args.folder / name, folder / name)
            print(f"{CARRIED / name}: {(folder / name).stat().st_size:,} bytes")
    return 0
