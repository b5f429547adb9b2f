"""Where a user's files lie, and how one is written: whole and on disk, or not at all.

Every file the package writes goes through here, so that a crash, a full disk or a second process
costs nobody more than what was not finished yet.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed by others
    fcntl = None  # type: ignore[assignment]

# What a killed process leaves has this name, which nobody else gives to a file. The target's name
# is not in it: that may be as long as a name can be.
_PARTIAL = re.compile(r"\.maestro-[0-9a-f]{16}\.partial")


def cache_folder() -> Path:
    """Measurements that can be made again: MAESTRO_KERNELS_CACHE, or the user's cache folder."""
    override = os.environ.get("MAESTRO_KERNELS_CACHE")
    if override:
        return Path(override)
    return _user_folder("XDG_CACHE_HOME", ".cache")


def config_folder() -> Path:
    """What the user decided: the user's configuration folder, unless MAESTRO_KERNELS_CACHE is set.

    That variable names the one folder which the package may write to by itself.
    """
    override = os.environ.get("MAESTRO_KERNELS_CACHE")
    if override:
        return Path(override)
    return _user_folder("XDG_CONFIG_HOME", ".config")


def _user_folder(variable: str, default: str) -> Path:
    root = os.environ.get(variable)
    if root:
        return Path(root) / "maestro_kernels"
    try:
        return Path.home() / default / "maestro_kernels"
    except RuntimeError:
        # A user without a home, as in some containers.
        return Path(tempfile.gettempdir()) / f"maestro_kernels-{os.getuid()}"


def check_path(fn: str, argument: str, value: object) -> Path:
    """A path from what a user gave.

    Raises:
        TypeError: neither a string nor a PathLike of one.
        ValueError: empty, or with a character that no path can hold.
    """
    try:
        text = os.fspath(value)  # type: ignore[call-overload]
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise TypeError(f"{fn}: {argument}: expected a path, got {type(value).__name__}")
    if not text or "\0" in text:
        raise ValueError(f"{fn}: {argument}: expected a path, got {text!r}")
    return Path(text)


def check_file(fn: str, argument: str, value: object) -> Path:
    """A path where a file can be written, as far as can be seen without writing.

    Raises:
        TypeError: no path.
        ValueError: a folder, a FIFO, a device, or a place below a file.
    """
    return _check_place(fn, argument, value, "a file", "a file to write")


def check_folder(fn: str, argument: str, value: object) -> Path:
    """A path where a folder is or can be made, as far as can be seen without writing.

    Raises:
        TypeError: no path.
        ValueError: a file, a FIFO, a device, or a place below a file.
    """
    return _check_place(fn, argument, value, "a folder", "a folder")


def _check_place(fn: str, argument: str, value: object, kind: str, expected: str) -> Path:
    path = check_path(fn, argument, value)
    found = kind_of(path)
    if found not in (None, kind):
        raise ValueError(f"{fn}: {argument}: expected {expected}, got {found} {str(path)!r}")
    for parent in Path(os.path.realpath(path)).parents:
        found = kind_of(parent)
        if found == "a folder":
            break
        if found is not None:
            raise ValueError(
                f"{fn}: {argument}: expected a place in a folder, got {str(path)!r} below "
                f"{found} {str(parent)!r}"
            )
    return path


def kind_of(path: Path) -> str | None:
    """What lies at a path, links followed; None where nothing does."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link to itself"
        raise
    if stat.S_ISREG(mode):
        return "a file"
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a FIFO" if stat.S_ISFIFO(mode) else "a device or socket"


def write_text(path: str | Path, text: str) -> None:
    """Let a file hold `text` (UTF-8); see `replacing`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Let a file hold `content`; see `replacing`."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to fill, which takes the place of `path` when the block ends without an error.

    Until then, and after a crash, a full disk or an error, `path` is what it was. A reader that
    opens it once sees the old content or the new, never a mixture; of several writers the last one
    wins. Content reaches the disk before the name does, and both before the block is over. A link
    stays a link, its target is written; an existing file keeps its permissions; folders are made.
    What writers that died have left in the folder is removed.

    Raises:
        OSError: names `path`, also where the trouble is with another name.
    """
    # A link's target may lie on another disk, so the new file is made beside it.
    place = Path(os.path.realpath(path))
    found = kind_of(place)
    if found not in (None, "a file"):
        raise OSError(errno.EEXIST, f"expected a file to replace, got {found}", str(path))
    try:
        made = make_folder(place.parent)
        try:
            _remove_leftovers(place.parent)
            yield from _replace(place)
        except BaseException:
            remove_folders(made)
            raise
        sync_folder(place.parent)
    except OSError as error:
        raise about(error, path) from error


def about(error: OSError, path: str | Path) -> OSError:
    """The same error, about the file that the user knows of."""
    name = error.filename
    hidden = name is None or _PARTIAL.fullmatch(os.path.basename(os.fsdecode(name)))
    if error.errno is None or not hidden:
        return error
    return OSError(error.errno, os.strerror(error.errno), str(path))


def _replace(place: Path) -> Iterator[BinaryIO]:
    """Yield a new file in the folder of `place`, then move it there."""
    fd, partial = _new_partial(place.parent)
    try:
        with os.fdopen(fd, "w+b") as file:
            _keep_permissions(fd, place)
            yield file
            file.flush()
            os.fsync(fd)
            # Before the file is closed: its lock says that it has a writer.
            os.replace(partial, place)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(partial)
        raise


def _new_partial(folder: Path) -> tuple[int, Path]:
    """A new file in a folder, locked as long as it is open."""
    while True:
        path = folder / f".maestro-{secrets.token_hex(8)}.partial"
        # Unlike that of tempfile, its mode follows the umask, as anybody expects of a file.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if lock(fd) is not False and os.fstat(fd).st_nlink:
                return fd, path
        except BaseException:
            os.close(fd)
            os.unlink(path)
            raise
        # Somebody who was collecting leftovers came between the two calls and removes it.
        os.close(fd)


def _keep_permissions(fd: int, place: Path) -> None:
    with suppress(FileNotFoundError):
        mode = stat.S_IMODE(os.stat(place).st_mode)
        if mode != stat.S_IMODE(os.fstat(fd).st_mode):
            os.chmod(fd, mode)


def _remove_leftovers(folder: Path) -> None:
    """Remove new files whose writers are dead: the system has released their locks."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if _PARTIAL.fullmatch(entry.name)]
    for name in names:
        # Gone meanwhile, or another user's: neither is a reason not to write.
        with suppress(OSError):
            fd = os.open(folder / name, os.O_RDWR)
            try:
                if lock(fd):
                    os.unlink(folder / name)
            finally:
                os.close(fd)


def lock(fd: int, *, wait: bool = False) -> bool | None:
    """Lock an open file until it is closed; None where the file system cannot."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            return None
        raise
    return True


def unlock(fd: int) -> None:
    """Release what `lock` has taken, also where closing the file should fail."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and what is missing above it; returns what was made, outermost first."""
    missing = []
    for parent in (folder, *folder.parents):
        if parent.is_dir():
            break
        missing.append(parent)
    made: list[Path] = []
    try:
        for path in reversed(missing):
            with suppress(FileExistsError):
                os.mkdir(path)
                made.append(path)
                sync_folder(path.parent)
    except BaseException:
        remove_folders(made)
        raise
    return made


def remove_folders(made: list[Path]) -> None:
    """Remove what `make_folder` made, as far as it is empty."""
    for folder in reversed(made):
        # Not empty where somebody else has begun to use it.
        with suppress(OSError):
            os.rmdir(folder)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk; without it a rename may be lost with power."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems do not know this of folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def append_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Add lines to the end of a file of JSON lines, in one piece; other processes may do the same.

    A last line without its end is completed where it is JSON, and otherwise removed: a writer died
    while writing it. The file is made where there is none, folders too.
    """
    content = "".join(f"{line}\n" for line in lines).encode("utf-8")
    with locked_file(path) as file:
        write_at(file, whole_lines(file), content)


@contextmanager
def locked_file(path: str | Path) -> Iterator[FileIO]:
    """A file to read and write while no other process does so through this function.

    It is made where there is none, folders too.

    Raises:
        OSError: names `path`.
    """
    place = Path(os.path.realpath(path))
    found = kind_of(place)
    if found not in (None, "a file"):
        raise OSError(errno.EEXIST, f"expected a file to write, got {found}", str(path))
    try:
        make_folder(place.parent)
        while True:
            fd = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
            # Without a buffer: what a full disk refused must not be written later, on closing.
            with os.fdopen(fd, "r+b", buffering=0) as file:
                lock(fd, wait=True)
                if _is_same_file(fd, place):
                    yield file
                    return
    except OSError as error:
        raise about(error, path) from error


def write_at(file: FileIO, end: int, content: bytes) -> None:
    """Let a file end with `content` after its first `end` bytes; on an error, with those."""
    try:
        file.seek(end)
        left = memoryview(content)
        while left:
            left = left[file.write(left) :]
        file.truncate()
    except BaseException:
        with suppress(OSError):
            file.truncate(end)
        raise


def _is_same_file(fd: int, path: Path) -> bool:
    """Whether nobody replaced or removed the file while we waited for it."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def whole_lines(file: FileIO) -> int:
    """Where to go on writing: after the last line that is whole, which gets its end if need be."""
    end = file.seek(0, os.SEEK_END)
    start, tail = end, b""
    while start and b"\n" not in tail:
        step = min(start, 1 << 16)
        start = file.seek(start - step)
        tail = file.read(step) + tail
    torn = tail[tail.rfind(b"\n") + 1 :]
    if not torn or not _is_row(torn):
        return end - len(torn)
    write_at(file, end, b"\n")
    return end + 1


def _is_row(line: bytes) -> bool:
    """Whether a line is whole; half of 123 is JSON too, but every row of ours is an object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


@contextmanager
def sole_user(fn: str, argument: str, folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made where there is none.

    For runs that write to it as long as they last. The lock is the system's: it ends with the
    process, however that ends.

    Raises:
        ValueError: another process is in there.
    """
    from filelock import FileLock, Timeout

    make_folder(folder)
    lock = FileLock(folder / ".lock", thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"{fn}: {argument}: expected a folder that no other process uses, got {str(folder)!r} "
            "with a run that is still going on"
        ) from None
    try:
        yield
    finally:
        lock.release()
