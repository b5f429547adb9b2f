"""How figures are published: what every row carries, in words too, and the blocks of a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from maestro_kernels import hardware
from maestro_kernels.files import write_text

__all__ = ["origin", "stamp", "write_block"]


def stamp() -> dict[str, Any]:
    """What every published row carries: device, threads, versions (commit and dirty flag in it)."""
    return {
        "device": hardware.current_device().name,
        "threads": torch.get_num_threads(),
        "versions": hardware.versions(),
    }


def origin(row: Mapping[str, Any]) -> str:
    """A stamped row's machine and software in words, "unknown" where it does not say.

    >>> origin({"device": "CPU", "threads": 2, "versions": {"torch": "2.13", "commit": "0123456"}})
    'CPU, 2 threads, torch 2.13, commit 0123456'
    """
    versions = row.get("versions") or {}
    commit = str(versions.get("commit") or "unknown")[:10]
    changed = " with uncommitted changes" if versions.get("dirty") else ""
    threads = row.get("threads")
    count = "" if threads is None else f"{threads} thread{'' if threads == 1 else 's'}, "
    return (
        f"{row.get('device', 'machine unknown')}, {count}torch {versions.get('torch', 'unknown')}, "
        f"commit {commit}{changed}"
    )


def write_block(page: Path, block: str, begin: str, end: str) -> None:
    """Put a block between two markers of a document.

    Raises:
        ValueError: the markers are not there exactly once, in order; the document is as it was.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"write_block: page: expected {begin!r} and then {end!r}, once each")
    head, _, rest = text.partition(begin)
    write_text(page, f"{head}{begin}\n{block}\n{end}{rest.partition(end)[2]}")
