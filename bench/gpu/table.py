"""The table of this device: each strategy against two library matmuls, in every mode.

The suite's own cases, so that `auto` has a row for each that is timed afterwards; a full
`maestro-kernels tune` has 1188 and would not get to 4096 x 4096 within a machine's time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from bench.gpu import suite
from bench.gpu.device import Device, Skip
from bench.gpu.items import Item
from bench.gpu.plan import Stage
from bench.gpu.state import Record
from maestro_kernels.measure.cases import Case
from maestro_kernels.measure.providers import Provider
from maestro_kernels.search import strategies, tuning
from maestro_kernels.tables import BASELINE, Modes, Row, parse_row

__all__ = ["items", "merged"]

# Seconds of samples per strategy and mode; six rounds of a millisecond are run in any case.
_SECONDS = 0.01


def items(device: Device, stage: Stage, family: str) -> Iterator[Item]:
    """One item per case of the suite."""
    for case in suite.cases():
        yield Item(case.id, partial(_measure, device, family, case))


def _measure(device: Device, family: str, case: Case) -> dict[str, Any]:
    case, place = device.case(case), torch.device(device.name)
    refused: dict[str, str] = {}
    us = tuning.measure(
        case, place, _SECONDS, lambda case: providers(device, family, case), refused
    )
    timed = set().union(*us.values()) - {BASELINE}
    wrong = {name: why for name, why in refused.items() if not name.endswith(BASELINE)}
    if not timed and not wrong:
        raise Skip("the strategy does not take the call")
    return {
        "row": asdict(tuning.table_row(case, device.facts(), us)) if timed else None,
        "wrong": "; ".join(f"{name}: {why}" for name, why in wrong.items()),
    }


def providers(device: Device, family: str, case: Case) -> Sequence[Provider]:
    """Two library matmuls and one strategy."""
    name = family.replace("-", ": ", 1)
    found = {p.name: p for p in strategies.for_table(case)}
    if device.is_stub:
        # The interpreter would take seconds; what is timed there stands for nothing.
        return [found[BASELINE], replace(found[BASELINE], name=name)]
    return [found[p] for p in (BASELINE, name) if p in found]


def merged(records: Sequence[Record]) -> list[Row]:
    """One row per call from what the families measured in processes of their own.

    Each of them timed two library matmuls beside its strategy. Times of a strategy are scaled by
    what these took in its process and in the first one, so that ratios stay what they were.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    for record in records:
        found = (record["result"] or {}).get("row")
        if found is None:
            continue
        row = parse_row(found, record["item"])
        key = (*row.kind, row.M, row.N, row.K, row.rank)
        rows[key] = replace(row, us=_joined(rows[key].us, row.us)) if key in rows else row
    return list(rows.values())


def _joined(first: Modes, other: Modes) -> Modes:
    joined = {mode: dict(times) for mode, times in first.items()}
    for mode, times in other.items():
        mine = joined.setdefault(mode, {BASELINE: times[BASELINE]})
        scale = mine[BASELINE][1] / times[BASELINE][1]
        for name, (p20, p50, p80) in times.items():
            mine.setdefault(name, (p20 * scale, p50 * scale, p80 * scale))
    return joined
