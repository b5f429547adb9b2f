"""The same comparison on two architectures with random weights: GPT-2 small and ViT-S.

    python examples/allocate_random.py [--stage STAGE] [--out out/allocation]

Built from their configurations, so nothing is downloaded, and nothing was learned: the singular
values of every layer are nearly flat. What is left to gain is which layers are cheap, and which
ones the output depends on. Judged by the output error on inputs that nothing was chosen by.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import allocation_study as study
import torch
from torch import nn

from maestro_kernels import search

TARGETS = (1.1, 1.25, 1.5, 2.0)
STAGES = ("prepare", "profile", "measure", "report", "all")
COMMAND = "python examples/allocate_random.py"


def gpt2(seed: int = 0) -> tuple[nn.Module, list[torch.Tensor]]:
    """GPT-2 small (12 layers, 768 wide) and batches of 2 x 64 random tokens."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(seed)
    config = GPT2Config(use_cache=False)
    model = GPT2Model(config).eval()
    return model, [torch.randint(config.vocab_size, (2, 64)) for _ in range(36)]


def vit(seed: int = 0) -> tuple[nn.Module, list[torch.Tensor]]:
    """ViT-S/16 (12 layers, 384 wide) and batches of 2 random images, smooth as photographs are."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(seed)
    config = ViTConfig(hidden_size=384, intermediate_size=1536, num_attention_heads=6)
    model = ViTModel(config, add_pooling_layer=False).eval()
    coarse = [torch.randn(2, 3, 28, 28) for _ in range(16)]
    smooth = [nn.functional.interpolate(c, size=(224, 224), mode="bilinear") for c in coarse]
    return model, smooth


MODELS = {"GPT-2 small": ("gpt2", gpt2), "ViT-S": ("vit-s", vit)}


def main() -> None:
    """Run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=STAGES, default="all")
    parser.add_argument("--only", choices=tuple(MODELS), help="one of the two models")
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS)
    parser.add_argument("--out", type=Path, default=Path("out/allocation"))
    parser.add_argument("--rows", type=Path, default=Path("bench/results"))
    parser.add_argument("--docs", type=Path, help="write the figures and search.md's block here")
    parser.add_argument("--seconds", type=float, default=9.0, help="of timing per target")
    args = parser.parse_args()
    for name, (short, build) in MODELS.items():
        if args.only not in (None, name):
            continue
        out = args.out / short
        model, batches = build()
        # The first batch is what is served; the last four judge, and nothing is chosen by them.
        calibration, held_out = batches[:-4], batches[-4:]
        if args.stage in ("prepare", "all"):
            study.prepare(model, calibration, out)
        if args.stage in ("profile", "all"):
            study.profile(model, batches[0], out, seconds=20.0)
        if args.stage in ("measure", "all"):
            study.measure(name, model, batches[0], args.targets, out, args.seconds)
        if args.stage in ("report", "all"):

            def quality(small: nn.Module, model=model, data=held_out) -> dict[str, float]:  # noqa: ANN001
                return {"output error": search.output_error(small, model, data)}

            rows = study.evaluate(model, quality, out)
            path = args.rows / f"allocation-{short}.jsonl"
            study.record(rows, path, COMMAND)
            print(f"\n{name}\n\n{study.table(rows, ['output error'])}")
            if args.docs:
                study.publish(path, short, f"{name}, random weights", args.docs)


if __name__ == "__main__":
    main()
