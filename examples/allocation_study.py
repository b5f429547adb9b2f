"""What both allocation examples do: prepare, measure, evaluate; tables and plots.

For each target speed-up every rule chooses ranks by the same latency profile and the same layers'
factors. The models that result are timed in turns with the dense model, then compared with it on
data that nothing was chosen by.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from published import origin, stamp, write_block
from torch import nn

import maestro_kernels as mk
from maestro_kernels import search
from maestro_kernels.measure import plots, records
from maestro_kernels.search.whole_model import measure_models

# Rule -> (method of allocate, method of sensitivity).
RULES = {
    "uniform": ("uniform", "svd"),
    "WeLore threshold": ("threshold", "svd"),
    "exact, svd": ("exact", "svd"),
    "exact, data": ("exact", "data"),
    "greedy, loss": ("greedy", "loss"),
    "exact, loss": ("exact", "loss"),
}
_MULTIPLE_OF = 8
_ATTEMPTS = 3
_DRIFT = 0.05


@dataclass(frozen=True)
class Row:
    """One rule at one target.

    Attributes:
        model: which model.
        rule: a key of RULES, or "dense".
        target: speed-up asked for.
        predicted: milliseconds.
        ms: measured median; p20 and p80 beside it.
        p20: see ms.
        p80: see ms.
        dense_ms: of the dense model in the same run.
        threads: it was timed with.
        weights: share of the layers' weights that is left.
        ranks: chosen.
        quality: of the outputs against the dense model's, by name.
    """

    model: str
    rule: str
    target: float
    predicted: float
    ms: float
    p20: float
    p80: float
    dense_ms: float
    threads: int
    weights: float
    ranks: dict[str, int | str]
    quality: dict[str, float]


def prepare(model: nn.Module, batches: Sequence[Any], out: Path, held_out: int = 2) -> None:
    """Write the sensitivities that are not there yet, and the factors at full rank.

    Args:
        model: dense.
        batches: calibrate the data-aware factors and sensitivities.
        out: folder.
        held_out: of the batches, how many the loss is measured on.
    """
    out.mkdir(parents=True, exist_ok=True)
    options = {"svd": {}, "data": {}, "loss": {"held_out": held_out}}
    for method, more in options.items():
        path = out / f"{method}.json"
        if path.exists():
            print(f"{path} is there")
            continue
        start = time.perf_counter()
        data = None if method == "svd" else batches
        search.sensitivity(model, data, method=method, **more).save(path)
        print(f"sensitivity, {method}: {time.perf_counter() - start:.1f} s", flush=True)
    full = mk.convert(model, init="data", batches=batches, allow_larger=True, inplace=False)
    torch.save(full.state_dict(), out / "factors.pt")
    (out / "quality.json").unlink(missing_ok=True)


def factors(model: nn.Module, out: Path) -> nn.Module:
    """The model in the factors of full rank that `prepare` left; each prefix is the best one."""
    full = mk.convert(model, init="random", allow_larger=True, inplace=False)
    full.load_state_dict(torch.load(out / "factors.pt", mmap=True))
    return full


def small_model(full: nn.Module, model: nn.Module, ranks: Mapping[str, int | str]) -> nn.Module:
    """A model of these ranks; dense layers keep the weights of `model`."""
    small = copy.deepcopy(full)
    dense = dict(model.named_modules())
    for name, rank in ranks.items():
        if rank == "dense":
            parent, _, child = name.rpartition(".")
            setattr(small.get_submodule(parent), child, copy.deepcopy(dense[name]))
    mk.set_ranks(small, ranks)
    return mk.truncate(small)


def profile(model: nn.Module, batch: Any, out: Path, seconds: float) -> None:
    """Time the layers inside the model; nothing else should run on the machine meanwhile."""
    found = search.profile_model(model, batch, seconds=seconds)
    found.save(out / "profile.json")
    print(f"dense {found.total:.1f} ms, {found.rest:.1f} ms of it outside the layers")


def measure(
    name: str, model: nn.Module, batch: Any, targets: Iterable[float], out: Path, seconds: float
) -> None:
    """Choose and time, target by target; nothing else should run on the machine meanwhile.

    A target during which the dense model is 5 % off its time in the profile is measured again:
    something else was running, and the prediction is of another machine.
    """
    full = factors(model, out)
    known = {m: search.Sensitivity.load(out / f"{m}.json") for m in ("svd", "data", "loss")}
    times = search.ModelProfile.load(out / "profile.json")
    for target in targets:
        chosen = {}
        for rule, (method, sens) in RULES.items():
            try:
                chosen[rule] = search.allocate(
                    model, search.Speedup(target), known[sens], times, method=method,
                    multiple_of=_MULTIPLE_OF,
                )  # fmt: skip
            except ValueError as error:
                print(error)
        models = {"dense": model}
        models.update({rule: small_model(full, model, a) for rule, a in chosen.items()})
        for _ in range(_ATTEMPTS):
            found = measure_models(models, batch, seconds=seconds)
            dense = found["dense"].ms
            if abs(dense / times.total - 1) <= _DRIFT:
                break
            print(f"{target}x: dense takes {dense:.1f} ms, in the profile {times.total:.1f} ms")
        else:
            raise SystemExit("the machine is too busy to measure")
        rows = []
        for rule, a in chosen.items():
            m, predicted = found[rule], a.predicted
            assert predicted.ms is not None
            rows.append(
                Row(name, rule, target, predicted.ms, m.ms, m.p20, m.p80, dense,
                    torch.get_num_threads(), predicted.weights / a.dense.weights, dict(a), {})
            )  # fmt: skip
            print(f"{target}x {rule}: predicted {predicted.ms:.2f} ms, measured {m.ms:.2f} ms")
        records.write(out / f"measured-{target:g}.jsonl", map(asdict, rows))


def evaluate(
    model: nn.Module, quality: Callable[[nn.Module], dict[str, float]], out: Path
) -> list[Row]:
    """The measured rows with the quality of each model."""
    full = factors(model, out)
    known = out / "quality.json"
    # Judging takes longer than measuring: what an interrupted run found is not asked again.
    cache = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
    rows = []
    for row in (row for file in sorted(out.glob("measured-*.jsonl")) for row in read(file)):
        key = json.dumps(row.ranks, sort_keys=True)
        if key not in cache:
            cache[key] = quality(small_model(full, model, row.ranks))
            known.write_text(json.dumps(cache), encoding="utf-8")
        rows.append(replace(row, quality=cache[key]))
    return rows


def record(rows: Sequence[Row], path: Path, command: str) -> None:
    """Write the rows with device and versions."""
    made = {"schema": 1, "job": "allocation", "command": command, **stamp()}
    records.write(path, ({**made, **asdict(row)} for row in rows))


def at_equal_latency(rows: Sequence[Row], row: Row, measure: str) -> float | None:
    """What uniform ranks reach at this row's measured latency, on straight lines between them.

    Latencies are relative to the dense model of the same run, which ends the line with nothing
    lost; None where no uniform model was as fast.
    """
    points = sorted(
        (r.ms / r.dense_ms, r.quality[measure])
        for r in rows
        if r.rule == "uniform" and r.model == row.model
    )
    points.append((1.0, 0.0 if "error" in measure else 1.0))
    x = row.ms / row.dense_ms
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0 or math.inf)
    return None


def block(path: Path, short: str, title: str) -> str:
    """What docs/guide/search.md shows of one model's rows: a table and a drawing."""
    rows = read(path)
    made = records.load(path)[0]
    measures = list(rows[0].quality)
    off = max(abs(row.predicted / row.ms - 1) for row in rows)
    return "\n".join(
        [
            table(rows, measures),
            "",
            f"Predictions are at most {off:.1%} off. {origin(made)}.",
            "",
            f"![{title}: {measures[0]} over measured latency](figures/allocation-{short}.svg)",
        ]
    )


def publish(path: Path, short: str, title: str, docs: Path) -> None:
    """Put the block and the drawing of one model's rows into the documentation."""
    rows = read(path)
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    plot = drawing(rows, next(iter(rows[0].quality)), title)
    (docs / "figures" / f"allocation-{short}.svg").write_text(plot, encoding="utf-8")
    write_block(docs / "search.md", block(path, short, title), *marks(short))


def marks(short: str) -> tuple[str, str]:
    """The lines around a model's block."""
    script = "allocate_encoder" if short == "encoder" else "allocate_random"
    return f"<!-- {short}:begin, written by examples/{script}.py -->", f"<!-- {short}:end -->"


def read(path: Path) -> list[Row]:
    """The rows of a file that `measure` or `record` wrote."""
    names = {field.name for field in fields(Row)}
    return [
        records.checked(Row, {k: v for k, v in record.items() if k in names}, where)
        for where, record in records.located(path)
    ]


def table(rows: Sequence[Row], measures: Sequence[str]) -> str:
    """A Markdown table; the last column compares with uniform ranks at equal measured latency."""
    first = measures[0]
    heads = ["target", "ranks by", "predicted, ms", "measured, ms", "off by", "speed-up",
             "weights left", *measures, f"{first} of uniform at equal latency"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "| --: | --- |" + " --: |" * (len(heads) - 2)]
    for row in rows:
        equal = at_equal_latency(rows, row, first)
        cells = [
            f"{row.target:g}×", row.rule, f"{row.predicted:.1f}", f"{row.ms:.1f}",
            f"{row.predicted / row.ms - 1:+.1%}", f"{row.dense_ms / row.ms:.2f}×",
            f"{row.weights:.1%}", *(f"{row.quality[m]:.4f}" for m in measures),
            "" if equal is None or row.rule == "uniform" else f"{equal:.4f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def drawing(rows: Sequence[Row], measure: str, title: str) -> str:
    """Quality over measured latency, one line per rule."""
    series = {}
    for rule in RULES:
        points = sorted((r.ms / r.dense_ms, r.quality[measure]) for r in rows if r.rule == rule)
        if points:
            series[rule] = [plots.Point(100 * x, y) for x, y in points]
    order = ["exact, loss", *(rule for rule in series if rule != "exact, loss")]
    plot = plots.line_plot(
        {rule: series[rule] for rule in order if rule in series},
        title=title, xlabel="measured latency, % of the dense model's", ylabel=measure, log=False,
    )  # fmt: skip
    return plots.standalone(plot)
