"""The rows of a training run: one JSON object a line, append-only, cut back on resume.

Kinds, in `event`: "start" once, then "step" and "epoch". Report and plots are made of these rows.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["MetricsFile", "load_rows"]

SCHEMA = 1


class MetricsFile:
    """Append rows to a JSONL file whose length is known, so that a resume can cut off the rest.

    Args:
        path: the file; its folder is made.
        keep: bytes of an existing file to keep; 0 starts afresh.

    Raises:
        ValueError: the file is shorter than `keep`.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        have = path.stat().st_size if path.is_file() else 0
        if have < keep:
            raise ValueError(
                f"train: {path.name}: expected at least the {keep} bytes that the checkpoint "
                f"counted, got {have}; was the file changed?"
            )
        self._file = path.open("r+b" if path.is_file() else "w+b")
        self._file.truncate(keep)
        self._file.seek(keep)

    def append(self, **row: Any) -> None:
        """Write one row and hand it to the system."""
        # NaN is no JSON, and a row that nobody can parse is worse than an error here.
        self._file.write((json.dumps(row, allow_nan=False) + "\n").encode())
        self._file.flush()

    def sync(self) -> int:
        """Wait until everything is on disk; returns the length."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def load_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line that a kill cut short is left out.

    Raises:
        ValueError: another line is no row.
    """
    path = Path(path)
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    # What follows the last line break is empty, or not yet whole.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or "event" not in row:
            raise ValueError(f"load_rows: {path.name}:{number}: expected a row, got {line[:60]!r}")
        rows.append(row)
    return rows
