"""Allocated ranks against uniform ones at equal weights, judged on batches that chose nothing.

    python examples/allocation_quality.py [--only NAME ...] [--seeds 0 1 ...] [--docs docs/guide]

A sentence encoder as it was trained; GPT-2 small, ViT-S and five MLPs from their configurations,
with planted power-law spectra that differ from layer to layer. Both allocations take prefixes of
the same data-aware factors. Finished seeds are rows; a second call goes on where the first ended.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import allocate_random
import allocation_study as study
import encoder_texts as judging
import torch
from published import origin, stamp, write_block
from torch import Tensor, nn

import maestro_kernels as mk
from maestro_kernels import search
from maestro_kernels.benchmark import encoder as library
from maestro_kernels.measure import records

FRACTIONS = (0.2, 0.3, 0.5, 0.7)
ROWS = Path("bench/results/allocation-quality.jsonl")
MARKS = (
    "<!-- quality:begin, written by examples/allocation_quality.py -->",
    "<!-- quality:end -->",
)
# Of the calibration batches, those that losses are measured on; the others make the factors.
MEASURED = 2
# Features, activation, and the exponents of the layers' spectra.
MLPS = {
    "MLP 512-1024-768-256": ((512, 1024, 768, 256), nn.ReLU, (0.2, 0.6, 1.1)),
    "MLP 256-512-512-128": ((256, 512, 512, 128), nn.GELU, (1.2, 0.1, 0.5)),
    "MLP 384-384-384-384-384": ((384, 384, 384, 384, 384), nn.Tanh, (0.1, 0.4, 0.8, 1.3)),
    "MLP 784-512-256-64-10": ((784, 512, 256, 64, 10), nn.ReLU, (0.9, 0.3, 0.7, 0.2)),
    "MLP 128-768-128-768-128": ((128, 768, 128, 768, 128), nn.SiLU, (0.4, 1.0, 0.2, 0.8)),
}
# Model, calibration batches, held-out batches.
Case = tuple[nn.Module, list[Any], list[Any]]


@torch.no_grad()
def plant(model: nn.Module, exponents: Callable[[], float]) -> None:
    """Give each layer's matrix the singular values i^-a and random vectors, at its own norm."""
    modules = dict(model.named_modules())
    for name, one in mk.nn.classify(model).items():
        if one.reason is not None:
            continue
        weight = modules[name].weight
        rows, columns = weight.flatten(1).shape
        rank = min(rows, columns)
        left, right = (torch.linalg.qr(torch.randn(n, rank)).Q for n in (rows, columns))
        values = torch.arange(1, rank + 1) ** -exponents()
        values *= weight.norm() / values.norm()
        weight.copy_((left * values @ right.T).reshape(weight.shape))


def mlp(name: str, seed: int) -> Case:
    """An MLP of mixed spectra, and correlated inputs."""
    sizes, activation, exponents = MLPS[name]
    torch.manual_seed(seed)
    layers = [
        module
        for k, n in itertools.pairwise(sizes)
        for module in (nn.Linear(k, n, dtype=torch.float32), activation())
    ]
    model = nn.Sequential(*layers[:-1]).eval()
    for layer in model[::2]:
        # Keeps the variance of the signal: else biases are what the output is made of.
        nn.init.normal_(layer.weight, std=(2 / layer.in_features) ** 0.5)
    plant(model, iter(exponents).__next__)
    mix = torch.randn(sizes[0], sizes[0]) * torch.arange(1, sizes[0] + 1) ** -0.5
    batches = [torch.randn(256, sizes[0]) @ mix.T / mix.norm(dim=1) for _ in range(14)]
    return model, batches[:10], batches[10:]


def planted(build: Callable[[int], tuple[nn.Module, list[Tensor]]], seed: int) -> Case:
    """A transformer of random weights, whose layers' exponents are drawn from 0.1 to 1.2."""
    model, batches = build(seed)
    draw = random.Random(seed)
    plant(model, lambda: draw.uniform(0.1, 1.2))
    return model, batches[:-4], batches[-4:]


def encoder(seed: int) -> Case:
    """The sentence encoder as it was trained; the seed draws the sentences that calibrate."""
    found = library.load_encoder(library.BUNDLED)
    pool, held_out = judging.split(judging.sentences(), 1024, 384)
    calibration = random.Random(seed).sample(pool, 512)
    batches = list(found.batches(judging.by_length(found, calibration)))
    random.Random(seed).shuffle(batches)
    return found.model, batches, list(found.batches(judging.by_length(found, held_out)))


CASES: dict[str, Callable[[int], Case]] = {
    "Sentence encoder": encoder,
    **{name: partial(planted, build) for name, (_, build) in allocate_random.MODELS.items()},
    **{name: partial(mlp, name) for name in MLPS},
}


def compare(name: str, seed: int, passes: int | None = None) -> list[dict[str, Any]]:
    """Errors on held-out batches at each fraction of the weights."""
    model, calibration, held_out = CASES[name](seed)
    sens = search.sensitivity(model, calibration, method="loss", points=2, held_out=MEASURED)
    full = mk.convert(model, init="data", batches=calibration, allow_larger=True, inplace=False)
    rows = []
    for fraction in FRACTIONS:
        budget = search.Params(fraction)
        found = {
            "allocated": search.allocate(
                model, budget, sens, batches=calibration[:MEASURED], passes=passes, multiple_of=4
            ),
            "uniform": search.allocate(model, budget, sens, method="uniform", multiple_of=4),
        }
        errors = {
            rule: search.output_error(study.small_model(full, model, ranks), model, held_out)
            for rule, ranks in found.items()
        }
        refined = found["allocated"].refined
        assert refined is not None
        rows.append(
            {
                "model": name, "seed": seed, "fraction": fraction, **errors,
                "passes": refined.passes, "ranks": {r: dict(a) for r, a in found.items()},
            }
        )  # fmt: skip
        print(
            f"{name}, seed {seed}, {fraction:.0%}: {errors['allocated']:.4g} against "
            f"{errors['uniform']:.4g}, {errors['allocated'] / errors['uniform']:.3f}",
            flush=True,
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Error of allocated over that of uniform ranks: the geometric mean of the seeds, the worst."""
    heads = ["model", "seeds", *(f"{fraction:.0%} of the weights" for fraction in FRACTIONS)]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for name in CASES:
        cells = []
        of_model = [row for row in rows if row["model"] == name]
        if not of_model:
            continue
        for fraction in FRACTIONS:
            ratios = [r["allocated"] / r["uniform"] for r in of_model if r["fraction"] == fraction]
            cells.append(f"{statistics.geometric_mean(ratios):.3f} ({max(ratios):.3f})")
        seeds = len({row["seed"] for row in of_model})
        lines.append("| " + " | ".join([name, str(seeds), *cells]) + " |")
    return "\n".join(lines)


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """How often allocated ranks were better and worse."""
    better, worse = (
        sum(sign * row["allocated"] < sign * row["uniform"] for row in rows) for sign in (1, -1)
    )
    return f"Allocated ranks were better in {better} of {len(rows)} cases, worse in {worse}."


def block(rows: Sequence[dict[str, Any]]) -> str:
    """What docs/guide/search.md shows."""
    commits = sorted(set(map(_commit, rows)) - {_commit(rows[0])})
    others = f"; rows of later seeds at {', '.join(commits)}" if commits else ""
    fewest, most = (f([row["passes"] for row in rows]) for f in (min, max))
    passes = f"The refinement took {fewest} to {most} forward passes of the calibration batches."
    return f"{table(rows)}\n\n{verdict(rows)} {passes} {origin(rows[0])}{others}."


def _commit(row: dict[str, Any]) -> str:
    return str(row["versions"]["commit"])[:10]


def read(path: Path) -> list[dict[str, Any]]:
    """The rows there are."""
    return records.load(path) if path.is_file() else []


def main() -> None:
    """Compare whatever the rows lack."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--only", choices=tuple(CASES), nargs="+", default=tuple(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--passes", type=int, help="of the refinement per budget")
    parser.add_argument("--docs", type=Path, help="write search.md's table here")
    args = parser.parse_args()
    made = {"schema": 1, "job": "allocation-quality", **stamp()}
    for name, seed in itertools.product(args.only, args.seeds):
        if any((row["model"], row["seed"]) == (name, seed) for row in read(args.rows)):
            continue
        rows = compare(name, seed, args.passes)
        records.append(args.rows, ({**made, **row} for row in rows))
    rows = read(args.rows)
    print(block(rows))
    if args.docs:
        write_block(args.docs / "search.md", block(rows), *MARKS)


if __name__ == "__main__":
    main()
