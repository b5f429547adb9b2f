"""The folder beside the result where a compression keeps what it has finished, in case of a kill.

Every file of a stage has a key that stands for all it depends on; a file with another key counts as
none. Nothing that another program put there is removed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from maestro_kernels.files import kind_of, replacing, sole_user, write_text

_FN = "compress"
_MARK = "maestro-kernels-compress.json"
_LOCK = ".lock"
_KEY = "maestro_kernels.compress"


class Work:
    """Finished stages in a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors (mapped, not yet read) and values of a stage; None unless it has this key."""
        from safetensors import SafetensorError, safe_open

        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                found = json.loads((file.metadata() or {}).get(_KEY, "{}"))
                if found.get("key") != key:
                    return None
                return {k: file.get_tensor(k) for k in file.keys()}, found["values"]  # noqa: SIM118
        except (SafetensorError, ValueError, KeyError):
            # Damaged on disk: made again.
            return None

    def write(
        self, name: str, key: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> None:
        """Finish a stage."""
        from safetensors.torch import save

        held = {k: tensor.detach().contiguous() for k, tensor in tensors.items()}
        text = json.dumps({"key": key, "values": dict(values)})
        with replacing(self._path(name)) as file:
            file.write(save(held, metadata={_KEY: text}))

    def clear(self) -> None:
        """Remove all stages; the folder too, where nothing else is in it."""
        for path in [*self.folder.glob("*.stage"), self.folder / _MARK, self.folder / _LOCK]:
            with suppress(FileNotFoundError):
                path.unlink()
        with suppress(OSError):
            self.folder.rmdir()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.stage"


def folder_for(out: Path) -> Path:
    """Where the stages of a result lie."""
    return out.with_name(f"{out.name}.compress-work")


def check(out: Path) -> None:
    """Raise ValueError where a folder of that name is not ours."""
    folder = folder_for(out)
    kind = kind_of(folder)
    if kind is None:
        return
    if kind != "a folder" or (
        any(path.name != _LOCK for path in folder.iterdir()) and not (folder / _MARK).is_file()
    ):
        raise ValueError(
            f"{_FN}: --out: expected a free name for unfinished work beside it, got {kind} "
            f"{str(folder)!r} of somebody else; choose another --out"
        )


@contextmanager
def opened(out: Path) -> Iterator[Work]:
    """The folder of a result, to be used by this process alone.

    Raises:
        ValueError: another process uses it, or it is not ours.
    """
    check(out)
    folder = folder_for(out)
    with sole_user(_FN, "--out", folder):
        text = f"Unfinished work of maestro-kernels compress --out {out.name}; may be removed.\n"
        if not (folder / _MARK).is_file():
            write_text(folder / _MARK, json.dumps({"what": text.strip()}) + "\n")
        yield Work(folder)


def key_of(*parts: object) -> str:
    """One value for everything that a stage depends on."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def contents(path: Path | None) -> list[Any] | None:
    """What tells whether a file, or a folder's files, are those of before."""
    if path is None:
        return None
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    found = []
    for file in files:
        seen = file.stat()
        found.append([str(file.relative_to(path)), seen.st_size, seen.st_mtime_ns])
    return found
