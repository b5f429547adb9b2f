"""The one place that calls oneDNN takes what oneDNN takes, also where its ISA is capped."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import maestro_kernels as mk
from maestro_kernels.backends import onednn
from maestro_kernels.backends.reference import lod_linear_ref
from maestro_kernels.testing import assert_accurate, make_inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CAPS = ["AVX2", "AVX512_CORE", "AVX512_CORE_BF16", "ALL"]

# Asks the op itself, so that the guard is held to what it does and not to what it says.
WHAT_IT_TAKES = """
import json, torch
from maestro_kernels.backends import onednn
from maestro_kernels.measure import probes
found = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    weight = torch.ones(8, 8, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 4)
        torch.ops.mkldnn._linear_pointwise(weight, packed, None, "none", [], "")
        takes = True
    except RuntimeError:
        takes = False
    peak = probes.grown(probes.matmul, dtype, torch.device("cpu"))
    found[str(dtype)] = takes, onednn.unsupported(dtype), peak
print(json.dumps(found))
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("cap", CAPS)
def test_the_guard_follows_the_cap_of_onednn(cap):
    done = subprocess.run(
        [sys.executable, "-c", WHAT_IT_TAKES],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": cap},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for dtype, (takes, reason, peak) in found.items():
        assert takes == (reason is None), dtype
        assert peak > 0
    assert found["torch.float32"][1] is None
    if cap == "AVX2":
        assert found["torch.float16"][1] == "oneDNN has no float16 linear on this CPU"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("post", ["none", "relu"])
def test_a_reordered_linear_computes_the_formula(dtype, post):
    reason = onednn.unsupported(dtype)
    if reason is not None:
        pytest.skip(reason)
    x, w, _, bias = make_inputs(5, 24, 40, 40, dtype=dtype)
    y = onednn.linear(x, onednn.reorder(w, 5), bias, post)
    act = F.relu if post == "relu" else torch.nn.Identity()
    eye = torch.eye(40, dtype=torch.float64)
    exact = act(lod_linear_ref(x.double(), w.double(), eye, bias.double()))
    assert_accurate("y", y, act(F.linear(x, w, bias)), exact)


def test_what_cannot_be_reordered_is_refused():
    with pytest.raises(NotImplementedError, match="float32, bfloat16 and float16, not float64"):
        onednn.reorder(torch.ones(2, 2, dtype=torch.float64), 1)
    with pytest.raises(ValueError, match=r"reorder: weight: expected N, K > 0, got \(0, 2\)"):
        onednn.reorder(torch.ones(0, 2), 1)
    with pytest.raises(ValueError, match="reorder: weight: expected a CPU tensor, got meta"):
        onednn.reorder(torch.ones(2, 2, device="meta"), 1)


def test_a_torch_without_onednn_is_told(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    onednn._lacking.cache_clear()
    try:
        assert onednn.unsupported(torch.float32) == "this torch is built without oneDNN"
    finally:
        onednn._lacking.cache_clear()


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.skipif(onednn.unsupported(torch.float32) is not None, reason="no oneDNN")
def test_a_user_who_switches_onednn_off_gets_no_packed_linears():
    layer, x = mk.LoDLinear(24, 40, max_rank=8).eval(), torch.randn(3, 24)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        mk.prepack(twin, form="two oneDNN linears")
        with torch.backends.mkldnn.flags(enabled=False):
            assert "switched off" in onednn.unsupported(torch.float32)
            assert torch.equal(twin(x), layer(x))
            assert twin.packed.choices == {4: "unpacked"}
        assert onednn.unsupported(torch.float32) is None
