"""The theory of LoD on exactly defined data: it finds the SVD, PCA, and follows the data's order.

    python examples/theory.py [--seeds 5] [--rows reports/theory.jsonl] [--docs docs/guide]

One bias-free layer y = x v^T u^T, each factor with nn.Linear's own initialisation (no SVD), mean
squared error, plain SGD, one sampled (layer, rank) pair a step. Source: Horvath et al., Maestro,
ICML 2024 (arXiv 2308.14929); settings of the authors' linear-models notebook.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from published import origin, stamp, write_block
from torch import Tensor, nn

import maestro_kernels as mk
from maestro_kernels import training
from maestro_kernels.measure import plots, records
from maestro_kernels.measure.plots import Point


@dataclass
class Trace:
    """One experiment over time.

    Attributes:
        name: "svd", "pca", "adaptivity" or "order".
        seed: of the sampler.
        target: what the products should come to.
        iterations: when each row was taken.
        curves: norm(u[:, k]) * norm(v[k]) of every component k, one row per iteration logged.
        distances: "svd" only: squared Frobenius distance of prefix k to the best rank-k matrix.
        made: device, threads and versions.
    """

    name: str
    seed: int
    target: list[float]
    iterations: list[int] = field(default_factory=list)
    curves: list[list[float]] = field(default_factory=list)
    distances: list[list[float]] = field(default_factory=list)
    made: dict[str, Any] = field(default_factory=stamp)

    def log(self, iteration: int, figures: Tensor) -> None:
        """Keep one row."""
        self.iterations.append(iteration)
        self.curves.append(figures.tolist())


def linear_layer(in_features: int, out_features: int) -> mk.LoDLinear:
    """A full-rank layer whose factors start as two nn.Linear layers would."""
    R = min(in_features, out_features)
    v = nn.Linear(in_features, R, bias=False).weight
    u = nn.Linear(R, out_features, bias=False).weight
    return mk.LoDLinear.from_factors(u, v)


def products(layer: mk.LoDLinear) -> Tensor:
    """norm(u[:, k]) * norm(v[k]) of each component: its singular value, once training is done."""
    with torch.no_grad():
        return layer.u.norm(dim=0) * layer.v.norm(dim=1)


def target_matrix() -> Tensor:
    """C (9, 6) of rank 3; singular values 9.5465, 6.9242, 3.6651."""
    torch.manual_seed(123)
    return torch.randn(9, 3) @ torch.randn(3, 6)


def svd_recovery(iterations: int = 2000, every: int = 20, seed: int = 0) -> Trace:
    """Uniform input: prefix k becomes the best rank-k approximation of C, for every k at once."""
    C = target_matrix()
    U, S, Vh = torch.linalg.svd(C, full_matrices=False)
    best = torch.stack([U[:, :k] * S[:k] @ Vh[:k] for k in range(1, 7)])
    trace = Trace("svd", seed, S[:3].tolist())
    layer = linear_layer(9, 6)

    def log(i: int) -> None:
        trace.log(i, products(layer))
        with torch.no_grad():
            prefixes = torch.cumsum(torch.einsum("nr,rk->rkn", layer.u, layer.v), 0)
        trace.distances.append((prefixes - best).square().sum((1, 2)).tolist())

    _fit(layer, torch.eye(9), C, 0.5, iterations, every, seed, log)
    return trace


def order_follows_data(iterations: int = 10_000, every: int = 100, seed: int = 0) -> Trace:
    """Inputs that stress the last singular vector most: the order of components is turned round."""
    C = target_matrix()
    U, S, _ = torch.linalg.svd(C, full_matrices=True)
    scale = torch.ones(9)
    scale[:3] = torch.tensor([1.0, 2.0, 3.0]) / S[:3]
    X = scale[:, None] * U.T
    trace = Trace("order", seed, S[:3].flip(0).tolist())
    layer = linear_layer(9, 6)
    _fit(layer, X, X @ C, 10.0, iterations, every, seed, lambda i: trace.log(i, products(layer)))
    return trace


def pca(
    iterations: int = 2500, every: int = 25, seed: int = 0, two_samples_from: int | None = None
) -> Trace:
    """Identity on 3 samples in 10 dimensions: three components stay, the lasso removes the others.

    Each step is a full pass with plain group lasso 1e-2 and a sampled pass, both before the update.
    With `two_samples_from` only two of the samples are seen from that iteration on.
    """
    torch.manual_seed(12345)
    X = torch.randn(3, 10)
    name = "pca" if two_samples_from is None else "adaptivity"
    trace = Trace(name, seed, [1.0, 1.0, 1.0])
    layer = linear_layer(10, 10)
    sampler = training.SinglePairSampler(layer, seed=seed)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for i in range(iterations):
        if i % every == 0:
            trace.log(i, products(layer))
        x = X if two_samples_from is None or i < two_samples_from else X[:2]
        optimizer.zero_grad()
        sampler.reset()
        (F.mse_loss(layer(x), x) + 1e-2 * training.group_lasso(layer)).backward()
        sampler.step()
        F.mse_loss(layer(x), x).backward()
        optimizer.step()
    sampler.reset()
    trace.log(iterations, products(layer))
    return trace


def _fit(
    layer: mk.LoDLinear,
    X: Tensor,
    Y: Tensor,
    lr: float,
    iterations: int,
    every: int,
    seed: int,
    log: Any,
) -> None:
    """SGD on the mean squared error of sampled prefixes."""
    sampler = training.SinglePairSampler(layer, seed=seed)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    for i in range(iterations):
        if i % every == 0:
            log(i)
        sampler.step()
        optimizer.zero_grad()
        F.mse_loss(layer(X), Y).backward()
        optimizer.step()
    sampler.reset()
    log(iterations)


TITLES = {
    "svd": "SVD: products reach the singular values",
    "pca": "PCA: three samples, three components",
    "adaptivity": "Two samples from iteration 1,200 on",
    "order": "Order follows the data, not the SVD",
}
SWITCH = 1200


def experiments(seed: int) -> list[Trace]:
    """All four, with one seed of the sampler."""
    return [
        svd_recovery(seed=seed),
        pca(seed=seed),
        pca(seed=seed, two_samples_from=SWITCH),
        order_follows_data(seed=seed),
    ]


def draw(traces: Sequence[Trace], folder: Path) -> list[Path]:
    """One drawing per experiment: the products over time, targets dashed."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for trace in traces:
        series = {f"component {k}": [c[k - 1] for c in trace.curves] for k in (1, 2, 3)}
        series["largest of the others"] = [max(c[3:]) for c in trace.curves]
        drawing = plots.line_plot(
            {
                name: [Point(x, y) for x, y in zip(trace.iterations, values, strict=True)]
                for name, values in series.items()
            },
            title=TITLES[trace.name],
            xlabel="iteration",
            ylabel="‖u[:, k]‖ · ‖v[k]‖",
            log=False,
            markers=False,
            levels=sorted(set(trace.target)),
        )
        paths.append(folder / f"theory-{trace.name}.svg")
        paths[-1].write_text(plots.standalone(drawing), encoding="utf-8")
    return paths


def markdown(traces: Sequence[Trace]) -> str:
    """The figures beside what is expected, over all seeds: the block of docs/guide/examples.md."""
    found = {name: [t for t in traces if t.name == name] for name in TITLES}

    def ends(name: str, part: slice) -> list[list[float]]:
        return [list(column) for column in zip(*(t.curves[-1] for t in found[name]), strict=True)][
            part
        ]

    def means(name: str) -> str:
        return ", ".join(f"{statistics.fmean(column):.3f}" for column in ends(name, slice(3)))

    def rest(name: str) -> str:
        return f"{max(map(max, ends(name, slice(3, None)))):.2g}"

    def furthest(name: str) -> str:
        target = found[name][0].target
        gaps = [abs(v - t) for c, t in zip(ends(name, slice(3)), target, strict=True) for v in c]
        return f"{max(gaps):.3f}"

    distance = max(max(t.distances[-1]) for t in found["svd"])
    fallen = [t.curves[t.iterations.index(SWITCH + 1000)][2] for t in found["adaptivity"]]
    targets = {n: ", ".join(f"{v:.4g}" for v in t[0].target) for n, t in found.items()}
    return "\n".join(
        [
            f"Means of the products over {len(found['svd'])} sampler seeds:",
            "",
            "| experiment | expected | found | furthest from it, any seed | largest of the rest |",
            "|---|--:|--:|--:|--:|",
            f"| SVD of C, uniform inputs | {targets['svd']} | {means('svd')} | {furthest('svd')} "
            f"| {rest('svd')} |",
            f"| PCA, three samples | {targets['pca']} | {means('pca')} | {furthest('pca')} "
            f"| {rest('pca')} |",
            f"| inputs that weigh the last direction most | {targets['order']} | {means('order')} "
            f"| {furthest('order')} | {rest('order')} |",
            "",
            f"- SVD: after {found['svd'][0].iterations[-1]:,} iterations every prefix k is within "
            f"{distance:.2g} (squared Frobenius norm) of the best rank-k matrix, on every seed.",
            f"- Adaptivity: a third sample that stops coming at iteration {SWITCH:,} takes the "
            f"third component with it: {statistics.fmean(fallen):.3f} after another 1,000 "
            f"iterations, {max(ends('adaptivity', slice(2, 3))[0]):.1g} at the end.",
            "",
            f"On {origin(traces[0].made)}.",
            "",
            *(f"![{TITLES[name]}](figures/theory-{name}.svg)" for name in TITLES),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run all four, print the figures, write rows and drawings."""
    parser = argparse.ArgumentParser(description="LoD on exactly defined data")
    parser.add_argument("--rows", type=Path, default=Path("reports/theory.jsonl"))
    parser.add_argument("--docs", type=Path, help="write figures and the block of examples.md here")
    parser.add_argument("--seeds", type=int, default=5, help="sampler seeds")
    args = parser.parse_args(argv)
    traces = []
    for seed in range(args.seeds):
        traces += experiments(seed)
        print(f"seed {seed} of {args.seeds} done", file=sys.stderr)
    save(traces, args.rows)
    # From the file, so that it alone accounts for text and drawings.
    traces = load(args.rows)
    text = markdown(traces)
    print(text)
    folder = args.docs / "figures" if args.docs else args.rows.parent
    print("\n".join(str(path) for path in draw(traces[:4], folder)), file=sys.stderr)
    if args.docs:
        marks = ("<!-- theory:begin, written by examples/theory.py -->", "<!-- theory:end -->")
        write_block(args.docs / "examples.md", text, *marks)
    return 0


def save(traces: Sequence[Trace], path: Path) -> None:
    """One line per trace, figures to five digits."""

    def rounded(rows: list[list[float]]) -> list[list[float]]:
        return [[float(f"{value:.5g}") for value in row] for row in rows]

    short = ({"curves": rounded(t.curves), "distances": rounded(t.distances)} for t in traces)
    records.write(path, ({**asdict(t), **s} for t, s in zip(traces, short, strict=True)))


def load(path: Path) -> list[Trace]:
    """What `save` wrote."""
    return [Trace(**record) for record in records.load(path)]


if __name__ == "__main__":
    raise SystemExit(main())
