"""The CUDA kernels of the compiled library: which one takes a call, and the call itself.

csrc/cuda/plan.cpp decides; it needs no device, so that a plan for a recorded device can be made
and tested anywhere.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from maestro_kernels.backends import workspace

if TYPE_CHECKING:
    from maestro_kernels.problem import LoDProblem

# The order of mk::cuda::Strategy in csrc/cuda/launch.h.
STRATEGIES = ("none", "decode", "rows", "row")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# int32 counters of a launch: one per block that fits on the device, one per layer and 64 rows. The
# library checks; kCounterBytes of csrc/cuda/launch.h is the most it ever asks for.
_FEW_COUNTERS, _ALL_COUNTERS = 2 * 1024, 16 * 1024
_FEW_ROWS = 32 * 1024
# (compute capability as 10 * major + minor, SMs, shared bytes per block, per SM, row kernel built)
Facts = tuple[int, int, int, int, int]


@functools.cache
def device_facts(library: ctypes.CDLL, index: int) -> tuple[Facts | None, str]:
    """What plans depend on for a CUDA device, or (None, why the library cannot say)."""
    facts = (ctypes.c_int64 * 5)()
    failed = library.mk_cuda_device(index, facts).decode()
    return (None, failed) if failed else (tuple(facts), "")  # type: ignore[return-value]


def plan(
    library: ctypes.CDLL, problems: Sequence[LoDProblem], facts: Facts, only: str = "none"
) -> tuple[str, str]:
    """(strategy, description) for one layer or a group; strategy "none" where no kernel takes it.

    Args:
        library: the loaded library.
        problems: the layers, already validated, of one dtype.
        facts: of the device to plan for.
        only: one of STRATEGIES to refuse every other; "none" lets the library choose.
    """
    numbers: list[int] = []
    for p in problems:
        u_stride, v_stride = p.u_stride or (p.R, 1), p.v_stride or (p.K, 1)
        strides = ((p.x_stride or (p.K, 1))[0], u_stride[0], v_stride[0])
        numbers += [p.M, p.N, p.K, p.R, p.max_active_rank, p.rank is None, *strides, p.aligned]
    strategy = ctypes.c_int32()
    text = library.mk_cuda_plan(
        (ctypes.c_int64 * len(numbers))(*numbers),
        len(problems),
        _DTYPES.index(problems[0].dtype),
        _tf32(),
        (ctypes.c_int64 * 5)(*facts),
        STRATEGIES.index(only),
        ctypes.byref(strategy),
    )
    return STRATEGIES[strategy.value], text.decode()


def _tf32() -> bool:
    return torch.get_float32_matmul_precision() != "highest"


@functools.cache
def _op() -> Callable[..., list[Tensor]]:
    """The op without the Python frame of its overload."""
    overload = torch.ops.maestro_native.cuda_grouped.default
    call: Callable[..., list[Tensor]] = getattr(overload, "_op", overload)
    return call


def grouped(arguments: tuple[Any, ...], rows: int, strategy: str) -> list[Tensor]:
    """The outputs of all layers in one launch on the current stream.

    Args:
        arguments: of the library's CPU op for groups, which this one's begin with.
        rows: M of all layers together.
        strategy: one of STRATEGIES.
    """
    return _call(arguments, rows, STRATEGIES.index(strategy))


def quick(strategy: str, codes: Mapping[str | None, int]) -> Callable[..., Tensor]:
    """(x, u, v, bias, rank, activation) -> y of one layer; the op refuses what does not fit.

    Args:
        strategy: one of STRATEGIES.
        codes: of the activations.
    """
    number = STRATEGIES.index(strategy)

    def again(
        x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, rank: int, activation: str | None
    ) -> Tensor:
        biases, has_bias = ([], [0]) if bias is None else ([bias], [1])
        layer = [x], [u], [v], biases, has_bias, [rank], None, [codes[activation]], False
        return _call(layer, x.numel() // x.shape[-1], number)[0]

    return again


def _call(arguments: tuple[Any, ...], rows: int, strategy: int) -> list[Tensor]:
    device = arguments[0][0].device
    counters = _FEW_COUNTERS if rows <= _FEW_ROWS else _ALL_COUNTERS
    outputs: list[Tensor] = _op()(
        *arguments,
        strategy,
        _tf32(),
        workspace.counters(device, counters),
        workspace.scratch(device),
    )
    return outputs
