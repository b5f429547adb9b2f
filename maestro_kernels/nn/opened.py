"""Opened: what stands for a module that keeps several matrices in parameters of its own.

Each matrix is a linear layer there, with a name, so that it is factorised, ranked, trained and
saved like any other. The dense module can be made again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from maestro_kernels.nn.linear import LoDLinear, trainable
from maestro_kernels.nn.pivoted import PivotedLinear

if TYPE_CHECKING:
    from typing_extensions import Self

# What every module has; all else in its __dict__ is its own.
_BASE = frozenset(vars(nn.Module()))
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class Opened(nn.Module):
    """The same function as another module, through one linear layer for each of its matrices.

    All else of that module (children, settings, mode, call hooks) is taken over.

    Attributes:
        closed_type: class of the module that this one stands for.
    """

    closed_type: type[nn.Module]

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether `of` can open this module."""
        raise NotImplementedError

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The open form, dense: its linear layers look at the memory of the module's parameters."""
        raise NotImplementedError

    def close(self) -> nn.Module:
        """A module of `closed_type` with the same function; factorised layers are merged."""
        raise NotImplementedError

    @classmethod
    def _around(cls, model: nn.Module) -> Self:
        """An open form that has all but the matrices."""
        made = cls.__new__(cls)
        _take_over(made, model)
        made.closed_type = type(model)
        return made

    def _closed(self, parts: set[str]) -> nn.Module:
        """A module of `closed_type` that has all but the matrices.

        Args:
            parts: the children that `of` has made.
        """
        made = object.__new__(self.closed_type)
        _take_over(made, self)
        del vars(made)["closed_type"]
        for name in parts:
            del made._modules[name]
        return made

    def own(self) -> None:
        """Give dense layers that still look at the memory of the module copies of what they use."""
        for parameter in self.parameters():
            size = parameter.numel() * parameter.element_size()
            if not parameter.is_meta and parameter.untyped_storage().nbytes() > size:
                parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)


def _take_over(new: nn.Module, old: nn.Module) -> None:
    nn.Module.__init__(new)
    vars(new).update({key: value for key, value in vars(old).items() if key not in _BASE})
    for part in ("_modules", "_buffers"):
        vars(new)[part].update(vars(old)[part])
    new._non_persistent_buffers_set.update(old._non_persistent_buffers_set)
    new.training = old.training
    take_hooks(old, new, share=True)


def take_hooks(old: nn.Module, new: nn.Module, *, share: bool) -> None:
    """Give `new` the call hooks of `old`; hooks on state dicts know other keys."""
    for name in _HOOKS:
        hooks = vars(old)[name]
        # The dict itself: a handle's remove() looks into it.
        vars(new)[name] = hooks if share or not isinstance(hooks, dict) else hooks.copy()


def linear_of(weight: Tensor, bias: Tensor | None, like: nn.Parameter) -> nn.Linear:
    """An nn.Linear around the memory of weight (N, K) and bias (N,), trained where `like` is."""
    # Without the constructor, which draws a weight: a model may have ten thousand experts.
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    layer.register_parameter("weight", trainable(weight, like))
    layer.register_parameter("bias", bias if bias is None else trainable(bias, bias))
    return layer


def dense_linear_of(layer: nn.Module | None) -> nn.Linear:
    """An nn.Linear as it is, a factorised one merged."""
    if isinstance(layer, nn.Linear):
        return layer
    assert isinstance(layer, LoDLinear | PivotedLinear)
    return layer.to_linear()
