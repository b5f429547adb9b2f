"""LoD training in Lightning: one callback, for `lightning` and for `pytorch_lightning`.

Importing this module imports the one that is loaded already, or else the one that is installed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from maestro_kernels.training.callbacks import Callback, packed, unpacked
from maestro_kernels.training.layers import require_layers
from maestro_kernels.training.loop import Maestro, check_loss
from maestro_kernels.training.resize import resize_on_load

__all__ = ["MaestroCallback"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callback_class() -> Any:
    for name in sorted(_PACKAGES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name).Callback
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    raise NotImplementedError(
        "maestro_kernels.training.lightning: expected the package lightning or pytorch_lightning, "
        "got neither; pip install lightning"
    )


if TYPE_CHECKING:
    _Callback = object
else:
    _Callback = _callback_class()


class MaestroCallback(Callback, _Callback):
    """Rank sampling, penalty and shrinking inside a Lightning Trainer.

        class Module(LightningModule):
            def __init__(self):
                self.model = mk.convert(dense, allow_larger=True)
        Trainer(callbacks=[MaestroCallback(lam=1e-3)]).fit(Module(), loader)

    Ranks are drawn before each batch and are full again after it; the penalty's gradient is added
    once per optimizer step, before Lightning clips; layers shrink at the end of every training
    epoch, before epoch-end checkpoints. `fit(ckpt_path=...)` goes on with the shrunken layers; the
    module is built as before.

    The loss is checked every `log_every_n_steps` batches and the parameters before every checkpoint
    is written, so that NaN never replaces a good one.

    Args:
        options: as `training.Maestro` takes them: lam, threshold, sampler, penalty, ...

    Attributes:
        maestro: the `training.Maestro` of the run, None before it starts.

    Raises:
        TypeError: an unknown option.
        ValueError: at the start, a module without LoD layers or with more than one optimizer; at
            the first shrinking, a strategy that wraps the model (use shrink_every=0 and
            `training.rewrap`).
        NotImplementedError: manual optimization, which calls `optimizer.step` itself: use
            `training.Maestro` there.
    """

    _first_event = "on_train_start"
    _pending: dict[str, Any] | None = None
    _handle: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let the module load checkpoints of shrunken layers."""
        require_layers("MaestroCallback", pl_module)
        if self._handle is None:
            self._handle = resize_on_load(pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hook off the module."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the optimizer; on resume, take up the checkpoint's state."""
        fn = "MaestroCallback"
        if not pl_module.automatic_optimization:
            raise NotImplementedError(
                f"{fn}: pl_module: expected automatic optimization, got manual; "
                "use training.Maestro in training_step"
            )
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"{fn}: trainer: expected one optimizer, got {len(trainer.optimizers)}"
            )
        # Lightning steps with a closure, so the gradient is added in on_before_optimizer_step.
        self.maestro = Maestro(pl_module, trainer.optimizers[0], attach=False, **self.options)
        if self._pending is not None:
            self.maestro.load_state_dict(unpacked(self._pending))
            self._pending = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Freeze whose turn it is."""
        self._running().epoch_begin()

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the ranks of this batch."""
        self._running().step_begin()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Add the gradient of the penalty."""
        self._running().add_penalty_gradient()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Full rank again; look at the loss now and then."""
        maestro = self._running()
        maestro.step_end()
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and maestro.steps % max(trainer.log_every_n_steps, 1) == 0:
            check_loss(loss, pl_module, maestro.steps)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Shrink."""
        self._running().epoch_end()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the model at full rank and nothing frozen."""
        self._running().close()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse to write a checkpoint that is not finite."""
        steps = 0 if self.maestro is None else self.maestro.steps
        self._check_finite(pl_module, steps, "the last checkpoint is from before")

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps."""
        return {} if self.maestro is None else {"maestro": packed(self.maestro.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until there is an optimizer."""
        self._pending = state_dict.get("maestro")
