"""What rows amount to: per case who wins beyond noise, and the verdict in plain words."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from maestro_kernels.benchmark.rows import Row, fastest
from maestro_kernels.measure.cases import joined
from maestro_kernels.measure.noise import beyond_noise
from maestro_kernels.measure.wording import count, geometric_mean, times


@dataclass(frozen=True)
class Outcome:
    """One measurement of a case: ours and what it stands against; None where nothing passed.

    Attributes:
        ours: what is recommended there: after `prepack` for inference on a CPU, else a plain call.
        plain: the row of a plain call, on the factors as they are.
        two: two plain library matmuls, the alternative that takes the same inputs.
        best: the fastest way to compute the same function that is not ours.
        dense: the fastest dense layer.
    """

    ours: Row
    plain: Row
    two: Row | None
    best: Row | None
    dense: Row | None

    def against(self, other: Row | None) -> str | None:
        """Whether ours is "faster", "slower" or the "same" within noise; None without the other."""
        if other is None or other.times is None or self.ours.times is None:
            return None
        # Ours is the newer of the two only in the sense of the helper: smaller is better.
        return beyond_noise(other.times, self.ours.times)

    def ratio(self, other: Row | None) -> float | None:
        """Time of the other / time of ours."""
        if other is None or not other.p50_us or not self.ours.p50_us:
            return None
        return other.p50_us / self.ours.p50_us

    @property
    def pays(self) -> float | None:
        """Fastest dense / fastest low-rank path, whoever's it is: above 1 low rank pays."""
        low = min(r.p50_us for r in (self.ours, self.best) if r and r.p50_us)
        return self.dense.p50_us / low if self.dense and self.dense.p50_us else None


def outcomes(rows: Sequence[Row]) -> list[Outcome]:
    """One outcome per case, cache state and launch mode in which ours passed."""
    cases: defaultdict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        cases[row.case].append(row)
    found = []
    for group in cases.values():
        passed = {row.provider: row for row in group if row.p50_us}
        if "ours" not in passed:
            continue
        two = passed.get("two matmuls")
        plain = passed["ours"]
        ours = passed.get("ours, prepacked", plain)
        best, dense = (fastest(passed.values(), family) for family in ("two matmuls", "dense"))
        found.append(Outcome(ours, plain, two, best, dense))
    return found


def refusals(rows: Sequence[Row]) -> list[tuple[str, str, str, int]]:
    """(provider, gate, reason, measurements) of what has no time, most frequent first."""
    counts = Counter((r.provider, r.gate, r.reason) for r in rows if r.gate != "passed")
    return [(*key, n) for key, n in counts.most_common()]


def device_line(row: Row) -> str:
    """Processor, threads and versions behind a row."""
    on_cpu = row.device.get("kind") == "cpu"
    cores = count(row.threads, "thread") if on_cpu else f"{row.device.get('num_cores')} SMs"
    return f"{row.device.get('name')}, {cores}, torch {row.versions.get('torch')}"


def verdict(rows: Sequence[Row]) -> list[str]:
    """Two to five sentences: where ours wins, where two matmuls or dense win, what failed."""
    found = outcomes(rows)
    if not found:
        return ["Nothing of ours passed its accuracy check, so there is nothing to compare."]
    sentences = [_against_dense(found), _against_best(found), _against_two(found)]
    if any(o.ours is not o.plain for o in found):
        sentences.append(_prepacked(found))
    if all(o.ours.config.startswith("matmul") for o in found):
        sentences.append(
            "On this device every call of ours ran as two library matmuls, so a tie with them is "
            "the most these rows can show; what packing or compiling adds, others get here."
        )
    wrong = sorted({r.provider for r in rows if r.gate in ("failed", "error")})
    if wrong:
        sentences.append(
            f"Refused because of a wrong result or an error, and therefore without a time in at "
            f"least one case: {', '.join(f'“{name}”' for name in wrong)}."
        )
    return sentences


def _against_dense(found: Sequence[Outcome]) -> str:
    known = [(o.pays, o) for o in found if o.pays is not None]
    if not known:
        return "No dense layer passed, so whether low rank pays was not measured."
    best, where = max(known, key=lambda pair: pair[0])
    wins = sum(pays > 1 for pays, _ in known)
    text = f"Low rank beats the fastest dense layer in {wins} of {len(known)} measurements"
    if wins:
        text += f", by up to {times(best)} ({_name(where)})"
    worst, there = min(known, key=lambda pair: pair[0])
    if worst <= 1:
        text += (
            f"; dense wins most clearly at {_name(there)}, where low rank runs at {times(worst)}"
        )
    return text + "."


def _against_best(found: Sequence[Outcome]) -> str:
    count = Counter(o.against(o.best) for o in found if o.best is not None)
    mean = geometric_mean([r for o in found if (r := o.ratio(o.best)) is not None])
    if mean is None:
        return "No other path for the same factors passed, so ours has no baseline here."
    winners = Counter(o.best.provider for o in found if o.best is not None)
    name, often = winners.most_common(1)[0]
    return (
        f"Against the fastest other way to run the same factors, ours is faster in "
        f"{count['faster']}, equal within noise in {count['same']} and slower in {count['slower']} "
        f"of {sum(count.values())} measurements: {times(mean)} in the geometric mean. That "
        f"alternative is most often “{name}” ({often} times)."
    )


def _against_two(found: Sequence[Outcome]) -> str:
    count = Counter(o.against(o.two) for o in found if o.two is not None)
    mean = geometric_mean([r for o in found if (r := o.ratio(o.two)) is not None])
    if mean is None:
        return "Two plain matmuls did not pass, so there is no comparison with them."
    return (
        f"Against two plain matmuls, the alternative that takes the same inputs: faster in "
        f"{count['faster']}, equal in {count['same']}, slower in {count['slower']}; {times(mean)}."
    )


def _prepacked(found: Sequence[Outcome]) -> str:
    packed = [o for o in found if o.ours is not o.plain]
    forms = Counter(o.ours.config.removeprefix("prepacked: ") for o in packed)
    chosen = ", ".join(f"{name} {n} times" for name, n in forms.most_common())
    mean = geometric_mean([r for o in packed if (r := o.ratio(o.plain)) is not None])
    return (
        f"Inference is shown after `prepack`, which chose {chosen}; a call on the factors as they "
        f"are takes {times(mean)} as long."
    )


def _name(outcome: Outcome) -> str:
    row = outcome.ours
    where = f"{row.source}, M {row.M}, rank {joined(row.rank)}"
    return f"{where}, {row.dtype}, {row.mode}, {row.cache}"
