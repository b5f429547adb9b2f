"""What stands around a call: compile, functorch, modes, autocast, forward-mode AD.

The registered op costs about half a small call again (docs/dev/performance-log.md), so an eager
call on plain tensors goes to the plan directly; whatever needs to see an op (FakeTensor,
FlopCounterMode, subclasses, torch.compile, export) gets the op.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils.checkpoint import CheckpointFunction

_PLAIN = frozenset((Tensor, Parameter, type(None)))
_are_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_node = torch._C._current_autograd_node
_is_compiling = torch.compiler.is_compiling
any_autocast = torch._C._is_any_autocast_enabled


def is_plain(*tensors: Any) -> bool:
    """Whether a call may skip the registered op: ordinary tensors and nobody watching.

    None stands for an argument that is not there.
    """
    return (
        not _is_compiling()
        and _PLAIN.issuperset(map(type, tensors))
        and not _are_transforms_active()
        and _dispatch_modes() == 0
        and forward_ad._current_level < 0
    )


def in_backward() -> bool:
    """Whether a backward pass is running: a call in it repeats one, as checkpointing does."""
    return _node() is not None


def repeats_inference() -> bool:
    """Whether the call that this one repeats ran without gradients.

    So does torch.utils.checkpoint(use_reentrant=True), whose node computes it again; the other kind
    runs its forward with gradients.
    """
    return type(_node()).__name__.startswith("Checkpoint")


def in_checkpoint() -> bool:
    """Whether torch.utils.checkpoint runs the call and will repeat it. Slow: looks at frames."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", ""):
        return True
    code, frame = CheckpointFunction.forward.__code__, sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def transforms_active() -> bool:
    """Whether a functorch transform (grad, vmap, ...) surrounds the call."""
    return bool(_are_transforms_active())


def autocast_dtype(x: Any) -> torch.dtype | None:
    """The dtype autocast wants for a call on x, or None outside autocast."""
    if not any_autocast() or not isinstance(x, Tensor):
        return None
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast a floating-point tensor; leave float64 and everything else alone, as autocast does."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value


def refuse_forward_ad(fn: str, tensors: Iterable[Any]) -> None:
    """Raise NotImplementedError when a tensor carries a forward-mode tangent.

    An op without a forward-mode formula would silently return a zero tangent.
    """
    if forward_ad._current_level < 0:
        return
    for value in tensors:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(forward_ad_message(fn))


def forward_ad_message(fn: str) -> str:
    """The error text of forward-mode AD."""
    return (
        f"{fn}: forward-mode AD (torch.func.jvp, dual tensors): expected reverse mode; "
        "use torch.func.vjp or grad, or maestro_kernels.backends.reference.lod_linear_ref"
    )
