"""The model of kernels on a recorded GPU: each of its limits, by arithmetic done by hand."""

from dataclasses import replace

import pytest

from maestro_kernels.hardware import H100
from maestro_kernels.measure import predict
from maestro_kernels.measure.cost import Size
from maestro_kernels.measure.predict import Assumptions, Phase

PEAK = 800e12
# One limit at a time: everything that is not looked at takes no time.
FREE = Assumptions(
    gap=0.0, latency=1e-6, cache_latency=1e-30, handover=0.0, reduce=0.0,
    cache_bandwidth=1e30, core_bandwidth=1e30,
)  # fmt: skip
PLENTY = Phase(tiles=132, tile_bytes=1, tile_flops=0, memory_bytes=0, in_flight=1e9)


def test_memory_runs_at_the_bandwidth_where_enough_is_in_flight():
    phase = replace(PLENTY, memory_bytes=3.0e6)
    assert phase.seconds(H100, PEAK, FREE) == pytest.approx(1e-6 + 1e-6)


def test_littles_law_limits_what_has_too_little_in_flight():
    """132 cores x 10 KB a microsecond are 1.32 TB/s."""
    phase = replace(PLENTY, memory_bytes=1.32e6, in_flight=10e3)
    assert phase.seconds(H100, PEAK, FREE) == pytest.approx(2e-6)
    both = replace(phase, tiles=264, resident=2)
    assert both.seconds(H100, PEAK, FREE) == pytest.approx(1e-6 + 0.5e-6)
    alone = replace(phase, tiles=66, resident=2)
    assert alone.seconds(H100, PEAK, FREE) == pytest.approx(1e-6 + 2e-6)


def test_one_tile_more_than_cores_takes_two_waves():
    assumed = replace(FREE, core_bandwidth=1e9)
    one = replace(PLENTY, tile_bytes=1000)
    assert one.seconds(H100, PEAK, assumed) == pytest.approx(1e-6 + 1e-6)
    more = replace(one, tiles=133)
    assert more.seconds(H100, PEAK, assumed) == pytest.approx(1e-6 + 2e-6)
    assert more.waves(H100) == pytest.approx(133 / 132)


def test_products_of_the_busiest_core():
    flops = PEAK / 132 * 1e-6
    phase = replace(PLENTY, tile_flops=flops, share=0.5)
    assert phase.seconds(H100, PEAK, FREE) == pytest.approx(1e-6 + 2e-6)


def test_all_cores_share_the_second_level_cache():
    phase = replace(PLENTY, tile_bytes=1000)
    fed = replace(FREE, cache_bandwidth=132e9)
    assert phase.seconds(H100, PEAK, fed) == pytest.approx(2e-6)
    assert replace(phase, tiles=66).seconds(H100, PEAK, fed) == pytest.approx(1.5e-6)


def test_a_launch_is_a_gap_and_its_phases():
    assumed = replace(FREE, gap=5e-6)
    assert predict.seconds([PLENTY, PLENTY], H100, PEAK, assumed) == pytest.approx(7e-6)
    assert predict.seconds([replace(PLENTY, tiles=0)], H100, PEAK, assumed) == 5e-6


@pytest.mark.parametrize("M", [1, 16, 64, 256, 1024, 8192, 32768])
@pytest.mark.parametrize("rank", [64, 256, 1024])
def test_library_calls_never_beat_their_own_roofline(M, rank):
    """And stay within what kernels like these are known to reach: half of it at many rows."""
    size = Size(M, 4096, 4096, rank)
    calls = predict.library_calls([size], H100, PEAK, 2)
    flops, elements = 2 * M * rank * 8192, rank * 8192 + M * 8192
    ideal = max(flops / PEAK, 2 * elements / H100.bandwidth)
    assert calls > ideal + 2 * predict.H100_ASSUMED.gap
    assert M < 8192 or calls < 1.3 * ideal


def test_layers_that_share_x_read_it_once_while_it_is_near():
    size = Size(3000, 4096, 4096, 32)
    one, two = (predict.library_calls([size] * n, H100, PEAK, 2) for n in (1, 2))
    assert one < two < 2 * one


def test_what_memory_needs_in_flight():
    """3.0 TB/s for 0.72 µs on 132 cores: 16 KiB each."""
    assert predict.needed_in_flight(H100) == pytest.approx(3.0e12 * 0.72e-6 / 132)
    phase = replace(PLENTY, memory_bytes=3.0e6, in_flight=predict.needed_in_flight(H100, FREE))
    assert phase.seconds(H100, PEAK, FREE) == pytest.approx(1e-6 + 1e-6)


def test_a_pass_reads_from_the_cache_what_fits():
    small, large = 3.0e6, 300e6
    near = predict.pass_over_memory(H100, small, small, FREE)
    far = predict.pass_over_memory(H100, large, large, FREE)
    assert near == pytest.approx(1e-6 + 1e-6)
    assert far == pytest.approx(1e-6 + 200e-6)


def test_an_activation_is_one_more_kernel_for_a_library():
    size = Size(256, 4096, 4096, 64)
    plain, act = (predict.library_calls([size], H100, PEAK, 2, activation=a) for a in (False, True))
    y = 256 * 4096 * 2
    assert act - plain == pytest.approx(predict.pass_over_memory(H100, y, y))


def test_gradients_by_a_library():
    """dx is the forward of the mirrored layer; a bias and a shared x cost a pass each."""
    size = Size(256, 1024, 4096, 64)
    dx, weights = predict.library_backward([size], H100, PEAK, 2)
    assert dx == predict.library_calls([Size(256, 4096, 1024, 64)], H100, PEAK, 2)
    assert weights == pytest.approx(
        predict.gemm(H100, PEAK, 2, 1024, 64, 256)[0]
        + predict.gemm(H100, PEAK, 2, 64, 4096, 256)[0]
    )
    _, biased = predict.library_backward([replace(size, bias=True)], H100, PEAK, 2)
    passed = predict.pass_over_memory(H100, 256 * 1024 * 2, 1024 * 2)
    assert biased - weights == pytest.approx(passed)
    both, _ = predict.library_backward([size, size], H100, PEAK, 2)
    x = 256 * 4096 * 2
    assert both - 2 * dx == pytest.approx(predict.pass_over_memory(H100, 2 * x, x))
