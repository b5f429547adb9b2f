"""Triton kernels and the compiled library."""

from __future__ import annotations

from tools.mutants.fault import PACKAGE, Fault

FAULTS = (
    # --- Triton kernels ---------------------------------------------------------------------
    Fault(
        "triton-relu-hides-nan",
        f"{PACKAGE}/backends/triton/epilogue.py",
        "z = tl.where(z < 0, 0.0, z)",
        "z = tl.maximum(z, 0.0)",
        "tests/backends/test_activations.py::test_of_the_triton_kernels",
        "a NaN in a ReLU layer becomes zero on a GPU",
    ),
    Fault(
        "triton-silu-derivative",
        f"{PACKAGE}/backends/triton/epilogue.py",
        "d = s * (1.0 + z * t)",
        "d = s * (1.0 + z * s)",
        "tests/backends/test_activations.py::test_of_the_triton_kernels",
        "SiLU layers train on a wrong gradient on a GPU",
    ),
    Fault(
        "triton-row-kernel-ignores-the-rank",
        f"{PACKAGE}/backends/triton/row_kernel.py",
        "b_h = tl.where((o_r < rank)[None, :], b_h, 0.0).to(p_y.dtype.element_ty)",
        "b_h = b_h.to(p_y.dtype.element_ty)",
        "tests/backends/triton/test_row.py::test_rank_on_the_device_is_clamped_and_h_is_zero_beyond",
        "a rank on the device is rounded up to the tile",
    ),
    Fault(
        "triton-row-kernel-does-not-clamp",
        f"{PACKAGE}/backends/triton/row_kernel.py",
        "rank = tl.minimum(tl.maximum(tl.load(rank), 0), R)",
        "rank = tl.load(rank)",
        "tests/backends/triton/test_row.py::test_rank_on_the_device_is_clamped_and_h_is_zero_beyond",
        "a rank on the device beyond R reads past the factors",
    ),
    Fault(
        "triton-two-phase-ignores-the-rank",
        f"{PACKAGE}/backends/triton/two_phase_kernel.py",
        "    b_h = tl.where((o_r < rank)[None, :], b_h, 0.0)\n",
        "",
        "tests/backends/triton/test_two_phase.py::test_int_and_tensor_rank_agree",
        "H of a layer holds values beyond the rank",
    ),
    Fault(
        "triton-weight-gradients-beyond-the-rank",
        f"{PACKAGE}/backends/triton/wgrad.py",
        "b_g = tl.where((o_r < rank)[:, None], b_g, 0.0).to(",
        "b_g = b_g.to(",
        "tests/backends/triton/test_backward.py::TestWeightGrads::test_zeros_beyond_the_rank_beside_nan",
        "momentum moves components that are switched off, on a GPU",
    ),
    Fault(
        "triton-expand-reads-beyond-the-rank",
        f"{PACKAGE}/backends/triton/expand.py",
        "shape, strides = [tensor.shape[0], width], list(tensor.stride())",
        "shape, strides = list(tensor.shape), list(tensor.stride())",
        "tests/backends/triton/test_expand.py::test_sizes_off_the_grid_and_odd_ranks",
        "NaN in components that are switched off reaches the output on an H100",
    ),
    Fault(
        "triton-expand-leaves-h-unfinished",
        f"{PACKAGE}/backends/triton/expand.py",
        "        padded[:, width:].zero_()",
        "        pass",
        "tests/backends/triton/test_expand.py::test_sizes_off_the_grid_and_odd_ranks",
        "the backward of an odd rank multiplies whatever memory held",
    ),
    # --- the compiled library ---------------------------------------------------------------
    Fault(
        "cuda-decode-does-not-wait-for-the-kernel-in-front",
        "csrc/cuda/decode.cuh",
        "  wait_for_kernel_in_front();\n",
        "",
        "tests/csrc/test_cuda_host.py::test_a_missing_barrier_or_wait_is_noticed",
        "a decode step reads x before the layer in front has written it",
    ),
    Fault(
        "cpu-silu-of-the-wrong-sign",
        "csrc/cpu/activation.h",
        "exp(Vec::zero() - s)",
        "exp(s)",
        "tests/csrc/test_cpu_host.py::test_portable_kernels_of_this_machine",
        "SiLU layers of the compiled library are wrong",
    ),
)
