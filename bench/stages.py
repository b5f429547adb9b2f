"""A job in parts: one that fails is told in a line and a log, and the others still run."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["Stages"]

T = TypeVar("T")


class Stages:
    """Runs the parts of a job, each guarded.

    Args:
        log: file for tracebacks; written anew at the first failure.
        say: what a line about each part goes to.

    Attributes:
        failed: one line per part that did not come to its end.
        seconds: what each part took.
    """

    def __init__(self, log: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.log, self._say = log, say
        self.failed: list[str] = []
        self.seconds: dict[str, float] = {}
        log.unlink(missing_ok=True)

    def run(self, name: str, part: Callable[..., T], *needs: object) -> T | None:
        """part(*needs), or None where it raises or one of its needs is None.

        Args:
            name: of the part, for people.
            part: does the work.
            needs: results of earlier parts.

        Raises:
            KeyboardInterrupt: and everything else that is no Exception ends the job.
        """
        if any(need is None for need in needs):
            self.failed.append(f"{name}: not run, because a part that it needs failed")
            return None
        self._say(name)
        start = time.perf_counter()
        try:
            return part(*needs)
        except Exception as error:
            text = str(error).strip() or type(error).__name__
            self.failed.append(
                f"{name}: failed with {type(error).__name__}: {text.splitlines()[0]}; "
                f"traceback in {self.log}"
            )
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"# {name}\n{traceback.format_exc()}\n")
            return None
        finally:
            self.seconds[name] = time.perf_counter() - start
