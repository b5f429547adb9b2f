"""Accuracy against size on scikit-learn's digits: LoD, plain factors, and a dense model cut by SVD.

    python examples/digits.py [--quick] [--rows reports/digits.jsonl] [--docs docs/guide]

Every model starts from the same weights per seed and sees the same batches. Whole networks are
factorised, classifier included. Sizes count the weights of linear and convolution layers in the
smaller of their two forms, min(r (N + K), N K); biases and BatchNorm stay out. Finished pieces are
rows of a file; a second call goes on where the first ended.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from digits_report import SVD, Row, draw, markdown
from digits_task import make as digits
from published import stamp, write_block
from torch import Tensor, nn

import maestro_kernels as mk
from maestro_kernels import training
from maestro_kernels.measure import records

# Methods that train factors: the sampler, and whether the hierarchical lasso acts.
METHODS = {
    "LoD, single pair": ("single", False),
    "LoD, all layers": ("independent", False),
    "LoD and lasso": ("single", True),
    "lasso, no LoD": ("full", True),
    "factors, no LoD": ("full", False),
}
LAMBDA = {"mlp": 1e-3, "cnn": 1e-2}
BUDGETS = (0.75, 0.5, 0.4, 0.31, 0.23, 0.155, 0.1, 0.06)
WIDTHS = (0.5, 0.25, 0.125, 0.0625)
EPOCHS = {"mlp": 150, "cnn": 30}
# Ranks that one step of the greedy search takes from a layer, as a share of its full rank.
STEP = 1 / 16
LR, MOMENTUM, BATCH = 0.03, 0.9, 64

Split = tuple[Tensor, Tensor]


class Data:
    """One split of the digits, as tensors."""

    def __init__(self, model: str, seed: int) -> None:
        task = digits(model, seed=seed)
        self.train: Split = task.train.tensors  # type: ignore[attr-defined]
        self.test: Split = task.test.tensors  # type: ignore[union-attr]
        # What the greedy search and BatchNorm see: training samples only.
        self.calibration: Split = (self.train[0][:512], self.train[1][:512])

    def batches(self, epoch: int, seed: int) -> Iterator[Split]:
        """Shuffled training batches; the same for every method."""
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        for index in torch.randperm(len(self.train[1]), generator=generator).split(BATCH):
            yield self.train[0][index], self.train[1][index]


def fit(
    model: nn.Module,
    data: Data,
    epochs: int,
    seed: int,
    sampler: str = "",
    lam: float = 0.0,
    lr: float = LR,
) -> float:
    """SGD with momentum, lr / 10 at 50 % and 75 %; returns the last epoch's mean loss, or NaN.

    Args:
        model: dense, or factorised where a sampler is named.
        data: see Data.
        epochs: passes over the data.
        seed: of the batches and the sampler.
        sampler: as `training.Maestro` takes it; "" for a dense model.
        lam: weight of the hierarchical lasso; layers shrink where it is not 0.
        lr: learning rate at the start.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)
    milestones = [epochs // 2, epochs * 3 // 4]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    maestro = None
    if sampler:
        maestro = training.Maestro(
            model, optimizer, lam=lam, sampler=sampler, shrink_every=1 if lam else 0, seed=seed
        )
    model.train()
    losses: list[float] = []
    for epoch in range(epochs):
        batches = data.batches(epoch, seed)
        losses.clear()
        try:
            for x, y in maestro.epoch(batches) if maestro else batches:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        except training.NonFiniteLoss:
            losses.append(float("nan"))
            break
        schedule.step()
    if maestro:
        maestro.close()
    model.eval()
    return statistics.fmean(losses)


def _finite(value: float) -> bool:
    return value - value == 0


def factorised(model: nn.Module) -> nn.Module:
    """A copy whose every layer is the SVD of its weight at full rank."""
    return mk.convert(model, allow_larger=True, inplace=False)


def weights(model: nn.Module) -> tuple[int, int]:
    """(weights at the active ranks, each layer in its smaller form; weights of the dense model)."""
    shapes = [(layer.rank, *layer.matrix_shape) for layer in mk.nn.lod_layers(model).values()]
    return sum(min(r * (N + K), N * K) for r, N, K in shapes), sum(N * K for _, N, K in shapes)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Test accuracy at the active ranks, BatchNorm statistics made anew for them."""
    training.recalibrate_batchnorm(model, [(data.train[0],)])
    model.eval()
    x, y = data.test
    return float((model(x).argmax(-1) == y).double().mean())


@torch.no_grad()
def calibration_loss(model: nn.Module, data: Data) -> float:
    """Loss on training samples, BatchNorm by the statistics of these samples."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        # Momentum 0 normalises by the batch and leaves the running statistics alone.
        norm.momentum, norm.training = 0.0, True
    x, y = data.calibration
    loss = float(F.cross_entropy(model(x), y))
    for norm in norms:
        norm.momentum, norm.training = 0.1, False
    return loss


def greedy(model: nn.Module, data: Data, budgets: Sequence[float]) -> Iterator[float]:
    """Take ranks away, always where the calibration loss stays lowest; yields at each budget.

    Nested: a smaller model is a prefix of a larger one. `training.extract` does this for one
    budget; a whole curve needs one descent.
    """
    layers = mk.nn.lod_layers(model)
    steps = {name: max(1, round(layer.max_rank * STEP)) for name, layer in layers.items()}
    for budget in sorted(budgets, reverse=True):
        while True:
            now, dense = weights(model)
            if now <= budget * dense:
                break
            losses = {}
            for name, layer in layers.items():
                rank = layer.rank
                if rank > 1:
                    layer.rank = max(1, rank - steps[name])
                    losses[name] = calibration_loss(model, data)
                    layer.rank = rank
            if not losses:
                return
            chosen = min(losses, key=losses.__getitem__)
            layers[chosen].rank = max(1, layers[chosen].rank - steps[chosen])
        yield budget


def sizes(model: nn.Module, data: Data, about: Mapping[str, Any]) -> list[Row]:
    """Accuracy of a factorised model whole, at uniform widths, and along the greedy descent."""
    layers = mk.nn.lod_layers(model)
    full = {name: layer.rank for name, layer in layers.items()}
    head = list(layers)[-1]

    def row(cut: str, at: float) -> Row:
        now, dense = weights(model)
        found = {"cut": cut, "at": at, "weights": now, "dense_weights": dense}
        return {**about, **found, "accuracy": accuracy(model, data)}

    rows = [{**row("whole", 1.0), "ranks": full}]
    for width in WIDTHS:
        for name, layer in layers.items():
            # Ten classes need ten ranks: a narrow classifier says nothing about the rest.
            layer.rank = full[name] if name == head else max(1, int(full[name] * width))
        rows.append(row("width", width))
    mk.set_ranks(model, full)
    rows += [row("greedy", budget) for budget in greedy(model, data, BUDGETS)]
    mk.set_ranks(model, full)
    return rows


def run(kind: str, method: str, seed: int, epochs: int) -> list[Row]:
    """Train one model and measure it at every size."""
    data = Data(kind, seed)
    torch.manual_seed(seed)
    dense = digits(kind, seed=seed).model
    about: Row = {"model": kind, "method": method, "seed": seed, "epochs": epochs}
    started = time.perf_counter()
    if method == SVD:
        fit(dense, data, epochs, seed)
        about["dense_accuracy"] = accuracy(dense, data)
        model = factorised(dense)
    else:
        sampler, lasso = METHODS[method]
        model = factorised(dense)
        about["lam"] = lam = LAMBDA[kind] if lasso else 0.0
        fit(model, data, epochs, seed, sampler, lam)
    about["seconds"] = round(time.perf_counter() - started, 1)
    return sizes(model, data, about)


def high_lr(seed: int, epochs: int) -> list[Row]:
    """The trap of a learning rate that only dense layers survive: 0.1 with momentum 0.9."""
    data = Data("mlp", seed)
    rows = []
    for method, sampler in (("dense", ""), ("factors, no LoD", "full"), ("LoD", "single")):
        torch.manual_seed(seed)
        model = digits("mlp", seed=seed).model
        if sampler:
            model = factorised(model)
        loss = fit(model, data, epochs, seed, sampler, lr=0.1)
        about = {"model": "mlp", "method": method, "seed": seed, "epochs": epochs}
        finite = _finite(loss)
        right = accuracy(model, data) if finite else None
        rows.append({**about, "cut": "lr 0.1", "finite": finite, "accuracy": right})
    return rows


def collect(
    path: Path,
    seeds: int,
    epochs: Mapping[str, int],
    methods: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """Append the rows of every piece that the file lacks."""
    made = stamp()
    have = {(r["model"], r["method"], r["seed"], r["cut"] == "lr 0.1") for r in load(path)}
    for seed in range(seeds):
        for kind, method in [(k, m) for k in epochs for m in methods]:
            if (kind, method, seed, False) in have:
                continue
            rows = run(kind, method, seed, epochs[kind])
            records.append(path, ({**row, **made} for row in rows))
            say(f"{kind}, {method}, seed {seed}: {rows[0]['accuracy']:.1%}")
        if "mlp" in epochs and ("mlp", "dense", seed, True) not in have:
            rows = high_lr(seed, epochs["mlp"])
            records.append(path, ({**row, **made} for row in rows))


def load(path: Path) -> list[Row]:
    """Rows of a file; none where there is no file."""
    return records.load(path) if path.is_file() else []


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, print the tables, draw."""
    parser = argparse.ArgumentParser(description="accuracy against size on digits")
    parser.add_argument("--rows", type=Path, default=Path("reports/digits.jsonl"))
    parser.add_argument("--docs", type=Path, help="write figures and the block of examples.md here")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs: a smoke test")
    args = parser.parse_args(argv)
    epochs = {"mlp": 12, "cnn": 1} if args.quick else EPOCHS
    methods = [SVD, "LoD and lasso"] if args.quick else [SVD, *METHODS]
    seeds = 1 if args.quick else args.seeds
    collect(args.rows, seeds, epochs, methods, lambda text: print(text, file=sys.stderr))
    rows = load(args.rows)
    text = markdown(rows)
    print(text)
    folder = args.docs / "figures" if args.docs else args.rows.parent
    print("\n".join(str(path) for path in draw(rows, folder)), file=sys.stderr)
    if args.docs:
        marks = ("<!-- digits:begin, written by examples/digits.py -->", "<!-- digits:end -->")
        write_block(args.docs / "examples.md", text, *marks)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
