"""Self-distillation: a factorised student learns to answer as the dense model it was made from."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn

from maestro_kernels.arguments import check_int, check_model
from maestro_kernels.measure.progress import Advance, progress_bar
from maestro_kernels.nn.moments import check_batches
from maestro_kernels.training.descent import Descent
from maestro_kernels.training.distances import DISTANCES, Distance
from maestro_kernels.training.loop import check_loss

_FN = "distil"
# Evaluations of one run, where the caller does not say how many steps lie between two.
_EVALUATIONS = 10


@dataclass(frozen=True)
class Distillation:
    """What a distillation did to the student.

    Attributes:
        steps: taken.
        best_step: whose state the student has; 0 is the state it came with.
        losses: of every step, on its batch.
        held_out: (step, mean loss on the held-out batches), step 0 first; empty without them.
        stopped: "steps", or "patience" where the held-out loss no longer fell.
    """

    steps: int
    best_step: int
    losses: tuple[float, ...] = field(repr=False)
    held_out: tuple[tuple[int, float], ...] = ()
    stopped: str = "steps"


def distil(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int,
    held_out: Iterable[Any] | None = None,
    lr: float = 4e-4,
    loss: str | Distance = "hidden",
    patience: int = 3,
    evaluate_every: int | None = None,
    sampler: Any = None,
    embeddings: bool = False,
    seed: int = 0,
    progress: bool | Advance | None = None,
) -> Distillation:
    """Train `student` in place to answer as `teacher`: min over θ of mean loss(student_θ, teacher).

    AdamW without weight decay over every parameter of the student that requires a gradient
    (factors, biases, norms), embedding tables left out; the learning rate rises over the first
    tenth of the steps and falls along half a cosine to 0; gradients are clipped to norm 1. Both
    models run in eval mode (no dropout; BatchNorm keeps its statistics) and get their modes back.
    Parameters in bfloat16 and float16 are trained through float32 copies and stay in their dtype.

    Whatever ends the training early, an error or Ctrl-C too, leaves the best state so far in the
    student: the one with the lowest held-out loss, without `held_out` the one it came with.

    Memory: four float32 copies of the trained parameters at most (two of AdamW, the best state,
    and one for parameters in half precision), and the gradients.

    Args:
        student: factorised or not; runs at the active ranks it has.
        teacher: frozen; shares no trained parameter with the student.
        batches: tensors (model(x)), tuples (model(*t)) or dicts (model(**d)). A list is shuffled
            anew in every epoch, by `seed`; another iterable, such as a DataLoader, is read again
            in its own order; an iterator is read once and kept.
        steps: at most; one batch each.
        held_out: batches to judge by, before the first step and then every `evaluate_every`; the
            batches weigh alike.
        lr: the highest learning rate.
        loss: "hidden": relative squared error of the hidden states after every block, and 1 -
            cosine of the mean-pooled last ones (transformers models; for encoders). "logits":
            KL(teacher || student) of the predicted distributions (causal, seq2seq, classifiers;
            also a plain model's output). Or a function (student, teacher, batch) -> scalar.
        patience: evaluations in a row without a lower held-out loss, after which to stop.
        evaluate_every: steps; None means a tenth of `steps`.
        sampler: draws the student's ranks before every step (`step()`, `reset()`, as those of this
            package do), so that it learns to work at many; None leaves the ranks alone.
        embeddings: whether embedding tables, and heads tied to them, are trained, too.
        seed: of the order of the batches.
        progress: a function of (text, done, total), or whether to show a bar; None does so on a
            terminal.

    Returns:
        What happened.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a value out of range, no batch, nothing to train, a parameter that is the
            teacher's, too, or models that do not answer what `loss` compares.
        NonFiniteLoss: the loss or a gradient became NaN or infinite.
    """
    check_model(_FN, student)
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"{_FN}: teacher: expected an nn.Module, got {type(teacher).__name__}")
    check_int(_FN, "steps", steps, 1)
    check_int(_FN, "patience", patience, 1)
    every = max(steps // _EVALUATIONS, 1)
    if evaluate_every is not None:
        every = check_int(_FN, "evaluate_every", evaluate_every, 1)
    if not isinstance(lr, int | float) or not 0 < lr < math.inf:
        raise ValueError(f"{_FN}: lr: expected a finite number > 0, got {lr!r}")
    distance = _distance(loss)
    _check_sampler(sampler)
    endless = _endless(batches, seed)
    judged = None if held_out is None else _kept("held_out", held_out)
    trained = _trained(student, teacher, embeddings)
    state = Descent(trained, lr, steps)
    with ExitStack() as stack:
        stack.enter_context(_frozen(teacher))
        stack.enter_context(_evaluating(student))
        stack.enter_context(_evaluating(teacher))
        advance = stack.enter_context(progress_bar(progress, "distillation"))
        if sampler is not None:
            stack.callback(sampler.reset)
        return _run(
            _Loop(student, partial(distance, student, teacher), state, sampler, advance),
            endless,
            judged,
            steps=steps,
            every=every,
            patience=patience,
        )


@dataclass
class _Loop:
    student: nn.Module
    distance: Callable[[Any], Tensor]
    state: Descent
    sampler: Any
    advance: Advance

    def step(self, batch: Any, number: int) -> float:
        """Train on one batch; its loss before that."""
        if self.sampler is not None:
            self.sampler.step()
        loss = self.distance(batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(
                f"{_FN}: loss: expected a scalar tensor that depends on the student's trained "
                f"parameters, got {_described(loss)}"
            )
        value = check_loss(loss, self.student, number, partial(self.distance, batch))
        self.state.update(loss, number)
        return value

    @torch.no_grad()
    def judge(self, batches: Sequence[Any], number: int) -> float:
        """The mean loss over batches, at full rank where a sampler draws ranks."""
        if self.sampler is not None:
            self.sampler.reset()
        values = [
            check_loss(self.distance(b), self.student, number, partial(self.distance, b))
            for b in batches
        ]
        return sum(values) / len(values)


def _run(
    loop: _Loop,
    batches: Iterator[Any],
    judged: Sequence[Any] | None,
    *,
    steps: int,
    every: int,
    patience: int,
) -> Distillation:
    losses: list[float] = []
    found: list[tuple[int, float]] = []
    best_step, stopped = 0, "steps"
    try:
        if judged is not None:
            found.append((0, loop.judge(judged, 0)))
        for number in range(1, steps + 1):
            batch = next(batches, None)
            if batch is None:
                raise ValueError(
                    f"{_FN}: batches: expected batches in every epoch, got none after "
                    f"{number - 1} steps; give a list"
                )
            losses.append(loop.step(batch, number))
            text = f"distillation, loss {losses[-1]:.4g}"
            if judged is not None and (number % every == 0 or number == steps):
                lowest = min(value for _, value in found)
                found.append((number, loop.judge(judged, number)))
                if found[-1][1] < lowest:
                    loop.state.keep()
                    best_step = number
                text += f", held-out {found[-1][1]:.4g}"
            loop.advance(text, number, steps)
            if sum(at > best_step for at, _ in found) >= patience and number < steps:
                stopped = "patience"
                break
        if judged is None:
            loop.state.keep()
            best_step = number
    finally:
        loop.state.restore()
    return Distillation(len(losses), best_step, tuple(losses), tuple(found), stopped)


def _distance(loss: str | Distance) -> Distance:
    if callable(loss):
        return loss
    if loss not in DISTANCES:
        expected = ", ".join(repr(name) for name in DISTANCES)
        raise ValueError(
            f"{_FN}: loss: expected {expected} or a function (student, teacher, batch), "
            f"got {loss!r}"
        )
    return DISTANCES[loss]


def _check_sampler(sampler: Any) -> None:
    missing = [n for n in ("step", "reset") if not callable(getattr(sampler, n, None))]
    if sampler is not None and missing:
        raise TypeError(
            f"{_FN}: sampler: expected an object with step() and reset(), "
            f"got {type(sampler).__name__} without {missing[0]}"
        )


def _described(loss: Any) -> str:
    if not isinstance(loss, Tensor):
        return type(loss).__name__
    return f"shape {tuple(loss.shape)}, {'with' if loss.requires_grad else 'without'} a gradient"


def _kept(name: str, batches: Iterable[Any]) -> list[Any]:
    check_batches(_FN, name, batches)
    kept = list(batches)
    if not kept:
        raise ValueError(f"{_FN}: {name}: expected at least one batch, got none")
    return kept


def _endless(batches: Iterable[Any], seed: int) -> Iterator[Any]:
    """Batches without end: of a list in a new order in every epoch."""
    check_batches(_FN, "batches", batches)
    if isinstance(batches, Iterator):
        batches = list(batches)
    epochs = _shuffled(batches, seed) if isinstance(batches, Sequence) else _repeated(batches)
    endless = chain.from_iterable(epochs)
    first = next(endless, None)
    if first is None:
        raise ValueError(f"{_FN}: batches: expected at least one batch, got none")
    return chain([first], endless)


def _shuffled(batches: Sequence[Any], seed: int) -> Iterator[Iterator[Any]]:
    if not batches:
        return
    for epoch in count():
        order = random.Random(f"{seed}:{epoch}").sample(range(len(batches)), len(batches))
        yield (batches[i] for i in order)


def _repeated(batches: Iterable[Any]) -> Iterator[Iterator[Any]]:
    while True:
        epoch = iter(batches)
        first = next(epoch, None)
        if first is None:
            return
        yield chain([first], epoch)


def _trained(student: nn.Module, teacher: nn.Module, embeddings: bool) -> dict[str, nn.Parameter]:
    """The parameters to train by name.

    Raises:
        ValueError: there are none, or the teacher has one of them.
    """
    tables = {
        id(module.weight)
        for module in student.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and not embeddings
    }
    found = {
        name: p for name, p in student.named_parameters() if p.requires_grad and id(p) not in tables
    }
    if not found:
        raise ValueError(
            f"{_FN}: student: expected parameters that require a gradient, got none beside "
            "embedding tables"
        )
    theirs = {id(p) for p in teacher.parameters()}
    places = {(p.device, p.data_ptr()) for p in teacher.parameters() if p.numel()}
    for name, p in found.items():
        if id(p) in theirs or (p.numel() and (p.device, p.data_ptr()) in places):
            raise ValueError(
                f"{_FN}: teacher: expected parameters of its own, got one that is the student's "
                f"{name!r}, too; make the student with convert(..., inplace=False)"
            )
    return found


@contextmanager
def _frozen(teacher: nn.Module) -> Iterator[None]:
    wanted = [p for p in teacher.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
