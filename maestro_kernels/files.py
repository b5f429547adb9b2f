"""Where a user's files lie, and how one is written: complete or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["cache_folder", "config_folder", "write_durably", "write_text"]


def cache_folder() -> Path:
    """Measurements that can be made again: MAESTRO_KERNELS_CACHE, or the user's cache folder."""
    override = os.environ.get("MAESTRO_KERNELS_CACHE")
    if override:
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maestro_kernels"


def config_folder() -> Path:
    """What the user decided: the user's configuration folder."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "maestro_kernels"


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=".", suffix=".tmp", delete=False
    ) as file:
        file.write(text)
    # A temporary file is for its owner alone; these hold no secret.
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def write_durably(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a file that is on disk before it takes the place of an earlier one.

    For large files with one writer. One fixed temporary name: what a killed process left is
    overwritten, not collected.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    if hasattr(os, "O_DIRECTORY"):
        # Without this the rename itself may be lost with the power.
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
