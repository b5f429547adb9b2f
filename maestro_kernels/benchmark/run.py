"""One benchmark run: gate every provider, time those that pass against each other, make rows."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from maestro_kernels import hardware
from maestro_kernels.benchmark.providers import default_providers
from maestro_kernels.benchmark.rows import Gate, Row, with_speedups
from maestro_kernels.measure.accuracy import References, Rings, flush_bytes, gate, walk
from maestro_kernels.measure.cases import Case
from maestro_kernels.measure.providers import Bound, Provider, Unavailable, make_case_inputs
from maestro_kernels.measure.timing import (
    Clock,
    CpuClock,
    Stats,
    interleave,
    launch_modes,
    prepared,
)
from maestro_kernels.measure.wording import first_line


@dataclass(frozen=True)
class Options:
    """How a run measures.

    Attributes:
        device: "cpu" or "cuda".
        seconds: time for the samples of one case in one cache state, all providers together.
        caches: which of "warm" and "cold" to measure.
        ring_bytes: a cold measurement walks through copies of weights and x that fill this much
            per provider (at least two copies). Below the size of the last-level cache it shows
            cold private caches, not cold memory; rows say how large it was.
        compiled: include the torch.compile baselines, which take seconds each to compile.
        command: what repeats the run, for the rows.
    """

    device: str = "cpu"
    seconds: float = 2.5
    caches: tuple[str, ...] = ("warm", "cold")
    ring_bytes: int = 256 << 20
    compiled: bool = True
    command: str = ""


def run(
    cases: Sequence[Case],
    options: Options | None = None,
    *,
    providers: Callable[[Case], Sequence[Provider]] = default_providers,
    on_case: Callable[[Case], None] = lambda case: None,
) -> Iterator[Row]:
    """Measure cases one after the other and yield their rows as each case ends.

    Args:
        cases: what to time.
        options: how.
        providers: the candidates of a case.
        on_case: called before each case, for progress.
    """
    options = options or Options()
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    # Peaks of all dtypes at once: the rows of a run name one device.
    device = hardware.measured_device(options.device, *dict.fromkeys(c.dtype for c in cases))
    for case in cases:
        on_case(case)
        yield from run_case(case, providers(case), device, started, options)


def run_case(
    case: Case,
    providers: Sequence[Provider],
    device: hardware.Device,
    started: str,
    options: Options,
) -> list[Row]:
    """Rows of one case: every provider, every cache state, every launch mode."""
    if not options.compiled:
        providers = [p for p in providers if "compiled" not in p.name]
    # Each case has its own shapes; without this, compiled baselines would hit the limit on
    # recompilations after a few cases and run uncompiled.
    torch.compiler.reset()
    inputs = make_case_inputs(case, options.device)
    blank = _row(case, device, started, options)
    rows: list[Row] = []
    with torch.set_grad_enabled(case.mode == "training"):
        references = References(case, inputs)
        for cache in options.caches:
            rings = Rings(inputs, options.ring_bytes if cache == "cold" else 0)
            bounds, refused = _admit(case, providers, rings, references)
            flush = flush_bytes(torch.device(options.device)) if cache == "cold" else 0
            for launch, clock in launch_modes(options.device, flush).items():
                stats, unfit = _time(bounds, cache == "cold", clock, options.seconds)
                for provider in providers:
                    row = replace(
                        blank,
                        cache=cache,
                        launch=launch,
                        provider=provider.name,
                        family=provider.family,
                    )
                    if provider.name not in stats:
                        kind, reason = (refused | unfit)[provider.name]
                        rows.append(replace(row, gate=kind, reason=reason))
                        continue
                    copies = len(bounds[provider.name]) if cache == "cold" else 0
                    size = inputs.bytes(provider.family)
                    config = provider.config(case, inputs)
                    row = replace(row, ring_bytes=copies * size, config=config)
                    rows.append(_timed(row, case, stats[provider.name], device))
    return with_speedups(rows)


def _admit(
    case: Case, providers: Sequence[Provider], rings: Rings, references: References
) -> tuple[dict[str, list[Bound]], dict[str, tuple[Gate, str]]]:
    """Bind and gate the providers: (name -> calls), (name -> (gate, reason))."""
    bounds: dict[str, list[Bound]] = {}
    refused: dict[str, tuple[Gate, str]] = {}
    for provider in providers:
        try:
            bound = provider.bound(case, rings[provider.family])
            problem = gate(bound[0], references[provider.family])
            if problem is None and len(bound) > 1:
                problem = gate(bound[-1], references[provider.family])
        except Unavailable as reason:
            refused[provider.name] = ("unavailable", str(reason))
        except (RuntimeError, KeyError, AssertionError) as error:
            # Compilation, memory and launch errors of one candidate must not end the others. The
            # compiler of torch 2.11 has a KeyError for a user without a name, and an AssertionError
            # when it is asked again.
            refused[provider.name] = ("error", f"{type(error).__name__}: {first_line(error)}")
        else:
            if problem is None:
                bounds[provider.name] = bound
            else:
                refused[provider.name] = ("failed", problem)
    return bounds, refused


def _time(
    bounds: dict[str, list[Bound]], cold: bool, clock: Clock, seconds: float
) -> tuple[dict[str, Stats], dict[str, tuple[Gate, str]]]:
    """Time what the clock can time: (name -> stats), (name -> (gate, reason))."""
    calls, reasons = prepared(clock, {name: walk(ring) for name, ring in bounds.items()})
    unfit: dict[str, tuple[Gate, str]] = {
        name: ("unavailable", f"cannot be captured: {why}") for name, why in reasons.items()
    }
    if not calls:
        return {}, unfit
    # Only a GPU's caches are flushed; on a CPU a ring larger than the cache is all there is.
    flushed = cold and not isinstance(clock, CpuClock)
    most = {name: len(bounds[name]) for name in calls} if flushed else None
    stats = interleave(calls, seconds=seconds, prime=not cold, clock=clock, most_calls=most)
    return stats, unfit


def _row(case: Case, device: hardware.Device, started: str, options: Options) -> Row:
    """What all rows of a case share; provider, cache state and times are filled in per row."""
    record = asdict(device)
    record["peak_flops"] = dict(device.peak_flops)
    return Row(
        run=started,
        op=case.op,
        source=case.source,
        M=case.M,
        N=tuple(layer.N for layer in case.layers),
        K=case.K,
        R=tuple(layer.R for layer in case.layers),
        rank=tuple(layer.rank for layer in case.layers),
        bias=case.bias,
        dtype=case.dtype,
        mode=case.mode,
        cache="warm",
        launch="eager",
        provider="",
        family="",
        gate="unavailable",
        threads=torch.get_num_threads(),
        device=record,
        versions=hardware.versions(),
        command=options.command,
    )


def _timed(row: Row, case: Case, stats: Stats, device: hardware.Device) -> Row:
    cost = case.cost("dense" if row.family == "dense" else "fused")
    warm = row.cache == "warm" and cost.bytes <= device.last_level_cache
    ideal = cost.seconds(device, case.dtype, warm=warm)
    return replace(
        row,
        gate="passed",
        p20_us=stats.p20 * 1e6,
        p50_us=stats.p50 * 1e6,
        p80_us=stats.p80 * 1e6,
        samples=stats.samples,
        calls=stats.calls,
        tflops=cost.flops / stats.p50 / 1e12,
        gbs=cost.bytes / stats.p50 / 1e9,
        roofline=None if ideal is None else ideal / stats.p50,
    )
