"""Ranks for a sentence encoder under a latency budget: allocated, uniform, and WeLore's threshold.

    python examples/allocate_encoder.py [--stage STAGE] [--out out/allocation]

all-MiniLM-L6-v2 on sentences of Python's documentation: 512 calibrate, 384 others judge. All rules
use the same data-aware factors and the same latency profile, nothing is fine-tuned.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import allocation_study as study
from torch import nn

from maestro_kernels import search
from maestro_kernels.benchmark import encoder as library

TARGETS = (1.1, 1.2, 1.35, 1.5, 1.75, 2.0)
MEASURES = ("cosine", "Spearman", "output error")
STAGES = ("prepare", "profile", "measure", "report", "all")
COMMAND = "python examples/allocate_encoder.py"


def main() -> None:
    """Run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=STAGES, default="all")
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS)
    parser.add_argument("--out", type=Path, default=Path("out/allocation"))
    parser.add_argument("--rows", type=Path, default=Path("bench/results/allocation-encoder.jsonl"))
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    parser.add_argument("--seconds", type=float, default=7.0, help="of timing per target")
    args = parser.parse_args()
    out = args.out / "encoder"
    calibration, held_out = library.split(library.sentences(), 512, 384)
    encoder = library.load_encoder(library.BUNDLED)
    batches = list(encoder.batches(calibration))
    served = encoder.tokens(held_out[:16])
    if args.stage in ("prepare", "all"):
        study.prepare(encoder.model, batches, batches[:2], out)
    if args.stage in ("profile", "all"):
        study.profile(encoder.model, served, out, seconds=15.0)
    if args.stage in ("measure", "all"):
        study.measure("MiniLM-L6", encoder.model, served, args.targets, out, args.seconds)
    if args.stage in ("report", "all"):
        original = encoder.embed(held_out)
        judged = list(encoder.batches(held_out))

        def quality(model: nn.Module) -> dict[str, float]:
            close = library.fidelity(encoder.embed(held_out, model), original)
            error = search.output_error(model, encoder.model, judged)
            return {"cosine": close.cosine, "Spearman": close.spearman, "output error": error}

        rows = study.evaluate(encoder.model, quality, out)
        study.record(rows, args.rows, COMMAND)
        print(study.table(rows, MEASURES))
        args.figures.mkdir(parents=True, exist_ok=True)
        plot = study.drawing(rows, "cosine", "Sentence encoder, held-out text", log=False)
        (args.figures / "allocation-encoder.svg").write_text(plot, encoding="utf-8")


if __name__ == "__main__":
    main()
