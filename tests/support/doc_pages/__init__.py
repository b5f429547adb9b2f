"""The code of README.md and docs/: found here, run by test_docs.py, each block by itself.

A block runs as it stands in an empty folder, or, below `<!-- in a checkout -->`, in a copy of what
a checkout holds. One below `<!-- fragment: REASON -->` is not run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LANGUAGES", "ROOT", "Block", "blocks", "pages"]

ROOT = Path(__file__).resolve().parents[3]
LANGUAGES = {"python": "python", "py": "python", "bash": "shell", "sh": "shell", "shell": "shell"}
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<text>.*?)^ *```$", re.M | re.S)
_MARK = re.compile(r"<!-- (?:fragment: (?P<reason>[^\n]+?)|(?P<checkout>in a checkout)) -->\n\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: relative to the root.
        line: of its opening fence.
        language: "python", "shell", or the fence's own word.
        text: what stands between the fences.
        fragment: why it is not run; None where it is.
        checkout: runs beside what a checkout holds.
    """

    page: str
    line: int
    language: str
    text: str
    fragment: str | None
    checkout: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str, page: str) -> list[Block]:
    """Every fenced block of a page."""
    found = []
    for fence in _FENCE.finditer(text):
        info = fence["info"].strip()
        mark = _MARK.search(text, 0, fence.start())
        code = re.sub(rf"^{fence['indent']}", "", fence["text"], flags=re.M)
        found.append(
            Block(
                page,
                text.count("\n", 0, fence.start()) + 1,
                LANGUAGES.get(info, info),
                code,
                mark["reason"] if mark else None,
                bool(mark and mark["checkout"]),
            )
        )
    return found
