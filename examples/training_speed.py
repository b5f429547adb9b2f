"""One LoD training step against the implementation that one would write first.

    python examples/training_speed.py --rows out/training-speed.jsonl [--docs docs/guide]

A step is: draw one (layer, rank) pair, forward, hierarchical group lasso, backward, SGD with
momentum. The straightforward implementation selects the active components of both factors with a
boolean mask, calls F.linear twice and leaves the penalty to autograd. Both steps are first shown to
give the same parameters; then they take turns. Peak memory comes from a process of its own each.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from published import origin, stamp, write_block
from torch import Tensor, nn

import maestro_kernels as mk
from maestro_kernels import training
from maestro_kernels.measure import plots, records
from maestro_kernels.measure.timing import interleave

LAMBDA = 1e-6
NAMES = ("LoD", "straightforward")
MARKS = (
    "<!-- training-speed:begin, written by examples/training_speed.py -->",
    "<!-- training-speed:end -->",
)


class Block(nn.Module):
    """A transformer block that normalises before attention and before the MLP."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) to the same."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(), is_causal=self.causal)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Head(nn.Module):
    """Mean over the tokens, then classes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.classes = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) to (B, 1000)."""
        return self.classes(self.norm(x).mean(1))


def mlp(rows: int) -> tuple[nn.Module, tuple[int, ...]]:
    """784-1024-1024-10."""
    model = nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )
    return model, (rows, 784)


def vit_s(images: int) -> tuple[nn.Module, tuple[int, ...]]:
    """ViT-S/16 on 224 x 224 images, each as 196 patches of 16 x 16 x 3."""
    blocks = [Block(384, 6, causal=False) for _ in range(12)]
    return nn.Sequential(nn.Linear(768, 384), *blocks, Head(384)), (images, 196, 768)


def gpt2_block(tokens: int) -> tuple[nn.Module, tuple[int, ...]]:
    """One block of GPT-2 small."""
    return Block(768, 12, causal=True), (1, tokens, 768)


# The first of each model is the goal's; the second has enough rows for the matmuls, which are the
# same in both implementations, to take most of the time.
CASES = {
    "MLP, 128 rows": (mlp, 128),
    "ViT-S, 1 image": (vit_s, 1),
    "GPT-2 small block, 128 tokens": (gpt2_block, 128),
    "MLP, 1024 rows": (mlp, 1024),
    "ViT-S, 8 images": (vit_s, 8),
    "GPT-2 small block, 1024 tokens": (gpt2_block, 1024),
}
SMALL = tuple(CASES)[:3]


class Masked(nn.Module):
    """The straightforward LoD layer."""

    mask: Tensor

    def __init__(self, layer: mk.LoDLinear) -> None:
        super().__init__()
        self.u, self.v, self.bias = layer.u, layer.v, layer.bias
        self.register_buffer("mask", torch.ones(layer.max_rank, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        """Y (..., N)."""
        return F.linear(F.linear(x, self.v[self.mask]), self.u[:, self.mask], self.bias)


def masked(model: nn.Module) -> nn.Module:
    """A copy of a model whose LoD layers are straightforward ones."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, mk.LoDLinear):
                setattr(parent, name, Masked(child))
    return twin


def masked_penalty(layers: list[Masked]) -> Tensor:
    """The hierarchical group lasso as one would write it."""
    total = torch.zeros(())
    for layer in layers:
        for squares in (layer.u.square().sum(0), layer.v.square().sum(1)):
            total = total + squares.flip(0).cumsum(0).sqrt().sum()
    return total


def steps_of(case: str, names: Sequence[str] = NAMES) -> dict[str, Callable[[], None]]:
    """A step of each implementation asked for, on models with the same parameters."""
    torch.manual_seed(0)
    build, size = CASES[case]
    dense, shape = build(size)
    model = mk.convert(dense, init="random", allow_larger=True)
    x = torch.randn(shape)
    with torch.no_grad():
        target = torch.randn_like(model(x))
    models = {name: masked(model) if name == "straightforward" else model for name in names}
    found = {name: _step(name, models[name], x, target) for name in names}
    if len(names) > 1:
        check(found, models)
    return found


def _step(name: str, model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], None]:
    if name == "LoD":
        draw: Callable[[], Any] = training.SinglePairSampler(model, seed=0).step
        penalty = partial(training.hierarchical_group_lasso, model)
    else:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, Masked)}
        # The same draws; only their ranks are used.
        ranks = nn.ModuleDict(
            {
                n.replace(".", "/"): mk.LoDLinear(*m.v.shape[::-1], len(m.v), device="meta")
                for n, m in layers.items()
            }
        )
        draw = partial(_draw_masks, training.SinglePairSampler(ranks, seed=0), layers)
        penalty = partial(masked_penalty, list(layers.values()))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        draw()
        loss = F.mse_loss(model(x), target) + LAMBDA * penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _draw_masks(sampler: training.SinglePairSampler, layers: Mapping[str, Masked]) -> None:
    for name, rank in sampler.step().items():
        layer = layers[name.replace("/", ".")]
        layer.mask = torch.arange(len(layer.mask)) < rank


def check(steps: Mapping[str, Callable[[], None]], models: Mapping[str, nn.Module]) -> None:
    """Three steps of each leave the same parameters."""
    for step in steps.values():
        for _ in range(3):
            step()
    pairs = zip(*(model.parameters() for model in models.values()), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def timed(case: str, seconds: float) -> dict[str, Any]:
    """Milliseconds of a step, 20th, 50th and 80th percentile."""
    stats = interleave(steps_of(case), seconds=seconds, min_rounds=6)
    return {n: [t * 1e3 for t in (s.p20, s.p50, s.p80)] for n, s in stats.items()}


def resident(case: str, name: str) -> float:
    """MiB that three steps of one implementation add to the process's peak, gradients included."""
    step = steps_of(case, (name,))[name]
    # Resets the peak to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    for _ in range(3):
        step()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """KiB of a line of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+)", text)[1])


def peaks(case: str) -> dict[str, Any]:
    """Peak memory of each implementation, in a process of its own."""
    found = {}
    for name in NAMES:
        command = [sys.executable, __file__, "--resident", case, name]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[name] = float(out)
    return found


def ratio(row: dict[str, Any]) -> float:
    """How much faster the LoD step is."""
    return row["straightforward"][1] / row["LoD"][1]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/guide/deployment.md."""
    times = {r["case"]: r for r in rows if r["measure"] == "ms"}
    memory = {r["case"]: r for r in rows if r["measure"] == "MiB"}
    first = next(iter(times.values()))
    lines = [
        "| | LoD, ms | straightforward, ms | faster | LoD, MiB | straightforward, MiB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for case, row in times.items():
        lod, other = ("{1:.1f} ({0:.1f}-{2:.1f})".format(*row[name]) for name in NAMES)
        peak = [f"{memory[case][n]:.0f}" if case in memory else "" for n in NAMES]
        lines.append(f"| {case} | {lod} | {other} | {ratio(row):.2f}× | {' | '.join(peak)} |")
    small = [ratio(r) for c, r in times.items() if c in SMALL]
    large = [ratio(r) for c, r in times.items() if c not in SMALL]
    means = [f"{statistics.geometric_mean(part):.2f}×" for part in (small, large) if part]
    return "\n".join(
        [
            *lines,
            "",
            f"Medians and 20th to 80th percentile on {origin(first)}; memory is what steps add to "
            f"the model at their peak. Geometric means: {means[0]} for the first three"
            + (f", {means[1]} for the larger ones." if large else "."),
        ]
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Ratios of time and of peak memory."""
    times = {r["case"]: ratio(r) for r in rows if r["measure"] == "ms"}
    memory = {r["case"]: r["straightforward"] / r["LoD"] for r in rows if r["measure"] == "MiB"}
    drawing = plots.ratio_plot(
        [plots.Ratio(case, value, memory.get(case)) for case, value in times.items()],
        title="A LoD training step",
        xlabel="straightforward / LoD",
        names=("time", "peak memory"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(plots.standalone(drawing), encoding="utf-8")


def main() -> int:
    """Measure what is asked for, write rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=Path, default=Path("out/training-speed.jsonl"))
    parser.add_argument("--docs", type=Path, help="write the block of deployment.md here")
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing per case")
    parser.add_argument("--measure", choices=("ms", "MiB"), nargs="*", default=["ms", "MiB"])
    parser.add_argument("--cases", choices=list(CASES), nargs="+", default=list(CASES))
    parser.add_argument("--resident", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.resident:
        print(resident(*args.resident))
        return 0
    known = records.load(args.rows) if args.rows.is_file() else []
    rows = {(r["case"], r["measure"]): r for r in known}
    made = stamp()
    for measure in args.measure:
        for case in args.cases:
            print(f"{case}: {measure}", file=sys.stderr)
            one = timed(case, args.seconds) if measure == "ms" else peaks(case)
            rows[case, measure] = {"case": case, "measure": measure, **one, **made}
            records.write(args.rows, rows.values())
    found = [rows[c, m] for c in CASES for m in ("ms", "MiB") if (c, m) in rows]
    table = markdown(found)
    print(table)
    if args.docs:
        draw(found, args.docs / "figures" / "training-speed.svg")
        write_block(args.docs / "deployment.md", table, *MARKS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
