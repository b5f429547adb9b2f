"""What the main job found: rows, the verdict, tables; everything follows from the rows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from examples.published import origin
from maestro_kernels.files import write_text
from maestro_kernels.measure import records, report
from maestro_kernels.measure.noise import beyond_noise

__all__ = [
    "BATCHES",
    "DEPLOYED",
    "Form",
    "file_name",
    "load",
    "markdown",
    "save",
    "table",
    "verdict",
]

BATCHES = ("batch 1", "batch 64")
DEPLOYED = "grouped, prepacked"
# Below this mean cosine a user of embeddings would notice; above it, hardly.
USABLE_COSINE = 0.95
_SCHEMA = 2


@dataclass(frozen=True)
class Form:
    """One way to deploy the encoder: how close it stays, how large it is, how fast it runs.

    Attributes:
        ranks: "dense", "uniform" (one share for every layer) or "searched" (by measured loss).
        budget: fraction of the linear layers' weights that may be kept; 1 for dense.
        init: "data" or "svd" factors; empty for dense.
        dtype: "float32", "bfloat16" or "int8".
        run: "nn.Linear", "two matmuls" or DEPLOYED.
        cosine: mean cosine of held-out embeddings to the original's in float32.
        worst: the lowest of them.
        spearman: rank correlation of all pairwise similarities with the original's.
        weights: left in the linear layers, of dense_weights.
        dense_weights: see weights.
        parameters: of the whole model.
        macs: multiply-adds per token in the linear layers.
        latency: batch -> (p20, median, p80) in milliseconds; empty where it was not timed.
    """

    ranks: str
    budget: float
    init: str
    dtype: str
    run: str
    cosine: float
    worst: float
    spearman: float
    weights: int
    dense_weights: int
    parameters: int
    macs: int
    latency: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For tables: "dense bfloat16", "searched 85%, bfloat16"."""
        if self.ranks == "dense":
            return f"dense {self.dtype}"
        return f"{self.ranks} {self.budget:.0%}, {self.dtype}"

    @property
    def ours(self) -> bool:
        """Whether it is factorised and deployed as we would."""
        return self.run == DEPLOYED

    def ms(self, batch: str) -> float:
        """Median milliseconds."""
        return self.latency[batch][1]

    def speed(self, batch: str, over: Form) -> float:
        """How many times as fast as another form; above 1 it is faster."""
        return over.ms(batch) / self.ms(batch)


def save(path: Path, forms: Iterable[Form], stamp: Mapping[str, Any]) -> None:
    """One JSONL row per form, each with the stamp: machine, threads, versions and more."""
    about = {"schema": _SCHEMA, "job": "sentence encoder", **stamp}
    write_text(path, "".join(f"{records.line({**about, **asdict(f)})}\n" for f in forms))


def load(path: Path) -> tuple[list[Form], dict[str, Any]]:
    """Forms and the stamp of the run that `save` wrote.

    Raises:
        ValueError: no such rows.
    """
    names = {f.name for f in fields(Form)}
    rows = records.located(path, schema=_SCHEMA)
    if not rows:
        raise ValueError(f"load: path: expected rows of the main job, schema {_SCHEMA}, got {path}")
    forms = [
        records.checked(Form, {k: v for k, v in row.items() if k in names}, where)
        for where, row in rows
    ]
    return forms, {k: v for k, v in rows[0][1].items() if k not in names}


def file_name(stamp: Mapping[str, Any], isa: str) -> str:
    """The start of a machine's row files: processor, instruction set, threads.

    >>> file_name({"device": "Intel(R) Xeon(R) Processor", "threads": 2}, "amx")
    'intel-xeon-processor-amx-2-threads'
    """
    name = re.sub(r"\((r|tm|c)\)", " ", str(stamp["device"]).lower())
    name = re.sub(r"[^a-z0-9]+", "-", re.sub(r"@.*", "", name)).strip("-")
    threads = stamp["threads"]
    return f"{name}-{isa}-{threads}-thread{'s' * (threads != 1)}"


def verdict(forms: Sequence[Form]) -> list[str]:
    """Which form pays, in plain words: within a dtype, that of the fastest dense model first."""
    timed = [f for f in forms if f.latency]
    ours = [f for f in timed if f.ours]
    dense = {f.dtype: f for f in timed if f.ranks == "dense"}
    lines = []
    both = {f.dtype for f in ours} & dense.keys()
    for dtype in sorted(both, key=lambda d: math.prod(map(dense[d].ms, dense[d].latency))):
        lines.append(_within(dtype, [f for f in ours if f.dtype == dtype], dense))
    lines += _dense_forms(dense)
    return lines + _searched(ours) + _initialisations(forms) + _against_two(timed)


def _pays(form: Form, dense: Form) -> bool:
    found = {beyond_noise(dense.latency[batch], times) for batch, times in form.latency.items()}
    return "faster" in found and "slower" not in found and form.cosine >= USABLE_COSINE


def _speeds(form: Form, over: Form) -> str:
    return " / ".join(f"{form.speed(batch, over):.2f}×" for batch in form.latency)


def _at(form: Form) -> str:
    return " / ".join(batch.removeprefix("batch ") for batch in form.latency)


def _within(dtype: str, ours: Sequence[Form], dense: Mapping[str, Form]) -> str:
    base = dense[dtype]
    paying = [f for f in ours if _pays(f, base)]
    if not paying:
        return (
            f"In {dtype} nothing pays without fine-tuning: no ranks are both faster than dense "
            f"{dtype} and keep a mean cosine of {USABLE_COSINE} to the original embeddings."
        )
    best = max(paying, key=lambda f: (min(f.speed(b, base) for b in f.latency), f.cosine))
    rival = _rival(best, dense)
    other = (
        "that is also the fastest dense form at least as close"
        if rival.dtype == dtype
        else f"against {rival.name} (cosine {rival.cosine:.3f}), the fastest dense form at least "
        f"as close, {_speeds(best, rival)}"
    )
    return (
        f"In {dtype} {best.ranks} ranks at {best.budget:.0%} of the weights pay: "
        f"{_speeds(best, base)} as fast as dense {dtype} at batch {_at(best)}, mean cosine "
        f"{best.cosine:.3f} to the original embeddings; {other}."
    )


def _rival(form: Form, dense: Mapping[str, Form]) -> Form:
    """The fastest dense form that stays at least as close to the original."""
    close = [d for d in dense.values() if d.cosine >= form.cosine]
    # Nothing is closer than the original itself.
    close = close or [dense["float32"]]
    return min(close, key=lambda d: sum(d.ms(batch) / form.ms(batch) for batch in form.latency))


def _dense_forms(dense: Mapping[str, Form]) -> list[str]:
    base = dense.get("float32")
    others = [d for d in dense.values() if d is not base]
    if base is None or not others:
        return []
    parts = [f"{d.name} {_speeds(d, base)} (cosine {d.cosine:.3f})" for d in others]
    return [f"Against dense float32 at batch {_at(base)}: {', '.join(parts)}."]


def _searched(ours: Sequence[Form]) -> list[str]:
    by_kind = {(f.ranks, f.budget, f.dtype): f.cosine for f in ours}
    gains = [
        cosine - by_kind["uniform", budget, dtype]
        for (ranks, budget, dtype), cosine in by_kind.items()
        if ranks == "searched" and ("uniform", budget, dtype) in by_kind
    ]
    if not gains:
        return []
    return [
        f"At equal weights searched ranks are {min(gains):+.3f} to {max(gains):+.3f} of mean "
        "cosine from uniform ones."
    ]


def _initialisations(forms: Sequence[Form]) -> list[str]:
    found: dict[float, dict[str, float]] = {}
    for f in forms:
        if f.ranks == "uniform" and f.dtype == "float32":
            found.setdefault(f.budget, {})[f.init] = f.cosine
    pairs = [p for p in found.values() if {"svd", "data"} <= p.keys()]
    if not pairs:
        return []
    better = sum(p["data"] > p["svd"] for p in pairs)
    gap = sum(p["data"] - p["svd"] for p in pairs) / len(pairs)
    return [
        f"Data-aware initialisation is closer to the original than plain SVD at {better} of "
        f"{len(pairs)} budgets, by {gap:+.2f} mean cosine on average."
    ]


def _against_two(timed: Sequence[Form]) -> list[str]:
    plain = {(f.ranks, f.budget, f.dtype): f for f in timed if f.run == "two matmuls"}
    ratios = [
        f.speed(batch, plain[key])
        for f in timed
        if f.ours and (key := (f.ranks, f.budget, f.dtype)) in plain
        for batch in f.latency
    ]
    if not ratios:
        return []
    return [
        f"Against two plain F.linear calls on the same factors, ours {DEPLOYED} runs at "
        f"{min(ratios):.2f}× to {max(ratios):.2f}× their speed here."
    ]


def table(forms: Sequence[Form]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Headers and rows of everything that was measured, dense first."""
    dense = {f.dtype: f for f in forms if f.ranks == "dense" and f.latency}
    headers = (
        "form", "run as", "init", "cosine", "worst", "Spearman", "weights, M",
        *(f"{batch}, ms" for batch in BATCHES), "of dense, same dtype", "of dense float32",
    )  # fmt: skip
    body = []
    for f in forms:
        times = [f"{f.ms(b):.1f}" if b in f.latency else "" for b in BATCHES]
        ratios = [
            _speeds(f, over) if f.latency and over is not None else ""
            for over in (dense.get(f.dtype), dense.get("float32"))
        ]
        body.append(
            [
                f.name, f.run, f.init, f"{f.cosine:.3f}", f"{f.worst:.3f}", f"{f.spearman:.3f}",
                f"{f.weights / 1e6:.2f}", *times, *ratios,
            ]
        )  # fmt: skip
    return headers, body


def markdown(forms: Sequence[Form], stamp: Mapping[str, Any], *, short: bool = False) -> str:
    """What the documentation shows of a run: the table, the machine, the verdict.

    Args:
        forms: of the run.
        stamp: of its rows.
        short: for the README: only forms that were timed and that somebody would deploy.

    Raises:
        ValueError: rows of a work tree with uncommitted changes.
    """
    if (stamp.get("versions") or {}).get("dirty"):
        raise ValueError("markdown: stamp: expected a clean work tree, got uncommitted changes")
    shown = [f for f in forms if f.latency and f.run != "two matmuls"] if short else list(forms)
    headers, body = table(shown)
    said = verdict(forms)
    notes = [str(note) for note in stamp.get("notes", ())]
    return "\n".join(
        [
            *report.markdown_table(headers, body, numeric=range(3, len(headers))),
            "",
            f"{origin(stamp)}; medians of whole forward passes in turns, times as fast at batch "
            "1 / 64. Repeat with `make bench`.",
            "",
            *(
                f"- {line}"
                for line in ([s for s in said if s.startswith("In ")] if short else [*said, *notes])
            ),
        ]
    )
