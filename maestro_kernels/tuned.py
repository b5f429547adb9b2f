"""Choosing by measurement: the table in use for a device, and what it says about a call.

A user's own table is preferred to the one that ships with the package; one of another device is
refused. Reading happens on the first plan for a device, never at import.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from maestro_kernels import hardware, tables

if TYPE_CHECKING:
    from maestro_kernels.problem import LoDProblem


@dataclass(frozen=True)
class Choice:
    """What a table says about a call.

    Attributes:
        backend: name of the backend.
        strategy: form of the computation inside it.
        reason: table and row behind it.
    """

    backend: str
    strategy: str
    reason: str


@dataclass(frozen=True)
class _Found:
    """The table of a device, if there is one, and what was refused on the way to it."""

    table: tables.Table | None
    name: str
    remarks: tuple[str, ...]


def choose(
    group: Sequence[LoDProblem],
    backends: Sequence[str],
    device: hardware.Device | None = None,
    mode: tables.Mode = tables.FORWARD,
) -> Choice | str:
    """The strategy that won wherever the table measured around this call, or why there is none.

    Two library matmuls stay unless one strategy beat them beyond noise in every measured corner of
    the cell that the call lies in.

    Args:
        group: one layer, or the layers of a group that reads one x.
        backends: the backends that can serve the call.
        device: plan for this one; None is that of the tensors.
        mode: how the call is made.
    """
    first = group[0]
    if device is None:
        kind = first.device.type
        if kind != "cpu" and not (kind == "cuda" and torch.cuda.is_available()):
            return "no measured table for this device: it is not here"
        device = hardware.current_device(first.device)
    found = _find(device, os.environ.get("MAESTRO_KERNELS_TABLE", ""))
    remarks = "".join(f" ({remark})" for remark in found.remarks)
    if found.table is None:
        return f"no measured table for this device, see maestro-kernels tune{remarks}"
    rank, N = _mean_rank(group), sum(p.N for p in group)
    aligned = device.kind == "cpu" or all(is_aligned(p) for p in group)
    row_kind = (tables.dtype_key(first.dtype), len(group), aligned)
    degenerate = not (first.M and N and first.K and rank)
    around = [] if degenerate else found.table.around(row_kind, first.M, N, first.K, rank)
    name = f"table {found.name}"
    if not around:
        return f"{name} has no row near this call{remarks}"
    usable = set.intersection(*(row.strategies(mode) for row in around))
    if not usable:
        return f"{name} has no times of this mode ({mode}) near this call{remarks}"
    winners = {
        strategy: math.prod(row.speedup(strategy, mode) for row in around)
        for strategy in usable
        if strategy.partition(": ")[0] in backends
        and all(row.wins(strategy, mode) for row in around)
    }
    if not winners:
        nothing = f"nothing beats two matmuls in every row around {around[0]}"
        return Choice("matmul", "two matmuls", f"{name}: {nothing}{remarks}")
    best = max(winners, key=lambda s: (winners[s], s))
    backend, _, strategy = best.partition(": ")
    gain = f"{around[0].speedup(best, mode):.2f} times as fast as two matmuls"
    return Choice(backend, strategy, f"{name}, row {around[0]}: {gain}{remarks}")


def choose_form(
    N: int, K: int, rank: int, M: int, dtype: torch.dtype, device: hardware.Device | None = None
) -> str | None:
    """The form of `prepack` that is fastest around a size, by the CPU's table.

    Args:
        N: out_features.
        K: in_features.
        rank: active rank.
        M: rows of x.
        dtype: of x and the factors.
        device: plan for this one; None is the CPU here.

    Returns:
        One of backends.packed.FORMS; None where the table has no rows of this very N and K around
        M and rank, or where they do not agree: then a short measurement knows better.
    """
    if device is None:
        device = hardware.current_device("cpu")
    table = _find(device, os.environ.get("MAESTRO_KERNELS_TABLE", "")).table
    if table is None or not (M and rank):
        return None
    rows = table.around((tables.dtype_key(dtype), 1, True), M, N, K, rank)
    best = {row.fastest_form for row in rows if (row.N, row.K) == (N, K)}
    return best.pop() if len(best) == 1 else None


def is_aligned(problem: LoDProblem) -> bool:
    """Whether fast kernels can read every row of the factors in pieces of 16 bytes."""
    return problem.aligned and problem.R % 8 == 0 and problem.K % 8 == 0


def _mean_rank(group: Sequence[LoDProblem]) -> int:
    weights = [p.N + p.K for p in group]
    total = sum(p.max_active_rank * w for p, w in zip(group, weights, strict=True))
    return round(total / max(sum(weights), 1))


@functools.cache
def _find(device: hardware.Device, override: str) -> _Found:
    """The user's table of a device, or the shipped one."""
    remarks: list[str] = []
    if override == "off":
        return _Found(None, "", ("MAESTRO_KERNELS_TABLE=off",))
    shipped = resources.files("maestro_kernels").joinpath("configs", tables.file_name(device))
    for path in (tables.user_path(device), Path(str(shipped))):
        try:
            table = tables.load(path, device)
        except FileNotFoundError:
            if override and path == Path(override):
                remarks.append(f"MAESTRO_KERNELS_TABLE: no file {path.name}")
        except (OSError, ValueError) as error:
            remarks.append(f"refused: {str(error).removeprefix('load: ')}")
        else:
            remarks += _other_versions(table)
            return _Found(table, path.name, tuple(remarks))
    return _Found(None, "", tuple(remarks))


def _other_versions(table: tables.Table) -> list[str]:
    changed = [
        f"{name} {table.versions.get(name)}, here {version}"
        for name, version in hardware.libraries().items()
        if table.versions.get(name) != version
    ]
    return [f"made with other versions: {'; '.join(changed)}"] if changed else []


def fingerprint(device: hardware.Device) -> str:
    """What changes whenever the table in use for a device does; empty without a table."""
    found = _find(device, os.environ.get("MAESTRO_KERNELS_TABLE", ""))
    if found.table is None:
        return ""
    return hashlib.sha256(found.table.to_json().encode()).hexdigest()[:16]


def forget() -> None:
    """Read tables again, the next time one is asked for; `dispatch.forget` drops plans too."""
    _find.cache_clear()
