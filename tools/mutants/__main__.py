"""Plant every fault of faults/ in a copy of the checkout and run the test that must catch it.

    python -m tools.mutants [--only NAME ...] [--list] [--jobs N]

Exit status: 0 every fault was caught; 1 one survived, no longer applies, or its test is broken.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tools.mutants.fault import Fault
from tools.mutants.faults import FAULTS
from tools.mutants.forked import ROOT, pytest_run

COPIED = ("maestro_kernels", "csrc", "tests", "tools", "bench", "examples", "docs")
TIMEOUT = 300.0
# Not an assertion about what the fault does, but a fault that could never run.
BROKEN = ("ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError", "NameError")


def copy_of_checkout(folder: Path) -> Path:
    """A copy that may be broken; byte code stays behind, because it outlives a quick change."""
    unwanted = shutil.ignore_patterns("__pycache__", "results", ".*")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for file in (p for p in ROOT.iterdir() if p.is_file() and not p.name.startswith(".")):
        shutil.copy(file, folder)
    return folder


def mutated(fault: Fault, root: Path) -> str:
    """The text of the file with the fault in it.

    Raises:
        ValueError: there is no such file, or not exactly one such place.
    """
    file = root / fault.file
    if not file.is_file():
        raise ValueError(f"{fault.name}: file: expected {fault.file}, got no such file")
    text = file.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise ValueError(
            f"{fault.name}: old: expected exactly once in {fault.file}, got "
            f"{text.count(fault.old)} times: {fault.old!r}"
        )
    return text.replace(fault.old, fault.new)


def verdict(status: int, output: str) -> tuple[bool, str]:
    """(whether the fault was caught, how it showed)."""
    if status == 0:
        return False, "SURVIVED" if " passed" in output else "NOT RUN: the test was skipped"
    line = re.search(r"^(?:FAILED|ERROR) \S.*? - (.*)$", output, re.MULTILINE)
    reason = line[1] if line else (output.strip().splitlines() or ["nothing"])[-1]
    if status == -1:
        return False, f"BROKEN: no end within {TIMEOUT:.0f} s"
    if status != 1 or reason.startswith(BROKEN):
        return False, f"BROKEN: pytest ended with {status}: {reason}"
    return True, reason


def tried(fault: Fault, copies: SimpleQueue[Path]) -> tuple[bool, str, float]:
    """Plant one fault in a free copy, run its test, take the fault out again."""
    root, started = copies.get(), time.monotonic()
    file = root / fault.file
    try:
        try:
            broken = mutated(fault, root)
        except ValueError as error:
            return False, f"DOES NOT APPLY: {error}", 0.0
        whole = file.read_bytes()
        file.write_text(broken, encoding="utf-8")
        try:
            caught, how = verdict(*pytest_run(root, [fault.test], TIMEOUT))
        finally:
            file.write_bytes(whole)
        return caught, how, time.monotonic() - started
    finally:
        copies.put(root)


def main(argv: Sequence[str] | None = None) -> int:
    """Try the faults, print a table."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults")
    parser.add_argument("--list", action="store_true", help="print the faults and run nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    unknown = set(args.only or ()) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"--only: expected names that --list prints, got {', '.join(sorted(unknown))}")
    faults = [fault for fault in FAULTS if not args.only or fault.name in args.only]
    if args.list:
        for fault in faults:
            print(f"{fault.name}: {fault.harm}\n    {fault.file}\n    {fault.test}")
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: SimpleQueue[Path] = SimpleQueue()
        for k in range(max(1, min(args.jobs, len(faults)))):
            (Path(folder) / str(k)).mkdir()
            copies.put(copy_of_checkout(Path(folder) / str(k)))
        whole = copies.get()
        status, output = pytest_run(whole, sorted({fault.test for fault in faults}))
        copies.put(whole)
        if status != 0:
            print(f"{output}\nthe tests must pass before a fault is planted", file=sys.stderr)
            return 1
        with ThreadPoolExecutor(copies.qsize()) as pool:
            missed = 0
            for fault, found in zip(
                faults, pool.map(lambda f: tried(f, copies), faults), strict=True
            ):
                caught, how, seconds = found
                missed += not caught
                mark = "caught" if caught else "MISSED"
                print(f"{mark}  {seconds:5.1f} s  {fault.name:<40} {how[:150]}", flush=True)
    print(f"{len(faults) - missed} of {len(faults)} caught in {time.monotonic() - started:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
