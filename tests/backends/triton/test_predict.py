"""What the planner predicts of the Triton kernels on a recorded H100; no kernel runs."""

from dataclasses import replace

import pytest
import torch

from maestro_kernels.backends.triton import choose, predict
from maestro_kernels.backends.triton.expand_config import SHIPPED as EXPAND
from maestro_kernels.backends.triton.row_config import RowConfig, RowPlan
from maestro_kernels.backends.triton.two_phase_config import CANDIDATES, TwoPhaseConfig
from maestro_kernels.backends.triton.wgrad_config import WgradConfig
from maestro_kernels.hardware import H100
from maestro_kernels.measure.cost import Size, count
from maestro_kernels.measure.predict import H100_ASSUMED, library_calls

PEAK = 800e12


def tiles(M, N, R, K=4096):
    return choose.two_phase(H100, M, (N,), (K,), (R,), torch.bfloat16)


@pytest.mark.parametrize("N", [4096, 14336])
@pytest.mark.parametrize("M", [1, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("R", [16, 64, 127, 256, 512, 1024])
def test_few_rows_have_enough_in_flight(M, N, R):
    """For 3.3 TB/s, or everything there is to fetch, in both phases (Little's law)."""
    config = tiles(M, N, R)
    assert config.decode
    found = predict.two_phase(H100, config, [Size(M, N, 4096, R)], 2, PEAK)
    shrink, expand = found.phases
    needed = 3.3e12 * H100_ASSUMED.latency
    there = 2 * R * (4096 + min(N, 6 << 20))
    asked = shrink.in_flight_per_core(H100) * H100.num_cores
    assert asked >= min(needed, there)
    busy = min(expand.tiles, H100.num_cores)
    flying = expand.in_flight_per_core(H100) * busy
    loaded = expand.tiles * 2 * R * (min(M, config.BLOCK_M) + config.BLOCK_N)
    assert flying >= min(3.3e12 * H100_ASSUMED.cache_latency, 0.5 * loaded)


def test_the_expand_with_a_step_of_32_ranks_has_too_little():
    """What few rows had before: six kilobytes on an SM, a third of its share for 3.3 TB/s."""
    before = TwoPhaseConfig(16, 32, 128, 32, 4, 4)
    expand = predict.two_phase(H100, before, [Size(1, 4096, 4096, 1024)], 2, PEAK).phases[1]
    assert expand.in_flight_per_core(H100) == 3 * (1 + 32) * 32 * 2
    assert expand.in_flight_per_core(H100) < 3.3e12 * H100_ASSUMED.latency / 132 / 2


@pytest.mark.parametrize("M", [1, 64, 1024, 8192, 32768])
@pytest.mark.parametrize("rank", [64, 256])
def test_nothing_is_faster_than_the_roofline(M, rank):
    size = Size(M, 4096, 4096, rank)
    ideal = count("fused", [size], 2).seconds(H100, "bfloat16")
    for config in CANDIDATES["sm_90", "16-bit"]:
        assert predict.two_phase(H100, config, [size], 2, PEAK).seconds > ideal
    assert min(choose.strategies(H100, M, 4096, 4096, rank, torch.bfloat16).values()) > ideal


def test_prefetched_factors_are_fetched_once():
    plain = TwoPhaseConfig(16, 32, 128, 32, 4, 4, 128)
    size = Size(16, 4096, 4096, 256)
    for config in (plain, replace(plain, decode=True)):
        shrink, expand = predict.two_phase(H100, config, [size], 2, PEAK).phases
        total = 2 * (16 * 8192 + 256 * 8192)
        assert shrink.memory_bytes + expand.memory_bytes == total
    assert expand.cached
    far = predict.two_phase(H100, config, [Size(1, 14336, 4096, 1024)], 2, PEAK).phases[1]
    assert not far.cached  # 28 MB of u are more than waits in L2


def test_a_group_is_one_launch():
    size = Size(1, 4096, 4096, 128)
    config = tiles(1, 4096, 128)
    one, three = (predict.two_phase(H100, config, [size] * n, 2, PEAK) for n in (1, 3))
    assert one.seconds < three.seconds < 2 * one.seconds


def test_shared_blocks_read_their_rows_again():
    config = RowConfig(64, 128, 64, 128, 4, 4, descriptors=True)
    size = Size(64, 4096, 4096, 128)
    alone, shared = (
        predict.row(H100, config, RowPlan(whole, splits, splits), size, 2, PEAK).phases[0]
        for whole, splits in ((1, 1), (0, 4))
    )
    assert shared.tiles == 4
    assert shared.tile_bytes == alone.tile_bytes - 2 * (128 + 64) * 3072
    assert shared.memory_bytes == alone.memory_bytes


def test_many_rows_take_wide_blocks_of_ranks():
    """64 ranks a tile read x four times at rank 256."""
    assert tiles(4096, 4096, 256).BLOCK_R == 128
    assert tiles(4096, 4096, 64).BLOCK_R == 64


def test_summed_layers_have_an_x_each_and_one_y():
    config = CANDIDATES["sm_90", "16-bit"][-1]
    sizes = [Size(1024, 4096, K, 128) for K in (4096, 1024, 1024)]
    shrink, expand = predict.two_phase(H100, config, sizes, 2, PEAK, summed=True).phases
    factor_s, factor_e = 128 * 6144, 3 * 128 * 4096
    assert shrink.memory_bytes == 2 * (1024 * 6144 + factor_s)
    assert expand.memory_bytes == 2 * (1024 * 4096 + factor_e)
    one = predict.two_phase(H100, config, sizes[:1], 2, PEAK).phases[1]
    assert expand.tiles == one.tiles
    assert expand.tile_flops == 3 * one.tile_flops


def test_weight_gradients_read_every_row_and_write_every_gradient():
    config = WgradConfig(64, 128, 128, 8, 4)
    size = Size(8192, 4096, 1024, 256)
    (phase,) = predict.wgrad(H100, config, [size], 2, PEAK).phases
    assert phase.memory_bytes == 2 * (8192 * (4096 + 1024 + 2 * 256) + 256 * (4096 + 1024))
    tiles = (4096 + 1024) // 128 * 2  # of 132 programs: nothing to split
    assert phase.tiles == tiles
    assert phase.tiles * phase.tile_flops == 2 * 8192 * 256 * (4096 + 1024)
    split = predict.wgrad(H100, config, [Size(8192, 512, 512, 64)], 2, PEAK).phases[0]
    assert split.tiles > 8
    assert split.before == H100_ASSUMED.handover


def test_programs_that_do_not_fit_do_not_run():
    """The report of the compilers predicts with what registers and shared memory allow."""
    config, size = RowConfig(64, 128, 64, 64, 4, 4, descriptors=True), Size(16384, 4096, 4096, 64)
    plan = RowPlan(256, 1, 256)
    two, one = (predict.row(H100, config, plan, size, 2, PEAK, resident=n).seconds for n in (2, 1))
    assert two < one
    decode = CANDIDATES["sm_90", "16-bit"][0]
    few = Size(16, 14336, 4096, 64)
    planned, more, fewer = (
        predict.two_phase(H100, decode, [few], 2, PEAK, resident=n).seconds for n in (None, 3, 1)
    )
    assert planned == more < fewer  # the grid has no program for a third


def test_a_launch_behind_a_library_product_reads_h_from_the_cache():
    config = EXPAND["sm_90"][2]
    near, far = (Size(M, 4096, 4096, 256) for M in (1024, 8192))
    for size, read in ((near, 0), (far, far.M * 256 * 2)):
        _, phase = predict.expand(H100, config, size, 2, PEAK).phases
        assert phase.memory_bytes == 2 * 4096 * (size.M + 256) + read
        assert phase.tiles == size.M // 128 * 32
        assert phase.tiles * phase.tile_flops == 2 * size.M * 4096 * 256


def test_what_a_launch_of_ours_saves_is_the_pass_of_an_activation():
    """Between 256 and 4096 rows, at every rank that registers do not hold either."""
    for M in (256, 1024, 2048):
        for rank in (128, 256, 512):
            size = Size(M, 4096, 4096, rank)
            found = choose.strategies(H100, M, 4096, 4096, rank, torch.bfloat16)["expand"]
            assert found < library_calls([size], H100, PEAK, 2, activation=True)


def test_only_hopper_and_later_expand_behind_a_library():
    for arch, there in (("sm_80", False), ("sm_89", False), ("sm_90", True), ("sm_100", True)):
        device = replace(H100, arch=arch)
        assert (
            "expand" in choose.strategies(device, 1024, 4096, 4096, 64, torch.bfloat16)
        ) == there
    assert "expand" not in choose.strategies(H100, 1024, 4096, 4096, 64, torch.float32, "tf32")
