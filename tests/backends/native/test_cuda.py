"""Plans of the CUDA kernels through the library, for devices that need not be here."""

import dataclasses

import pytest
import torch

from maestro_kernels.backends import native
from maestro_kernels.backends.native import cuda as native_cuda
from maestro_kernels.problem import LoDProblem

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason="no compiled library")

H100 = (90, 132, 232448, 233472, 1)
A100 = (80, 108, 166912, 167936, 0)
TURING = (75, 68, 65536, 65536, 0)


def problem(M, N=4096, K=4096, R=256, rank=256, dtype=torch.bfloat16, **changes):
    return LoDProblem(M, N, K, R, rank, dtype, torch.device("cuda", 0), **changes)


def plan(*problems, device=H100, only="none"):
    return native_cuda.plan(native._library(), problems, device, only)


@pytest.mark.parametrize(("M", "strategy"), [(1, "decode"), (64, "decode"), (512, "rows")])
@pytest.mark.parametrize("device", [H100, A100])
def test_rows_decide_the_kernel(M, strategy, device):
    chosen, text = plan(problem(M), device=device)
    assert chosen == strategy
    assert text.startswith(f"{strategy}: ")
    assert "blocks of" in text


def test_large_m_takes_the_row_kernel_where_it_was_built_only():
    assert plan(problem(16384, rank=128))[0] == "row"
    without = (*H100[:4], 0)
    chosen, text = plan(problem(16384, rank=128), device=without)
    assert chosen == "rows"
    assert "not row: " in text


def test_a_forced_kernel_that_cannot_serve_says_why():
    chosen, text = plan(problem(4096), only="decode")
    assert chosen == "none"
    assert "64" in text


def test_an_old_device_is_refused():
    chosen, text = plan(problem(16), device=TURING)
    assert chosen == "none"
    assert "compute capability below 8.0" in text


def test_a_group_is_planned_as_one_launch():
    layers = [problem(16), problem(16, N=1024, rank=100), problem(16, N=1024, rank=None)]
    assert plan(*layers)[0] == "decode"
    assert plan(*layers[:2] * 9)[0] == "none"


def test_alignment_strides_and_dtype_reach_the_plan():
    base = problem(8192, rank=128)
    assert plan(base)[0] == "row"
    for change in ({"aligned": False}, {"x_stride": (4099, 1)}, {"v_stride": (4099, 1)}):
        assert plan(dataclasses.replace(base, **change))[0] != "row", change
    assert plan(dataclasses.replace(base, dtype=torch.float32))[0] != "row"
    assert plan(dataclasses.replace(base, dtype=torch.float16))[0] == "row"


def test_the_library_without_cuda_kernels_or_device_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    facts, reason = native_cuda.device_facts(native._library(), 0)
    assert facts is None
    assert "no CUDA kernels" in reason or "query_device" in reason
