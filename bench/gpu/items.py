"""What a worker runs: one question each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Item"]


@dataclass(frozen=True)
class Item:
    """One question: `run` returns its result for the record, and raises where it is not answered.

    Attributes:
        name: unique within stage and family.
        run: gives the result for the record, in which "wrong" says what of it failed; raises
            AssertionError for a wrong result, device.Skip where it does not apply.
        small: fit for a sanitizer, which slows a launch down a thousandfold.
    """

    name: str
    run: Callable[[], dict[str, Any] | None]
    small: bool = False
