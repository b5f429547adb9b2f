"""What only a GPU can show: the checks of `python -m bench.gpu`, which runs them there too."""

import pytest
import torch

import maestro_kernels as mk
from bench.gpu import checks, device
from bench.gpu.plan import KERNELS
from maestro_kernels.backends import native
from maestro_kernels.testing import make_inputs

pytestmark = pytest.mark.gpu
NAMES = [
    (family, item.name)
    for family in (*KERNELS, "auto")
    for item in checks.items(device.Cuda(), None, family)
]


@pytest.mark.parametrize(("family", "name"), NAMES, ids=":".join)
def test_check(family, name):
    items = {item.name: item for item in checks.items(device.here(), None, family)}
    try:
        items[name].run()
    except device.Skip as reason:
        pytest.skip(str(reason))
    torch.cuda.synchronize()


@pytest.mark.skipif(native.load_error() is not None, reason="no compiled library")
def test_what_no_native_kernel_takes_is_said():
    x, u, v, b = make_inputs(4, 64, 64, 13, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(NotImplementedError, match="16-byte pieces"):
        mk.lod_linear(x, u, v, b, backend="native")
