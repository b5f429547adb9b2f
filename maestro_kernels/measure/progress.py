"""How far a long measurement is: a function of (text, done, total), and the bar behind it."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[str, int, int], None]


@contextmanager
def progress_bar(wanted: bool | Advance | None, title: str) -> Iterator[Advance]:
    """A function of (text, done, total) that moves a bar, or does nothing, or is the caller's.

    Args:
        wanted: the caller's own, or whether to show a bar; None does so on a terminal.
        title: what stands beside the bar before the first text.
    """
    if callable(wanted):
        yield wanted
    elif sys.stderr.isatty() if wanted is None else wanted:
        from rich.console import Console

        with bar(title, Console(stderr=True)) as advance:
            yield advance
    else:
        yield lambda text, done, total: None


@contextmanager
def bar(title: str, console: Console) -> Iterator[Advance]:
    """A function of (text, done, total) that moves a bar with the time spent and left."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as shown:
        task = shown.add_task(title, total=None)

        def advance(text: str, done: int, total: int) -> None:
            shown.update(task, description=text, completed=done, total=total)

        yield advance


def told(fn: str, progress: Any) -> bool | Advance | None:
    """`progress` as `progress_bar` takes it; functions of less than (text, done, total) warn.

    For one release, one argument gets the share that is done, and two get (done, total).
    """
    if not callable(progress):
        found: bool | None = progress
        return found
    takes = [n for n in (3, 2, 1) if _binds(progress, n)]
    if not takes or takes[0] == 3:
        return progress
    warnings.warn(
        f"{fn}: progress: expected a function of (text, done, total), got one of "
        f"{'(done, total)' if takes[0] == 2 else 'a share'}, which is deprecated",
        DeprecationWarning,
        stacklevel=3,
    )
    if takes[0] == 2:
        return lambda text, done, total: progress(done, total)
    return lambda text, done, total: progress(done / max(total, 1))


def _binds(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # A builtin without a signature.
        return count == 3
    return True
