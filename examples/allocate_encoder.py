"""Ranks for a sentence encoder under a latency budget: allocated, uniform, and WeLore's threshold.

    python examples/allocate_encoder.py [--stage STAGE] [--out out/allocation]

all-MiniLM-L6-v2 on sentences of Python's documentation: 512 calibrate, 384 others judge. All rules
use the same data-aware factors and the same latency profile, nothing is fine-tuned.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import allocation_study as study
import encoder_texts as judging
import torch
from torch import Tensor, nn

from maestro_kernels.benchmark import encoder as library

TARGETS = (1.1, 1.2, 1.35, 1.5, 1.75, 2.0)
TITLE = "Sentence encoder, held-out text"
STAGES = ("prepare", "profile", "measure", "report", "all")
COMMAND = "python examples/allocate_encoder.py"


@torch.no_grad()
def outputs(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """The last hidden states of each batch."""
    return [model(**batch)[0] for batch in batches]


def embeddings(hidden: Sequence[Tensor], batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """One unit vector per sentence."""
    pairs = zip(hidden, batches, strict=True)
    return torch.cat([library.pooled(y, batch["attention_mask"]) for y, batch in pairs])


def main() -> None:
    """Run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=STAGES, default="all")
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS)
    parser.add_argument("--out", type=Path, default=Path("out/allocation"))
    parser.add_argument("--rows", type=Path, default=Path("bench/results/allocation-encoder.jsonl"))
    parser.add_argument("--docs", type=Path, help="write the figures and search.md's block here")
    parser.add_argument("--seconds", type=float, default=7.0, help="of timing per target")
    args = parser.parse_args()
    out = args.out / "encoder"
    calibration, held_out = judging.split(judging.sentences(), 512, 384)
    encoder = library.load_encoder(library.BUNDLED)
    batches = list(encoder.batches(calibration))
    served = encoder.tokens(held_out[:16])
    if args.stage in ("prepare", "all"):
        study.prepare(encoder.model, batches, out)
    if args.stage in ("profile", "all"):
        study.profile(encoder.model, served, out, seconds=15.0)
    if args.stage in ("measure", "all"):
        study.measure("MiniLM-L6", encoder.model, served, args.targets, out, args.seconds)
    if args.stage in ("report", "all"):
        judged = list(encoder.batches(held_out))
        reference = outputs(encoder.model, judged)
        original = embeddings(reference, judged)

        def quality(model: nn.Module) -> dict[str, float]:
            found = outputs(model, judged)
            close = judging.fidelity(embeddings(found, judged), original)
            pairs = list(zip(found, reference, strict=True))
            errors = [float((y - y0).square().sum() / y0.square().sum()) for y, y0 in pairs]
            return {
                "cosine": close.cosine,
                "Spearman": close.spearman,
                "output error": sum(errors) / len(errors),
            }

        rows = study.evaluate(encoder.model, quality, out)
        study.record(rows, args.rows, COMMAND)
        print(study.table(rows, list(rows[0].quality)))
        if args.docs:
            study.publish(args.rows, "encoder", TITLE, args.docs)


if __name__ == "__main__":
    main()
