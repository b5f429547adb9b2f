"""Probes of a device: small where it is slow, plausible where it is not."""

import pytest
import torch

from maestro_kernels.measure import probes


def test_free_memory_is_asked_of_the_system():
    assert 64 << 20 < probes.free_bytes("cpu") < 1 << 50


def test_a_slow_dtype_is_probed_small(monkeypatch):
    """A matmul of size n that takes (n / 256)^3 times 20 ms is not grown beyond 256."""
    sizes = []

    def seconds(call, device, budget=0.25):
        (n,) = {a.shape[0] for a in call}
        sizes.append(n)
        return 0.02 * (n / 256) ** 3

    monkeypatch.setattr(probes, "_best_seconds", seconds)
    peak = probes.grown(lambda a, b: (a, b), torch.float16, torch.device("cpu"))
    assert peak == pytest.approx(2 * 256**3 / 0.02)
    assert sizes == [64, 128, 256, 256]


def test_probes_give_plausible_ceilings():
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert 1e7 < probes.flops(dtype, cpu) < 1e15
    assert 1e8 < probes.bandwidth(4 << 20, cpu) < 1e14
