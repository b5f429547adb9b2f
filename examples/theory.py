"""The theory of LoD on exactly defined data: it finds the SVD, PCA, and follows the data's order.

    python examples/theory.py [--out reports/theory] [--images docs/images] [--long]

One bias-free layer y = x v^T u^T, each factor with nn.Linear's own initialisation (no SVD), mean
squared error, plain SGD, one sampled (layer, rank) pair a step. Source: Horvath et al., Maestro,
ICML 2024 (arXiv 2308.14929); settings of the authors' linear-models notebook.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maestro_kernels as mk
from maestro_kernels import training


@dataclass
class Trace:
    """One experiment over time.

    Attributes:
        name: "svd", "pca", "adaptivity" or "order".
        target: what the products should come to.
        iterations: when each row was taken.
        curves: norm(u[:, k]) * norm(v[k]) of every component k, one row per iteration logged.
        distances: "svd" only: squared Frobenius distance of prefix k to the best rank-k matrix.
    """

    name: str
    target: list[float]
    iterations: list[int] = field(default_factory=list)
    curves: list[list[float]] = field(default_factory=list)
    distances: list[list[float]] = field(default_factory=list)

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
    trace = Trace("svd", S[:3].tolist())
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
    trace = Trace("order", S[:3].flip(0).tolist())
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
    trace = Trace("pca" if two_samples_from is None else "adaptivity", [1.0, 1.0, 1.0])
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


def figures(trace: Trace) -> str:
    """The last row, as text."""
    return "  ".join(
        f"{value:.3g}" if value < 0.1 else f"{value:.3f}" for value in trace.curves[-1]
    )


def plot(traces: Sequence[Trace], folder: Path) -> list[Path]:
    """One drawing per experiment: components over iterations, targets dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {
        "svd": "SVD: products reach the singular values",
        "pca": "PCA: three samples, three components",
        "adaptivity": "Two samples from iteration 1,200 on",
        "order": "Order follows the data, not the SVD",
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for trace in traces:
        figure, axes = pyplot.subplots(figsize=(4.8, 3.3), dpi=110, layout="constrained")
        for k, curve in enumerate(zip(*trace.curves, strict=True)):
            axes.plot(trace.iterations, curve, linewidth=1.6, label=f"component {k + 1}")
        for value in sorted(set(trace.target)):
            axes.axhline(value, color="black", linewidth=0.8, linestyle="--", zorder=1)
        axes.set(xlabel="iteration", ylabel="‖u[:, k]‖ · ‖v[k]‖ of component k")
        axes.set_title(titles[trace.name], fontsize=11, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        paths.append(folder / f"theory-{trace.name}.png")
        figure.savefig(paths[-1])
        pyplot.close(figure)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Run all four, print the figures, write JSON and drawings."""
    parser = argparse.ArgumentParser(description="LoD on exactly defined data")
    parser.add_argument("--out", type=Path, default=Path("reports/theory"))
    parser.add_argument("--images", type=Path, help="folder of the drawings; default: --out")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler")
    parser.add_argument("--long", action="store_true", help="SVD for 20,000 iterations instead")
    args = parser.parse_args(argv)
    svd = svd_recovery(20_000 if args.long else 2000, 200 if args.long else 20, args.seed)
    order = order_follows_data(seed=args.seed)
    plain, fewer = pca(seed=args.seed), pca(seed=args.seed, two_samples_from=1200)
    worst = max(svd.distances[-1])
    print(f"1  SVD         products     {figures(svd)}")
    print(f"               squared distance of prefixes to the best: at most {worst:.2g}")
    print(f"2  PCA         products     {figures(plain)}")
    print(f"2b two samples products     {figures(fewer)}")
    print(f"3  order       products     {figures(order)}")
    traces = [svd, plain, fewer, order]
    paths = plot(traces, args.images or args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "theory.json").write_text(json.dumps([asdict(t) for t in traces]) + "\n")
    print("\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
