"""Records as lines of JSON: the one store of rows, of results so far and of a run's metrics.

Files only grow. What a writer that died left after the last whole line is nobody's: readers pass it
over, and the next writer puts its own in its place.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from maestro_kernels.files import (
    append_lines,
    cache_folder,
    locked_file,
    whole_lines,
    write_at,
    write_text,
)

T = TypeVar("T")


def line(record: Mapping[str, Any]) -> str:
    """A record as one line of JSON, without its end.

    Raises:
        ValueError: a NaN or an infinity, which no JSON has.
    """
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def append(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add records to the end of a file in one piece; several processes may add to one file.

    The file is made where there is none, folders too.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    append_lines(path, map(line, records))


def write(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Put records in the place of a file: all of them, or the file stays as it was.

    Folders are made.

    Raises:
        OSError: it cannot be written.
    """
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_text(place, "".join(f"{line(record)}\n" for record in records))


def load(path: str | Path, *, schema: int | None = None, fn: str = "load") -> list[dict[str, Any]]:
    """Every record of a file.

    Args:
        path: the file.
        schema: what every record says of its "schema"; None asks for nothing.
        fn: the public function that errors name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is no record, or of another schema; names file and line.
    """
    return [record for _, record in located(path, schema=schema, fn=fn)]


def located(
    path: str | Path, *, schema: int | None = None, fn: str = "load"
) -> list[tuple[str, dict[str, Any]]]:
    """As `load`, each record with where it stands, for what else may be wrong with it."""
    path = Path(path)
    found = list(_parsed(path.read_bytes(), f"{fn}: {path.name}"))
    for where, record in found:
        if schema is not None and record.get("schema") != schema:
            raise ValueError(f"{where}: schema: expected {schema}, got {record.get('schema')!r}")
    return found


def _parsed(content: bytes, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, record) of every line that is whole."""
    lines = content.split(b"\n")
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        where = f"{name}, line {number}"
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                return
            why = error.msg if isinstance(error, json.JSONDecodeError) else error
            start = text[:40].decode("utf-8", "replace")
            raise ValueError(f"{where}: expected a JSON object, got {start!r} ({why})") from None
        if not isinstance(record, dict):
            got = type(record).__name__
            raise ValueError(f"{where}: expected a JSON object, got {got}")
        yield where, record


def document(head: Mapping[str, Any], name: str, records: Iterable[Mapping[str, Any]]) -> str:
    """One JSON object, its records under `name` one a line so that differences can be read."""
    text = json.dumps(head, ensure_ascii=False, allow_nan=False, indent=1)
    lines = ",\n  ".join(map(line, records))
    return f'{text[:-2]},\n "{name}": [\n  {lines}\n ]\n}}\n'


def load_document(
    path: str | Path, fields: Iterable[str], *, schema: int, what: str, fn: str
) -> dict[str, Any]:
    """A file of one JSON object, with these fields and the schema that it names.

    Args:
        path: the file.
        fields: all that it has beside "schema", which is left out of the result.
        schema: what it has to be.
        what: what errors call it.
        fn: the public function that errors name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds something else; says what was expected and what came.
    """
    path = Path(path)
    where, expected = f"{fn}: {path.name}", {"schema", *fields}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected a JSON {what}, got {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected a JSON {what}, got {type(found).__name__}")
    if found.get("schema", schema) != schema:
        raise ValueError(f"{where}: schema: expected {schema}, got {found['schema']!r}")
    if found.keys() != expected:
        raise ValueError(
            f"{where}: expected the fields {sorted(expected)} of a {what}, got {sorted(found)}"
        )
    del found["schema"]
    return found


def checked(kind: type[T], record: Any, where: str) -> T:
    """A dataclass from its record: every field there, none else, each of its type.

    Lists become the tuples they were, and an integer will do for a float.

    Args:
        kind: the dataclass; its fields are numbers, texts, tuples, dicts, Literals or None.
        record: as `dataclasses.asdict` and JSON made it.
        where: what errors begin with.

    Raises:
        ValueError: names `where`, the field, what was expected and what came.
    """
    types_of = _fields(typing.cast(Any, kind))
    if not isinstance(record, dict) or record.keys() != types_of.keys():
        got = record.keys() if isinstance(record, dict) else set()
        missing, unknown = sorted(types_of.keys() - got), sorted(got - types_of.keys())
        raise ValueError(
            f"{where}: expected the fields {sorted(types_of)}, got missing {missing}, "
            f"unknown {unknown}"
        )
    values = {}
    for name, (spelled, wanted) in types_of.items():
        try:
            values[name] = _read(record[name], wanted)
        except TypeError:
            raise ValueError(f"{where}: {name}: expected {spelled}, got {record[name]!r}") from None
    return kind(**values)


@functools.cache
def _fields(kind: Any) -> dict[str, tuple[str, Any]]:
    """Field -> (its type in words, the type)."""
    hints = typing.get_type_hints(kind)
    return {f.name: (_in_words(hints[f.name]), hints[f.name]) for f in dataclasses.fields(kind)}


def _in_words(wanted: Any) -> str:
    if typing.get_origin(wanted) is Literal:
        return f"one of {typing.get_args(wanted)}"
    return str(wanted if typing.get_origin(wanted) else wanted.__name__)


def _read(value: Any, wanted: Any) -> Any:
    """The value as a field of this type holds it; TypeError where it is of another."""
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any or (origin is Literal and value in args):
        return value
    if origin in (types.UnionType, typing.Union):
        for one in args:
            try:
                return _read(value, one)
            except TypeError:
                continue
    elif origin is tuple and isinstance(value, list | tuple):
        if args[-1] is Ellipsis:
            return tuple(_read(v, args[0]) for v in value)
        if len(value) == len(args):
            return tuple(map(_read, value, args))
    elif origin is dict and isinstance(value, dict):
        return {_read(k, args[0]): _read(v, args[1]) for k, v in value.items()}
    elif (wanted is float and type(value) in (int, float)) or type(value) is wanted:
        return value
    raise TypeError


class Log:
    """A file with one writer whose length is known, so that a resume can cut off what came after.

    Args:
        path: the file; its folder is made.
        keep: bytes of an existing file to keep, as `sync` counted them; 0 starts afresh.
        fn: the public function that errors name.

    Raises:
        ValueError: the file is shorter than `keep`.
    """

    def __init__(self, path: Path, keep: int = 0, *, fn: str = "Log") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        have = path.stat().st_size if path.is_file() else 0
        if have < keep:
            raise ValueError(
                f"{fn}: {path.name}: expected at least the {keep} bytes that the checkpoint "
                f"counted, got {have}; was the file changed?"
            )
        self._file = path.open("r+b" if path.is_file() else "w+b")
        self._file.truncate(keep)
        self._file.seek(keep)

    def append(self, **record: Any) -> None:
        """Write one record and hand it to the system."""
        self._file.write(f"{line(record)}\n".encode())
        self._file.flush()

    def sync(self) -> int:
        """Wait until everything is on disk; returns the length."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Journal(Generic[T]):
    """Results measured so far under one identity, so that an interrupted measurement goes on.

    One file per identity: whatever of it changes, another file is meant.

    Args:
        folder: name of the folder in the user's cache folder.
        identity: everything a result depends on beside what it says itself; its hash is the name
            of the file.
        parse: a result, a dataclass instance, from its record; raises ValueError for anything else.
        quiet: say nothing where the folder cannot be written.

    Attributes:
        items: the results, oldest first.
        done: names of finished parts.

    Several processes may keep results under one identity. Where the folder cannot be written a
    warning says so, and results live as long as the object.
    """

    def __init__(
        self, folder: str, identity: dict[str, Any], parse: Callable[[Any], T], quiet: bool = False
    ) -> None:
        self._head = json.dumps({"identity": identity}, sort_keys=True)
        name = hashlib.sha256(self._head.encode()).hexdigest()[:16]
        self.path = cache_folder() / folder / f"{name}.jsonl"
        self.items: list[T] = []
        self.done: set[str] = set()
        self._kept = True
        try:
            with locked_file(self.path) as file:
                if not self._read(file, parse):
                    self.items, self.done = [], set()
                    write_at(file, 0, f"{self._head}\n".encode())
        except OSError as error:
            # A place to keep results is no condition for measuring them.
            self._kept = False
            if quiet:
                return
            warnings.warn(
                f"measurements are not kept: {error} (MAESTRO_KERNELS_CACHE names another folder)",
                RuntimeWarning,
                stacklevel=2,
            )

    def add(self, items: Iterable[T]) -> None:
        """Keep results, on disk too."""
        items = list(items)
        self.items += items
        self._append([{"item": dataclasses.asdict(item)} for item in items])  # type: ignore[call-overload]

    def finish(self, part: str) -> None:
        """Note that nothing is missing of a part."""
        self.done.add(part)
        self._append([{"done": part}])

    def _append(self, records: Iterable[dict[str, Any]]) -> None:
        if not self._kept:
            return
        with locked_file(self.path) as file:
            end = whole_lines(file)
            # Somebody may have cleared the cache meanwhile.
            lines = [*([] if end else [self._head]), *map(line, records)]
            write_at(file, end, "".join(f"{text}\n" for text in lines).encode())

    def _read(self, file: FileIO, parse: Callable[[Any], T]) -> bool:
        """Read what earlier runs left; False where there is nothing that can be used."""
        whole = whole_lines(file)
        file.seek(0)
        try:
            (_, head), *rest = _parsed(file.read(whole), self.path.name)
            if head != json.loads(self._head):
                return False
            for _, record in rest:
                if "item" in record:
                    self.items.append(parse(record["item"]))
                else:
                    self.done.add(str(record["done"]))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            return False
        return True
