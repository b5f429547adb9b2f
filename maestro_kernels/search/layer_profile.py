"""How fast a layer is at each rank on this machine: measured, interpolated, and fitted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from maestro_kernels import hardware, tables, tuned
from maestro_kernels.arguments import renamed
from maestro_kernels.backends import native
from maestro_kernels.measure.accuracy import Rings, flush_bytes, passing, ring_bytes, walk
from maestro_kernels.measure.cases import Case, Layer
from maestro_kernels.measure.progress import Advance, progress_bar
from maestro_kernels.measure.providers import Inputs, Provider
from maestro_kernels.measure.records import Journal
from maestro_kernels.measure.timing import timed
from maestro_kernels.search import curves
from maestro_kernels.search.latencies import Point, Profile, point_from
from maestro_kernels.search.strategies import AUTO, DENSE, TWO, for_profile
from maestro_kernels.search.targets import default_device, default_dtype, shapes_of
from maestro_kernels.testing import make_inputs

# Seconds of samples for one candidate: about ten of a millisecond, each with an untimed call.
_SECONDS = 0.025
# Rounds of refinement after the coarse ranks; each adds at most four ranks where the curve bends.
_ROUNDS = 2
# A round whose dense layer is this much slower or faster than before was disturbed.
_DISTURBED = 1.4
_TRIES = 3


@renamed(batch_sizes="rows", cache="resume")
def profile(
    target: Any,
    ranks: Sequence[int] | None = None,
    rows: Sequence[int] = (1, 64),
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    resume: bool = True,
    seconds: float = _SECONDS,
    progress: bool | Advance | None = None,
) -> Profile:
    """Measure latency over rank: ms(N, K, rank, M) for dense, two matmuls and every strategy.

    Each layer size is timed at a few ranks first, then where the curve bends, where it crosses the
    dense layer and just above the ranks where tiles of kernels end. All candidates of a round take
    turns, with warm and with cold caches, on a GPU as eager launches and as a CUDA graph. A
    strategy of ours is timed only where it passes the accuracy gate.

    Points are kept in the user's cache folder (MAESTRO_KERNELS_CACHE) per device, threads, dtype,
    versions and tuning table, so that a second call costs nothing and an interrupted one goes on.

    Args:
        target: a layer, a model, (N, K), or a list of (N, K). Of a model its linear layers and its
            1 × 1 convolutions without stride, padding and groups, which are one matmul on
            channels-last images (M is the number of positions).
        ranks: measure exactly these, as far as they are at most min(N, K); None chooses them.
        rows: values of M, the rows of x after flattening: batch times tokens.
        dtype: of everything; None is the target's own, or float32.
        device: where; None is the target's own, or the CPU.
        resume: read and keep points in the user's cache folder.
        seconds: of samples per candidate, cache state and launch mode.
        progress: show a bar; None does so on a terminal. A function gets (text, done, total).

    Raises:
        TypeError: target, ranks, rows or dtype of the wrong type.
        ValueError: sizes below 1, no linear layer, an unknown device.
        NotImplementedError: a target of other convolutions alone, whose time depends on the image:
            `profile_model` measures these.
    """
    shapes = shapes_of(target)
    ranks = None if ranks is None else _positive("ranks", ranks)
    rows = _positive("rows", rows)
    dtype = default_dtype(target) if dtype is None else dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"profile: dtype: expected a torch.dtype, got {type(dtype).__name__}")
    place = torch.device(default_device(target) if device is None else device)
    record = hardware.current_device(place)
    journal = _journal(record, dtype) if resume else None
    points: list[Point] = []
    work = [(shape, M) for shape in shapes for M in rows]
    with progress_bar(progress, "profile") as advance:
        for i, (shape, M) in enumerate(work):
            advance(f"{M} · {shape.K}→r→{shape.N}", i, len(work))
            sweep = Sweep(shape.N, shape.K, M, shape.bias, dtype, place, seconds)
            points += _curve(sweep, ranks, journal)
        advance("done", len(work), len(work))
    return Profile(
        device=tables.identity(record),
        versions=hardware.versions(),
        dtype=str(dtype).removeprefix("torch."),
        points=tuple(points),
        shapes=tuple(shapes),
    )


@dataclass(frozen=True)
class Sweep:
    """One layer size at one M, to be measured at ranks that are decided as one goes.

    Attributes:
        N: out_features.
        K: in_features.
        M: rows of x.
        bias: whether the layer adds one.
        dtype: dtype of everything.
        device: where.
        seconds: of samples per candidate, cache state and launch mode.
    """

    N: int
    K: int
    M: int
    bias: bool
    dtype: torch.dtype
    device: torch.device
    seconds: float = _SECONDS

    def case(self, rank: int) -> Case:
        """The benchmark's description of one rank."""
        name = str(self.dtype).removeprefix("torch.")
        layer = Layer(self.N, self.K, rank, rank)
        return Case("profile", self.M, (layer,), name, bias=self.bias)

    def measure(
        self,
        ranks: Sequence[int],
        providers: Callable[[Case], Sequence[Provider]] = for_profile,
    ) -> list[Point]:
        """Time the dense layer and every strategy at every rank against each other.

        What cannot run, or is less accurate than two matmuls allow, gives no point.
        """
        inputs, admitted = {}, {}
        with torch.no_grad():
            for rank in (0, *ranks):
                case = self.case(max(rank, 1))
                inputs[rank] = self._inputs(rank)
                # What follows from the rank is timed at every rank, dense layers once.
                chosen = [p for p in providers(case) if (p.family == "dense") == (rank == 0)]
                admitted[rank] = passing(case, chosen, inputs[rank], yardstick=(DENSE, TWO))
            points: list[Point] = []
            for cache in ("warm", "cold"):
                ring = ring_bytes(self.device) if cache == "cold" else 0
                calls, copies = {}, {}
                for rank, chosen in admitted.items():
                    rings = Rings(inputs[rank], ring)
                    case = self.case(max(rank, 1))
                    for provider in chosen:
                        bound = provider.bound(case, rings[provider.family])
                        calls[f"{rank} {provider.name}"] = walk(bound)
                        copies[f"{rank} {provider.name}"] = len(bound)
                points += self._time(calls, cache, copies)
        return points

    def _inputs(self, rank: int) -> Inputs:
        """Factors of one rank; for 0 the dense weight instead, which is no product of any."""
        R = rank or self.N
        outs = self.N if rank else 1
        x, u, v, b = make_inputs(
            self.M, outs, self.K, R, dtype=self.dtype, device=self.device, bias=False, seed=rank
        )
        if self.bias:
            b = make_inputs(1, self.N, 1, 1, dtype=self.dtype, device=self.device)[3]
        if rank:
            return Inputs(x, (u,), (v,), (b,), (), (rank,))
        return Inputs(x, (), (), (b,), (), (1,), dense=(v,))

    def _time(
        self, calls: dict[str, Callable[[], object]], cache: str, copies: dict[str, int]
    ) -> list[Point]:
        points = []
        flush = flush_bytes(self.device) if cache == "cold" else 0
        for launch, stats in timed(
            calls, self.device, cache, self.seconds, rounds=(5, 40), flush=flush, copies=copies
        ):
            for name, s in stats.items():
                rank, _, strategy = name.partition(" ")
                times = (1e3 * s.p20, 1e3 * s.p50, 1e3 * s.p80)
                where = (self.N, self.K, self.M, self.bias, int(rank), strategy, cache, launch)
                points.append(Point(*where, *times))
        return points


def _positive(name: str, values: Any) -> list[int]:
    if isinstance(values, int | str) or not isinstance(values, Sequence):
        got = type(values).__name__
        raise TypeError(f"profile: {name}: expected a sequence of integers, got {got}")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"profile: {name}: expected integers, got {value!r}")
        if value < 1:
            raise ValueError(f"profile: {name}: expected integers >= 1, got {value}")
    if not values:
        raise ValueError(f"profile: {name}: expected at least one, got none")
    return sorted(set(values))


def software(record: hardware.Device) -> dict[str, Any]:
    """The device and the software that a time depends on."""
    library = native.LIBRARY.read_bytes() if native.LIBRARY.exists() else b""
    return {
        "device": tables.identity(record),
        "libraries": hardware.libraries(),
        "commit": hardware.versions()["commit"],
        "native": hashlib.sha256(library).hexdigest()[:16],
    }


def _journal(record: hardware.Device, dtype: torch.dtype) -> Journal[Point]:
    table = tuned.fingerprint(record)
    identity = {**software(record), "dtype": tables.dtype_key(dtype), "table": table}
    return Journal("profiles", identity, point_from)


def _curve(
    sweep: Sweep, ranks: Sequence[int] | None, journal: Journal[Point] | None
) -> list[Point]:
    """All points of one sweep: from the journal as far as it goes, the rest measured."""
    top = min(sweep.N, sweep.K)
    wanted = None if ranks is None else [r for r in ranks if r <= top] or [top]
    size = (sweep.N, sweep.K, sweep.M, sweep.bias)
    name = f"{size} ranks={wanted}"
    kept = [] if journal is None else journal.items
    known = [p for p in kept if (p.N, p.K, p.M, p.bias) == size]
    if journal is not None and name in journal.done:
        return known
    for proposal in _proposals(sweep, wanted):
        missing = [r for r in proposal(known) if r not in {p.rank for p in known}]
        if not missing:
            continue
        found = _undisturbed(sweep, missing, known)
        known = [*known, *found]
        if journal is not None:
            journal.add(found)
    if journal is not None:
        journal.finish(name)
    return known


def _proposals(
    sweep: Sweep, wanted: Sequence[int] | None
) -> Iterator[Callable[[list[Point]], list[int]]]:
    """Functions of the points so far, each giving the ranks of one round."""
    if wanted is not None:
        yield lambda known: list(wanted)
        return
    coarse = curves.coarse_ranks(sweep.N, sweep.K)
    middle = coarse[len(coarse) // 2]
    # One rank off the grid beside one on it shows what odd ranks cost.
    odd = [middle - 1] if middle > curves.GRID and middle % curves.GRID == 0 else []
    yield lambda known: [*coarse, *odd]

    def bends(known: list[Point]) -> list[int]:
        curve, dense = _main_curve(known)
        return curves.refine(curve, dense)

    for _ in range(_ROUNDS):
        yield bends
    edges = [r for r in curves.edges(coarse) if r < min(sweep.N, sweep.K)]
    yield lambda known: edges[len(edges) // 2 :][:1]

    def more_edges(known: list[Point]) -> list[int]:
        # A step at one tile edge suggests steps at the others.
        return edges if curves.steps(_main_curve(known)[0]) else []

    yield more_edges


def _main_curve(points: list[Point]) -> tuple[dict[int, curves.Knot], float | None]:
    """The curve that is refined, of what auto runs with cold caches, and the dense layer's time."""
    launch = "graph" if any(p.launch == "graph" for p in points) else "eager"
    here = [p for p in points if p.cache == "cold" and p.launch == launch]
    strategy = AUTO if any(p.strategy == AUTO for p in here) else TWO
    dense = next((p.p50 for p in here if p.strategy == DENSE), None)
    return curves.curve_of([p for p in here if p.strategy == strategy]), dense


def _undisturbed(sweep: Sweep, ranks: Sequence[int], known: list[Point]) -> list[Point]:
    """The points of a later round, measured again while something else keeps the machine busy.

    The dense layer is part of every round: how its time changed tells how busy the machine is.
    What little is left of that after the last try is divided out.
    """
    first = {(p.cache, p.launch): p.p50 for p in known if p.strategy == DENSE}
    for _ in range(_TRIES):
        found = sweep.measure(ranks)
        again = {(p.cache, p.launch): p.p50 for p in found if p.strategy == DENSE}
        drifts = {where: first[where] / again[where] for where in first.keys() & again.keys()}
        if all(1 / _DISTURBED < drift < _DISTURBED for drift in drifts.values()):
            break
    scaled = []
    for p in found:
        drift = min(max(drifts.get((p.cache, p.launch), 1.0), 0.5), 2.0)
        if p.rank or not first:
            scaled.append(replace(p, p20=p.p20 * drift, p50=p.p50 * drift, p80=p.p80 * drift))
    return scaled
