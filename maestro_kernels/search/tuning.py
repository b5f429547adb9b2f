"""Measuring a table: every strategy against two matmuls over shapes, M and ranks of one device."""

from __future__ import annotations

import datetime
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from maestro_kernels import hardware, tables
from maestro_kernels.measure.accuracy import Rings, flush_bytes, passing, ring_bytes, walk
from maestro_kernels.measure.cases import Case, Layer
from maestro_kernels.measure.cost import break_even_rank
from maestro_kernels.measure.providers import Provider, make_case_inputs
from maestro_kernels.measure.records import Journal
from maestro_kernels.measure.timing import timed
from maestro_kernels.search.layer_profile import software
from maestro_kernels.search.strategies import for_table
from maestro_kernels.tables import BASELINE, Modes, Row, Table

# (N, K) that layers of published models have: encoders, GPT-2, ViT, Llama, Qwen.
SHAPES = (
    *((384, 384), (1536, 384), (384, 1536)),
    *((768, 768), (3072, 768), (768, 3072)),
    *((1024, 1024), (4096, 1024), (1024, 4096)),
    *((4096, 4096), (14336, 4096), (4096, 14336)),
)
# Layers that read one x: q/k/v and gate/up, as (N of each, K).
GROUPS = (
    ((384, 384, 384), 384),
    ((768, 768, 768), 768),
    ((4096, 1024, 1024), 4096),
    ((14336, 14336), 4096),
)
_RANKS = (16, 32, 64, 128, 256, 512, 1024)
_ROWS = {"cpu": (1, 4, 16, 64, 256, 1024), "cuda": (1, 8, 32, 64, 256, 1024, 4096, 8192, 16384)}
# A CPU call above this takes too long to be measured often, and strategies differ little there.
_CPU_FLOP = 4e9
_SECONDS = 0.03


@dataclass(frozen=True)
class Plan:
    """What a table is measured for.

    Attributes:
        device: where.
        dtype: dtype name.
        cases: the calls, one row each.
    """

    device: torch.device
    dtype: str
    cases: tuple[Case, ...]


def plan(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    shapes: Sequence[tuple[int, int]] | None = None,
    groups: Sequence[tuple[tuple[int, ...], int]] | None = None,
    rows: Sequence[int] | None = None,
    quick: bool = False,
) -> Plan:
    """The calls a table is made of: every shape at ranks 16, 32, ... that hold fewer weights.

    Args:
        device: "cpu" or "cuda".
        dtype: of everything.
        shapes: (N, K) of single layers; None is SHAPES, () none.
        groups: (N of each, K) of layers that read one x; None is GROUPS without `shapes`, else ().
        rows: values of M; None is the device's own list.
        quick: every second M and rank.
    """
    place = torch.device(device)
    if groups is None:
        groups = GROUPS if shapes is None else ()
    layers = [((N,), K) for N, K in (SHAPES if shapes is None else shapes)]
    step = 2 if quick else 1
    Ms = rows or _ROWS["cuda" if place.type == "cuda" else "cpu"][::step]
    name = str(dtype).removeprefix("torch.")
    cases = []
    for (Ns, K), M in itertools.product([*layers, *groups], Ms):
        for rank in _ranks(Ns, K, place.type)[::step]:
            # A width that is no multiple of 8 is another kind of row on a GPU.
            case = Case("tune", M, tuple(Layer(N, K, rank, rank) for N in Ns), name)
            if place.type != "cpu" or case.cost("two matmuls").flops <= _CPU_FLOP:
                cases.append(case)
    return Plan(place, name, tuple(cases))


def _ranks(Ns: Sequence[int], K: int, kind: str) -> list[int]:
    N = min(Ns)
    found = [r for r in _RANKS if r < break_even_rank(N, K)]
    return sorted([*found, *(r - 1 for r in found[1::2])]) if kind == "cuda" else found


def tune(
    plan: Plan,
    *,
    seconds: float = _SECONDS,
    cache: bool = True,
    command: str = "",
    limit: float = math.inf,
    progress: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> Table:
    """Measure a table; rows are kept in the user's cache folder, so an interrupted run goes on.

    Where time runs out the table holds what was measured: fewer rows than the plan has cases.

    Args:
        plan: what to measure; see `plan`.
        seconds: of samples per strategy and mode.
        cache: keep and reuse rows.
        command: what repeats it, for the file.
        limit: start no further case after this many seconds.
        progress: gets (text, done, total).
    """
    deadline = time.monotonic() + limit
    device = hardware.current_device(plan.device)
    journal = Journal("tables", software(device), _parse) if cache else None
    known = {str(row): row for row in journal.items} if journal else {}
    rows = []
    for i, case in enumerate(plan.cases):
        blank = table_row(case, device, {})
        progress(str(blank), i, len(plan.cases))
        row = known.get(str(blank))
        if row is None and time.monotonic() > deadline:
            continue
        if row is None:
            row = table_row(case, device, measure(case, plan.device, seconds))
            if journal is not None:
                journal.add([row])
        rows.append(row)
    progress("done", len(rows), len(plan.cases))
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Table(tables.identity(device), hardware.versions(), tuple(rows), now, command)


def _parse(record: object) -> Row:
    return tables.parse_row(record, "row")


def table_row(case: Case, device: hardware.Device, us: Modes) -> Row:
    """A table's row of a measured case."""
    total = sum(layer.N + layer.K for layer in case.layers)
    rank = round(sum(s.rank * (s.N + s.K) for s in case.layers) / total)
    aligned = device.kind == "cpu" or (case.K % 8 == 0 and all(s.R % 8 == 0 for s in case.layers))
    N = sum(layer.N for layer in case.layers)
    kind = tables.dtype_key(case.torch_dtype)
    return Row(kind, len(case.layers), case.M, N, case.K, rank, aligned, us)


def measure(
    case: Case,
    device: torch.device,
    seconds: float = _SECONDS,
    providers: Callable[[Case], Sequence[Provider]] = for_table,
    refused: dict[str, str] | None = None,
) -> Modes:
    """Every strategy of a call, gated and interleaved, in every mode.

    Args:
        case: the call.
        device: where.
        seconds: of samples per strategy and mode.
        providers: the strategies, two library matmuls among them.
        refused: gets "mode: strategy" -> why what can run the call was not timed.
    """
    modes: Modes = {}
    for mode in ("forward", "training"):
        kind = Case(case.source, case.M, case.layers, case.dtype, mode)  # type: ignore[arg-type]
        with torch.set_grad_enabled(mode == "training"):
            inputs = make_case_inputs(kind, device)
            why: dict[str, str] = {}
            chosen = passing(kind, providers(kind), inputs, refused=why)
            if refused is not None:
                refused.update({f"{mode}: {name}": reason for name, reason in why.items()})
            for cache in ("cold", "warm") if mode == "forward" else ("cold",):
                rings = Rings(inputs, ring_bytes(device) if cache == "cold" else 0)
                bounds = {p.name: p.bound(kind, rings[p.family]) for p in chosen}
                calls = {name: walk(ring) for name, ring in bounds.items()}
                copies = {name: len(ring) for name, ring in bounds.items()}
                flush = flush_bytes(device) if cache == "cold" else 0
                for launch, stats in timed(
                    calls, device, cache, seconds, rounds=(6, 60), flush=flush, copies=copies
                ):
                    if BASELINE in stats:
                        modes[f"{mode} {cache} {launch}"] = {
                            n: (1e6 * s.p20, 1e6 * s.p50, 1e6 * s.p80) for n, s in stats.items()
                        }
    return modes
