"""How many variants of each kernel the ranks 0..256 make, by Triton's own count.

Run as a script (`python tests/test_triton_variants.py`, TRITON_INTERPRET unset) this file calls the
real launchers and prints which cache keys Triton asked to compile. The keys come from Triton: its
binder specialises the arguments of the launch, and its `jit_cache_hook` is called with the key of
every variant it does not have yet; the hook says "do not compile", which also means no launch. The
only thing stood in for is the driver, because Triton asks it for the target: it answers sm_90.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
from triton_support import needs_triton, run_compiled

R, N, K, M = 256, 320, 192, 64


def _ask_triton(calls: dict[str, Callable[[], object]]) -> dict[str, dict[str, list[str]]]:
    """Kernel -> the keys it would be compiled under, for each named series of launches."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    keys: dict[str, set[str]] = {}

    def hook(*, key, fn, **_):
        keys.setdefault(fn.name.rsplit(".")[-1], set()).add(key)
        return True

    driver.set_active(Driver())
    triton.knobs.runtime.jit_cache_hook = hook
    found = {}
    for name, call in calls.items():
        keys.clear()
        call()
        found[name] = {kernel: sorted(seen) for kernel, seen in keys.items()}
    return found


def _series() -> dict[str, Callable[[], object]]:
    """The launches to count, by the form of the rank."""
    import torch
    import triton
    import triton.language as tl

    from maestro_kernels.backends.triton import two_phase

    x, dy = torch.zeros(M, K, dtype=torch.bfloat16), torch.zeros(M, N, dtype=torch.bfloat16)
    v, u = torch.zeros(R, K, dtype=torch.bfloat16), torch.zeros(N, R, dtype=torch.bfloat16)
    bias = torch.zeros(N, dtype=torch.bfloat16)
    # Elements of one tensor: three of four do not start on 16 bytes, which must not matter either.
    ranks = {"int": range(R + 1), "tensor": torch.arange(R + 1, dtype=torch.int32).unbind()}

    def every(form, launch):
        return lambda: [launch(rank) for rank in ranks[form]]

    def grouped(rank):
        both = torch.stack([rank, rank]) if isinstance(rank, torch.Tensor) else (rank, R - rank)
        two_phase.two_phase_grouped(
            [x], [v, v], [u, u[:64]], [bias, None], both, [None, None], save_h=False
        )

    def rows():
        for m in (33, 48, 50, 64):  # one configuration serves them
            two_phase.two_phase(x[:m], v, u, bias, 16, None, save_h=False)

    launches = {
        "two-phase": lambda r: two_phase.two_phase(x, v, u, bias, r, "gelu", save_h=True),
        "two-phase dx": lambda r: two_phase.two_phase_dx(dy, u, v, r),
        "grouped": grouped,
    }

    @triton.jit
    def _naive(x_ptr, rank):
        tl.store(x_ptr, rank)

    naive = {"specialised int": lambda: [_naive[(1,)](x, r) for r in range(R + 1)]}
    return (
        naive
        | {"two-phase rows": rows}
        | {
            f"{name} {form}": every(form, launch)
            for name, launch in launches.items()
            for form in ranks
        }
    )


@pytest.fixture(scope="module")
def variants():
    return run_compiled(__file__)


def _of(variants, series):
    (keys,) = variants[series].values()  # one kernel, else the test is about the wrong launch
    return keys


@needs_triton
def test_the_instrument_sees_variants(variants):
    """A kernel with an ordinary int argument makes three: 1, the multiples of 16, the rest."""
    assert len(_of(variants, "specialised int")) == 3


@needs_triton
@pytest.mark.parametrize("kernel", ["two-phase", "two-phase dx", "grouped"])
def test_one_variant_for_all_ranks(variants, kernel):
    by_int, by_tensor = _of(variants, f"{kernel} int"), _of(variants, f"{kernel} tensor")
    assert len(by_int) == 1
    assert len(by_tensor) == 1
    assert by_int != by_tensor  # a tensor rank is read by the kernel: the second form


@needs_triton
def test_the_number_of_rows_makes_no_variant(variants):
    assert len(_of(variants, "two-phase rows")) == 1


if __name__ == "__main__":
    json.dump(_ask_triton(_series()), sys.stdout)
