"""A folder's worth of files that is written beside the old one and moved in file by file.

`files` does this for one file. Several cannot be replaced in one step, so who moves them decides on
the order: after each step the folder has to be one that its readers understand.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from maestro_kernels.files import lock, make_folder, remove_folders, sync_folder, unlock

# The name that `files` gives to what is not finished, for a folder.
_STAGE = re.compile(r"\.maestro-[0-9a-f]{16}\.partial")


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A new hidden folder inside `folder`, to be filled; it is gone when the block is over.

    `folder` is made, parents too, and removed again if the block raises and it is empty. What
    writers that died have left there is removed.

    Raises:
        OSError: the folder cannot be made.
    """
    made = make_folder(folder)
    try:
        _remove_leftovers(folder)
        fd, stage = _new_stage(folder)
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            unlock(fd)
            os.close(fd)
    except BaseException:
        remove_folders(made)
        raise


@contextmanager
def only_mover(folder: Path) -> Iterator[None]:
    """Wait until no other process moves files into a folder, and keep them waiting meanwhile."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        lock(fd, wait=True)
        yield
        sync_folder(folder)
    finally:
        unlock(fd)
        os.close(fd)


def to_disk(folder: Path) -> list[str]:
    """Wait until every file below a folder is on disk; their names, relative to it."""
    names = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            names.append(path.relative_to(folder).as_posix())
    return names


def move(stage: Path, folder: Path, name: str) -> None:
    """Let `folder/name` be the file that was staged under this name."""
    place = folder / name
    make_folder(place.parent)
    os.replace(stage / name, place)


def remove(path: Path) -> None:
    """Remove a file; that somebody else did so before is fine."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def _new_stage(folder: Path) -> tuple[int, Path]:
    """A new folder in a folder, locked as long as it is open."""
    while True:
        path = folder / f".maestro-{secrets.token_hex(8)}.partial"
        os.mkdir(path)
        fd = -1
        try:
            fd = os.open(path, os.O_RDONLY)
            if lock(fd) is not False and path.is_dir():
                return fd, path
        except FileNotFoundError:
            pass
        # Somebody who was collecting leftovers came between and removes it.
        if fd >= 0:
            os.close(fd)


def _remove_leftovers(folder: Path) -> None:
    """Remove staging folders whose writers are dead: the system has released their locks."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if _STAGE.fullmatch(entry.name)]
    for name in names:
        # A file of this name is the business of `files`; another user's stays.
        with suppress(OSError):
            if not (folder / name).is_dir():
                continue
            fd = os.open(folder / name, os.O_RDONLY)
            try:
                if lock(fd):
                    shutil.rmtree(folder / name, ignore_errors=True)
            finally:
                os.close(fd)
