"""pytest in a fork of a process that has imported torch: it begins seconds earlier than anew."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["ROOT", "pytest_run"]

ROOT = Path(__file__).resolve().parents[2]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "numpy", "pytest"])


def pytest_run(root: Path, tests: Iterable[str], limit: float | None = None) -> tuple[int, str]:
    """(exit status, output) of these tests in a copy; status -1 after the time limit."""
    log = root.with_suffix(".log")
    process = _FORKS.Process(target=_child, args=(str(root), str(log), list(tests)))
    process.start()
    process.join(limit)
    if process.exitcode is None:
        process.kill()
        process.join()
        return -1, ""
    return process.exitcode, log.read_text(encoding="utf-8", errors="replace")


def _child(root: str, log: str, tests: list[str]) -> None:
    with open(log, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(root)
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "300"}
    sys.dont_write_bytecode = True
    # The copy, and nothing of the checkout that this file lies in.
    sys.path[:] = [root, *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    options = ["-q", "-x", "-rfEs", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist"]
    import pytest

    status = int(pytest.main([*options, *tests]))
    sys.stdout.flush()
    # Threads that a test left must not keep the process.
    os._exit(status)
