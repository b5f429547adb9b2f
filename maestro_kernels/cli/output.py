"""What commands print: results on standard output, plans and progress on standard error."""

from __future__ import annotations

import argparse
import codecs
import importlib.util
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console

from maestro_kernels.measure.progress import bar
from maestro_kernels.measure.wording import count

# Without a terminal, a line this often says how far a command is.
_EVERY = 30.0
# What we print beside ASCII, for streams that hold nothing else.
_PLAIN = {
    "×": "x", "→": "->", "←": "<-", "·": ".", "µ": "u", "…": "...", "–": "-", "—": "-", "−": "-",
    "≥": ">=", "≤": "<=", "λ": "lambda", "“": '"', "”": '"', "²": "^2", "√": "sqrt",
}  # fmt: skip


class _Console(Console):
    """A console that leaves it to cli.main to say what a closed pipe means."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def show(*blocks: Any, width: int = 140) -> None:
    """Print tables and texts; in a log a table is not folded to 80 columns."""
    console = _Console(highlight=False)
    if not console.is_terminal:
        console = _Console(highlight=False, width=width)
    for block in blocks:
        console.print(block)


def say(command: str, text: str) -> None:
    """One line on standard error, so that --json leaves standard output to the result."""
    print(f"{f'maestro-kernels {command}'.strip()}: {text}", file=sys.stderr, flush=True)


def about(seconds: float) -> str:
    """A duration as one would say it."""
    if seconds < 10:
        return "a few seconds"
    if seconds < 90:
        return f"about {10 * round(seconds / 10)} seconds"
    if seconds < 5400:
        return f"about {count(round(seconds / 60), 'minute')}"
    return f"about {count(round(seconds / 3600), 'hour')}"


def repeats(args: argparse.Namespace, *options: str, targets: Sequence[str] = ()) -> str:
    """The command that repeats a measurement; where its files went is nobody else's business.

    Args:
        args: as parsed; `args.command` is the sub-command.
        options: names of those that matter, in order; those not given are left out.
        targets: what stands before them.
    """
    words = ["maestro-kernels", args.command, *targets]
    for name in options:
        value = torch.get_num_threads() if name == "threads" else getattr(args, name)
        if value and isinstance(value, list) and isinstance(value[0], int):
            value = ",".join(map(str, value))
        for one in value if isinstance(value, list) else [value]:
            if one is None or one is False:
                continue
            words.append(f"--{name.replace('_', '-')}")
            if one is not True:
                words.append(f"{one:g}" if isinstance(one, float) else str(one))
    return shlex.join(words)


def user_error(error: BaseException) -> str:
    """What the user's own code raised, and where: "raised KeyError('x') in mine.py, line 4"."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    name = last.filename.rpartition("/")[2]
    return f"raised {error!r} in {name}, line {last.lineno}"


def plots_can_be_drawn(command: str) -> bool:
    """Whether matplotlib is here; if not, says so before anything is measured."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    say(
        command,
        "no page and no plots will be written: they need matplotlib; "
        "pip install 'maestro-kernels[bench]'",
    )
    return False


@contextmanager
def progress(command: str) -> Iterator[Callable[[str, int, int], None]]:
    """A function of (text, done, total): a bar on a terminal, elsewhere a line twice a minute."""
    if not sys.stderr.isatty():
        begin = last = time.monotonic()

        def line(text: str, done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _EVERY and done < total:
                last = now
                left = f", {about((now - begin) * (total - done) / done)} left" if done else ""
                say(command, f"{done} of {total} done{left}; now {text}")

        yield line
        return
    with bar(command, _Console(stderr=True)) as advance:
        yield advance


def spell_in_any_locale() -> None:
    """Make both streams take any text: what their encoding lacks is spelled in ASCII."""
    codecs.register_error("maestro_kernels.plain", _plainly)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="maestro_kernels.plain")


def _plainly(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c, "?") for c in text), error.end
