"""The dense weight that a factorised layer would have, as a tensor that is computed when used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Kwargs = dict[str, Any]


class MergedWeight(Tensor):
    """A tensor with the shape, dtype and device of `merge()`, which runs only for its values.

    Code that asks a layer for `weight.dtype` or `weight.device` in every forward (T5 does) pays for
    no product; all else (arithmetic, `F.linear`, printing, gradients) sees the merged matrix.
    It is a value, not storage: writing into it raises, since nothing could keep what was written.
    """

    _merge: Callable[[], Tensor]
    # A factor of the layer whose weight it is.
    like: Tensor

    @staticmethod
    def of(
        merge: Callable[[], Tensor], shape: tuple[int, ...], like: Tensor, requires_grad: bool
    ) -> MergedWeight:
        """A stand-in for merge(), which has this shape and the dtype and device of `like`."""
        weight: MergedWeight = Tensor._make_wrapper_subclass(
            MergedWeight, shape, dtype=like.dtype, device=like.device, requires_grad=requires_grad
        )
        weight._merge, weight.like = merge, like
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Kwargs | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _DETACH:
            return args[0]._detached()
        if _writes(func, args, kwargs):
            # Not a TypeError: torch turns that one, in `w *= 2`, into "try another operand".
            raise NotImplementedError(
                f"weight: {func.__name__}: expected a read, got a write: the weight of a "
                "factorised layer is computed from u and v; write into those"
            )
        args, kwargs = pytree.tree_map_only(MergedWeight, lambda w: w._merge(), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Kwargs | None = None
    ) -> Any:
        # Reached only by C++ code that steps around __torch_function__, below autograd.
        args, kwargs = pytree.tree_map_only(
            MergedWeight, lambda w: w._merge().detach(), (args, kwargs or {})
        )
        return func(*args, **kwargs)

    def _detached(self) -> MergedWeight:
        merge = self._merge
        return MergedWeight.of(lambda: merge().detach(), tuple(self.shape), self, False)


def _writes(func: Any, args: tuple[Any, ...], kwargs: Kwargs) -> bool:
    if isinstance(kwargs.get("out"), MergedWeight):
        return True
    name = getattr(func, "__name__", "")
    inplace = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
    return inplace and bool(args) and isinstance(args[0], MergedWeight)


_WRITES = ("__setitem__", "__set__")
_GETTERS = """device dtype grad grad_fn is_cpu is_cuda is_leaf is_meta is_quantized is_sparse
itemsize layout nbytes ndim requires_grad shape"""
_METHODS = """__hash__ __len__ data_ptr dim element_size get_device is_complex is_contiguous
is_floating_point nelement numel size stride"""
_METADATA = frozenset(
    [getattr(Tensor, name).__get__ for name in _GETTERS.split()]
    + [getattr(Tensor, name) for name in _METHODS.split()]
    + [torch.is_floating_point, torch.is_complex, torch.numel]
)
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_DETACH = frozenset((Tensor.detach, torch.detach, _DATA))
