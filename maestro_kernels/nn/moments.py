"""Second moments of the inputs that layers see on calibration batches."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestro_kernels.nn.conv import LoDConv

# Patches of this many images at a time: im2col multiplies their size by the kernel's.
_IMAGES = 8
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, LoDConv)


def run_batch(model: nn.Module, batch: Any, *, fn: str, argument: str = "batches") -> Any:
    """model(x) for a tensor, model(*batch) for a tuple or list, model(**batch) for a dict."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    raise TypeError(
        f"{fn}: {argument}: expected batches that are tensors, tuples or dicts, "
        f"got {type(batch).__name__}"
    )


def check_batches(fn: str, argument: str, batches: Any) -> None:
    """Raise TypeError unless `batches` is an iterable of batches rather than a batch."""
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{fn}: {argument}: expected an iterable of batches (tensors, tuples or dicts), "
            f"got {type(batches).__name__}"
        )


def input_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    fn: str,
    argument: str = "batches",
    idle: Collection[nn.Module] = (),
) -> dict[str, Tensor]:
    """Sum of x x^T over every input row x of each layer, float64 (groups, K, K).

    A convolution's rows are its patches, (C_in / groups * k_h * k_w) each, per group. The model
    runs in eval mode without gradients and is left as it was. Memory: 8 K^2 bytes per layer and
    group.

    Args:
        model: the dense model.
        layers: name -> a linear (or transposed linear) layer or convolution inside model, dense
            or factorised.
        batches: read once.
        fn: the public function that errors name.
        argument: its argument that holds the batches.
        idle: layers that may be left without a moment, when no row comes to them.

    Raises:
        TypeError: a batch is no tensor, tuple or dict.
        ValueError: there is no batch, a layer was never called, or an input is not finite.
    """
    gather = _Gather()
    count = 0
    with calibrating(model), gather.attached(layers):
        for batch in batches:
            run_batch(model, batch, fn=fn, argument=argument)
            gather.forget_input()
            count += 1
    if count == 0:
        raise ValueError(f"{fn}: {argument}: expected at least one batch, got none")
    for name, layer in layers.items():
        if name not in gather.moments:
            if layer in idle:
                continue
            raise ValueError(
                f"{fn}: {argument}: expected batches that reach every layer to convert, got none "
                f"for {name!r}; exclude it or add batches"
            )
        if not bool(gather.moments[name].isfinite().all()):
            raise ValueError(
                f"{fn}: {argument}: expected finite inputs in every layer, got NaN or infinity in "
                f"the input of {name!r}"
            )
    return gather.moments


class _Gather:
    """Forward hooks that add up moments, computing them once for siblings that read one tensor."""

    def __init__(self) -> None:
        self.moments: dict[str, Tensor] = {}
        self._last: tuple[Tensor, int, Tensor] | None = None

    @contextmanager
    def attached(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        handles = [
            layer.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name, layer in layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forget_input(self) -> None:
        self._last = None

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if isinstance(module, _CONVOLUTIONS):
                moment = _patches_moment(module, x)
            else:
                moment = self._rows(x)
            if name in self.moments:
                self.moments[name] += moment
            else:
                self.moments[name] = moment.clone()

        return add

    def _rows(self, x: Tensor) -> Tensor:
        # Held by reference, so the id cannot be reused; the version tells of writes in between.
        version = -1 if x.is_inference() else x._version
        if self._last is not None and self._last[0] is x and self._last[1] == version >= 0:
            return self._last[2]
        rows = x.detach().reshape(-1, x.shape[-1]).double()
        moment = (rows.mT @ rows)[None]
        self._last = (x, version, moment)
        return moment


def _patches_moment(conv: Any, x: Tensor) -> Tensor:
    """(groups, K, K) of the patches that the convolution multiplies its kernel with."""
    dims = len(conv.kernel_size)
    x = x.detach() if x.dim() == dims + 2 else x.detach()[None]
    kernel, dilation, stride = (
        (1,) * (2 - dims) + tuple(sizes) for sizes in (conv.kernel_size, conv.dilation, conv.stride)
    )
    total: Tensor | None = None
    for part in x.split(_IMAGES):
        image = _padded(conv, part)
        image = image if dims == 2 else image[:, :, None]
        patches = F.unfold(image, kernel, dilation, 0, stride)
        rows = patches.double().unflatten(1, (conv.groups, -1)).permute(1, 2, 0, 3).flatten(2)
        moment = rows @ rows.mT
        total = moment if total is None else total + moment
    assert total is not None
    return total


def _padded(conv: Any, x: Tensor) -> Tensor:
    if isinstance(conv, LoDConv):
        return conv.padded(x)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    # The library's own description of its border: the order F.pad wants.
    return F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; every module's own mode comes back, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        for module, training in modes:
            module.training = training


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; see `evaluating`."""
    with evaluating(model), torch.no_grad():
        yield
