"""What the CUDA driver is asked directly: memory that torch's allocator does not know, capture ids.

torch hands out memory of a private pool while a CUDA graph is captured, and while torch.compile
warms up for one; the driver does not. Everything here works at any moment, also under capture.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

_RELAXED, _NON_BLOCKING = 2, 1
_ACTIVE = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE


@functools.cache
def _library() -> ctypes.CDLL | None:
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def zeroed(device: torch.device, count: int) -> Tensor | None:
    """`count` int32 zeros on a CUDA device that are never freed; None where the driver says no.

    Zero before this returns, on every stream: a graph may be replayed on one that waits for none.
    """
    return _filled(device, count, None)


def copied(device: torch.device, values: Tensor) -> Tensor | None:
    """A copy of contiguous int32 values of the host, as lasting as `zeroed`."""
    return _filled(device, values.numel(), values.data_ptr())


def _filled(device: torch.device, count: int, source: int | None) -> Tensor | None:
    driver = _library()
    wrap = getattr(torch._C, "_construct_storage_from_data_pointer", None)
    if driver is None or wrap is None:
        return None
    pointer = _allocate(driver, device.index or 0, 4 * count, source)
    if not pointer:
        return None
    storage = wrap(pointer, device, 4 * count)
    return torch.empty(0, dtype=torch.int32, device=device).set_(storage, 0, (count,), (1,))


def _allocate(driver: ctypes.CDLL, index: int, num_bytes: int, source: int | None) -> int:
    """Address of memory with the bytes at `source`, or zeros; 0 where there is none."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuDeviceGet(ctypes.byref(handle), index):
        return 0
    # The context that torch uses; on a new thread it need not be the current one.
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle):
        return 0
    mode = ctypes.c_int(_RELAXED)
    pointer, stream = ctypes.c_uint64(), ctypes.c_void_p()
    driver.cuCtxPushCurrent_v2(context)
    # Whatever another thread captures, this one may allocate and wait.
    driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        if driver.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(num_bytes)):
            return 0
        failed = driver.cuStreamCreate(ctypes.byref(stream), _NON_BLOCKING)
        if not failed:
            if source is None:
                words = ctypes.c_size_t(num_bytes // 4)
                failed = driver.cuMemsetD32Async(pointer, ctypes.c_uint(0), words, stream)
            else:
                size = ctypes.c_size_t(num_bytes)
                failed = driver.cuMemcpyHtoDAsync_v2(pointer, ctypes.c_void_p(source), size, stream)
            failed = failed or driver.cuStreamSynchronize(stream)
            driver.cuStreamDestroy_v2(stream)
        if failed:
            driver.cuMemFree_v2(pointer)
            return 0
        return pointer.value
    finally:
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        driver.cuCtxPopCurrent_v2(ctypes.byref(context))


def capture_id(stream: int) -> int | None:
    """What tells the capture that a stream takes part in from every other; None if unknown.

    Args:
        stream: its handle, as torch.cuda.Stream.cuda_stream.
    """
    driver = _library()
    ask = getattr(driver, "cuStreamGetCaptureInfo_v2", None)
    if ask is None:
        return None
    status, found = ctypes.c_int(), ctypes.c_uint64()
    failed = ask(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(found), None, None, None
    )
    return None if failed or status.value != _ACTIVE else found.value
