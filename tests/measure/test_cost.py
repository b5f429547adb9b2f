import pytest
import torch

from maestro_kernels.hardware import H100, Device
from maestro_kernels.measure.cost import Size, backward_flop, break_even_rank, count, forward_flop
from maestro_kernels.problem import describe


def us(form, M, N, K, r, mode="forward", bias=False):
    return count(form, [Size(M, N, K, r, bias)], 2, mode).seconds(H100, torch.bfloat16) * 1e6


def test_forward_counts_by_hand():
    size = [Size(M=2, N=3, K=5, rank=4)]
    dense, two, fused = (count(f, size, 4) for f in ("dense", "two matmuls", "fused"))
    assert (dense.flops, dense.bytes) == (2 * 2 * 3 * 5, 4 * (10 + 15 + 6))
    assert [(s.flops, s.elements) for s in two.steps] == [(80, 10 + 20 + 8), (48, 8 + 12 + 6)]
    assert [(s.flops, s.elements) for s in fused.steps] == [(128, 10 + 20 + 12 + 6)]


def test_flop_of_a_call_and_of_the_gradients_that_are_asked_for():
    M, N, K, r = 2, 3, 5, 4
    assert forward_flop(M, N, K, r) == 2 * M * r * (K + N)
    one = 2 * M * r
    for (dx, du, dv), products in {
        (True, True, True): 2 * (N + K),
        (True, False, False): N + K,
        (False, True, False): N,
        (False, False, True): N + K,
        (True, False, True): N + 2 * K,
        (False, False, False): 0,
    }.items():
        assert backward_flop(M, N, K, r, dx=dx, du=du, dv=dv) == one * products
    fused = count("fused", [Size(M, N, K, r)], 4, "backward")
    assert fused.flops == backward_flop(M, N, K, r)


def test_bias_counts_once_per_layer():
    with_bias, without = (count("fused", [Size(2, 3, 5, 4, b)] * 2, 2) for b in (True, False))
    assert with_bias.bytes - without.bytes == 2 * 2 * 3


# Figures of kernels.md §3.2 and §5 (microseconds on the recorded H100), computed independently.
@pytest.mark.parametrize(
    ("form", "M", "N", "r", "expected"),
    [
        ("dense", 1, 4096, 0, 11.19),
        ("dense", 8192, 4096, 0, 343.6),
        ("two matmuls", 64, 4096, 32, 0.53),
        ("fused", 64, 4096, 32, 0.52),
        ("two matmuls", 8192, 4096, 256, 48.9),
        ("fused", 8192, 4096, 256, 46.1),
        ("fused", 32768, 4096, 1024, 687.2),
        ("two matmuls", 1024, 14336, 256, 16.1),
        ("fused", 1024, 14336, 256, 15.7),
    ],
)
def test_forward_agrees_with_the_recorded_table(form, M, N, r, expected):
    assert us(form, M, N, 4096, r) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("N", "r", "naive", "fused"), [(4096, 32, 112.9, 90.4), (14336, 256, 291.5, 211.8)]
)
def test_backward_agrees_with_the_recorded_table(N, r, naive, fused):
    assert us("two matmuls", 8192, N, 4096, r, "backward", bias=True) == pytest.approx(naive, 0.002)
    assert us("fused", 8192, N, 4096, r, "backward", bias=True) == pytest.approx(fused, 0.002)


def test_group_reads_a_shared_x_once():
    sizes = [Size(8192, 4096, 4096, r) for r in (128, 64, 192)]
    grouped = count("fused", sizes, 2)
    assert grouped.seconds(H100, "bfloat16") * 1e6 == pytest.approx(91.6, rel=0.002)
    two = count("two matmuls", sizes, 2)
    assert two.seconds(H100, "bfloat16") * 1e6 == pytest.approx(140.5, rel=0.002)
    own_x = count("fused", sizes, 2, shared_x=False)
    assert own_x.bytes - grouped.bytes == 2 * 2 * 8192 * 4096
    # Autograd adds the dx of the second and third layer: two reads and a write each.
    alone = sum(count("two matmuls", [s], 2, "backward").bytes for s in sizes)
    together = count("two matmuls", sizes, 2, "backward").bytes
    assert together - alone == 2 * 2 * 3 * 8192 * 4096


def test_training_is_forward_that_keeps_h_and_backward():
    size = [Size(64, 96, 128, 16)]
    forward, backward, both = (
        count("fused", size, 4, m) for m in ("forward", "backward", "training")
    )
    assert both.flops == forward.flops + backward.flops == 3 * forward.flops
    assert both.bytes == forward.bytes + backward.bytes + 4 * 64 * 16


def test_rank_zero_does_not_read_x():
    assert count("fused", [Size(8, 16, 32, 0, bias=True)], 4).bytes == 4 * (8 * 16 + 16)


def test_warm_uses_the_cache_bandwidth_and_unknown_peaks_give_none():
    cost = count("dense", [Size(1, 100, 100, 0)], 4)
    device = Device("cpu", "x", "y", 1, bandwidth=1e9, cache_bandwidth=4e9)
    assert cost.seconds(device, torch.float32) is None
    known = Device(
        "cpu", "x", "y", 1, bandwidth=1e9, cache_bandwidth=4e9, peak_flops=(("float32", 1e15),)
    )
    cold, warm = cost.seconds(known, "float32"), cost.seconds(known, "float32", warm=True)
    assert cold == pytest.approx(cost.bytes / 1e9)
    assert warm == pytest.approx(cold / 4)
    assert cost.seconds(known, torch.bfloat16) is None


def test_break_even_rank():
    assert break_even_rank(4096, 4096) == 2048
    assert round(break_even_rank(14336, 4096)) == 3186


def test_size_of_a_described_call():
    x, u, v = torch.randn(2, 3, 8), torch.randn(5, 4), torch.randn(4, 8)
    assert Size.of(describe(x, u, v, None, 2, None)) == Size(6, 5, 8, 2)
    tensor_rank = torch.tensor(2, dtype=torch.int32)
    assert Size.of(describe(x, u, v, torch.randn(5), tensor_rank, None)) == Size(6, 5, 8, 4, True)


def test_wrong_form_and_mode_are_named():
    with pytest.raises(ValueError, match="count: form: expected dense, two matmuls or fused, got"):
        count("sparse", [Size(1, 1, 1, 1)], 4)
    with pytest.raises(ValueError, match="count: mode: expected forward, backward or training"):
        count("dense", [Size(1, 1, 1, 1)], 4, "sideways")
