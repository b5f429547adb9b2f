"""The activations and their derivatives over the whole range, infinities and NaN included.

The CPU kernels are judged in test_native.py, on every instruction set.
"""

import subprocess

import activation_cases
import pytest
import torch
from cuda_host import ACTIVATIONS, COMPILER, HOST, SOURCE
from triton_support import DEVICE, WHY_NOT, needs_kernels

from maestro_kernels.backends import packed

Z = activation_cases.arguments(torch.float32)
SM90 = HOST.parent / "host_sm90"


@pytest.mark.skipif(COMPILER is None, reason="no g++")
@pytest.mark.parametrize("kernels", ["decode and rows", "sm_90 row"])
def test_of_the_cuda_kernels(kernels, tmp_path):
    program = tmp_path / "activations"
    command = [COMPILER, "-std=c++17", "-O1", "-DMK_HOST_DEVICE", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", str(HOST / "activations.cpp"), "-o", str(program)]
    command += (
        ["-DMK_SM90", f"-I{SM90}"] if kernels == "sm_90 row" else [f"-I{SOURCE}", f"-I{HOST}"]
    )
    subprocess.run(command, check=True, timeout=300)
    (tmp_path / "z").write_bytes(Z.numpy().tobytes())
    for name in activation_cases.NAMES:
        arguments = [str(ACTIVATIONS.index(name)), str(tmp_path / "z"), str(tmp_path / "y")]
        subprocess.run([str(program), *arguments], check=True, timeout=60)
        y = torch.frombuffer(bytearray((tmp_path / "y").read_bytes()), dtype=torch.float32)
        problem = activation_cases.disagreement(y, activation_cases.forward, name, Z)
        assert problem is None


if WHY_NOT is None:
    import triton
    import triton.language as tl

    from maestro_kernels.backends.triton.epilogue import activation_derivative, apply_activation

    @triton.jit
    def _pointwise(p_z, p_out, n, ACTIVATION: tl.constexpr, DERIVATIVE: tl.constexpr):
        o = tl.program_id(0) * 1024 + tl.arange(0, 1024)
        z = tl.load(p_z + o, mask=o < n, other=0.0)
        if DERIVATIVE:
            out = activation_derivative(z, ACTIVATION)
        else:
            out = apply_activation(z, ACTIVATION)
        tl.store(p_out + o, out, mask=o < n)


@needs_kernels
@pytest.mark.parametrize("derivative", [False, True], ids=["value", "derivative"])
@pytest.mark.parametrize("name", activation_cases.NAMES)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_of_the_triton_kernels(name, derivative):
    z = Z.to(DEVICE)
    out = torch.empty_like(z)
    _pointwise[(-(-z.numel() // 1024),)](z, out, z.numel(), name, derivative)
    function = activation_cases.derivative if derivative else activation_cases.forward
    problem = activation_cases.disagreement(out.cpu(), function, name, Z)
    assert problem is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", activation_cases.NAMES)
@pytest.mark.parametrize("form", packed.FORMS[1:3])
def test_of_the_onednn_forms(form, name, dtype):
    z = activation_cases.arguments(dtype)
    one = torch.ones(1, 1, dtype=dtype)
    if not packed.can_make(form, one, one, 1):
        pytest.skip("oneDNN cannot serve this here")
    run = packed.make_form(form, one, one, 1, name)
    y = run(z[:, None], None)[:, 0]
    problem = activation_cases.disagreement(y, activation_cases.forward, name, z)
    assert problem is None
