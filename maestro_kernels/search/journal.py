"""The file behind a long measurement: results are appended, so that an interrupted run goes on.

One file per device, dtype and software; whatever of these changes, another file is meant.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, Generic, TypeVar

from maestro_kernels.files import cache_folder, write_text

__all__ = ["Journal"]

T = TypeVar("T")


class Journal(Generic[T]):
    """Results measured so far under one identity, as dataclass instances.

    Args:
        folder: name of the folder in the user's cache folder.
        identity: everything a result depends on beside what it says itself; its hash is the name
            of the file.
        parse: a result from its dictionary; raises ValueError for anything else.

    Attributes:
        items: the results, oldest first.
        done: names of finished parts.
    """

    def __init__(self, folder: str, identity: dict[str, Any], parse: Callable[[Any], T]) -> None:
        self._header = json.dumps({"identity": identity}, sort_keys=True)
        name = hashlib.sha256(self._header.encode()).hexdigest()[:16]
        self.path = cache_folder() / folder / f"{name}.jsonl"
        self.items: list[T] = []
        self.done: set[str] = set()
        if not self._read(parse):
            self.items, self.done = [], set()
            write_text(self.path, self._header + "\n")

    def add(self, items: Iterable[T]) -> None:
        """Keep results, on disk too."""
        items = list(items)
        self.items += items
        self._append([json.dumps({"item": asdict(item)}) for item in items])  # type: ignore[call-overload]

    def finish(self, part: str) -> None:
        """Note that nothing is missing of a part."""
        self.done.add(part)
        self._append([json.dumps({"done": part})])

    def _append(self, lines: list[str]) -> None:
        # One write: two processes that share the file do not mix their lines.
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))

    def _read(self, parse: Callable[[Any], T]) -> bool:
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
                if "item" in record:
                    self.items.append(parse(record["item"]))
                else:
                    self.done.add(str(record["done"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            return False
        if torn:
            write_text(self.path, "".join(part + "\n" for part in (header, lines) if part))
        return True
