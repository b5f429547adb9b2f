"""How a generated block gets into a document."""

from __future__ import annotations

__all__ = ["replace_block"]


def replace_block(text: str, block: str, begin: str, end: str) -> str:
    """Put a block between the two markers of a document.

    Raises:
        ValueError: the markers are not there exactly once, in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"replace_block: text: expected {begin!r} and then {end!r}, once each")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{block}\n{end}{rest.partition(end)[2]}"
