"""Whether what was made of a layer, packed copies or waiting outputs, is still what it would be.

The factors may have become other tensors, lie elsewhere or have another version, or something may
have happened that torch does not count as a version: train(), load_state_dict, truncate, or a step
of any optimizer (fused ones write without telling). What writes to memory and tells nobody is not
noticed: `refresh` says so.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from maestro_kernels.arguments import check_model, renamed
from maestro_kernels.nn.layer import LoDLayer
from maestro_kernels.ops import eager

if TYPE_CHECKING:
    from maestro_kernels.nn.linear import LoDLinear

_NONE: Any = object()
_count = itertools.count(1)
_steps = 0
_hooked = False


def _watch_optimizers() -> None:
    """Count the steps of all optimizers from now on."""
    global _hooked
    if not _hooked:
        _hooked = True
        register_optimizer_step_post_hook(_count_step)


def _count_step(*_: Any) -> None:
    global _steps
    _steps = next(_count)


def version(tensor: Tensor) -> int:
    """How often a tensor was written to, -1 where that is not counted."""
    return -1 if tensor.is_inference() else tensor._version


class Made:
    """One layer as it was when something was made of it: its tensors, and all that may change them.

    Never changed itself. Compared on every call, mostly from cold caches: few objects, and
    attributes of modules looked up where nn.Module keeps them.

    Attributes:
        u: output factor (N, R), with the memory it had.
        v: input factor (R, K), with the memory it had.
        bias: (N,) or None.
        rank: active rank.
        activation: applied after the bias.
    """

    __slots__ = (
        "_bias_address",
        "_bias_version",
        "_counted",
        "_others",
        "_u",
        "_u_address",
        "_u_version",
        "_v",
        "_v_address",
        "_v_version",
        "activation",
        "bias",
        "rank",
        "u",
        "v",
    )

    def __init__(self, layer: LoDLinear, rank: int) -> None:
        _watch_optimizers()
        tensors = layer._parameters
        u, v, bias = tensors["u"], tensors["v"], tensors["bias"]
        assert u is not None
        assert v is not None
        # Before any value is read: what changes from here on makes this old.
        self._others = (rank, layer._epoch, _steps, layer.activation, layer.backend)
        self.rank, self.activation = rank, layer.activation
        # An inference tensor counts no versions.
        self._counted = not any(t is not None and t.is_inference() for t in (u, v, bias))
        self._u, self._v, self.bias = u, v, bias
        self._u_version, self._v_version, self._bias_version = self._versions()
        # As long as the memory is held, no other can come to lie at its address.
        self.u, self.v = u.detach(), v.detach()
        self._u_address, self._v_address = u.data_ptr(), v.data_ptr()
        self._bias_address = 0 if bias is None else bias.data_ptr()

    @staticmethod
    def can_tell(layer: LoDLinear) -> bool:
        """Whether a layer has plain tensors of its own: parametrised ones are made on each call."""
        u, v, bias = (layer._parameters.get(name, _NONE) for name in ("u", "v", "bias"))
        if (
            u is None
            or v is None
            or any(t is _NONE for t in (u, v, bias))
            or not eager.is_plain(u, v, bias)
        ):
            return False
        return all(t is None or t.data_ptr() or not t.numel() for t in (u, v, bias))

    def same(self, layer: LoDLinear, rank: int) -> bool:
        """Whether the layer would give the output of then: nothing that it depends on changed."""
        u, v, bias, tensors = self._u, self._v, self.bias, layer._parameters
        # Every call of every layer comes by here, so nothing is shared with `packs_like`.
        return (
            tensors.get("u") is u
            and tensors.get("v") is v
            and tensors.get("bias", self) is bias
            and u.data_ptr() == self._u_address
            and v.data_ptr() == self._v_address
            and (bias is None or bias.data_ptr() == self._bias_address)
            and (
                u._version == self._u_version
                and v._version == self._v_version
                and (bias is None or bias._version == self._bias_version)
                if self._counted
                else self._versions() == (self._u_version, self._v_version, self._bias_version)
            )
            and (rank, layer._epoch, _steps, layer.activation, layer.backend) == self._others
        )

    def wants_grad(self) -> bool:
        """Whether a tensor asks for a gradient now."""
        bias = self.bias
        return (
            self._u.requires_grad
            or self._v.requires_grad
            or (bias is not None and bias.requires_grad)
        )

    def packs_like(self, other: Made) -> bool:
        """Whether both differ in no more than the bias, which is not packed."""
        return (
            self._u is other._u
            and self._v is other._v
            and (self._u_address, self._v_address) == (other._u_address, other._v_address)
            and (self._u_version, self._v_version) == (other._u_version, other._v_version)
            and self._others == other._others
        )

    def _versions(self) -> tuple[int, int, int]:
        return version(self._u), version(self._v), -1 if self.bias is None else version(self.bias)


@renamed(module="model")
def refresh(model: nn.Module) -> nn.Module:
    """Say that values of the layers changed, or those of an input that is used again.

    y = act(x @ v[:r].T @ u[:, :r].T + bias) is then computed from the values as they are now, by
    `prepack`ed layers from new packed copies, by `group`ed ones without an output that waits. Not
    needed after what torch counts or replaces: in-place operations, optimizer steps, train(),
    load_state_dict, `.to()`, another Parameter, `.data = tensor`. Needed after writing to memory
    behind the tensor: `.data.mul_()` and the like, in place to the vector that
    vector_to_parameters made the parameters views of, to an untyped_storage(), or through numpy,
    DLPack or a pointer; in place to inference tensors; and, in a group, after refilling in such a
    way an x that some siblings were called with and others not yet. It costs nothing but making the
    copies again.

    Args:
        model: any module, changed in place.

    Returns:
        The model.

    Raises:
        TypeError: model is no module.
    """
    check_model("refresh", model)
    for layer in model.modules():
        if isinstance(layer, LoDLayer):
            layer.changed()
    return model
