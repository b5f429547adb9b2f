"""The two-phase kernel for one layer: forward, dx, ranks, grids, plans and counters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton_support import DEVICE, INTERPRETED, WHY_NOT, needs_kernels, needs_triton

if WHY_NOT is None:
    from triton_interleave import Deadlock, interleaved
    from two_phase_cases import Layer, allocations, rank_tensor  # noqa: F401

    from maestro_kernels import hardware
    from maestro_kernels.backends import workspace
    from maestro_kernels.backends.triton import choose, layers, two_phase
    from maestro_kernels.backends.triton.two_phase import (
        SHIPPED,
        TwoPhaseConfig,
        plan_two_phase,
    )

    TILES = TwoPhaseConfig(16, 32, 16, 16, 4, 2)
    CONFIGS = sorted({c for arch in SHIPPED.values() for c in arch}, key=str)

pytestmark = needs_triton
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")
# M, N, K, R, rank: off the tile grid, odd ranks, one row, one column; only the first is read in
# pieces of 16 bytes
SHAPES = (
    (37, 72, 104, 40, 33),
    (1, 1100, 70, 24, 24),
    (50, 33, 130, 13, 11),
    (70, 33, 1, 16, 7),
    (260, 4, 33, 8, 3),
)


def forward(layer, rank=None, **options):
    rank = layer.rank if rank is None else rank
    options = {"save_h": True, "config": TILES, "num_programs": 2} | options
    return two_phase.two_phase(
        layer.x, layer.v, layer.u, layer.bias, rank, layer.activation, **options
    )


def backward(layer, rank=None, **options):
    rank = layer.rank if rank is None else rank
    options = {"config": TILES, "num_programs": 2} | options
    return two_phase.two_phase_dx(layer.x, layer.u, layer.v, rank, **options)


def dy_layer(M, N, K, R, rank, dtype):
    """A layer whose x is dy (M, N)."""
    layer = Layer.make(M, N, K, R, rank, dtype, bias=False)
    layer.x = torch.randn(M, N, device=DEVICE).to(dtype)
    return layer


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, dtype):
    layer = Layer.make(*shape, dtype, activation="gelu")
    layer.check(*forward(layer))


@needs_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_bias_and_activation(activation, bias):
    layer = Layer.make(40, 40, 33, 16, 12, torch.float32, bias=bias, activation=activation)
    layer.check(*forward(layer))


@needs_kernels
@pytest.mark.parametrize("config", CONFIGS if WHY_NOT is None else (), ids=str)
def test_shipped_tiles(config):
    dtype = torch.float32 if config.BLOCK_R == 16 else torch.bfloat16
    layer = Layer.make(35, 72, 136, 72, 67, dtype)
    layer.check(*forward(layer, config=config))
    layer = dy_layer(35, 72, 136, 72, 67, dtype)
    layer.check_dx(*backward(layer, config=config))


@needs_kernels
@pytest.mark.parametrize("R", [40, 13])
@pytest.mark.parametrize("place", ["0", "1", "R-1", "R"])
def test_int_and_tensor_rank_agree(R, place):
    rank = {"0": 0, "1": 1, "R-1": R - 1, "R": R}[place]
    layer = Layer.make(33, 40, 48, R, rank, torch.bfloat16, activation="silu")
    y, h = forward(layer)
    layer.check(y, h)
    y_tensor, h_tensor = forward(layer, rank_tensor(rank)[0])
    layer.check(y_tensor, h_tensor, tensor_rank=True)
    assert torch.equal(y, y_tensor)
    y_unsaved, none = forward(layer, rank_tensor(rank)[0], save_h=False)
    assert none is None
    assert torch.equal(y, y_unsaved)


@needs_kernels
@pytest.mark.parametrize(("given", "used"), [(-3, 0), (99, 24)])
def test_tensor_rank_is_clamped(given, used):
    layer = Layer.make(40, 33, 50, 24, used, torch.float32)
    layer.check(*forward(layer, rank_tensor(given)[0]), tensor_rank=True)


@needs_kernels
def test_rank_0_is_the_activated_bias():
    layer = Layer.make(20, 60, 50, 16, 0, torch.float32, activation="gelu")
    for rank in (0, rank_tensor(0)[0]):
        y, _ = forward(layer, rank)
        expected = torch.nn.functional.gelu(layer.bias).expand(20, 60)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize(("N", "K", "R"), [(56, 48, 24), (50, 45, 13)])
def test_nothing_outside_the_factors_is_read(N, K, R):
    """Factors and x are windows in NaN: one element too many would show."""

    def window(tensor, rows=3, columns=16):
        around = torch.full(
            (tensor.shape[0] + rows, tensor.shape[1] + columns),
            float("nan"),
            dtype=tensor.dtype,
            device=tensor.device,
        )
        around[: tensor.shape[0], : tensor.shape[1]] = tensor
        return around[: tensor.shape[0], : tensor.shape[1]]

    def windows(layer):
        return replace(layer, x=window(layer.x), u=window(layer.u), v=window(layer.v))

    # Checked on the tensors themselves: torch's own bf16 product reads beyond such a window.
    for dtype in (torch.float32, torch.bfloat16):
        layer = Layer.make(21, N, K, R, R - 2, dtype)
        layer.check(*forward(windows(layer)))
        layer.check(*forward(windows(layer), rank_tensor(layer.rank)[0]), tensor_rank=True)
        layer = dy_layer(21, N, K, R, R - 2, dtype)
        layer.check_dx(*backward(windows(layer)))


@pytest.mark.parametrize(
    ("change", "layout"),
    [
        (lambda x, v, u, y: (x, v, u, y), "rows"),
        (lambda x, v, u, y: (y, u.t(), v.t(), x), "columns"),
        (lambda x, v, u, y: (x, v, u.t().contiguous().t(), y), "any"),
        (lambda x, v, u, y: (x, v, u, y[:, :15].clone()), "any"),  # N
        (lambda x, v, u, y: (x, v, u[:15], y), "any"),
        (lambda x, v, u, y: (x, v[:12], u[:, :12], y), "any"),  # R
        (lambda x, v, u, y: (x[:, :20], v[:, :20], u, y), "any"),  # K
        (lambda x, v, u, y: (x, v, u.new_zeros(16, 41)[:, :40], y), "any"),  # row stride
        (lambda x, v, u, y: (x.new_zeros(4, 25)[:, :24], v, u, y), "any"),
        (lambda x, v, u, y: (x, v, u.new_zeros(643)[3:].view(16, 40), y), "any"),  # start
    ],
)
def test_layout(change, layout):
    """Multiples of 8 are enough, and one that is missing is noticed."""
    x, v, u, y = (torch.zeros(shape) for shape in ((4, 24), (40, 24), (16, 40), (4, 16)))
    x, s, e, y = change(x, v, u, y)
    assert two_phase._layout([x], [s], [e], [y]) == layout


@needs_kernels
def test_strides():
    layer = Layer.make(80, 40, 72, 24, 20, torch.float32)
    layer.x = layer.x[::2]
    layer.check(*forward(layer))
    layer.u, layer.v = (t.t().contiguous().t() for t in (layer.u, layer.v))
    layer.check(*forward(layer))
    layer.u, layer.v = (torch.stack((t, t), -1).flatten(1)[:, ::2] for t in (layer.u, layer.v))
    layer.check(*forward(layer))


@needs_kernels
def test_offsets_beyond_32_bits():
    layer = Layer.make(3, 400, 32, 16, 16, torch.float16)
    far = torch.empty_strided((3, 32), (1_200_000_000, 1), dtype=torch.float16, device=DEVICE)
    far.copy_(layer.x)
    layer.x = far
    layer.check(*forward(layer))


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((SHAPES[0], dtype) for dtype in DTYPES), *((shape, DTYPES[2]) for shape in SHAPES[1:])],
    ids=str,
)
def test_dx(shape, dtype):
    layer = dy_layer(*shape, dtype)
    dx, dh = backward(layer)
    layer.check_dx(dx, dh)
    dx_tensor, dh_tensor = backward(layer, rank_tensor(layer.rank)[0])
    layer.check_dx(dx_tensor, dh_tensor, tensor_rank=True)
    assert torch.equal(dx, dx_tensor)


@needs_kernels
def test_the_planned_launch_is_right_too():
    """Neither tiles nor programs given."""
    layer = Layer.make(5, 300, 700, 48, 41, torch.bfloat16, activation="relu")
    layer.check(*forward(layer, config=None, num_programs=None))


@needs_kernels
def test_split_sums_go_through_the_slots(allocations):
    """And a launch with enough tiles does not split."""
    tiles = TwoPhaseConfig(16, 16, 16, 16, 8, 2)  # 8 warps: 132 programs are resident
    for M, splits in ((16, True), (16 * 67, False)):
        del allocations[:]
        layer = Layer.make(M, 16, 64, 16, 16, torch.float16)
        layer.check(*forward(layer, config=tiles))
        (partials,) = (a for a in allocations if a.dtype == torch.float32)
        assert bool(partials[64:-64].isfinite().any()) == splits


def idle_counters():
    return not bool(workspace.counters(torch.zeros((), device=DEVICE).device, 1).any())


@needs_kernels
@pytest.mark.parametrize("programs", [1, 2, 7])
def test_any_number_of_programs_twice(programs):
    """Bitwise the same from any grid; the counters are back at zero each time."""
    layer = Layer.make(20, 56, 72, 24, 21, torch.bfloat16)
    y, h = forward(layer, num_programs=1)
    for _ in range(2):
        again, h_again = forward(layer, num_programs=programs)
        assert torch.equal(again, y)
        assert torch.equal(h_again, h)
        assert idle_counters()


@needs_kernels
@pytest.mark.skipif(not INTERPRETED, reason="a GPU interleaves by itself")
class TestInterleaved:
    """Programs that really run side by side, in orders drawn from a seed."""

    @pytest.mark.parametrize("programs", [2, 7])
    @pytest.mark.parametrize("tensor_rank", [False, True])
    def test_order_changes_nothing(self, programs, tensor_rank):
        # float32: an order of the sums that depends on timing would be rounded away in 16 bits.
        layer = Layer.make(20, 40, 104, 24, 20, torch.float32)
        rank = rank_tensor(layer.rank)[0] if tensor_rank else layer.rank
        y, h = forward(layer, rank, num_programs=1)
        for seed in range(3):
            with interleaved(seed) as launches:
                again, h_again = forward(layer, rank, num_programs=programs)
            assert launches[0].programs == programs
            assert launches[0].switches > programs
            assert torch.equal(again, y)
            assert torch.equal(h_again, h)
            assert idle_counters()

    def test_dx(self):
        layer = dy_layer(20, 100, 40, 24, 20, torch.float32)
        for seed in range(3):
            with interleaved(seed):
                layer.check_dx(*backward(layer, num_programs=3))
            assert idle_counters()

    def test_a_wait_without_end_is_seen(self, monkeypatch):
        """The instrument itself: a ready count that is never reached."""
        layer = Layer.make(16, 16, 16, 8, 8, torch.float32)
        counters = torch.zeros(4096, dtype=torch.int32)
        plan = plan_two_phase(hardware.H100, TILES, 16, (16,), (8,))
        counters[plan.counters - 1] = -1
        monkeypatch.setattr(workspace, "counters", lambda *_: counters)
        with pytest.raises(Exception, match=Deadlock.__name__), interleaved(0, limit=2000):
            forward(layer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_every_choice_is_shipped_and_fits(arch, dtype):
    table = "sm_90" if arch in ("sm_90", "sm_100") else "sm_80"
    limit = {"sm_90": 227 * 1024, "sm_100": 227 * 1024, "sm_80": 163 * 1024}.get(arch, 99 * 1024)
    device = replace(hardware.H100, arch=arch)
    for M in (1, 16, 17, 64, 65, 512, 4096, 1 << 20):
        for N in (1, 8192, 8193, 1 << 17):
            for precision in ("ieee", "tf32"):
                sizes = (device, M, (N,), (4096,), (256,), dtype, precision)
                config = choose.two_phase(*sizes)
                small = choose.two_phase(*sizes, aligned=False)
                assert {config, small} <= set(SHIPPED[table])
                assert small.BLOCK_M <= config.BLOCK_M
                assert M > 16 or config.BLOCK_M == 16
                shrink = (config.BLOCK_M + config.BLOCK_R) * config.BLOCK_K
                expand = (config.BLOCK_M + config.BLOCK_N) * config.ranks_per_step
                stages = config.num_stages * dtype.itemsize
                assert max(shrink, expand) * stages <= limit


def test_plan_for_a_recorded_h100():
    small, large = TwoPhaseConfig(16, 32, 128, 32, 4, 4), TwoPhaseConfig(128, 128, 64, 64, 8, 4)
    decode = plan_two_phase(hardware.H100, small, 1, (4096,), (256,))
    assert decode.num_programs == decode.split_target == 2 * 132
    assert decode.partials == 264 * 16 * 32
    wide = plan_two_phase(hardware.H100, large, 32768, (4096, 1024), (256, 128))
    assert wide.num_programs == wide.split_target == 132
    assert wide.partials == 1  # two row blocks for each program: nothing is split
    assert wide.counters == 64 + 132 + 2 * 256
    tiny = plan_two_phase(hardware.H100, large, 128 * 100, (64,), (8,))
    assert tiny.num_programs == 100


def test_rank_encoding_is_never_special():
    """Neither 1 nor a multiple of 16, which Triton would compile variants for; and it decodes."""
    for rank in (*range(300), 1 << 20):
        encoded = layers.encode_rank(rank)
        assert encoded % 16 == 8
        assert encoded >> 4 == rank


def test_a_y_that_is_not_written_does_not_narrow_the_loads():
    x, v, u = (torch.zeros(n, k, dtype=torch.bfloat16) for n, k in ((16, 64), (16, 64), (64, 16)))
    nothing = x.new_empty(16, 0)
    assert nothing.stride(0) % 8
    assert two_phase._layout([x], [v], [u], [nothing]) == "rows"
    assert two_phase._layout([x], [v], [u], [x.new_empty(16, 65)]) == "any"
