"""Every file-system call of maestro_kernels.files and folders, seen, counted and made to fail."""

import io
import os

from maestro_kernels import files, folders

# What a writer does to the disk, as functions of os; writes and truncations come beside them.
CALLS = frozenset(
    ("chmod", "close", "fstat", "fsync", "mkdir", "open", "replace", "scandir", "stat", "unlink")
)


class Faults:
    """Stands in for the module os in maestro_kernels.files and folders.

    Args:
        before: called with (number, name, first argument) before each call; may raise or kill.
        after: the same after each call that succeeded.
    """

    def __init__(self, before=None, after=None):
        self.before, self.after = before, after
        self.events = []

    def __getattr__(self, name):
        value = getattr(os, name)
        return self.watched(name, value) if name in CALLS else value

    def watched(self, name, call):
        def watching(*args, **kwargs):
            number = len(self.events)
            self.events.append((name, args[0] if args else None))
            if self.before is not None:
                self.before(number, name, args[0] if args else None)
            result = call(*args, **kwargs)
            if self.after is not None:
                self.after(number, name, args[0] if args else None)
            return result

        return watching

    def fdopen(self, fd, mode, buffering=-1):
        faults = self

        class Watched(io.FileIO):
            def write(self, content):
                write = super().write
                return faults.watched("write", lambda fd: write(content))(self.fileno())

            def truncate(self, size=None):
                truncate = super().truncate
                return faults.watched("truncate", lambda fd: truncate(size))(self.fileno())

        raw = Watched(fd, mode.replace("b", ""))
        return raw if buffering == 0 else io.BufferedRandom(raw)

    def __enter__(self):
        files.os = folders.os = self
        return self

    def __exit__(self, *_):
        files.os = folders.os = os
