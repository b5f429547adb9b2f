"""Gradients of the Triton backend in the interpreter: each kernel, then the whole backward."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch
from triton_support import DEVICE, INTERPRETED, WHY_NOT, needs_kernels, needs_triton

from maestro_kernels import hardware
from maestro_kernels.backends import reference
from maestro_kernels.backends import triton as backend
from maestro_kernels.backends.triton import choose
from maestro_kernels.call import Call
from maestro_kernels.ops.gradient import by_halves
from maestro_kernels.problem import describe
from maestro_kernels.testing import assert_accurate, make_inputs

if WHY_NOT is None:
    from triton_interleave import interleaved
    from two_phase_cases import allocations, rank_tensor  # noqa: F401

    from maestro_kernels.backends import workspace
    from maestro_kernels.backends.triton import activation_grad as activation_module
    from maestro_kernels.backends.triton import wgrad
    from maestro_kernels.backends.triton.activation_grad import (
        ActivationGradConfig,
        activation_grad,
    )
    from maestro_kernels.backends.triton.launch import is_aligned, layer_runs, readable_h
    from maestro_kernels.backends.triton.wgrad import WgradConfig, plan_wgrad, weight_grads

    TILES = WgradConfig(16, 16, 32, 4, 2)
    DZ_TILES = ActivationGradConfig(16, 32, 16, 4, 2)

pytestmark = needs_triton
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HALF = (torch.bfloat16, torch.float32)
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
ALL = (True, True, True, True)


def draw(M, N, dtype, seed=0):
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(M, N, generator=generator).to(dtype).to(DEVICE)


def wide(*tensors):
    return [None if t is None else t.double() for t in tensors]


class Products:
    """Operands of the weight gradients of one layer, and what they should be."""

    def __init__(self, M, N, K, R, rank, dtype, *, seed=0, x=None):
        self.R, self.rank = R, rank
        self.dz, self.x = draw(M, N, dtype, seed), draw(M, K, dtype, seed + 1) if x is None else x
        self.h, self.dh = (draw(M, rank, dtype, seed + i) for i in (2, 3))

    def over(self, width):
        """(H, dH) as a rank on the device makes them: `width` columns."""
        return tuple(torch.nn.functional.pad(t, (0, width - self.rank)) for t in (self.h, self.dh))

    def check(self, du, dv, dbias):
        dz, h, dh, x = wide(self.dz, self.h, self.dh, self.x)
        if du is not None:
            assert du.shape == (self.dz.shape[1], self.R)
            assert_accurate("du", du[:, : self.rank], self.dz.mT @ self.h, dz.mT @ h)
            assert (du[:, self.rank :] == 0).all()
        if dv is not None:
            assert dv.shape == (self.R, self.x.shape[1])
            assert_accurate("dv", dv[: self.rank], self.dh.mT @ self.x, dh.mT @ x)
            assert (dv[self.rank :] == 0).all()
        if dbias is not None:
            assert_accurate("dbias", dbias, self.dz.sum(0), dz.sum(0))
        assert {t.dtype for t in (du, dv, dbias) if t is not None} <= {self.dz.dtype}


def run(layers, *, needs=(True, True, True), on_device=False, config="tiles", **options):
    """weight_grads of some layers; needs for u, v, bias."""
    pairs = [layer.over(layer.R) if on_device else (layer.h, layer.dh) for layer in layers]
    ranks = [layer.rank for layer in layers]
    shared = all(layer.x is layers[0].x for layer in layers)
    return weight_grads(
        [layer.dz for layer in layers],
        [h for h, _ in pairs] if needs[0] else None,
        [dh for _, dh in pairs] if needs[1] else None,
        [layer.x for layer in (layers[:1] if shared else layers)],
        [layer.R for layer in layers],
        rank_tensor(*ranks) if on_device else ranks,
        needs_u=needs[0],
        needs_v=needs[1],
        needs_bias=[needs[2]] * len(layers),
        config=TILES if config == "tiles" else config,
        **options,
    )


def idle_counters():
    """A launch leaves the counters as it found them."""
    device = torch.device(DEVICE)
    return bool((workspace.counters(device, 1) == 0).all())


@needs_kernels
class TestWeightGrads:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("on_device", [False, True])
    @pytest.mark.parametrize(
        ("M", "N", "K", "R", "rank"),
        [(150, 72, 40, 40, 33), (1, 40, 33, 24, 24), (50, 33, 41, 13, 11), (37, 1, 1, 7, 1),
         (130, 33, 40, 50, 17), (20, 40, 36, 24, 0)],
    )  # fmt: skip
    def test_values(self, M, N, K, R, rank, dtype, on_device):
        layer = Products(M, N, K, R, rank, dtype)
        found = run([layer], on_device=on_device)
        layer.check(*(gradient for (gradient,) in found))
        assert idle_counters()

    @pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
    def test_only_what_is_asked_for(self, needs):
        layer = Products(70, 40, 36, 24, 17, torch.bfloat16)
        found = [gradient for (gradient,) in run([layer], needs=needs)]
        assert [gradient is not None for gradient in found] == list(needs)
        layer.check(*found)

    @pytest.mark.parametrize("on_device", [False, True])
    @pytest.mark.parametrize("shared", [False, True])
    def test_group(self, on_device, shared):
        x = draw(90, 48, torch.bfloat16, 9) if shared else None
        sizes = ((33, 24, 17), (72, 64, 50), (16, 8, 8), (40, 24, 0))
        layers = [
            Products(90, N, 48 if shared else 20 + 7 * i, R, rank, torch.bfloat16, seed=10 * i, x=x)
            for i, (N, R, rank) in enumerate(sizes)
        ]
        for layer, *found in zip(layers, *run(layers, on_device=on_device), strict=True):
            layer.check(*found)
        assert idle_counters()

    def test_biases_of_some_layers(self):
        layers = [Products(60, 40, 20, 16, 9, torch.float32, seed=i) for i in range(3)]
        dbiases = weight_grads(
            [p.dz for p in layers], [p.h for p in layers], None, [layers[0].x], [16] * 3, [9] * 3,
            needs_u=True, needs_v=False, needs_bias=[False, True, False], config=TILES,
        )[2]  # fmt: skip
        assert [d is not None for d in dbiases] == [False, True, False]
        layers[1].check(None, None, dbiases[1])

    def test_more_layers_than_a_launch_takes(self):
        rows = [20] * 9 + [33] * 2
        layers = [Products(M, 20, 18, 8, 5, torch.float32, seed=i) for i, M in enumerate(rows)]
        runs = list(layer_runs([layer.dz for layer in layers]))
        assert runs == [slice(0, 8), slice(8, 9), slice(9, 11)]
        for layer, *found in zip(layers, *run(layers), strict=True):
            layer.check(*found)

    @pytest.mark.parametrize("on_device", [False, True])
    def test_programs_and_their_order_change_nothing(self, on_device):
        layers = [Products(130, 20, 33, 40, rank, torch.bfloat16, seed=rank) for rank in (33, 7)]

        def flat(**options):
            found = run(layers, on_device=on_device, **options)
            assert idle_counters()
            return [gradient for column in found for gradient in column]

        first = flat(num_programs=1)
        for programs in (1, 2, 7):
            assert all(map(torch.equal, first, flat(num_programs=programs)))
        if not INTERPRETED:
            return
        for seed, programs in ((0, 2), (1, 7)):
            with interleaved(seed) as launches:
                again = flat(num_programs=programs)
            # Stores and atomics of splits that really overlapped.
            assert launches[0].switches > 100
            assert all(map(torch.equal, first, again))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("R", [40, 130])
    def test_shipped_tiles(self, dtype, R):
        layer = Products(200, 136, 70, R, R - 3, dtype)
        layer.check(*(gradient for (gradient,) in run([layer], config=None)))

    def test_zeros_beyond_the_rank_beside_nan(self):
        layer = Products(50, 40, 36, 24, 13, torch.bfloat16)
        layer.dz[7, 3] = layer.x[7, 3] = float("nan")
        (du,), (dv,), _ = run([layer])
        assert not du.isfinite().all()
        assert not dv.isfinite().all()
        assert (du[:, 13:] == 0).all()
        assert (dv[13:] == 0).all()

    def test_rows_further_apart(self):
        layer = Products(50, 40, 36, 24, 13, torch.bfloat16)
        layer.dz = draw(100, 60, torch.bfloat16)[::2, 3:43]
        layer.x = draw(1, 36, torch.bfloat16).expand(50, 36)
        layer.check(*(gradient for (gradient,) in run([layer])))


def test_h_is_copied_only_where_its_rows_are_not_aligned():
    storage = torch.randn(5, 32)
    for good in (storage, storage[:, :13], storage[1:, 16:29]):
        assert readable_h(good) is good
    for bad in (torch.randn(5, 13), storage[:, 1:14], storage[:, :13].mT.contiguous().mT):
        copy = readable_h(bad)
        assert torch.equal(copy, bad)
        assert copy.stride(0) % 16 == 0
        padding = copy.as_strided((5, 16), (copy.stride(0), 1))[:, 13:]
        assert (padding == 0).all()  # kernels multiply what they read there by finite factors
    ends_inside = torch.randn(4 * 16 + 13).as_strided((5, 13), (16, 1))
    assert readable_h(ends_inside) is not ends_inside  # 16 bytes at once would read past the end


def test_plan_splits_m_where_tiles_are_few():
    def plan(M, *sizes, config=TILES):
        return plan_wgrad(hardware.H100, config, M, sizes)

    large = WgradConfig(64, 128, 128, 8, 4)
    many = plan(8192, (14336, 256, 256), (4096, 256, 256), config=large)
    assert (many.max_split, many.partials, many.num_programs) == (1, 1, 2 * (112 + 32))
    few = plan(8192, (4096, 64, 64), (4096, 64, 64), config=large)
    assert few.max_split == 16  # sqrt(2 * 8192 / 64)
    assert few.partials == 132 * (128 * 128 + 128)
    assert plan(64, (4096, 64, 64), config=large).max_split == 1  # one step: nothing to split
    # Only the device knows the rank: it may be as small as one tile.
    assert plan(8192, (14336, 256, None), config=large).max_split == 16
    # An active rank, not the width, says how many tiles there are; the grid has the others too.
    narrow = plan(8192, (14336, 1024, 64), config=large)
    assert (narrow.max_split, narrow.num_programs) == (1, 112 * 8)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("precision", ["half", "tf32", "ieee"])
@pytest.mark.parametrize("aligned", [False, True])
def test_choices_ship(arch, precision, aligned):
    for R in (1, 64, 65, 4096):
        config = wgrad.choose_config(R, precision, arch, aligned=aligned)
        assert config in wgrad.SHIPPED[arch]
        assert config.precision == precision
    for M, N in ((1, 1), (64, 4096), (8192, 14336)):
        config = activation_module.choose_config(M, N, precision, arch, 132, aligned=aligned)
        assert config in activation_module.SHIPPED[arch]
        assert config.precision == precision


def test_tiles_follow_sizes_and_alignment():
    def rows(M, **options):
        return activation_module.choose_config(M, 4096, "half", "sm_90", 132, **options).BLOCK_M

    assert (rows(64), rows(8192), rows(8192, aligned=False)) == (64, 128, 64)

    def tile(R, **options):
        config = wgrad.choose_config(R, "half", "sm_90", **options)
        return config.BLOCK_R * config.BLOCK_W

    assert tile(65) == 2 * tile(64) == 4 * tile(65, aligned=False)


def test_what_is_aligned():
    storage = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert is_aligned(storage, storage[:, :32], storage[:, 8:24])
    for odd in (storage[:, :40], storage[:, 4:20], torch.zeros(8, 40), torch.zeros(8, 40)[:, :32]):
        assert not is_aligned(storage, odd)


@needs_kernels
class TestActivationGrad:
    def check(self, dz, dy, h, u, bias, activation):
        """Against float64; the two-matmul form rounds z to the dtype."""
        z = h @ u.mT if bias is None else h @ u.mT + bias
        dy64, h64, u64, bias64 = wide(dy, h, u, bias)
        z64 = h64 @ u64.mT + (0 if bias is None else bias64)
        two = reference.activation_backward(dy, z, activation)
        assert_accurate("dz", dz, two, reference.activation_backward(dy64, z64, activation))
        assert dz.dtype == dy.dtype

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("on_device", [False, True])
    def test_from_h(self, dtype, activation, on_device):
        h, u, bias = draw(50, 13, dtype), draw(72, 24, dtype, 1) / 3, draw(1, 72, dtype, 2)[0]
        u[:, 13:] = 1e3
        dy = draw(50, 72, dtype, 3)
        given = torch.nn.functional.pad(h, (0, 11)) if on_device else h
        rank = rank_tensor(13)[0] if on_device else 13
        dz = activation_grad(dy, given, u, bias, None, rank, activation, config=DZ_TILES)
        self.check(dz, dy, h, u[:, :13], bias, activation)

    @pytest.mark.parametrize(("N", "R", "rank"), [(1, 1, 1), (33, 13, 11), (40, 100, 97)])
    def test_odd_widths_without_bias(self, N, R, rank):
        h, u = draw(19, rank, torch.bfloat16), draw(N, R, torch.bfloat16, 1) / 3
        dy = draw(19, N, torch.bfloat16, 3)
        dz = activation_grad(dy, h, u, None, None, rank, "gelu", config=DZ_TILES)
        self.check(dz, dy, h, u[:, :rank], None, "gelu")

    def test_relu_from_y_is_exact(self):
        dy, y = draw(50, 72, torch.bfloat16), draw(50, 72, torch.bfloat16, 1).relu()
        u = draw(72, 8, torch.bfloat16)
        dz = activation_grad(dy, None, u, None, y, 8, "relu", config=DZ_TILES)
        assert torch.equal(dz, torch.ops.aten.threshold_backward(dy, y, 0))

    def test_shipped_tiles_and_a_single_gradient_expanded(self):
        h, u = draw(130, 48, torch.float32), draw(200, 48, torch.float32, 1)
        dy = draw(1, 200, torch.float32).expand(130, 200)
        dz = activation_grad(dy, h, u, None, None, 48, "silu")
        self.check(dz, dy, h, u, None, "silu")


def expected(xs, us, vs, biases, ranks, activations, dys):
    """Gradients by autograd of the reference: (dxs, dus, dvs, dbiases)."""
    leaves = [[t.detach().clone().requires_grad_() for t in ts] for ts in (xs, us, vs, biases)]
    for i, (dy, rank, activation) in enumerate(zip(dys, ranks, activations, strict=True)):
        x = leaves[0][0 if len(xs) == 1 else i]
        y = reference.lod_linear_ref(
            x, *(leaf[i] for leaf in leaves[1:]), rank=rank, activation=activation
        )
        y.backward(dy)
    return [[leaf.grad for leaf in column] for column in leaves]


def compare(found, xs, us, vs, biases, ranks, activations, dys, needs=ALL):
    args = (xs, us, vs, biases)
    two = expected(*args, ranks, activations, dys)
    exact = expected(*(wide(*t) for t in args), ranks, activations, wide(*dys))
    for name, need, *columns in zip(
        ("dx", "du", "dv", "dbias"), needs, found, two, exact, strict=True
    ):
        for i, (gradient, torch_out, ref64) in enumerate(zip(*columns, strict=True)):
            assert (gradient is not None) == need, name
            if need:
                assert gradient.dtype == torch_out.dtype
                assert_accurate(f"{name}[{i}]", gradient, torch_out, ref64)
    for rank, du, dv in zip(ranks, *found[1:3], strict=True):
        assert du is None or (du[:, rank:] == 0).all()
        assert dv is None or (dv[rank:] == 0).all()


def layer_inputs(M, N, K, R, rank, dtype, seed=0):
    x, u, v, bias = make_inputs(M, N, K, R, dtype=dtype, device=DEVICE, seed=seed)
    u[:, rank:], v[rank:] = 1e3, -1e3
    return x, u, v, bias


@needs_kernels
class TestBackward:
    def check(self, dtype, activation, *, strategy="two_phase", rank=13, saved=True, needs=ALL,
              device_rank=None, R=24, dy=None):  # fmt: skip
        x, u, v, bias = layer_inputs(37, 72, 40, R, rank, dtype)
        dy = draw(37, 72, dtype) if dy is None else dy
        given = rank if device_rank is None else rank_tensor(device_rank)[0]
        given = [given] if device_rank is None else given
        call = Call("lod_linear", [x], [u], [v], [bias], given, [activation])
        ys, hs = backend.forward(call, save_h=True, strategy=strategy)
        none = [None]
        own = backend, strategy
        *found, _, _ = by_halves(
            own, own, call, [dy], hs if saved else none, ys if saved else none, needs=needs
        )
        compare(found, [x], [u], [v], [bias], [rank], [activation], [dy], needs)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
    @pytest.mark.parametrize("strategy", ["row", "two_phase"])
    @pytest.mark.parametrize("saved", [False, True])
    def test_against_autograd(self, dtype, activation, strategy, saved):
        self.check(dtype, activation, strategy=strategy, saved=saved)

    @pytest.mark.parametrize("strategy", ["row", "two_phase"])
    @pytest.mark.parametrize("saved", [False, True])
    @pytest.mark.parametrize("given", [-2, 0, 1, 23, 24, 99])
    def test_rank_on_the_device_is_clamped(self, strategy, saved, given):
        rank = min(max(given, 0), 24)
        options = {"strategy": strategy, "saved": saved, "rank": rank, "device_rank": given}
        self.check(torch.bfloat16, "gelu", **options)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
    @pytest.mark.parametrize("saved", [False, True])
    @pytest.mark.parametrize("rank", [1, 13, 24])
    def test_of_library_products(self, dtype, activation, saved, rank):
        self.check(dtype, activation, strategy="expand", saved=saved, rank=rank)

    @pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
    def test_of_library_products_only_what_is_asked_for(self, needs):
        for activation, saved in ((None, True), ("gelu", False)):
            options = {"needs": needs, "saved": saved, "strategy": "expand"}
            self.check(torch.bfloat16, activation, **options)

    @pytest.mark.parametrize("strategy", ["row", "two_phase"])
    @pytest.mark.parametrize(("R", "rank"), [(1, 1), (13, 12), (24, 1), (24, 23), (65, 65)])
    def test_ranks(self, strategy, R, rank):
        self.check(torch.bfloat16, "silu", strategy=strategy, R=R, rank=rank)

    @pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
    @pytest.mark.parametrize("strategy", ["row", "two_phase"])
    def test_only_what_is_asked_for(self, needs, strategy):
        for activation, saved in ((None, True), ("gelu", False)):
            self.check(torch.float32, activation, strategy=strategy, needs=needs, saved=saved)

    @pytest.mark.parametrize("activation", [None, "silu"])
    def test_gradient_of_a_sum(self, activation):
        dy = torch.ones((), dtype=torch.bfloat16, device=DEVICE).expand(37, 72)
        self.check(torch.bfloat16, activation, dy=dy)

    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("saved", [False, True])
    @pytest.mark.parametrize("on_device", [False, True])
    @pytest.mark.parametrize(
        "needs", [ALL, (True, False, False, False), (False, True, True, False)]
    )
    def test_group(self, shared, saved, on_device, needs):
        sizes, activations = ((40, 24, 17), (33, 16, 16), (65, 48, 5)), (None, "silu", "gelu")
        layers = [
            layer_inputs(21, N, 40, R, rank, torch.bfloat16, seed)
            for seed, (N, R, rank) in enumerate(sizes)
        ]
        xs, us, vs, biases = map(list, zip(*layers, strict=True))
        xs = xs[:1] if shared else xs
        ranks = [rank for _, _, rank in sizes]
        given = rank_tensor(*ranks) if on_device else ranks
        dys = [draw(21, N, torch.bfloat16, i) for i, (N, _, _) in enumerate(sizes)]
        call = Call("lod_linear_grouped", xs, us, vs, biases, given, activations)
        ys, hs = backend.forward(call, save_h=True, strategy="two_phase")
        none = [None] * 3
        own = backend, "two_phase"
        *found, _, _ = by_halves(
            own, own, call, dys, hs if saved else none, ys if saved else none, needs=needs
        )
        compare(found, xs, us, vs, biases, ranks, activations, dys, needs)

    def test_group_with_a_layer_without_bias_or_rank_or_rows(self):
        inputs = [
            layer_inputs(M, 12, 16, 8, r, torch.float32, r) for M, r in ((4, 0), (0, 3), (5, 8))
        ]
        xs, us, vs, biases = map(list, zip(*inputs, strict=True))
        dys = [draw(x.shape[0], 12, torch.float32) for x in xs]
        needs, ranks, none = (True, True, True, True), [0, 3, 8], [None] * 3
        call = Call("lod_linear_grouped", xs, us, vs, [*biases[:2], None], ranks, none)
        own = backend, "two_phase"
        *found, _, _ = by_halves(own, own, call, dys, none, none, needs=needs)
        assert found[3].pop() is None
        two = expected(xs, us, vs, biases, ranks, none, dys)
        for column, other in zip(found, two, strict=True):
            for gradient, torch_out in zip(column, other, strict=False):
                torch.testing.assert_close(gradient, torch_out)

    def test_repeats_bitwise(self):
        x, u, v, bias = layer_inputs(300, 72, 40, 24, 20, torch.bfloat16)
        dy = draw(300, 72, torch.bfloat16)

        def once():
            call = Call("lod_linear", [x], [u], [v], [bias], [20], ["gelu"])
            none, own = [None], (backend, "two_phase")
            *found, _, _ = by_halves(own, own, call, [dy], none, none, needs=ALL)
            return [of_layer[0] for of_layer in found]

        assert all(map(torch.equal, once(), once()))


def problem(M=8192, N=4096, K=4096, R=128, rank=128, dtype=torch.bfloat16, x=None):
    made = describe(torch.empty(1, K, device="meta"), *(torch.empty(1, R, device="meta"),
                    torch.empty(R, K, device="meta")), None, rank, None)  # fmt: skip
    stride = (K, 1) if x is None else x
    cpu = torch.device("cpu")
    return replace(made, M=M, N=N, K=K, rank=rank, dtype=dtype, device=cpu, x_stride=stride)


def test_strategy_follows_rows_rank_and_precision():
    def strategy(device=hardware.H100, **sizes):
        return backend.choose_strategy(problem(**sizes), device)[0]

    assert strategy(M=16384) == "row"
    assert strategy(M=64) == "two_phase"
    assert strategy(M=4096) == "expand"  # half of the cores would have no rows
    assert strategy(M=4096, rank=None) == "two_phase"  # no descriptor ends at an unknown rank
    # TMA cannot read such rows of u, nor write such rows of y, and tiles in two phases are small.
    assert strategy(M=4096, R=100, rank=100) == "row"
    assert strategy(M=4096, N=4100) == "row"
    assert strategy(M=1024, R=260, rank=260) == "two_phase"
    a100 = replace(hardware.H100, arch="sm_80")
    assert strategy(M=4096, device=a100) == "two_phase"
    assert strategy(M=8192, R=64, rank=64) == "row"
    assert strategy(M=64, device=replace(a100, num_cores=1)) == "row"
    assert strategy(R=512, rank=257, device=a100) == "two_phase"  # wider than the registers
    assert strategy(R=512, rank=257) == "expand"
    assert strategy(R=256, rank=64) == "row"
    assert strategy(R=256, rank=None, M=7000) == "two_phase"  # it may be 256
    assert strategy(R=64, rank=None) == "row"
    assert strategy(dtype=torch.float32) == "two_phase"
    group = (problem(), problem())
    assert backend.choose_strategy(group, hardware.H100)[0] == "two_phase"
    assert "2 layers" in backend.choose_strategy(group)[1]
    why = backend.choose_strategy(problem(M=1))[1]
    assert re.fullmatch(
        r"predicted µs: [\d.]+ with H in registers, [\d.]+ in two phases, "
        r"[\d.]+ after a library's product",
        why,
    )
    why = backend.choose_strategy(problem(R=512, rank=None))[1]
    assert why == "H of rank 512 does not fit into registers"


@pytest.mark.parametrize("rank", [16, 64, 128, 256])
def test_the_strategy_is_the_one_of_the_smaller_prediction(rank):
    for M in (64, 1000, 4096, 8448, 9000, 20000):
        sizes = (M, 4096, 4096, rank, torch.bfloat16)
        seconds = choose.strategies(hardware.H100, *sizes)
        assert list(seconds) == ["row", "two_phase", "expand"]
        chosen, _ = backend.choose_strategy(problem(M=M, R=rank, rank=rank), hardware.H100)
        assert seconds[chosen] == min(seconds.values())
        unknown = replace(hardware.H100, bandwidth=None, peak_flops=())
        assert choose.strategies(unknown, *sizes) == seconds


def test_tf32_is_asked_for_only_where_torch_allows_it(monkeypatch):
    assert backend.input_precision() == "ieee"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert backend.input_precision() == "tf32"
    assert backend.choose_strategy(problem(dtype=torch.float32), hardware.H100)[0] == "row"


def test_reasons_of_what_cannot_be_served(monkeypatch):
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    assert backend.unsupported(problem()) is None
    assert "not torch.float64" in backend.unsupported(problem(dtype=torch.float64))
    assert "last stride 1, not 2" in backend.unsupported(problem(x=(8192, 2)))
    assert backend.unsupported(problem(K=1, x=(1, 5))) is None  # one column has no neighbour
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    assert "TRITON_INTERPRET=1" in backend.unsupported(problem())
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert backend.unsupported(problem()) == "triton is not installed"
