"""The row kernel in the interpreter: values and H against float64, layouts, ranks, tile choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from triton_support import DEVICE, WHY_NOT, needs_kernels

from maestro_kernels.backends import reference
from maestro_kernels.testing import assert_accurate, make_inputs

pytestmark = needs_kernels
if WHY_NOT is None:
    from two_phase_cases import allocations  # noqa: F401

    from maestro_kernels import hardware
    from maestro_kernels.backends.triton import choose, predict, row_config
    from maestro_kernels.backends.triton.row import (
        SHIPPED,
        RowConfig,
        RowPlan,
        plans,
        row,
        row_dx,
        width_bucket,
    )
    from maestro_kernels.measure.cost import Size

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HALF = (torch.bfloat16, torch.float32)
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")


def small(width, *, descriptors=False):
    """Tiles so small that every loop runs several times and ends off the grid."""
    return RowConfig(16, 32, 16, width_bucket(width), 4, 2, descriptors=descriptors)


def inputs(M, N, K, R, dtype, *, rank=None, bias=True, seed=0):
    """make_inputs, with large garbage in what lies beyond the rank."""
    x, u, v, b = make_inputs(M, N, K, R, dtype=dtype, device=DEVICE, bias=bias, seed=seed)
    if rank is not None:
        u[:, rank:] = 1e3
        v[rank:] = -1e3
    return x, u, v, b


def check(y, h, x, u, v, bias, rank, activation):
    """Both results against float64, and against two matmuls for the tolerance."""
    factors = (u[:, :rank], v[:rank])
    h_torch = F.linear(x, factors[1])
    y_torch = reference.ACTIVATIONS[activation](F.linear(h_torch, factors[0], bias))
    wide = [None if t is None else t.double() for t in (x, *factors, bias)]
    y_ref = reference.lod_linear_ref(*wide, activation=activation)
    assert y.dtype == x.dtype
    assert_accurate("y", y, y_torch, y_ref)
    if h is not None:
        assert h.dtype == x.dtype
        assert h.stride(0) % 8 == 0
        assert_accurate("H", h[:, :rank], h_torch, wide[0] @ wide[2].mT)
        assert (h[:, rank:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("descriptors", [False, True])
def test_every_dtype_and_activation(dtype, activation, descriptors):
    tensors = inputs(37, 72, 40, 24, dtype, rank=13)
    config = small(13, descriptors=descriptors)
    y, h = row(tensors[0], tensors[2], tensors[1], tensors[3], 13, activation, save_h=True,
               config=config)  # fmt: skip
    assert h.shape == (37, 13)
    check(y, h, *tensors, 13, activation)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("M", "N", "K", "R", "rank"),
    [(1, 1, 1, 1, 1), (1, 75, 33, 24, 1), (50, 33, 97, 48, 47), (16, 64, 32, 16, 16),
     (33, 37, 41, 7, 5), (19, 40, 21, 65, 65), (18, 35, 50, 200, 129), (7, 33, 20, 256, 255),
     (9, 130, 100, 300, 256)],
)  # fmt: skip
def test_sizes_off_the_grid_and_odd_ranks(M, N, K, R, rank, dtype):
    tensors = x, u, v, bias = inputs(M, N, K, R, dtype, rank=rank)
    y, h = row(x, v, u, bias, rank, "gelu", save_h=True, config=small(rank))
    check(y, h, *tensors, rank, "gelu")


@pytest.mark.parametrize(("R", "rank"), [(64, 1), (64, 16), (64, 33), (64, 64), (128, 127)])
@pytest.mark.parametrize("save_h", [False, True])
def test_descriptors_end_at_the_rank(R, rank, save_h):
    tensors = x, u, v, bias = inputs(35, 72, 56, R, torch.bfloat16, bias=False)
    # Extents end at the rank, so with a plain int even a NaN beyond it is never read.
    u[:, rank:] = float("nan")
    v[rank:] = float("nan")
    y, h = row(x, v, u, bias, rank, None, save_h=save_h, config=small(rank, descriptors=True))
    assert (h is not None) == save_h
    check(y, h, *tensors, rank, None)


@pytest.mark.parametrize(("given", "rank"), [(0, 0), (1, 1), (13, 13), (24, 24), (99, 24), (-3, 0)])
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_rank_on_the_device_is_clamped_and_h_is_zero_beyond(given, rank, descriptors, dtype):
    tensors = x, u, v, bias = inputs(21, 40, 48, 24, dtype, rank=rank)
    device_rank = torch.tensor(given, dtype=torch.int32, device=DEVICE)
    config = small(24, descriptors=descriptors)
    y, h = row(x, v, u, bias, device_rank, "silu", save_h=True, config=config)
    assert h.shape == (21, 24)
    check(y, h, *tensors, rank, "silu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("on_device", [False, True])
def test_dx(dtype, descriptors, on_device):
    _, u, v, _ = inputs(1, 72, 40, 48, dtype, rank=29)
    dy = make_inputs(37, 8, 72, 8, dtype=dtype, device=DEVICE, seed=1)[0]
    rank = torch.tensor(29, dtype=torch.int32, device=DEVICE) if on_device else 29
    config = small(48 if on_device else 29, descriptors=descriptors)
    dx, dh = row_dx(dy, u, v, rank, config=config)
    assert dh.shape == (37, 48 if on_device else 29)
    check(dx, dh, dy, v.t(), u.t(), None, 29, None)


@pytest.mark.parametrize(("R", "rank"), [(25, 18), (256, 250)])
def test_dx_where_the_factors_are_not_aligned(R, rank):
    _, u, v, _ = inputs(1, 33, 41, R, torch.bfloat16, rank=rank)
    dy = make_inputs(20, 8, 33, 8, dtype=torch.bfloat16, device=DEVICE)[0]
    dx, dh = row_dx(dy, u, v, rank)
    check(dx, dh, dy, v.t(), u.t(), None, rank, None)


LAYOUTS = {
    "every other row of x": lambda x, u, v: (x.repeat_interleave(2, 0)[::2], u, v),
    "columns of a wider x": lambda x, u, v: (F.pad(x, (3, 2))[:, 3:-2], u, v),
    "one row of x for all": lambda x, u, v: (x[:1].expand(x.shape), u, v),
    "factors stored transposed": lambda x, u, v: (x, u.mT.contiguous().mT, v.mT.contiguous().mT),
    "every other column of wider factors": lambda x, u, v: (
        x, u.repeat_interleave(2, 1)[:, ::2], v.repeat_interleave(2, 1)[:, ::2]
    ),
    "factors inside larger ones": lambda x, u, v: (
        x, F.pad(u, (0, 5))[:, :-5], F.pad(v, (1, 2))[:, 1:-2]
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALF)
def test_strides(layout, dtype):
    x, u, v, bias = inputs(35, 72, 40, 24, dtype)
    x, u, v = LAYOUTS[layout](x, u, v)
    y, h = row(x, v, u, bias, 24, None, save_h=True)
    check(y, h, x, u, v, bias, 24, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("input_precision", ["ieee", "tf32"])
def test_shipped_tiles(dtype, input_precision):
    tensors = x, u, v, bias = inputs(150, 200, 136, 128, dtype, rank=100)
    y, h = row(x, v, u, bias, 100, "relu", save_h=True, input_precision=input_precision)
    check(y, h, *tensors, 100, "relu")


def test_repeats_bitwise():
    x, u, v, bias = inputs(50, 72, 56, 24, torch.bfloat16)
    first, second = (row(x, v, u, bias, 20, "gelu", save_h=True) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("save_h", [True, False])
@pytest.mark.parametrize(
    "plan", [(3, 1), (0, 2), (0, 3), (1, 2), (2, 3), (2, 5), (1, 9)], ids=str
)  # whole blocks, programs for each of the others; some of nine have no columns
def test_blocks_that_several_programs_share(plan, save_h, allocations):
    """Every element of y and H is written once, and to the bit as by one program."""
    whole, splits = plan
    x, u, v, bias = inputs(37, 200, 40, 24, torch.float32)
    config = small(24)
    alone = row(x, v, u, bias, 24, "gelu", save_h=True, config=config)
    cut = RowPlan(whole, splits, whole + (3 - whole) * splits)
    y, h = row(x, v, u, bias, 24, "gelu", save_h=save_h, config=config, plan=cut)
    assert torch.equal(y, alone[0])
    assert torch.equal(h, alone[1]) if save_h else h is None
    dy = make_inputs(37, 8, 200, 8, dtype=torch.float32, device=DEVICE)[0]
    dx, dh = row_dx(dy, u, v, 24, config=config, plan=cut)
    check(dx, dh, dy, v.t(), u.t(), None, 24, None)


def test_a_last_wave_that_is_nearly_empty_is_shared():
    """64 rows on 132 cores: 9000 are 141 blocks, and no plan leaves a core with two of them."""
    tiles = RowConfig(64, 128, 64, 128, 4, 4, descriptors=True)
    assert tiles.resident == 1
    found = list(plans(tiles, 9000, 4096, 132))
    assert found[0] == RowPlan(141, 1, 141)
    assert {p.num_whole for p in found[1:]} == {132}
    assert max(p.num_splits for p in found) == 132 // 9
    for plan in found:
        assert plan.num_programs == plan.num_whole + (141 - plan.num_whole) * plan.num_splits
    times = [
        predict.row(hardware.H100, tiles, p, Size(9000, 4096, 4096, 128), 2, 800e12).seconds
        for p in found
    ]
    assert min(times) < 0.9 * times[0]
    assert len(list(plans(tiles, 132 * 64, 4096, 132))) == 1  # one full wave: nothing to share
    assert all(p.num_splits <= 2 for p in plans(tiles, 64, 256, 132))  # two blocks of columns


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("precision", ["half", "tf32", "ieee"])
@pytest.mark.parametrize("descriptors", [False, True])
def test_a_width_has_one_configuration_that_ships(arch, precision, descriptors):
    device = replace(hardware.H100, arch=arch)
    dtype = torch.bfloat16 if precision == "half" else torch.float32
    for M in (1, 8192, 1 << 20):
        chosen = {}
        for rank in range(1, 257):
            config, _ = choose.row(
                device, M, 4096, 4096, width_bucket(rank), dtype, precision, descriptors=descriptors
            )
            assert config in SHIPPED[arch]
            assert rank <= config.BLOCK_R < max(2 * rank, 17)
            assert config.precision == precision
            assert not config.descriptors or descriptors
            chosen.setdefault(width_bucket(rank), set()).add(config)
        assert sorted(chosen) == [16, 32, 64, 128, 256]
        assert all(len(configs) == 1 for configs in chosen.values())


def test_tiles_follow_the_number_of_rows():
    def block_m(M, num_cores=132):
        device = replace(hardware.H100, num_cores=num_cores)
        return choose.row(device, M, 4096, 4096, 128, torch.bfloat16)[0].BLOCK_M

    assert block_m(2048) == 64  # 128 rows each would leave most of the cores idle
    assert block_m(132 * 128) == 128
    assert block_m(2048, num_cores=16) == 128
    offered = row_config.candidates("sm_90", 128, "half", descriptors=True)
    assert all(config.descriptors for config in offered)
    assert not any(
        config.descriptors
        for config in row_config.candidates("sm_80", 128, "half", descriptors=True)
    )
