"""What the launchers share: the record of a device, table rows for it, scratch shaped like H."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from maestro_kernels import hardware

# Layers of one launch; more of them take several. A layer costs about 17 kernel arguments and as
# many selects for each tile.
MAX_LAYERS = 8

# Rows of H are this many elements apart, or a multiple: they start on 16 bytes in every dtype, and
# Triton finds the stride divisible by 16 for every rank, so that no rank makes a variant.
_H_ALIGN = 16


def record_of(x: Tensor) -> hardware.Device:
    """The device record to plan for: the interpreter stands in for an H100."""
    return hardware.current_device(x.device) if x.is_cuda else hardware.H100


def input_precision(dtype: torch.dtype = torch.float32) -> str:
    """How a dtype is multiplied: "tf32" where torch.get_float32_matmul_precision() allows it.

    16-bit types have one way, "ieee", and so one variant of a kernel.
    """
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def table_arch(arch: str) -> str:
    """The architecture whose configurations serve `arch`.

    sm_100 has the instructions and the shared memory that those of sm_90 ask for (not run there);
    everything else takes those of sm_80, which fit into 99 KiB and use no descriptors.
    """
    return "sm_90" if arch in ("sm_90", "sm_100", "sm_103") else "sm_80"


def device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the one x is on."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def is_elsewhere(x: Tensor) -> bool:
    """Whether the current device is another one; `device_of` in a tenth of its time."""
    return not x.is_cpu and x.device.index != _current_device()


def h_stride(width: int) -> int:
    """Elements from one row of H to the next."""
    return max(-(-width // _H_ALIGN), 1) * _H_ALIGN


def empty_h(x: Tensor, width: int) -> Tensor:
    """Uninitialised (M, width) for x (M, K), its rows h_stride(width) elements apart."""
    return x.new_empty(x.shape[0], h_stride(width))[:, :width]


def readable_h(h: Tensor) -> Tensor:
    """H with rows as empty_h lays them out, copied if they are not: kernels read 16 bytes at once.

    They read up to the next multiple of 8 columns, where the kernels that make H leave zeros.
    """
    if h.stride(1) == 1 and h.stride(0) % _H_ALIGN == 0 and h.data_ptr() % 16 == 0:
        last = h.storage_offset() + (h.shape[0] - 1) * h.stride(0) + -(-h.shape[1] // 8) * 8
        if last * h.element_size() <= h.untyped_storage().nbytes():
            return h
    padded = empty_h(h, -(-h.shape[1] // 8) * 8).zero_()[:, : h.shape[1]]
    padded.copy_(h)
    return padded


def is_aligned(*matrices: Tensor) -> bool:
    """Whether kernels load and store rows 16 bytes at a time: Triton looks for multiples of 16.

    Elsewhere every element has an address and a mask of its own, which fill the registers.
    """
    return all(
        t.shape[1] % 16 == 0 and t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 for t in matrices
    )


def layer_runs(xs: Sequence[Tensor]) -> Iterator[slice]:
    """Runs of layers that one launch can take: as many rows each, MAX_LAYERS at most."""
    begin = 0
    for i in range(1, len(xs) + 1):
        full = i - begin == MAX_LAYERS
        if i == len(xs) or full or xs[i].shape[0] != xs[begin].shape[0]:
            yield slice(begin, i)
            begin = i
