"""One defined state of the C heap while whole models are timed.

glibc gives freed memory at the end of the heap back to the system. Whether a forward pass then has
to fault its activations in anew (38 MB a pass, a fifth of the time, for a small encoder) depends on
what the process happened to allocate before. Timings in different states cannot be compared.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# From malloc.h, part of glibc's interface.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
# The most that glibc's own adjustment comes to; a process that runs models is there soon.
_USUAL_MMAP = 32 << 20


@contextmanager
def keeping_memory() -> Iterator[None]:
    """Let freed memory stay in the process, as MALLOC_TRIM_THRESHOLD_ does; no-op without glibc.

    Afterwards the thresholds are the largest that glibc adjusts itself to, and unused memory goes
    back to the system.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _NEVER)
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _USUAL_MMAP)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _USUAL_MMAP)
        libc.malloc_trim(0)
