"""Running statistics of BatchNorm layers, made again for a model whose layers have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from maestro_kernels.arguments import check_model
from maestro_kernels.nn.moments import calibrating, check_batches, run_batch

Run = Callable[[nn.Module, Any], Any]


def recalibrate_batchnorm(
    model: nn.Module, batches: Iterable[Any], *, run: Run | None = None
) -> nn.Module:
    """Replace running means and variances by their averages over `batches`.

    Layers at another rank produce other statistics, so those of the model they were cut from do not
    fit. Everything but BatchNorm runs in eval mode; afterwards every module's mode and momentum are
    as before. A model without running statistics comes back untouched, its batches unread.

    Args:
        model: changed in place.
        batches: tensors (model(x)), tuples (model(*t)) or dicts (model(**d)), read once. Averages
            weigh batches alike, so they should be of one size.
        run: run(model, batch) instead of the call above, for batches that hold more than inputs.

    Returns:
        The model.

    Raises:
        TypeError: model is no module, or batches no iterable of batches.
        ValueError: there is no batch, a layer was never called or met values that are not finite;
            the statistics are then as they were.

    Source: Maestro's training code does so before each evaluation, for the full model only.
    """
    fn = "recalibrate_batchnorm"
    check_model(fn, model)
    check_batches(fn, "batches", batches)
    layers = {n: m for n, m in model.named_modules() if _is_tracking(m)}
    if not layers:
        return model
    before = {name: _statistics(layer) for name, layer in layers.items()}
    try:
        _measure(fn, model, layers, batches, run)
    except Exception:
        for name, layer in layers.items():
            for buffer, value in before[name].items():
                getattr(layer, buffer).copy_(value)
        raise
    return model


def _measure(
    fn: str,
    model: nn.Module,
    layers: dict[str, _BatchNorm],
    batches: Iterable[Any],
    run: Run | None,
) -> None:
    momenta = {name: layer.momentum for name, layer in layers.items()}
    count = 0
    try:
        with calibrating(model):
            for layer in layers.values():
                layer.reset_running_stats()
                # None makes the running values cumulative averages.
                layer.momentum = None
                layer.training = True
            for batch in batches:
                run_batch(model, batch, fn=fn, argument="batches") if run is None else run(
                    model, batch
                )
                count += 1
    finally:
        for name, layer in layers.items():
            layer.momentum = momenta[name]
    if count == 0:
        raise ValueError(f"{fn}: batches: expected at least one batch, got none")
    for name, layer in layers.items():
        assert layer.num_batches_tracked is not None
        assert layer.running_mean is not None
        assert layer.running_var is not None
        if int(layer.num_batches_tracked) == 0:
            raise ValueError(f"{fn}: batches: expected batches that reach {name!r}, got none")
        if not bool((layer.running_mean + layer.running_var).isfinite().all()):
            raise ValueError(f"{fn}: batches: expected finite inputs of {name!r}, got others")


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch at hand, as if recalibrated on it; nothing is updated."""
    layers: list[Any] = [m for m in model.modules() if _is_tracking(m)]
    modes = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training, layer.track_running_stats = True, False
        yield
    finally:
        for layer, training in zip(layers, modes, strict=True):
            layer.training, layer.track_running_stats = training, True


def _is_tracking(module: nn.Module) -> bool:
    return (
        isinstance(module, _BatchNorm)
        and module.track_running_stats
        and module.running_mean is not None
    )


def _statistics(layer: _BatchNorm) -> dict[str, Any]:
    return {name: value.clone() for name, value in layer.named_buffers(recurse=False)}
