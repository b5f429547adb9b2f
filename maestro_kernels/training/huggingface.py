"""LoD training in Hugging Face's Trainer: one callback.

Importing this module imports transformers; nothing else of maestro_kernels does so for training.
"""

from __future__ import annotations

import json
from typing import Any

from maestro_kernels.training.callbacks import Callback, packed, unpacked
from maestro_kernels.training.layers import require_layers
from maestro_kernels.training.loop import Maestro
from maestro_kernels.training.resize import resize_on_load

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
except ModuleNotFoundError as error:
    raise NotImplementedError(
        "maestro_kernels.training.huggingface: expected the package transformers, got none; "
        "pip install transformers accelerate"
    ) from error

__all__ = ["MaestroCallback"]


class MaestroCallback(Callback, TrainerCallback, ExportableState):
    """Rank sampling, penalty and shrinking inside `transformers.Trainer`.

        model = mk.convert(model, allow_larger=True)
        trainer = Trainer(model, args, train_dataset=data, callbacks=[MaestroCallback(lam=1e-3)])

    Ranks are drawn before each update (all micro-batches of it share them), the penalty's gradient
    is added inside `optimizer.step()`, after the Trainer's clipping, and layers shrink at the end
    of every epoch. Evaluation and checkpoints always see full ranks. A run resumed by
    `trainer.train(resume_from_checkpoint=...)` goes on with the shrunken layers; the model given to
    the new Trainer is converted as before and at any rank.

    Parameters are checked for NaN and infinity before every checkpoint and every log: the Trainer
    stops, and the last good checkpoint is still the last. (The Trainer hides a NaN loss from its
    log unless logging_nan_inf_filter=False.)

    Args:
        options: as `training.Maestro` takes them: lam, threshold, sampler, penalty, ...

    Attributes:
        maestro: the `training.Maestro` of the run, None before it starts.

    Raises:
        TypeError: an unknown option.
        ValueError: on construction of the Trainer, a model without LoD layers; at the first
            shrinking, a model wrapped by DDP or FSDP (use shrink_every=0 and `training.rewrap`).
    """

    _first_event = "on_train_begin"
    _sees_loads: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the model early, and let it load checkpoints of shrunken layers."""
        require_layers("MaestroCallback", kwargs["model"])
        self._sees_loads = resize_on_load(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the optimizer; on resume, take up what the checkpoint says."""
        self.maestro = Maestro(kwargs["model"], kwargs["optimizer"], **self.options)
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if isinstance(saved, list):
            saved = saved[-1]
        text = saved["attributes"]["maestro"] if saved else None
        if text and state.global_step > 0:
            self.maestro.load_state_dict(unpacked(json.loads(text)))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Freeze whose turn it is; first finish an epoch whose last step wrote the checkpoint."""
        maestro = self._running()
        while maestro.epochs < int(state.epoch or 0):
            maestro.epoch_end()
        maestro.epoch_begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the ranks of this update."""
        self._running().step_begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Full rank again; refuse to save or log a model that is not finite."""
        self._running().step_end()
        if control.should_save or control.should_log:
            kept = "no checkpoint was written since it was finite"
            self._check_finite(kwargs["model"], state.global_step, kept)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shrink."""
        self._running().epoch_end()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model at full rank and the optimizer without our hook."""
        self._running().close()

    def state(self) -> dict[str, Any]:
        """What the Trainer keeps in trainer_state.json."""
        if self.maestro is None:
            return {"args": {}, "attributes": {"maestro": None}}
        # As text, because the Trainer sorts keys, and the order of layers means something.
        text = json.dumps(packed(self.maestro.state_dict()))
        return {"args": {}, "attributes": {"maestro": text}}
