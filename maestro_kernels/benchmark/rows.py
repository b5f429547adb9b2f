"""Benchmark rows: what one measurement says, how it is stored, and how two runs compare.

Everything shown in a table, a plot or the README is computed from these rows and nothing else.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from maestro_kernels.files import check_file
from maestro_kernels.measure import records
from maestro_kernels.measure.cases import joined
from maestro_kernels.measure.noise import Times, beyond_noise

SCHEMA = 1
Gate = Literal["passed", "failed", "unavailable", "error"]
_LAYERS = ("N", "R", "rank")


@dataclass(frozen=True)
class Row:
    """One provider on one case, timed in one way; a row without a time says why in `reason`.

    Attributes:
        run: UTC start of the run, ISO 8601; rows of one run share it.
        op: "lod_linear" or "lod_linear_grouped".
        source: where the shape comes from.
        M: rows of x.
        N: out_features, one entry per layer of a group (a plain integer in JSON for one layer).
        K: in_features.
        R: width of the factors, per layer.
        rank: active rank, per layer.
        bias: whether a bias is added.
        dtype: dtype name.
        mode: "forward" or "training" (forward and backward).
        cache: "warm", or "cold" when weights and x rotate through `ring_bytes` per provider.
        launch: "eager" or "graph" (CUDA graph).
        provider: name of what was timed.
        family: "dense", "two matmuls" or "ours".
        gate: "passed"; "failed" (wrong result), "unavailable" or "error": then there is no time.
        reason: why there is no time; empty otherwise.
        p20_us: microseconds per call, 20th percentile over samples.
        p50_us: median.
        p80_us: 80th percentile.
        samples: number of samples.
        calls: calls per sample.
        tflops: 1e12 FLOP/s of the provider's function.
        gbs: 1e9 bytes/s, each operand of that function counted once.
        roofline: ideal time of one pass over the operands / p50; above 1 where caches beat the
            bandwidth that the probe saw.
        baseline: fastest passing alternative of the same function ("two matmuls" family).
        speedup: its median / this median.
        speedup_dense: median of the fastest passing dense provider / this median.
        config: the plan that ran, for ours.
        ring_bytes: bytes of weights and x that a cold measurement walks through.
        threads: CPU threads torch used.
        device: hardware.Device as a dictionary.
        versions: hardware.versions(), commit and dirty flag included.
        command: what repeats the run.
    """

    run: str
    op: str
    source: str
    M: int
    N: tuple[int, ...]
    K: int
    R: tuple[int, ...]
    rank: tuple[int, ...]
    bias: bool
    dtype: str
    mode: str
    cache: str
    launch: str
    provider: str
    family: str
    gate: Gate
    reason: str = ""
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    samples: int = 0
    calls: int = 0
    tflops: float | None = None
    gbs: float | None = None
    roofline: float | None = None
    baseline: str | None = None
    speedup: float | None = None
    speedup_dense: float | None = None
    config: str = ""
    ring_bytes: int = 0
    threads: int = 0
    device: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    schema: int = SCHEMA

    @property
    def case(self) -> tuple[Any, ...]:
        """What the rows of all providers of one measurement share."""
        sizes = (self.op, self.M, self.N, self.K, self.R, self.rank, self.bias)
        return (*sizes, self.dtype, self.mode, self.cache, self.launch)

    @property
    def shape(self) -> str:
        """Rows, in, rank and out as 16 · 4096→256→4096; a group joins its layers with +."""
        group = f"{len(self.N)} layers, " if len(self.N) > 1 else ""
        return f"{group}{self.M} · {self.K}→{joined(self.rank)}→{joined(self.N)}"

    @property
    def times(self) -> Times | None:
        """(p20, p50, p80) in microseconds, or None without a time."""
        if not self.p50_us or self.p20_us is None or self.p80_us is None:
            return None
        return self.p20_us, self.p50_us, self.p80_us

    def to_json(self) -> str:
        """One line of JSON."""
        return records.line(self._record())

    def _record(self) -> dict[str, Any]:
        record = asdict(self)
        for name in _LAYERS:
            record[name] = record[name][0] if len(record[name]) == 1 else list(record[name])
        return record


def append(path: str | Path, rows: Iterable[Row]) -> None:
    """Add rows to the end of a file; whole rows that are there are never changed.

    Several processes may add to one file.
    """
    records.append(check_file("append", "path", path), [row._record() for row in rows])


def load(path: str | Path) -> list[Row]:
    """Read and check every row of a file; a last line that was cut off is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is not a row of this schema; names the line and the field.
    """
    return [parse(record, where) for where, record in records.located(path, schema=SCHEMA)]


def parse(record: dict[str, Any], where: str) -> Row:
    """A row from its dictionary.

    Raises:
        ValueError: names `where`, the field, what was expected and what came.
    """
    for name in _LAYERS:
        value = record.get(name)
        if value == []:
            raise ValueError(f"{where}: {name}: expected tuple of at least one, got {value!r}")
        record[name] = value if isinstance(value, list) else [value]
    row = records.checked(Row, record, where)
    for name, value in record.items():
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"{where}: {name}: expected float >= 0, got {value!r}")
    if (row.gate == "passed") != (row.p50_us is not None):
        raise ValueError(
            f"{where}: p50_us: expected a time exactly when gate is passed, got "
            f"{row.p50_us!r} with gate {row.gate!r}"
        )
    return row


def latest_run(rows: Sequence[Row]) -> list[Row]:
    """The rows of the run that started last."""
    last = max((row.run for row in rows), default="")
    return [row for row in rows if row.run == last]


def with_speedups(rows: Iterable[Row]) -> list[Row]:
    """Fill baseline, speedup and speedup_dense from the passing rows of each case."""
    rows = list(rows)
    cases: defaultdict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row.p50_us:
            cases[row.case].append(row)
    filled = []
    for row in rows:
        if row.p50_us:
            two = fastest(cases[row.case], "two matmuls")
            dense = fastest(cases[row.case], "dense")
            row = replace(
                row,
                baseline=two.provider if two else None,
                speedup=two.p50_us / row.p50_us if two and two.p50_us else None,
                speedup_dense=dense.p50_us / row.p50_us if dense and dense.p50_us else None,
            )
        filled.append(row)
    return filled


def fastest(rows: Iterable[Row], family: str) -> Row | None:
    """The row of this family with the least median; None without one."""
    return min(
        (row for row in rows if row.family == family),
        key=lambda row: row.p50_us or float("inf"),
        default=None,
    )


@dataclass(frozen=True)
class Change:
    """The same measurement in an older and a newer run.

    Attributes:
        old: the older row.
        new: the newer row.
        ratio: new median / old median, with the drift of the case taken out.
        verdict: "slower", "faster", "same", or "lost" when a time became a failure.
    """

    old: Row
    new: Row
    ratio: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """Every measurement both runs have, and how much the machine as a whole drifted.

    Attributes:
        changes: one entry per measurement, slowest first.
        drift: median of new / old over everything that is not ours; 1 when there is nothing.
        unmatched: rows of the new run that the old one lacks, other devices and threads included.
    """

    changes: tuple[Change, ...]
    drift: float
    unmatched: int

    @property
    def regressions(self) -> list[Change]:
        """What of ours got slower or was lost."""
        ours = (c for c in self.changes if c.new.family == "ours")
        return [c for c in ours if c.verdict in ("slower", "lost")]


def compare(old: Sequence[Row], new: Sequence[Row]) -> Comparison:
    """Say what got slower, beyond noise, between two runs on one device.

    New times are first divided by the drift of their case, the median change of the providers that
    are not ours: they took turns with ours, so a busy moment hit all of them. A case without any
    takes the drift of the whole run. beyond_noise then decides.
    """
    before = {_identity(row): row for row in old}
    pairs = [(before[_identity(row)], row) for row in new if _identity(row) in before]
    local: defaultdict[tuple[Any, ...], list[float]] = defaultdict(list)
    for a, b in pairs:
        if a.p50_us and b.p50_us and b.family != "ours":
            local[b.case].append(b.p50_us / a.p50_us)
    everything = [ratio for ratios in local.values() for ratio in ratios]
    drift = statistics.median(everything) if everything else 1.0
    changes = [
        _change(a, b, statistics.median(local[b.case]) if b.case in local else drift)
        for a, b in pairs
        if a.times
    ]
    changes.sort(key=lambda c: -c.ratio)
    return Comparison(tuple(changes), drift, len(new) - len(pairs))


def _identity(row: Row) -> tuple[Any, ...]:
    return (*row.case, row.provider, row.device.get("name"), row.threads)


def _change(old: Row, new: Row, drift: float) -> Change:
    if old.times is None or new.times is None:
        return Change(old, new, float("inf"), "lost")
    p20, p50, p80 = (time / drift for time in new.times)
    return Change(old, new, p50 / old.times[1], beyond_noise(old.times, (p20, p50, p80)))
