"""Measured tables: which strategy beats two library matmuls where, on one device.

A table is one JSON file per device, written by `maestro-kernels tune`. A user's own is preferred to
the one that ships with the package; one of another device is refused. Reading happens on the first
plan for a device, never at import.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from maestro_kernels import hardware
from maestro_kernels.files import config_folder, write_text

if TYPE_CHECKING:
    from maestro_kernels.problem import LoDProblem

__all__ = [
    "BASELINE",
    "Choice",
    "Row",
    "Table",
    "choose",
    "dtype_key",
    "fingerprint",
    "forget",
    "identity",
    "load",
    "save",
    "user_path",
]

SCHEMA = 1
# What every row holds and every other strategy must beat, as a plan prints it.
BASELINE = "matmul: two matmuls"
# Beyond the measured sizes a row speaks for twice as much or half as much, no further.
_REACH = 2.0
# Two shapes are neighbours while N and K together differ by no more than this factor.
_SHAPE_REACH = 4.0
# Medians of one binary on a shared machine differ by this much between runs.
_MARGIN = 0.05

Times = tuple[float, float, float]


@dataclass(frozen=True)
class Row:
    """One measured call.

    Attributes:
        dtype: as `dtype_key` names it.
        layers: layers of the call; 1 is lod_linear, more is a group that reads one x.
        M: rows of x.
        N: out_features, of all layers together.
        K: in_features.
        rank: active rank; in a group the mean weighted by N_i + K.
        aligned: 16-byte rows: every factor starts on 16 bytes, and R and K are multiples of 8.
        us: strategy -> (p20, median, p80) in microseconds, forward.
        training_us: the same of forward and backward; empty where it was not measured.
    """

    dtype: str
    layers: int
    M: int
    N: int
    K: int
    rank: int
    aligned: bool
    us: dict[str, Times]
    training_us: dict[str, Times] = field(default_factory=dict)

    @property
    def kind(self) -> tuple[str, int, bool]:
        """What a call and a row must share."""
        return self.dtype, self.layers, self.aligned

    def speedup(self, strategy: str) -> float:
        """Median of two matmuls over that of a strategy; 0 where it was not measured."""
        return self.us[BASELINE][1] / self.us[strategy][1] if strategy in self.us else 0.0

    def wins(self, strategy: str) -> bool:
        """Faster than two matmuls beyond noise, and in training not slower beyond noise."""
        if strategy not in self.us or not _faster(self.us[strategy], self.us[BASELINE]):
            return False
        if strategy not in self.training_us:
            return not self.training_us
        return not _faster(self.training_us[BASELINE], self.training_us[strategy])

    def __str__(self) -> str:
        many = f"{self.layers} layers, " if self.layers > 1 else ""
        return f"{many}{self.M} · {self.K}→{self.rank}→{self.N} {self.dtype}"


@dataclass(frozen=True)
class Table:
    """Rows of one device.

    Attributes:
        device: kind, name, arch, num_cores of the device they were measured on.
        versions: hardware.versions() at that time.
        rows: the measurements.
        created: UTC time, ISO 8601.
        command: what repeats them.
    """

    device: dict[str, Any]
    versions: dict[str, Any]
    rows: tuple[Row, ...]
    created: str = ""
    command: str = ""

    @functools.cached_property
    def _shapes(self) -> dict[tuple[str, int, bool], dict[tuple[int, int], list[Row]]]:
        found: dict[tuple[str, int, bool], dict[tuple[int, int], list[Row]]] = {}
        for row in self.rows:
            found.setdefault(row.kind, {}).setdefault((row.N, row.K), []).append(row)
        return found

    def around(self, kind: tuple[str, int, bool], M: int, N: int, K: int, rank: int) -> list[Row]:
        """The measured rows around a call, nearest first; empty where it is out of reach.

        The call's own shape if it was measured, else the two nearest; of each the corners of the
        cell in (M, rank) that the call lies in.
        """
        shapes = self._shapes.get(kind, {})
        near = sorted(shapes, key=lambda s: _distance(s, (N, K)))
        near = [s for s in near if _distance(s, (N, K)) <= math.log2(_SHAPE_REACH)]
        near = near[: 1 if near and near[0] == (N, K) else 2]
        found = []
        for shape in near:
            corners = _corners(shapes[shape], M, rank)
            if not corners:
                return []
            found += corners
        return sorted(
            found,
            key=lambda row: (
                abs(math.log2(row.M / M))
                + abs(math.log2(row.rank / rank))
                + _distance((row.N, row.K), (N, K))
            ),
        )

    def to_json(self) -> str:
        """The file: one row a line, so that a difference can be read."""
        head = {"schema": SCHEMA, **{name: getattr(self, name) for name in _HEAD}}
        lines = [json.dumps(_record(row), ensure_ascii=False) for row in self.rows]
        text = json.dumps(head, ensure_ascii=False, indent=1)
        return text[:-2] + ',\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


_HEAD = ("device", "versions", "created", "command")


def identity(device: hardware.Device) -> dict[str, Any]:
    """What tells one device from another: kind, name, arch, and cores or threads."""
    return {name: getattr(device, name) for name in ("kind", "name", "arch", "num_cores")}


def dtype_key(dtype: torch.dtype) -> str:
    """The dtype's name, and for float32 below "highest" precision also that it is rounded."""
    name = str(dtype).removeprefix("torch.")
    rounded = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return f"{name} rounded" if rounded else name


def _faster(a: Times, b: Times) -> bool:
    """Whether (p20, median, p80) a is below b: medians apart by more than 5 % and both spreads."""
    spread = ((a[2] - a[0]) / a[1] + (b[2] - b[0]) / b[1]) / 2
    return b[1] / a[1] > 1 + max(_MARGIN, spread) and a[2] < b[0]


def _distance(a: tuple[int, int], b: tuple[int, int]) -> float:
    """Between two shapes (N, K), in factors of two."""
    return abs(math.log2(a[0] / b[0])) + abs(math.log2(a[1] / b[1]))


def _bracket(values: Sequence[int], wanted: int) -> list[int]:
    """The measured values on either side of `wanted`; one where it was measured or lies just out.

    Empty where it lies out of reach.
    """
    below = [v for v in values if v <= wanted]
    above = [v for v in values if v >= wanted]
    if below and above:
        return sorted({max(below), min(above)})
    edge = max(below) if below else min(above)
    return [edge] if max(edge / wanted, wanted / edge) <= _REACH else []


def _corners(rows: Sequence[Row], M: int, rank: int) -> list[Row]:
    found = []
    for m in _bracket(sorted({row.M for row in rows}), M):
        here = {row.rank: row for row in rows if m == row.M}
        ranks = _bracket(sorted(here), rank)
        if not ranks:
            return []
        found += [here[r] for r in ranks]
    return found


# --- files -----------------------------------------------------------------------------------


def user_path(device: hardware.Device) -> Path:
    """Where this user's table of a device lies; MAESTRO_KERNELS_TABLE overrides it."""
    override = os.environ.get("MAESTRO_KERNELS_TABLE", "")
    if override and override != "off":
        return Path(override)
    return config_folder() / _file_name(device)


def _file_name(device: hardware.Device) -> str:
    text = f"{device.name} {device.arch} {device.num_cores}".lower()
    return re.sub(r"[^a-z0-9_.]+", "-", text).strip("-") + ".json"


def save(table: Table, path: str | Path) -> None:
    """Write a table: complete, or not at all."""
    path, text = Path(path), table.to_json()
    _parse(json.loads(text), f"save: {path.name}")
    write_text(path, text)


def load(path: str | Path, device: hardware.Device | None = None) -> Table:
    """Read and check a table.

    Args:
        path: the file.
        device: refuse a table of any other.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no table of this schema, or one of another device; says where and why.
    """
    path = Path(path)
    where = f"load: {path.name}"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: expected a JSON table, got {error}") from None
    table = _parse(record, where)
    if device is not None and table.device != identity(device):
        ours, theirs = _described(identity(device)), _described(table.device)
        raise ValueError(f"{where}: device: expected {ours}, got {theirs}")
    return table


def _described(device: dict[str, Any]) -> str:
    return f"{device.get('name')} ({device.get('arch')}, {device.get('num_cores')} cores)"


def _record(row: Row) -> dict[str, Any]:
    record = asdict(row)
    for name in ("us", "training_us"):
        record[name] = {k: [round(t, 3) for t in v] for k, v in record[name].items()}
    return record


_ROW_FIELDS = {f.name: str(f.type) for f in fields(Row)}


def _parse(record: Any, where: str) -> Table:
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        got = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where}: schema: expected {SCHEMA}, got {got!r}")
    expected = {"schema", "rows", *_HEAD}
    if record.keys() != expected:
        raise ValueError(f"{where}: expected the fields {sorted(expected)}, got {sorted(record)}")
    for name, kind in (("device", dict), ("versions", dict), ("rows", list)):
        if not isinstance(record[name], kind):
            raise ValueError(f"{where}: {name}: expected a {kind.__name__}, got {record[name]!r}")
    rows = tuple(_parse_row(r, f"{where}: row {i}") for i, r in enumerate(record["rows"]))
    return Table(rows=rows, **{name: record[name] for name in _HEAD})


def _parse_row(record: Any, where: str) -> Row:
    if not isinstance(record, dict) or record.keys() != _ROW_FIELDS.keys():
        got = sorted(record) if isinstance(record, dict) else record
        raise ValueError(f"{where}: expected the fields {sorted(_ROW_FIELDS)}, got {got!r}")
    values = dict(record)
    for name, kind in _ROW_FIELDS.items():
        value = values[name]
        if kind.startswith("dict"):
            values[name] = _parse_times(value, f"{where}: {name}", needed=name == "us")
        elif type(value).__name__ != kind or (kind == "int" and value < 1):
            raise ValueError(f"{where}: {name}: expected {kind} (>= 1), got {value!r}")
    return Row(**values)


def _parse_times(value: Any, where: str, *, needed: bool) -> dict[str, Times]:
    if not isinstance(value, dict) or ((needed or value) and BASELINE not in value):
        raise ValueError(f"{where}: expected times of {BASELINE!r} and others, got {value!r}")
    for name, times in value.items():
        good = isinstance(times, list | tuple) and len(times) == 3
        good = good and all(isinstance(t, int | float) and t > 0 for t in times)
        if not good or not times[0] <= times[1] <= times[2] or ": " not in name:
            raise ValueError(
                f"{where}: expected 'backend: strategy' -> [p20, median, p80] in µs, "
                f"got {name!r} -> {times!r}"
            )
    return {name: (t[0], t[1], t[2]) for name, t in value.items()}


# --- choosing --------------------------------------------------------------------------------


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

    table: Table | None
    name: str
    remarks: tuple[str, ...]


def choose(
    group: Sequence[LoDProblem],
    backends: Sequence[str],
    device: hardware.Device | None = None,
) -> Choice | str:
    """The strategy that won wherever the table measured around this call, or why there is none.

    Two library matmuls stay unless one strategy beat them beyond noise in every measured corner of
    the cell that the call lies in.

    Args:
        group: one layer, or the layers of a group that reads one x.
        backends: the backends that can serve the call.
        device: plan for this one; None is that of the tensors.
    """
    first = group[0]
    if device is None:
        device = hardware.current_device(first.device)
    found = _find(device, os.environ.get("MAESTRO_KERNELS_TABLE", ""))
    remarks = "".join(f" ({remark})" for remark in found.remarks)
    if found.table is None:
        return f"no measured table for this device, see maestro-kernels tune{remarks}"
    rank, N = _mean_rank(group), sum(p.N for p in group)
    aligned = all(p.aligned and p.R % 8 == 0 and p.K % 8 == 0 for p in group)
    kind = (dtype_key(first.dtype), len(group), aligned)
    degenerate = not (first.M and N and first.K and rank)
    around = [] if degenerate else found.table.around(kind, first.M, N, first.K, rank)
    name = f"table {found.name}"
    if not around:
        return Choice("matmul", "two matmuls", f"{name} has no row near this call{remarks}")
    strategies = {s for row in around for s in row.us if s.partition(": ")[0] in backends}
    winners = {s: math.prod(row.speedup(s) for row in around) for s in strategies}
    winners = {s: gain for s, gain in winners.items() if all(row.wins(s) for row in around)}
    if not winners:
        nothing = f"nothing beats two matmuls in every row around {around[0]}"
        return Choice("matmul", "two matmuls", f"{name}: {nothing}{remarks}")
    best = max(winners, key=lambda s: (winners[s], s))
    backend, _, strategy = best.partition(": ")
    gain = f"{around[0].speedup(best):.2f} times as fast as two matmuls"
    return Choice(backend, strategy, f"{name}, row {around[0]}: {gain}{remarks}")


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
    shipped = resources.files("maestro_kernels").joinpath("configs", _file_name(device))
    for path in (user_path(device), Path(str(shipped))):
        try:
            table = load(path, device)
        except FileNotFoundError:
            if override and path == Path(override):
                remarks.append(f"MAESTRO_KERNELS_TABLE: no file {path.name}")
        except (OSError, ValueError) as error:
            remarks.append(f"refused: {str(error).removeprefix('load: ')}")
        else:
            remarks += _other_versions(table)
            return _Found(table, path.name, tuple(remarks))
    return _Found(None, "", tuple(remarks))


def _other_versions(table: Table) -> list[str]:
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
    """Read tables again at the next plan."""
    _find.cache_clear()
