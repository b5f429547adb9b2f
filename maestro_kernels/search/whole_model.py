"""What is measured rather than predicted: output error, latency, and changes undone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from maestro_kernels.measure.heap import keeping_memory
from maestro_kernels.measure.timing import interleave, launch_modes
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.nn.moments import calibrating, check_batches, run_batch
from maestro_kernels.search.layers import first_tensor

LossFn = Callable[[nn.Module, Any], Any]


class OutputError:
    """loss_fn(model, batch) = ||f(batch) - f0(batch)||^2 / ||f0(batch)||^2, f0 the model given.

    f is the first floating-point tensor of the model's output. Batches are known by identity, so
    it serves exactly the batches it was made with.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], *, fn: str) -> None:
        self._fn = fn
        self._batches = list(batches)
        with calibrating(model):
            outputs = [self._output(model, batch) for batch in self._batches]
        self._reference = {id(b): y for b, y in zip(self._batches, outputs, strict=True)}

    def __call__(self, model: nn.Module, batch: Any) -> float:
        """The relative squared error of one batch."""
        reference = self._reference[id(batch)]
        difference = self._output(model, batch) - reference
        energy = float(reference.square().sum())
        return float(difference.square().sum()) / (energy or 1.0)

    def _output(self, model: nn.Module, batch: Any) -> Tensor:
        try:
            return first_tensor(run_batch(model, batch, fn=self._fn, argument="batches")).double()
        except TypeError as error:
            raise TypeError(f"{self._fn}: model: {error}") from None


class MeanLoss:
    """Mean over batches of loss_fn(model, batch).

    Args:
        model: None compares with its outputs as they are now.
        batches: tensors, tuples or dicts; at least one.
        loss_fn: (model, batch) -> scalar; None is `OutputError`.
        fn: the public function that errors name.

    Attributes:
        run: run(model, batch), a pass that reaches every layer the loss depends on.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], loss_fn: LossFn | None, *, fn: str
    ) -> None:
        self._batches, self._fn = batches, fn
        self._one: LossFn
        self.run: LossFn
        if loss_fn is None:
            self._one = OutputError(model, batches, fn=fn)
            self.run = partial(run_batch, fn=fn, argument="batches")
        else:
            self._one = self.run = loss_fn

    def __call__(self, model: nn.Module) -> float:
        """Of a model in the mode it is in.

        Raises:
            ValueError: the loss is no scalar.
        """
        return sum(self._scalar(self._one(model, batch)) for batch in self._batches) / len(
            self._batches
        )

    def _scalar(self, loss: Any) -> float:
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(
                f"{self._fn}: loss_fn: expected a scalar, got shape {tuple(loss.shape)}"
            )
        return float(loss)


def check_measured(fn: str, batches: Any, loss_fn: Any) -> list[Any]:
    """The batches that a loss is measured on, at least one.

    Raises:
        TypeError: batches is no iterable of batches, or loss_fn no function.
        ValueError: there is no batch.
    """
    check_batches(fn, "batches", batches)
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"{fn}: loss_fn: expected a function, got {type(loss_fn).__name__}")
    data = list(batches)
    if not data:
        raise ValueError(f"{fn}: batches: expected at least one batch, got none")
    return data


def output_error(model: nn.Module, reference: nn.Module, batches: Iterable[Any]) -> float:
    """Mean over batches of ||f(batch) - f0(batch)||^2 / ||f0(batch)||^2.

    Args:
        model: f; its first floating-point output counts.
        reference: f0.
        batches: tensors, tuples or dicts.

    Raises:
        TypeError: batches is no iterable of batches, or an output holds no tensor.
        ValueError: there is no batch.
    """
    data = check_measured("output_error", batches, None)
    loss = MeanLoss(reference, data, None, fn="output_error")
    with calibrating(model):
        return loss(model)


@dataclass(frozen=True)
class Measurement:
    """Latency of a whole model on one batch.

    Attributes:
        ms: median milliseconds of a forward pass.
        p20: 20th percentile.
        p80: 80th percentile.
    """

    ms: float
    p20: float
    p80: float


def measure_models(
    models: Mapping[str, nn.Module],
    batch: Any,
    *,
    seconds: float = 4.0,
    run: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, Measurement]:
    """Time the forward passes of several models on one batch in turns, in eval mode.

    A busy machine is then busy for all of them. Memory that a pass frees stays in the process
    meanwhile, as with MALLOC_TRIM_THRESHOLD_: what giving it back costs depends on the process's
    history.

    Args:
        models: name -> model, on the CPU or a GPU.
        batch: a tensor (model(x)), tuple (model(*t)) or dict (model(**d)).
        seconds: for all models together; at least six passes each.
        run: run(model, batch) in place of these calls.

    Raises:
        TypeError: batch is none of those.
    """
    call = partial(run_batch, fn="measure_models", argument="batch") if run is None else run
    with ExitStack() as stack:
        stack.enter_context(keeping_memory())
        for model in models.values():
            stack.enter_context(calibrating(model))
        calls = {name: partial(call, model, batch) for name, model in models.items()}
        on_gpu = any(p.is_cuda for model in models.values() for p in model.parameters())
        clock = launch_modes("cuda" if on_gpu else "cpu")["eager"]
        found = interleave(calls, seconds=seconds, clock=clock)
    return {n: Measurement(s.p50 * 1e3, s.p20 * 1e3, s.p80 * 1e3) for n, s in found.items()}


def present(model: nn.Module, names: Iterable[str]) -> dict[str, int | str]:
    """What the named layers run at now: a rank, or "dense"."""
    modules = dict(model.named_modules())
    return {n: m.rank if isinstance(m := modules[n], LoDLayer) else "dense" for n in names}
