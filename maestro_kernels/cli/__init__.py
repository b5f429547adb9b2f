"""The `maestro-kernels` command: parse, call the library, print. One module per sub-command.

Exit status: 0 done; 1 done, and something of ours was wrong, slower or diverged; 2 wrong input, no
memory or no disk, one line on standard error; 3 `tune --limit` left work; 130 interrupted; 141 the
reader of the output went away.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

import torch

import maestro_kernels
from maestro_kernels.cli import bench, compress, info, profile, train, tune
from maestro_kernels.cli.output import say, spell_in_any_locale

_INTERRUPTED, _NO_READER = 130, 141


class _WrongArguments(Exception):
    """What argparse found; its own way would print the usage in front of the one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _WrongArguments(f"{self.prog}: {message.removeprefix('argument ')}")


def parser() -> argparse.ArgumentParser:
    """Build the command line; every sub-command has --json and --help with an example."""
    top = _Parser(
        prog="maestro-kernels",
        description="Fused low-rank linear layers: what runs here, how fast, and how small.",
        epilog="example: maestro-kernels info. Exit status: 0 done; 1 done, and something was "
        "wrong, slower or diverged; 2 wrong input, one line says which; 3 tune --limit left work; "
        "130 interrupted.",
    )
    top.add_argument("--version", action="version", version=maestro_kernels.__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (info, bench, profile, compress, train, tune):
        module.register(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 2 and one line on stderr for what a user can get wrong."""
    spell_in_any_locale()
    try:
        try:
            return _run(argv)
        finally:
            # Here a full disk or a closed pipe is still an error like others.
            sys.stdout.flush()
    except BrokenPipeError:
        _leave_output()
        return _NO_READER
    except OSError as error:
        _leave_output()
        print(f"maestro-kernels: {_line(error)}", file=sys.stderr)
        return 2


def _run(argv: Sequence[str] | None) -> int:
    name = ""
    try:
        args = parser().parse_args(argv)
        name = args.command
        with warnings.catch_warnings():
            # Of other libraries, about what a user of this command cannot change.
            warnings.simplefilter("ignore")
            return int(args.run(args))
    except _WrongArguments as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say(name, "interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        say(name, f"not enough memory: {_line(error)}")
    except RuntimeError as error:
        # NotImplementedError is a RuntimeError too; what torch's allocator raises has no type.
        if "can't allocate memory" in str(error):
            say(name, f"not enough memory: {_line(error)}")
        elif isinstance(error, NotImplementedError):
            say(name, _line(error).removeprefix(f"{name}: "))
        else:
            raise
    except (TypeError, ValueError, OSError) as error:
        say(name, _line(error).removeprefix(f"{name}: "))
    return 2


def _line(error: BaseException) -> str:
    """A message as one line."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _leave_output() -> None:
    """What could not be written is dropped: Python would try again at its exit, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, sys.stdout.fileno())
    finally:
        os.close(nowhere)
