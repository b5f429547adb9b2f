"""Steps down a gradient: AdamW with warm-up, clipping, float32 copies, and the best state kept."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from maestro_kernels.training.loop import NonFiniteLoss

# Share of the steps in which the learning rate rises.
_WARM_UP = 0.1
_CLIP = 1.0
_HALF = (torch.float16, torch.bfloat16)


class Descent:
    """AdamW on some parameters, in float32 whatever their dtype, and the best state so far.

    Args:
        trained: by name; parameters in half precision get float32 copies that are stepped instead.
        lr: the highest learning rate, after a tenth of the steps.
        steps: in all; the learning rate is 0 after the last.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], lr: float, steps: int) -> None:
        self.trained = trained
        self.masters = {
            name: p.detach().float() if p.dtype in _HALF else p for name, p in trained.items()
        }
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=lr, weight_decay=0.0)
        warm = max(math.ceil(_WARM_UP * steps), 1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda k: min((k + 1) / warm, 1.0) * (1 + math.cos(math.pi * k / steps)) / 2,
        )
        # Gradients in float16 underflow without a scale.
        first = next(iter(trained.values()))
        is_float16 = any(p.dtype is torch.float16 for p in trained.values())
        self.scaler = torch.amp.GradScaler(first.device.type, enabled=is_float16)
        self.keep()

    def keep(self) -> None:
        """Take the present state for the best."""
        self.best = {name: p.detach().clone() for name, p in self.masters.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best state into the model."""
        for name, p in self.trained.items():
            p.copy_(self.best[name])
            p.grad = None

    def update(self, loss: Tensor, step: int) -> None:
        """One step down the gradient of the loss."""
        self.scaler.scale(loss).backward()
        for name, p in self.trained.items():
            master = self.masters[name]
            if master is not p:
                master.grad = None if p.grad is None else p.grad.float()
                p.grad = None
        self.scaler.unscale_(self.optimizer)
        gradients = {n: p.grad for n, p in self.masters.items() if p.grad is not None}
        norm = nn.utils.get_total_norm(gradients.values())
        # With a scale, an overflow is ordinary: the scaler leaves such a step out.
        if not self.scaler.is_enabled() and not bool(norm.isfinite()):
            name = next(n for n, g in gradients.items() if not bool(g.isfinite().all()))
            raise NonFiniteLoss(
                f"training: gradient: expected finite values, got another at step {step}; "
                f"first non-finite: {name!r}"
            )
        nn.utils.clip_grads_with_norm_(self.masters.values(), _CLIP, norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:
            self.schedule.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, p in self.trained.items():
                if self.masters[name] is not p:
                    p.copy_(self.masters[name])
