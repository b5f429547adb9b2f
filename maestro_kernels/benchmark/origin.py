"""Where figures come from: machine, threads, versions, commit; in a row, and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from maestro_kernels import hardware

__all__ = ["origin", "stamp"]


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
