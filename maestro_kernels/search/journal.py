"""The file behind a profile while it is measured: points are appended, so that a run can go on.

One file per device, dtype and software; whatever of these changes, another file is meant.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from maestro_kernels.files import cache_folder, write_text
from maestro_kernels.search.measure import Point, point_from

__all__ = ["Journal"]


class Journal:
    """Points measured so far under one identity.

    Args:
        identity: everything that a time depends on beside size and strategy.
        path: the file; None for the user's cache folder, with the identity's hash for a name.
    """

    def __init__(self, identity: dict[str, Any], path: Path | None = None) -> None:
        self._header = json.dumps({"identity": identity}, sort_keys=True)
        name = hashlib.sha256(self._header.encode()).hexdigest()[:16]
        self.path = path or cache_folder() / "profiles" / f"{name}.jsonl"
        self.points: list[Point] = []
        self.done: set[str] = set()
        if not self._read():
            write_text(self.path, self._header + "\n")

    def add(self, points: Iterable[Point]) -> None:
        """Keep points, on disk too."""
        points = list(points)
        self.points += points
        self._append([json.dumps({"point": asdict(p)}) for p in points])

    def finish(self, sweep: str) -> None:
        """Note that nothing is missing of a sweep."""
        self.done.add(sweep)
        self._append([json.dumps({"done": sweep})])

    def _append(self, lines: list[str]) -> None:
        # One write: two processes that share the file do not mix their lines.
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))

    def _read(self) -> bool:
        """Read what an earlier run left; False where there is nothing that can be used."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            return False
        header, _, rest = text.partition("\n")
        # An interrupted write leaves half a line at the end, which is nobody's.
        lines, _, torn = rest.rpartition("\n")
        if header != self._header:
            return False
        try:
            for line in lines.splitlines():
                record = json.loads(line)
                if "point" in record:
                    self.points.append(point_from(record["point"]))
                else:
                    self.done.add(str(record["done"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            self.points, self.done = [], set()
            return False
        if torn:
            write_text(self.path, "".join(part + "\n" for part in (header, lines) if part))
        return True
