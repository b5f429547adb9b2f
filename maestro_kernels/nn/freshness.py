"""Whether what was made of a layer, packed copies or waiting outputs, is still what it would be.

The factors may have become other tensors, lie elsewhere or have another version, or something may
have happened that torch does not count as a version: train(), load_state_dict, truncate, or a step
of any optimizer (fused ones write without telling). Values written through `.data`, or in place to
an inference tensor, are not noticed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from maestro_kernels.nn.linear import LoDLinear

__all__ = ["Made", "version", "watch_optimizers"]

_steps = 0
_hooked = False


def watch_optimizers() -> None:
    """Count the steps of all optimizers from now on."""
    global _hooked
    if not _hooked:
        register_optimizer_step_post_hook(_count_step)
        _hooked = True


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


def version(tensor: Tensor) -> int:
    """How often a tensor was written to, -1 where that is not counted."""
    return -1 if tensor.is_inference() else tensor._version


class Made:
    """One layer as it was when something was made of it: its tensors, and all that may change them.

    Compared on every call, mostly from cold caches: few objects, and attributes of modules looked
    up where nn.Module keeps them.
    """

    __slots__ = (
        "_bias_version",
        "_counted",
        "_others",
        "_u_address",
        "_u_version",
        "_v_address",
        "_v_version",
        "bias",
        "u",
        "v",
    )

    def __init__(self, layer: LoDLinear, u: Tensor, v: Tensor) -> None:
        self.u, self.v, self.bias = u, v, layer._parameters["bias"]
        self._u_address, self._v_address = u.data_ptr(), v.data_ptr()
        # An inference tensor counts no versions.
        self._counted = not any(t is not None and t.is_inference() for t in (u, v, self.bias))
        self._u_version, self._v_version, self._bias_version = self._versions()
        self._others = (layer._rank, layer._epoch, _steps, layer.activation)

    def same(self, layer: LoDLinear) -> bool:
        """Whether the layer would give the output of then: nothing that it depends on changed."""
        u, v, bias, tensors = self.u, self.v, self.bias, layer._parameters
        # Every call of every layer comes by here, so nothing is shared with `again`.
        return (
            tensors.get("u") is u
            and tensors.get("v") is v
            and tensors.get("bias", self) is bias
            and u.data_ptr() == self._u_address
            and v.data_ptr() == self._v_address
            and (
                u._version == self._u_version
                and v._version == self._v_version
                and (bias is None or bias._version == self._bias_version)
                if self._counted
                else self._versions() == (self._u_version, self._v_version, self._bias_version)
            )
            and (layer._rank, layer._epoch, _steps, layer.activation) == self._others
            and layer.backend is None
        )

    def again(self, layer: LoDLinear) -> Made | None:
        """What differs from this in no more than the bias, or None."""
        tensors = layer._parameters
        if tensors.get("u") is not self.u or tensors.get("v") is not self.v:
            return None
        if "bias" not in tensors:
            return None
        now = Made(layer, self.u, self.v)
        then = (self._u_address, self._v_address, self._u_version, self._v_version, self._others)
        found = (now._u_address, now._v_address, now._u_version, now._v_version, now._others)
        return now if found == then and layer.backend is None else None

    def _versions(self) -> tuple[int, int, int]:
        return version(self.u), version(self.v), -1 if self.bias is None else version(self.bias)
