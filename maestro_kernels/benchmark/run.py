"""One benchmark run: gate every provider, time those that pass against each other, make rows."""

from __future__ import annotations

import datetime
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from maestro_kernels import hardware
from maestro_kernels.benchmark.cases import Case
from maestro_kernels.benchmark.providers import (
    Bound,
    Family,
    Inputs,
    Provider,
    Unavailable,
    default_providers,
    dense_forward,
    make_case_inputs,
    two_forward,
)
from maestro_kernels.benchmark.rows import Gate, Row, with_speedups
from maestro_kernels.measure.timing import (
    Clock,
    CpuClock,
    CudaClock,
    CudaGraphClock,
    Stats,
    interleave,
    prepared,
)
from maestro_kernels.testing import accuracy_error, rounding_errors

__all__ = ["Options", "Reference", "Rings", "checked", "gate", "run", "run_case", "walk"]

# A ring has at most this many sets of weights: a tiny layer would otherwise need thousands.
_MAX_RING = 512
# Overwriting this many times the L2 leaves nothing in it.
_FLUSH = 2


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

    @property
    def launches(self) -> tuple[str, ...]:
        """How calls are launched: "eager", and on a GPU also "graph" (CUDA graph)."""
        return ("eager", "graph") if torch.device(self.device).type == "cuda" else ("eager",)

    def clock(self, launch: str, cache: str) -> Clock:
        """What times a launch mode; on a GPU a cold one flushes the L2 before each sample."""
        if torch.device(self.device).type != "cuda":
            return CpuClock()
        l2 = hardware.current_device(self.device).l2_bytes or 0
        flush = _FLUSH * l2 if cache == "cold" else 0
        return CudaGraphClock(flush) if launch == "graph" else CudaClock(flush)


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
        references = _References(case, inputs)
        for cache in options.caches:
            rings = Rings(inputs, options.ring_bytes if cache == "cold" else 0)
            bounds, refused = _admit(case, providers, rings, references)
            for launch in options.launches:
                clock = options.clock(launch, cache)
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


class Rings:
    """Copies of a case's inputs, per family, because dense weights are larger than factors."""

    def __init__(self, inputs: Inputs, ring_bytes: int) -> None:
        self._inputs, self._bytes = inputs, ring_bytes
        self._rings: dict[bool, list[Inputs]] = {}

    def __getitem__(self, family: Family) -> list[Inputs]:
        dense = family == "dense"
        if dense not in self._rings:
            own = replace(self._inputs, us=(), vs=()) if dense else replace(self._inputs, dense=())
            copies = math.ceil(self._bytes / own.bytes(family)) if self._bytes else 1
            copies = min(max(copies, 2), _MAX_RING) if self._bytes else 1
            self._rings[dense] = [own, *(own.copy() for _ in range(copies - 1))]
        return self._rings[dense]


@dataclass(frozen=True)
class Reference:
    """What results are held to, in the order in which a Bound gives them.

    Attributes:
        torch_out: from plain torch in the same dtype.
        exact: in float64.
        rounding: gives the errors that rounding may leave in each; None where torch's are the only
            measure.
    """

    torch_out: Sequence[Tensor]
    exact: Sequence[Tensor]
    rounding: Callable[[], Sequence[Tensor]] | None = None


class _References:
    """The reference of each family."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._case, self._inputs = case, inputs
        self._results: dict[bool, Reference] = {}

    def __getitem__(self, family: Family) -> Reference:
        dense = family == "dense"
        if dense not in self._results:
            self._results[dense] = Reference(
                _compute(self._inputs, self._case.torch_dtype, dense),
                _compute(self._inputs, torch.float64, dense),
                None if dense else functools.cache(lambda: _rounding(self._inputs)),
            )
        return self._results[dense]


def _rounding(inputs: Inputs) -> tuple[Tensor, ...]:
    """`rounding_errors` of the factorised layers, in the order of Bound."""
    layers = [
        rounding_errors(inputs.x, u, v, rank=r, bias=b, dy=dy)
        for u, v, b, r, dy in zip(
            inputs.us,
            inputs.vs,
            inputs.biases,
            inputs.ranks,
            inputs.dys or [None] * len(inputs.us),
            strict=True,
        )
    ]
    ys = tuple(layer["y"] for layer in layers)
    if not inputs.dys:
        return ys
    # dx adds up what the layers give, and the errors of different layers are independent.
    dx = torch.stack([layer["dx"] for layer in layers]).square().sum(0).sqrt()
    weights = [layer[name] for name in ("du", "dv") for layer in layers]
    biases = [e["dbias"] for e, b in zip(layers, inputs.biases, strict=True) if b is not None]
    return (*ys, dx, *weights, *biases)


def _compute(inputs: Inputs, dtype: torch.dtype, dense: bool) -> tuple[Tensor, ...]:
    """The formula in plain torch, and its gradients in training, in the order of Bound."""

    def cast(t: Tensor) -> Tensor:
        return t.detach().to(dtype).requires_grad_(t.requires_grad)

    x = cast(inputs.x)
    biases = [None if b is None else cast(b) for b in inputs.biases]
    weights = [cast(w) for w in (inputs.dense if dense else (*inputs.us, *inputs.vs))]
    n = len(inputs.ranks)
    if dense:
        ys = dense_forward(x, weights, biases)
    else:
        ys = two_forward(x, weights[:n], weights[n:], biases, inputs.ranks)
    leaves = (x, *weights, *(b for b in biases if b is not None))
    return Bound(lambda: ys, leaves, tuple(dy.to(dtype) for dy in inputs.dys))()


def gate(bound: Bound, reference: Reference) -> str | None:
    """Why a provider's results are refused, or None when all meet the derived tolerance.

    Args:
        bound: the provider on one set of inputs.
        reference: the same results from elsewhere.
    """
    results, exact, rounding = bound(), reference.exact, reference.rounding
    if len(results) != len(exact):
        return f"expected {len(exact)} results, got {len(results)}"
    for k, (out, same, ref) in enumerate(zip(results, reference.torch_out, exact, strict=True)):
        problem = accuracy_error(out, same, ref, rounding and (lambda k=k: rounding()[k]))
        if problem is not None:
            return f"{_result_name(k, len(exact), bound)}: {problem}"
    return None


def _result_name(k: int, total: int, bound: Bound) -> str:
    """Name result k of a call: outputs first, then gradients in the order of its leaves."""
    outputs = total - len(bound.leaves) if bound.dys else total
    if k < outputs:
        return "y" if outputs == 1 else f"y[{k}]"
    leaf = bound.leaves[k - outputs]
    return "dx" if k == outputs else f"gradient of the {tuple(leaf.shape)} parameter"


def checked(case: Case, provider: Provider, inputs: Inputs) -> tuple[Bound, str | None]:
    """One provider bound to one set of inputs, and what its gate says; for other timers.

    Raises:
        Unavailable: the provider cannot run the case.
    """
    (bound,) = provider.bound(case, [inputs])
    return bound, gate(bound, _References(case, inputs)[provider.family])


def _admit(
    case: Case, providers: Sequence[Provider], rings: Rings, references: _References
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
        except RuntimeError as error:
            # Compilation, memory and launch errors of one candidate must not end the others.
            refused[provider.name] = ("error", f"{type(error).__name__}: {_first_line(error)}")
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
    most = {name: len(bounds[name]) for name in calls} if cold and _flushes(clock) else None
    stats = interleave(calls, seconds=seconds, prime=not cold, clock=clock, most_calls=most)
    return stats, unfit


def _flushes(clock: Clock) -> bool:
    return not isinstance(clock, CpuClock)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def walk(ring: list[Bound]) -> Callable[[], object]:
    """A call that uses the next set of inputs each time."""
    calls: list[Callable[[], object]] = [b if b.dys else b.forward for b in ring]
    if len(calls) == 1:
        return calls[0]
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


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
