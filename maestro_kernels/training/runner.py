"""The engine behind `maestro-kernels train`: one configured run, resumable at any point.

Everything that moves a run (weights, optimizer, sampler, random states, place in the data) is in
its checkpoint, and the order of the data is a function of (seed, epoch); so a run that was killed
and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from maestro_kernels import hardware
from maestro_kernels.files import check_folder, sole_user
from maestro_kernels.nn import convert, save_pretrained, summary
from maestro_kernels.nn.active_ranks import lod_layers
from maestro_kernels.training.batchnorm import recalibrate_batchnorm
from maestro_kernels.training.checkpoint import load_checkpoint, save_checkpoint, seed_random_state
from maestro_kernels.training.config import TrainConfig
from maestro_kernels.training.loop import Maestro, NonFiniteLoss, check_loss
from maestro_kernels.training.metrics import SCHEMA, MetricsFile
from maestro_kernels.training.tasks import Task, make_task

__all__ = ["Result", "deployed_weights", "learning_rate", "train"]

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Result:
    """What a finished run left.

    Attributes:
        folder: of the run.
        model: the trained model, in eval mode.
        last: the last "epoch" row.
        resumed_at: step the run went on from, None for a fresh one.
    """

    folder: Path
    model: nn.Module
    last: dict[str, Any]
    resumed_at: int | None


def train(
    config: TrainConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    device: torch.device | str = "cpu",
    beside: Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Train a task with LoD as configured.

    Leaves in `folder`: metrics.jsonl, checkpoint.pt and, at the end, model/ (`save_pretrained`).

    Args:
        config: see TrainConfig.
        folder: new, or with `resume` one that an earlier call with the same config wrote.
        resume: go on from the checkpoint in `folder`, from the start where there is none.
        device: where to train.
        beside: a folder whose modules are found first, for a task of the user's.
        progress: called with {"epoch", "step", "steps", "loss"} after every step and with every
            "epoch" row.

    Raises:
        ValueError: the folder is none, holds a run and resume is False, or is in use by a run
            that is still going on; its checkpoint is of another configuration or architecture.
        NonFiniteLoss: training diverged; the last good checkpoint is kept.
    """
    place = check_folder("train", "folder", folder)
    run = _Run(config, place, torch.device(device), beside)
    with sole_user("train", "folder", place):
        try:
            resumed_at = run.start(resume)
            while run.epoch < config.train.epochs:
                run.train_epoch(progress)
        except NonFiniteLoss as error:
            raise NonFiniteLoss(
                f"{error} (epoch {run.epoch + 1}); the checkpoint of step {run.saved_step} in "
                f"{str(run.checkpoint)!r} is kept"
            ) from None
        finally:
            run.close()
        run.model.eval()
        save_pretrained(run.model, run.folder / "model")
    return Result(run.folder, run.model, run.last, resumed_at)


class _Run:
    """State of a run between two steps."""

    def __init__(
        self, config: TrainConfig, folder: Path, device: torch.device, beside: Path | None
    ) -> None:
        self.config, self.folder, self.device = config, folder, device
        self.checkpoint = folder / "checkpoint.pt"
        seed_random_state(config.train.seed)
        self.task = make_task(config.task, config.options, beside)
        self.size = _length(self.task.train)
        self.model = _factorised(self.task, config).to(device)
        self.optimizer = _optimizer(self.model, config)
        self.maestro = Maestro(
            self.model,
            self.optimizer,
            lam=config.maestro.lam,
            threshold=config.maestro.threshold,
            sampler=config.maestro.sampler,
            fraction=config.maestro.fraction,
            penalty=config.maestro.penalty,
            shrink_every=config.maestro.shrink_every,
            multiple_of=config.maestro.multiple_of,
            freeze_period=config.maestro.freeze_period,
            seed=config.train.seed,
        )
        self.epoch = self.batch = self.step = self.saved_step = 0
        self.loss_sum = self.seconds = 0.0
        self.last: dict[str, Any] = {}
        self.metrics: MetricsFile | None = None

    @property
    def batches(self) -> int:
        return math.ceil(self.size / self.config.train.batch_size)

    def start(self, resume: bool) -> int | None:
        """Open the folder; the step resumed at, or None for a fresh run."""
        path = self.folder / "metrics.jsonl"
        if not resume and (self.checkpoint.exists() or path.exists()):
            raise ValueError(
                f"train: folder: expected a new one, got {str(self.folder)!r} with a run in it; "
                "resume it or choose another"
            )
        if self.checkpoint.exists():
            extra = load_checkpoint(self.checkpoint, self.model, self.optimizer, self.maestro)
            _check_config(extra["config"], self.config.to_dict())
            for name in ("epoch", "batch", "step", "loss_sum", "seconds", "last"):
                setattr(self, name, extra[name])
            self.saved_step = self.step
            self.metrics = MetricsFile(path, keep=extra["metrics_bytes"])
            return self.step
        self.metrics = MetricsFile(path)
        self.metrics.append(**self._start_row())
        self._save()
        return None

    def train_epoch(self, progress: Progress | None) -> None:
        """From the current batch to the end of the epoch, evaluation and checkpoint included."""
        train, started = self.config.train, time.perf_counter() - self.seconds
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.epoch)
        self.model.train()
        self.maestro.epoch_begin()
        for batch in self._train_batches():
            loss = self._train_step(batch)
            self.seconds = time.perf_counter() - started
            if self.step % train.log_steps == 0:
                self._log_step(loss)
            if progress is not None:
                place = {"epoch": self.epoch, "step": self.step}
                progress({**place, "steps": train.epochs * self.batches, "loss": loss})
            if train.checkpoint_steps and self.step % train.checkpoint_steps == 0:
                self._save()
        self._end_epoch()
        self.seconds = time.perf_counter() - started
        self.last = self._epoch_row()
        assert self.metrics is not None
        self.metrics.append(**self.last)
        self.epoch += 1
        self.batch, self.loss_sum = 0, 0.0
        self._save()
        if progress is not None:
            progress(self.last)

    def _train_step(self, batch: Any) -> float:
        self.maestro.step_begin()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.task.loss(self.model, batch)
        value = check_loss(
            loss, self.model, self.step + 1, lambda: self.task.loss(self.model, batch)
        )
        loss.backward()
        self.optimizer.step()
        self.maestro.step_end()
        self.step += 1
        self.batch += 1
        self.loss_sum += value
        return value

    def _end_epoch(self) -> None:
        self.maestro.epoch_end()
        count = self.config.maestro.recalibrate_batches
        if count:
            batches = (b for b, _ in zip(self._train_batches(start=0), range(count), strict=False))
            recalibrate_batchnorm(self.model, batches, run=self.task.loss)

    def _train_batches(self, start: int | None = None) -> Iterator[Any]:
        """Batches of this epoch from the current one on; their order depends on nothing else."""
        seed = self.config.train.seed * 1_000_003 + self.epoch
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.size, generator=generator).tolist()
        first = self.batch if start is None else start
        return self._batches(self.task.train, order, first, generator)

    def _batches(
        self, data: Dataset, order: list[int], first: int, generator: torch.Generator
    ) -> Iterator[Any]:
        size = self.config.train.batch_size
        chosen = [order[i : i + size] for i in range(first * size, len(order), size)]
        # With a generator of its own the loader leaves the global random state alone.
        for batch in DataLoader(data, batch_sampler=chosen, generator=generator):
            yield _to(batch, self.device)

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float | None]:
        test = self.task.test
        if test is None:
            return {}
        self.model.eval()
        order = list(range(_length(test)))
        batches = self._batches(test, order, 0, torch.Generator())
        if self.task.evaluate is None:
            losses = [float(self.task.loss(self.model, batch)) for batch in batches]
            figures: Mapping[str, float] = {"loss": sum(losses) / len(losses)}
        else:
            figures = self.task.evaluate(self.model, batches)
        self.model.train()
        return {str(name): _number(value) for name, value in figures.items()}

    def _epoch_row(self) -> dict[str, Any]:
        layers = lod_layers(self.model)
        weights, dense = deployed_weights(self.model)
        return {
            "event": "epoch",
            "epoch": self.epoch + 1,
            "step": self.step,
            "train_loss": self.loss_sum / self.batch,
            "metrics": self._evaluate(),
            "ranks": {name: layer.rank for name, layer in layers.items()},
            "stored_ranks": {name: layer.max_rank for name, layer in layers.items()},
            "weights": weights,
            "dense_weights": dense,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "seconds": self.seconds,
        }

    def _log_step(self, loss: float) -> None:
        penalty = self.maestro.last_penalty
        assert self.metrics is not None
        self.metrics.append(
            event="step",
            step=self.step,
            epoch=self.epoch + 1,
            loss=loss,
            penalty=None if penalty is None else float(penalty),
            lr=self.optimizer.param_groups[0]["lr"],
        )

    def _start_row(self) -> dict[str, Any]:
        layers = {
            layer.name: {"N": layer.N, "K": layer.K, "kind": layer.kind, "rank": layer.rank}
            for layer in summary(self.model).layers
        }
        return {
            "event": "start",
            "schema": SCHEMA,
            "config": self.config.to_dict(),
            "samples": self.size,
            "batches": self.batches,
            "layers": layers,
            "dense_weights": deployed_weights(self.model)[1],
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "versions": hardware.versions(),
        }

    def _save(self) -> None:
        assert self.metrics is not None
        save_checkpoint(
            self.checkpoint,
            self.model,
            self.optimizer,
            self.maestro,
            config=self.config.to_dict(),
            epoch=self.epoch,
            batch=self.batch,
            step=self.step,
            loss_sum=self.loss_sum,
            seconds=self.seconds,
            last=self.last,
            metrics_bytes=self.metrics.sync(),
        )
        self.saved_step = self.step

    def close(self) -> None:
        self.maestro.close()
        if self.metrics is not None:
            self.metrics.close()


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """The learning rate of an epoch, counted from 0."""
    train = config.train
    if train.schedule == "constant":
        return train.lr
    share = epoch / train.epochs
    if train.schedule == "cosine":
        return train.lr * 0.5 * (1 + math.cos(math.pi * share))
    return train.lr * 0.1 ** ((share >= 0.5) + (share >= 0.75))


def deployed_weights(model: nn.Module) -> tuple[int, int]:
    """(weights of the linear and convolution layers as deployed, as dense layers).

    A factorised layer is deployed in the smaller of its two forms, min(r (N + K), N K).
    """
    report = summary(model)
    saved = sum(
        layer.parameters - min(layer.macs, layer.dense_parameters)
        for layer in report.layers
        if layer.rank is not None
    )
    return report.weights - saved, report.dense_weights


def _factorised(task: Task, config: TrainConfig) -> nn.Module:
    if lod_layers(task.model, "train"):
        return task.model
    return convert(
        task.model,
        include=list(config.convert.include) or None,
        exclude=list(config.convert.exclude) or None,
        init=config.convert.init,
        allow_larger=True,
    )


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    train, parameters = config.train, list(model.parameters())
    if train.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, train.lr, momentum=train.momentum, weight_decay=train.weight_decay
        )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[train.optimizer]
    return kind(parameters, train.lr, weight_decay=train.weight_decay)


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


def _number(value: Any) -> float | None:
    """A figure of the user's; None where it is not finite, which JSON cannot hold."""
    figure = float(value)
    return figure if math.isfinite(figure) else None


def _length(data: Any) -> int:
    try:
        size = len(data)
    except TypeError:
        raise TypeError(
            f"train: task: expected a dataset with len and [i], got {type(data).__name__}"
        ) from None
    if size == 0:
        raise ValueError("train: task: expected at least one sample, got none")
    return size


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to(item, device) for item in value)
    return value
