"""What a user can get wrong and the error it must end in: one table, a file per area.

A row is a name, a call, the type of the error and a part of its message, which names the function,
the argument, what was expected and what came. test_messages.py runs them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Row"]


@dataclass(frozen=True)
class Row:
    """One wrong call.

    Attributes:
        name: id of the test.
        call: what the user does, given an empty folder.
        error: the exact type it raises.
        message: a part of the text, to the letter.
    """

    name: str
    call: Callable[[Path], object]
    error: type[Exception]
    message: str
