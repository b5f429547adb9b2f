"""What the penalty adds to a training step: ViT-S/16 at batch 64, all linear layers factorised.

python -m bench.penalty_cost [--batch 64] [--steps 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import maestro_kernels as mk
from maestro_kernels import hardware, training

REPEATS = 5


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """ViT-S/16 for 224 × 224 images: 12 blocks of width 384, 197 tokens."""

    def __init__(self, width=384, depth=12, heads=6, classes=1000):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 197, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images):
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def straightforward(model):
    """The same penalty through autograd, with a clamp against its NaN."""
    total = 0
    for layer in mk.nn.lod_layers(model).values():
        for squares in (layer.u.square().sum(0), layer.v.square().sum(1)):
            tails = squares.flip(0).cumsum(0).clamp_min(1e-12)
            total = total + tails.sqrt().sum()
    return total


def milliseconds(run):
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.penalty_cost", description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    # Random factors: an SVD of every layer takes longer than the measurement.
    model = mk.convert(ViT(), rank=None, exclude=["patch"], allow_larger=True, init="random")
    optimizer = torch.optim.AdamW(model.parameters())
    sampler = training.SinglePairSampler(model)
    images, labels = torch.randn(args.batch, 3, 224, 224), torch.randint(1000, (args.batch,))

    def step():
        sampler.step()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    def fused():
        training.hierarchical_group_lasso(model).backward()

    def plain():
        straightforward(model).backward()

    step()
    times = {"step": [], "fused": [], "straightforward": []}
    for _ in range(args.steps):
        # Gradients are there, as in a loop, so both penalties add to them.
        times["step"].append(milliseconds(step))
        for _ in range(REPEATS):
            times["fused"].append(milliseconds(fused))
            times["straightforward"].append(milliseconds(plain))
    ms = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "device": hardware.current_device().name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "batch": args.batch,
        "steps": args.steps,
        "ms": ms,
        "share": {name: ms[name] / ms["step"] for name in ("fused", "straightforward")},
    }
    print(f"ViT-S/16, batch {args.batch}, {result['threads']} threads: step {ms['step']:.0f} ms")
    for name, share in result["share"].items():
        print(f"penalty, {name}: {ms[name]:.1f} ms, {100 * share:.2f}% of a step")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
