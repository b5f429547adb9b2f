"""Measured tables of one device: rows, the JSON file, and the rows around a call.

A table is written by `maestro-kernels tune`; tuned.py finds the one in use and chooses by it.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from maestro_kernels import hardware
from maestro_kernels.files import check_file, config_folder, write_text
from maestro_kernels.measure import records
from maestro_kernels.measure.noise import Times, beyond_noise

SCHEMA = 1
# What every row holds and every other strategy must beat, as a plan prints it.
BASELINE = "matmul: two matmuls"
# Beyond the measured sizes a row speaks for twice as much or half as much, no further.
_REACH = 2.0
# Two shapes are neighbours while N and K together differ by no more than this factor.
_SHAPE_REACH = 4.0
# What auto may lose with cold caches to gain with warm ones, or the other way round.
_TOLERATED = 0.02

Modes = dict[str, dict[str, Times]]


class Mode(NamedTuple):
    """How a call is made: which strategy is fastest depends on it.

    Attributes:
        training: its gradients will be computed.
        captured: it is replayed in a CUDA graph, where launches cost the host nothing.
    """

    training: bool = False
    captured: bool = False

    def __str__(self) -> str:
        return (
            f"{'training' if self.training else 'forward'} {'graph' if self.captured else 'eager'}"
        )

    def covers(self, name: str) -> bool:
        """Whether times under `name`, as "forward cold eager", are of this mode."""
        direction, _, launch = name.partition(" ")
        return f"{direction} {launch.partition(' ')[2]}" == str(self)


FORWARD = Mode()


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
            Always true on a CPU, where nothing depends on it.
        us: mode -> strategy -> (p20, median, p80) in microseconds. A mode is "forward" or
            "training" (forward and backward), "cold" or "warm", "eager" or "graph", in this order;
            a strategy is a plan's "backend: strategy", or "packed: form" for a form of `prepack`.
    """

    dtype: str
    layers: int
    M: int
    N: int
    K: int
    rank: int
    aligned: bool
    us: Modes

    @property
    def kind(self) -> tuple[str, int, bool]:
        """What a call and a row must share."""
        return self.dtype, self.layers, self.aligned

    def strategies(self, mode: Mode = FORWARD) -> set[str]:
        """What was timed with cold caches and with warm ones, as far as the mode was measured."""
        timed = [set(times) for name, times in self.us.items() if mode.covers(name)]
        return set.intersection(*timed) if timed else set()

    def speedup(self, strategy: str, mode: Mode = FORWARD) -> float:
        """Median of two matmuls over that of a strategy, geometric mean over cold and warm."""
        ratios = [base[1] / ours[1] for ours, base in self._pairs(strategy, mode)]
        return math.prod(ratios) ** (1 / len(ratios))

    def wins(self, strategy: str, mode: Mode = FORWARD) -> bool:
        """Faster than two matmuls beyond noise with cold or warm caches, and slower in neither."""
        if strategy not in self.strategies(mode):
            return False
        pairs = self._pairs(strategy, mode)
        loses = any(ours[1] > base[1] * (1 + _TOLERATED) for ours, base in pairs)
        return not loses and any(beyond_noise(base, ours) == "faster" for ours, base in pairs)

    def _pairs(self, strategy: str, mode: Mode) -> list[tuple[Times, Times]]:
        """(a strategy's times, those of two matmuls)."""
        of_mode = [times for name, times in self.us.items() if mode.covers(name)]
        return [(times[strategy], times[BASELINE]) for times in of_mode]

    @property
    def fastest_form(self) -> str | None:
        """The form of `prepack` with the least time in forward modes; None where none was timed."""
        timed = self.strategies()
        forms = {s.removeprefix("packed: "): s for s in timed if s.startswith("packed: ")}
        if not forms:
            return None
        forms["unpacked"] = BASELINE
        return max(forms, key=lambda form: (self.speedup(forms[form]), form))

    def __str__(self) -> str:
        many = f"{self.layers} layers, " if self.layers > 1 else ""
        return f"{many}{self.M} · {self.K}→{self.rank}→{self.N} {self.dtype}"


@dataclass(frozen=True)
class Table:
    """Rows of one device.

    Attributes:
        device: `identity` of the device they were measured on.
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
        return records.document(head, "rows", map(_record, self.rows))


_HEAD = ("device", "versions", "created", "command")


def identity(device: hardware.Device) -> dict[str, Any]:
    """What tells one device from another: kind, name, arch, cores or threads, caches.

    Virtual CPUs of different generations share one name: caches tell them apart.
    """
    names = ("kind", "name", "arch", "num_cores", "l2_bytes", "l3_bytes")
    return {name: getattr(device, name) for name in names}


def dtype_key(dtype: torch.dtype) -> str:
    """The dtype's name, and for float32 below "highest" precision also that it is rounded."""
    name = str(dtype).removeprefix("torch.")
    rounded = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return f"{name} rounded" if rounded else name


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
    return config_folder() / file_name(device)


def file_name(device: hardware.Device) -> str:
    """Name of a device's table."""
    text = f"{device.name} {device.arch} {device.num_cores}".lower()
    return re.sub(r"[^a-z0-9_.]+", "-", text).strip("-") + ".json"


def save(table: Table, path: str | Path) -> None:
    """Write a table: complete, or not at all."""
    place = check_file("save", "path", path)
    for i, row in enumerate(table.rows):
        parse_row(_record(row), f"save: {place.name}: row {i}")
    write_text(place, table.to_json())


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
    fields = ("rows", *_HEAD)
    record = records.load_document(path, fields, schema=SCHEMA, what="table", fn="load")
    for name, kind in (("device", dict), ("versions", dict), ("rows", list)):
        if not isinstance(record[name], kind):
            raise ValueError(f"{where}: {name}: expected a {kind.__name__}, got {record[name]!r}")
    rows = tuple(parse_row(r, f"{where}: row {i}") for i, r in enumerate(record["rows"]))
    table = Table(rows=rows, **{name: record[name] for name in _HEAD})
    if device is not None and table.device != identity(device):
        ours, theirs = _described(identity(device)), _described(table.device)
        raise ValueError(f"{where}: device: expected {ours}, got {theirs}")
    return table


def _described(device: dict[str, Any]) -> str:
    caches = (f"{level} {device.get(f'{level}_bytes')}" for level in ("l2", "l3"))
    facts = (device.get("arch"), f"{device.get('num_cores')} cores", *caches)
    return f"{device.get('name')} ({', '.join(map(str, facts))})"


def _record(row: Row) -> dict[str, Any]:
    us = {
        mode: {name: [round(t, 3) for t in times] for name, times in by_strategy.items()}
        for mode, by_strategy in row.us.items()
    }
    return asdict(row) | {"us": us}


def parse_row(record: Any, where: str) -> Row:
    """A row from its dictionary.

    Raises:
        ValueError: names `where`, the field, what was expected and what came.
    """
    row = records.checked(Row, record, where)
    for name in ("layers", "M", "N", "K", "rank"):
        if record[name] < 1:
            raise ValueError(f"{where}: {name}: expected int (>= 1), got {record[name]!r}")
    if not any(mode.startswith("forward ") for mode in row.us):
        raise ValueError(f"{where}: us: expected times of a forward mode, got {record['us']!r}")
    for mode, by_strategy in row.us.items():
        if BASELINE not in by_strategy:
            raise ValueError(
                f"{where}: us: {mode}: expected times of {BASELINE!r} and others, "
                f"got {by_strategy!r}"
            )
        for name, times in by_strategy.items():
            if not 0 < times[0] <= times[1] <= times[2] or ": " not in name:
                raise ValueError(
                    f"{where}: us: {mode}: expected 'backend: strategy' -> [p20, median, p80] in "
                    f"µs, got {name!r} -> {times!r}"
                )
    return row
