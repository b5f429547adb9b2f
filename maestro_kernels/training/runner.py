"""What `maestro-kernels train` trains (a task) and one run of it, resumable at any point.

Everything that moves a run (weights, optimizer, sampler, random states, place in the data) is in
its checkpoint, and the order of the data is a function of (seed, epoch); so a run that was killed
and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
import pkgutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset, default_collate

from maestro_kernels import hardware
from maestro_kernels.files import check_folder, sole_user
from maestro_kernels.measure.records import Log
from maestro_kernels.nn import convert, lod_layers, save_pretrained, summary
from maestro_kernels.training.batchnorm import recalibrate_batchnorm
from maestro_kernels.training.checkpoint import load_checkpoint, save_checkpoint, seed_random_state
from maestro_kernels.training.loop import Maestro, check_loss

if TYPE_CHECKING:
    from maestro_kernels.training.config import TrainConfig


@dataclass
class Task:
    """A model with data; what a user's `module:function` returns.

    Attributes:
        model: dense, or already factorised; `maestro-kernels train` converts a dense one. Built
            after torch.manual_seed(seed), so ordinary initialisation is repeatable.
        train: a map-style dataset (`len` and `[i]`).
        loss: loss(model, batch) -> scalar tensor; a batch is what torch's default collate makes of
            samples, on the training device.
        test: the dataset that `evaluate` sees, or None.
        evaluate: evaluate(model, batches) -> {name: figure}, after every epoch, in eval mode and
            without gradients; None reports the mean of `loss` over `test`.
    """

    model: nn.Module
    train: Dataset
    loss: Callable[[nn.Module, Any], Tensor]
    test: Dataset | None = None
    evaluate: Callable[[nn.Module, Iterable[Any]], Mapping[str, float]] | None = None


class Run:
    """One training run; modules in the folder `beside` are found before installed ones."""

    log: Log

    def __init__(self, config: TrainConfig, folder: Path, beside: Path, device: str) -> None:
        self.config, self.device = config, device
        self.table = config.model_dump(mode="json")
        self.folder = check_folder("train", "folder", folder)
        self.checkpoint, self.metrics = self.folder / "checkpoint.pt", self.folder / "metrics.jsonl"
        seed_random_state(config.train.seed)
        self.task = _task(config, beside)
        model, options = self.task.model, config.convert.model_dump()
        if not lod_layers(model):
            options["include"] = options["include"] or None
            model = convert(model, allow_larger=True, **options)
        self.model = model.to(device)
        self.optimizer = _optimizer(self.model, config)
        options = config.maestro.model_dump(exclude={"recalibrate_batches"})
        self.maestro = Maestro(self.model, self.optimizer, seed=config.train.seed, **options)
        # How far the run is; `last` is the row of the last epoch.
        self.at = SimpleNamespace(epoch=0, batch=0, step=0, loss_sum=0.0, seconds=0.0, last={})
        self.saved_step = 0

    def train(self, resume: bool, progress: Callable[[str, int, int], None]) -> int | None:
        """Train to the end; the step that the run went on from, None for a fresh one.

        Raises:
            ValueError: the folder holds a run and resume is False, or a run of another
                configuration or architecture, or one that is still going on.
            NonFiniteLoss: training diverged; the last good checkpoint is kept.
        """
        with sole_user("train", "folder", self.folder):
            with closing(self.maestro):
                resumed_at = self._start(resume)
                with closing(self.log):
                    while self.at.epoch < self.config.train.epochs:
                        self._train_epoch(progress)
            save_pretrained(self.model.eval(), self.folder / "model")
        return resumed_at

    def _start(self, resume: bool) -> int | None:
        if not resume and (self.checkpoint.exists() or self.metrics.exists()):
            raise ValueError(
                f"train: folder: expected a new one, got {str(self.folder)!r} with a run in it; "
                "resume it or choose another"
            )
        if self.checkpoint.exists():
            state = load_checkpoint(self.model, self.checkpoint, self.optimizer, self.maestro)
            _check_config(state.pop("config"), self.table)
            # The rows after the checkpoint are written again.
            self.log = Log(self.metrics, keep=state.pop("metrics_bytes"), fn="train")
            self.at = SimpleNamespace(**state)
            self.saved_step = self.at.step
            return self.saved_step
        self.log = Log(self.metrics, fn="train")
        layers = {y.name: {"N": y.N, "K": y.K, "rank": y.rank} for y in summary(self.model).layers}
        about = {"device": self.device, "versions": hardware.versions(), "layers": layers}
        samples = len(self.task.train)  # type: ignore[arg-type]
        self.log.append(event="start", config=self.table, samples=samples, **about)
        self._save()
        return None

    def _train_epoch(self, progress: Callable[[str, int, int], None]) -> None:
        train, at, maestro = self.config.train, self.at, self.maestro
        started = time.perf_counter() - at.seconds
        batches = math.ceil(len(self.task.train) / train.batch_size)  # type: ignore[arg-type]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, at.epoch)
        self.model.train()
        maestro.epoch_begin()
        for batch in self._batches(self.task.train, first=at.batch):
            maestro.step_begin()
            self.optimizer.zero_grad(set_to_none=True)
            forward = partial(self.task.loss, self.model, batch)
            loss = forward()
            value = check_loss(loss, self.model, at.step + 1, forward)
            loss.backward()
            self.optimizer.step()
            maestro.step_end()
            at.step, at.batch, at.loss_sum = at.step + 1, at.batch + 1, at.loss_sum + value
            at.seconds = time.perf_counter() - started
            if at.step % train.log_steps == 0:
                penalty = None if maestro.last_penalty is None else float(maestro.last_penalty)
                place = {"step": at.step, "epoch": at.epoch + 1, "lr": group["lr"]}
                self.log.append(event="step", **place, loss=value, penalty=penalty)
            text = f"epoch {at.epoch + 1}, training loss {value:.3f}"
            progress(text, at.step, train.epochs * batches)
            if train.checkpoint_steps and at.step % train.checkpoint_steps == 0:
                self._save()
        maestro.epoch_end()
        count = self.config.maestro.recalibrate_batches
        if count:
            few = islice(self._batches(self.task.train), count)
            recalibrate_batchnorm(self.model, few, run=self.task.loss)
        at.last = self._epoch_row()
        self.log.append(event="epoch", **at.last)
        at.epoch, at.batch, at.loss_sum = at.epoch + 1, 0, 0.0
        self._save()

    def _batches(self, samples: Any, shuffle: bool = True, first: int = 0) -> Iterator[Any]:
        """Batches from the first on; their order depends on seed and epoch only."""
        order = torch.arange(len(samples))
        if shuffle:
            seed = self.config.train.seed * 1_000_003 + self.at.epoch
            order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
        for part in order.split(self.config.train.batch_size)[first:]:
            batch = default_collate([samples[i] for i in part.tolist()])
            yield tree_map_only(Tensor, lambda tensor: tensor.to(self.device), batch)

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float | None]:
        if self.task.test is None:
            return {}
        self.model.eval()
        batches = self._batches(self.task.test, shuffle=False)
        if self.task.evaluate is not None:
            figures = self.task.evaluate(self.model, batches)
        else:
            losses = [float(self.task.loss(self.model, batch)) for batch in batches]
            figures = {"loss": sum(losses) / len(losses)}
        # JSON has no other numbers.
        return {name: float(x) if math.isfinite(x) else None for name, x in figures.items()}

    def _epoch_row(self) -> dict[str, Any]:
        layers, sizes = lod_layers(self.model), summary(self.model)
        return {
            "epoch": self.at.epoch + 1,
            "step": self.at.step,
            "train_loss": self.at.loss_sum / self.at.batch,
            "metrics": self._evaluate(),
            "ranks": {name: layer.rank for name, layer in layers.items()},
            "stored_ranks": {name: layer.max_rank for name, layer in layers.items()},
            "weights": sizes.deployed_weights,
            "dense_weights": sizes.dense_weights,
            "parameters": sizes.parameters,
            "seconds": self.at.seconds,
        }

    def _save(self) -> None:
        state = {"config": self.table, "metrics_bytes": self.log.sync(), **vars(self.at)}
        save_checkpoint(self.model, self.checkpoint, self.optimizer, self.maestro, **state)
        self.saved_step = self.at.step


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """The learning rate of an epoch, counted from 0."""
    train, share = config.train, epoch / config.train.epochs
    if train.schedule == "cosine":
        return train.lr * 0.5 * (1 + math.cos(math.pi * share))
    drops = (share >= 0.5) + (share >= 0.75) if train.schedule == "steps" else 0
    return train.lr * 0.1**drops


def _task(config: TrainConfig, beside: Path) -> Task:
    sys.path.insert(0, str(beside.resolve()))
    try:
        function = pkgutil.resolve_name(config.task)
    except (ImportError, AttributeError) as error:
        expected = f"expected 'module:function', got {config.task!r}"
        raise ValueError(f"train: task: {expected}: {error}") from error
    finally:
        sys.path.remove(str(beside.resolve()))
    task = function(**config.options)
    if not isinstance(task, Task):
        raise TypeError(f"train: task: expected a training.Task, got {type(task).__name__}")
    return task


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    sgd = partial(torch.optim.SGD, momentum=config.train.momentum)
    kinds: dict[str, Any] = {"sgd": sgd, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    options = config.train.model_dump(include={"lr", "weight_decay"})
    return kinds[config.train.optimizer](model.parameters(), **options)


def _check_config(saved: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> None:
    for key in sorted(saved.keys() | now.keys()):
        a, b = saved.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            _check_config(a, b, f"{where}{key}.")
        elif a != b:
            raise ValueError(
                f"train: {where}{key}: expected {a!r} as in the checkpoint, got {b!r}; a resumed "
                "run keeps its configuration"
            )
