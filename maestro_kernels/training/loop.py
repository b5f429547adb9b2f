"""Maestro in a plain PyTorch loop: rank sampling, penalty, shrinking and freezing in two lines.

Lightning, Hugging Face and the command line drive the same object through the same four calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from maestro_kernels.arguments import check_int
from maestro_kernels.training.freezing import SequentialFreezing
from maestro_kernels.training.layers import require_layers
from maestro_kernels.training.optimizer_state import bare_optimizer
from maestro_kernels.training.penalties import (
    funnel,
    funnel_start,
    group_lasso,
    hierarchical_group_lasso,
)
from maestro_kernels.training.samplers import (
    FixedSampler,
    FullSampler,
    IndependentSampler,
    SinglePairSampler,
)
from maestro_kernels.training.shrinking import Report, shrink

T = TypeVar("T")

PENALTIES = ("hierarchical", "group", "funnel")
SAMPLERS = ("single", "independent", "fixed", "full")


class NonFiniteLoss(FloatingPointError):
    """The loss or a parameter became NaN or infinite; the message names the step and the layer."""


class Maestro:
    """Train a factorised model with LoD: sampled ranks, a penalty on late ranks, shrinking.

    Two lines in a loop of your own, the construction and `epoch` around the batches:

        maestro = training.Maestro(model, optimizer, lam=1e-3)
        for x, y in maestro.epoch(loader):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

    Before each batch the sampler writes the active ranks. Just before each `optimizer.step()` the
    gradient of lam * penalty is added to the factors' gradients, so the loss in the loop stays the
    task's own and gradient accumulation counts the penalty once. After the last batch every layer
    runs at full rank again and components whose importance fell below the threshold are dropped
    from the parameters, their gradients and the optimizer's state.

    Clipping the gradient before `optimizer.step()` leaves the penalty out; an `optimizer.step` with
    a closure raises (use `attach=False` and `add_penalty_gradient` inside the closure).

    Args:
        model: holds LoDLinear or LoDConv2d layers, `convert(model, allow_larger=True)`.
        optimizer: over the model's parameters, made after the conversion; also as accelerate's
            `prepare` returns it.
        lam: weight of the penalty, >= 0.
        threshold: components b with importance(b) below it are dropped.
        sampler: "single" (one (layer, rank) pair a step, the paper's), "independent", "fixed",
            "full", or an object with step(), reset(), state_dict() and load_state_dict().
        penalty: "hierarchical", "group" or "funnel".
        shrink_every: epochs between shrinking, 0 for never.
        multiple_of: ranks stored are rounded up to this multiple.
        freeze_period: epochs after which the frozen factor changes, 0 trains both.
        fraction: of the rank, for "fixed".
        seed: of the sampler; the same on every data-parallel process.
        attach: whether `optimizer.step` adds the penalty's gradient by itself.

    Attributes:
        epochs: finished epochs.
        steps: finished steps.
        last_penalty: lam * penalty at the last optimizer step, detached, or None.
        last_shrink: {layer: (old rank, new rank)} of the last shrinking, unchanged layers left out.

    Raises:
        TypeError: model or optimizer is of another kind.
        ValueError: no factorised layers, a value out of range, an unknown name.

    Source:
        Horvath et al., Maestro, ICML 2024 (arXiv 2308.14929).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        lam: float = 0.0,
        threshold: float = 1e-5,
        sampler: Any = "single",
        penalty: str = "hierarchical",
        shrink_every: int = 1,
        multiple_of: int = 1,
        freeze_period: int = 0,
        fraction: float = 0.5,
        seed: int = 0,
        attach: bool = True,
    ) -> None:
        fn = "Maestro"
        require_layers(fn, model)
        # Hooks belong on the optimizer that steps.
        optimizer = bare_optimizer(optimizer)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"{fn}: optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if penalty not in PENALTIES:
            raise ValueError(f"{fn}: penalty: expected one of {PENALTIES}, got {penalty!r}")
        for name, value in (("lam", lam), ("threshold", threshold)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{fn}: {name}: expected a finite number >= 0, got {value}")
        self.model, self.optimizer = model, optimizer
        self.lam, self.threshold = float(lam), float(threshold)
        self.shrink_every = check_int(fn, "shrink_every", shrink_every, 0)
        self.multiple_of = check_int(fn, "multiple_of", multiple_of, 1)
        self.sampler = _sampler(fn, model, sampler, fraction, seed)
        period = check_int(fn, "freeze_period", freeze_period, 0)
        self.freezer = SequentialFreezing(model, period=period) if period else None
        self.epochs = self.steps = 0
        self.last_penalty: Tensor | None = None
        self.last_shrink: Report = {}
        self._penalty = penalty
        self._start = funnel_start(model) if penalty == "funnel" else None
        self._hook = optimizer.register_step_pre_hook(self._before_step) if attach else None

    def epoch(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches of one epoch, with ranks drawn before each; shrink after the last.

        Leaving the loop early puts every layer back to full rank and does not count the epoch.
        """
        self.epoch_begin()
        try:
            for batch in batches:
                self.step_begin()
                yield batch
                self.steps += 1
        finally:
            self.sampler.reset()
        self.epoch_end()

    def epoch_begin(self) -> None:
        """Freeze the factor whose turn it is, where freezing is on."""
        if self.freezer is not None:
            self.freezer.epoch(self.epochs)

    def step_begin(self) -> None:
        """Write the active ranks of this step into the layers."""
        self.sampler.step()

    def step_end(self) -> None:
        """Count the step and put every layer back to full rank."""
        self.sampler.reset()
        self.steps += 1

    def epoch_end(self) -> Report:
        """Count the epoch and shrink, where it is time to.

        Returns:
            {layer: (old rank, new rank)} of the layers that changed.

        Raises:
            NonFiniteLoss: a parameter or buffer is NaN or infinite; nothing is shrunk.
            ValueError: as `shrink` does.
        """
        where = first_non_finite(self.model)
        if where is not None:
            raise NonFiniteLoss(
                f"training: model: expected finite values after step {self.steps}, "
                f"got a non-finite {where}"
            )
        self.epochs += 1
        self.last_shrink = {}
        if self.shrink_every and self.epochs % self.shrink_every == 0:
            report = shrink(
                self.model, self.optimizer, threshold=self.threshold, multiple_of=self.multiple_of
            )
            self.last_shrink = {n: pair for n, pair in report.items() if pair[0] != pair[1]}
        return self.last_shrink

    def add_penalty_gradient(self) -> Tensor | None:
        """Add the gradient of lam * penalty to `.grad` of the factors; returns the value.

        `optimizer.step` does this by itself unless attach=False. Hooks of DDP do not see it: the
        penalty depends on parameters alone, so its gradient is equal on all processes.
        """
        factors = [
            p
            for layer in require_layers("Maestro", self.model).values()
            for p in (layer.u, layer.v)
            if p.requires_grad
        ]
        if self.lam == 0 or not factors:
            return None
        with torch.enable_grad():
            value = self.lam * self.penalty()
            gradients = torch.autograd.grad(value, factors, allow_unused=True)
        # A fused optimizer under GradScaler divides by this scale itself, inside step().
        scale = getattr(self.optimizer, "grad_scale", None)
        for factor, gradient in zip(factors, gradients, strict=True):
            if gradient is None:
                continue
            if scale is not None:
                gradient = gradient * scale
            if factor.grad is None:
                factor.grad = gradient
            else:
                factor.grad.add_(gradient)
        self.last_penalty = value.detach()
        return self.last_penalty

    def penalty(self) -> Tensor:
        """The penalty without lam, differentiable: for those who put it into a loss themselves."""
        if self._start is not None:
            return funnel(self.model, self._start)
        if self._penalty == "group":
            return group_lasso(self.model)
        return hierarchical_group_lasso(self.model)

    def close(self) -> None:
        """Full rank everywhere, nothing frozen, and no hook left on the optimizer."""
        self.sampler.reset()
        if self.freezer is not None:
            self.freezer.reset()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def state_dict(self) -> dict[str, Any]:
        """Sampler, epochs, steps and where the funnel penalty started; the model holds the rest."""
        return {
            "sampler": self.sampler.state_dict(),
            "epochs": self.epochs,
            "steps": self.steps,
            "funnel_start": self._start,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; load the model first (`load_shrunken`).

        Raises:
            ValueError: the state has other entries, or belongs to another sampler or model.
        """
        self._check_state("Maestro.load_state_dict", state)
        self.sampler.load_state_dict(state["sampler"])
        self.epochs, self.steps = int(state["epochs"]), int(state["steps"])
        self._start = state["funnel_start"]
        self.epoch_begin()

    def _check_state(self, fn: str, state: Mapping[str, Any]) -> None:
        """Raise ValueError, in the name of `fn`, unless `state` is of a Maestro like this one."""
        mine = self.state_dict()
        if set(state) != set(mine):
            raise ValueError(f"{fn}: state: expected {sorted(mine)}, got {sorted(state)}")
        if (state["funnel_start"] is None) != (self._start is None):
            raise ValueError(
                f"{fn}: state: expected one of the penalty {self._penalty!r}, got another's"
            )
        kind, theirs = (s["sampler"].get("kind") for s in (mine, state))
        if kind != theirs:
            raise ValueError(f"{fn}: state: expected one of the sampler {kind!r}, got {theirs!r}")

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        # torch hands the optimizer itself over as the first argument.
        given = [*(arg for arg in args if arg is not optimizer), kwargs.get("closure")]
        if any(arg is not None for arg in given):
            # The closure clears and computes the gradients afterwards: ours would be lost.
            raise NotImplementedError(
                "Maestro: optimizer.step: expected no closure, got one; make Maestro with "
                "attach=False and call add_penalty_gradient() at the end of the closure"
            )
        self.add_penalty_gradient()


def _sampler(fn: str, model: nn.Module, sampler: Any, fraction: float, seed: int) -> Any:
    if not isinstance(sampler, str):
        missing = [
            name
            for name in ("step", "reset", "state_dict", "load_state_dict")
            if not callable(getattr(sampler, name, None))
        ]
        if missing:
            raise TypeError(
                f"{fn}: sampler: expected one of {SAMPLERS} or an object with step, reset, "
                f"state_dict and load_state_dict, got {type(sampler).__name__} without {missing[0]}"
            )
        return sampler
    if sampler == "single":
        return SinglePairSampler(model, seed=seed)
    if sampler == "independent":
        return IndependentSampler(model, seed=seed)
    if sampler == "fixed":
        return FixedSampler(model, fraction, seed=seed)
    if sampler == "full":
        return FullSampler(model, seed=seed)
    raise ValueError(f"{fn}: sampler: expected one of {SAMPLERS}, got {sampler!r}")


def check_loss(
    loss: Tensor, model: nn.Module, step: int, rerun: Callable[[], Any] | None = None
) -> float:
    """The loss as a number; one wait for the device.

    Args:
        loss: scalar.
        model: searched for the culprit.
        step: named in the message.
        rerun: repeats the forward pass, to find the first layer whose output is not finite.

    Raises:
        NonFiniteLoss: the loss is NaN or infinite.
    """
    value = float(loss.detach())
    if value - value == 0:
        return value
    where = first_non_finite(model, rerun) or "no parameter and no layer's output: the loss itself"
    raise NonFiniteLoss(
        f"training: loss: expected a finite value, got {value} at step {step}; "
        f"first non-finite: {where}"
    )


def first_non_finite(model: nn.Module, rerun: Callable[[], Any] | None = None) -> str | None:
    """Where a model first holds or produces NaN or infinity, in words; None where it does not.

    Args:
        model: any module.
        rerun: repeats the forward pass; without it only parameters and buffers are looked at.
    """
    for kind, tensors in (
        ("parameter", model.named_parameters()),
        ("buffer", model.named_buffers()),
    ):
        for name, tensor in tensors:
            if not bool(tensor.detach().isfinite().all()):
                return f"{kind} {name!r}"
    return None if rerun is None else _first_output(model, rerun)


def _first_output(model: nn.Module, rerun: Callable[[], Any]) -> str | None:
    """The first leaf module, in the order of the calls, with a non-finite input or output."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not found and not _finite(inputs):
                found.append(f"input of layer {name!r}")
            if not found and not _finite(output):
                found.append(f"output of layer {name!r}")

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if not any(m.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            rerun()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.detach().isfinite().all())
    if isinstance(value, tuple | list):
        return all(map(_finite, value))
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return True
