"""The file behind a long measurement: results are appended, so that an interrupted run goes on.

One file per device, dtype and software; whatever of these changes, another file is meant.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from io import FileIO
from typing import Any, Generic, TypeVar

from maestro_kernels.files import cache_folder, locked_file, whole_lines, write_at

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

    Several processes may keep results under one identity. Where the folder cannot be written a
    warning says so, and results live as long as the object.
    """

    def __init__(self, folder: str, identity: dict[str, Any], parse: Callable[[Any], T]) -> None:
        self._header = json.dumps({"identity": identity}, sort_keys=True) + "\n"
        name = hashlib.sha256(self._header.strip().encode()).hexdigest()[:16]
        self.path = cache_folder() / folder / f"{name}.jsonl"
        self.items: list[T] = []
        self.done: set[str] = set()
        self._kept = True
        try:
            with locked_file(self.path) as file:
                if not self._read(file, parse):
                    self.items, self.done = [], set()
                    write_at(file, 0, self._header.encode())
        except OSError as error:
            # A place to keep results is no condition for measuring them.
            self._kept = False
            warnings.warn(
                f"measurements are not kept: {error} (MAESTRO_KERNELS_CACHE names another folder)",
                RuntimeWarning,
                stacklevel=2,
            )

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
        if not self._kept:
            return
        with locked_file(self.path) as file:
            end = whole_lines(file)
            # Somebody may have cleared the cache meanwhile.
            head = "" if end else self._header
            write_at(file, end, (head + "".join(f"{line}\n" for line in lines)).encode())

    def _read(self, file: FileIO, parse: Callable[[Any], T]) -> bool:
        """Read what earlier runs left; False where there is nothing that can be used."""
        # What a run that was cut off left behind the last whole line is nobody's.
        whole = whole_lines(file)
        file.seek(0)
        try:
            header, _, rest = file.read(whole).decode("utf-8").partition("\n")
            if header + "\n" != self._header:
                return False
            for line in rest.splitlines():
                record = json.loads(line)
                if "item" in record:
                    self.items.append(parse(record["item"]))
                else:
                    self.done.add(str(record["done"]))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            return False
        return True
