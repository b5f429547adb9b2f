"""The two-phase kernel for a group: different N, R and ranks, one x or one each, y and dx."""

from __future__ import annotations

import pytest
import torch
from triton_support import DEVICE, INTERPRETED, WHY_NOT, needs_kernels, needs_triton

if WHY_NOT is None:
    from triton_interleave import interleaved
    from two_phase_cases import Layer, allocations, rank_tensor  # noqa: F401

    from maestro_kernels.backends import workspace
    from maestro_kernels.backends.triton import two_phase
    from maestro_kernels.backends.triton.two_phase import MAX_LAYERS, TwoPhaseConfig
    from maestro_kernels.testing import assert_accurate

    TILES = TwoPhaseConfig(16, 32, 16, 16, 4, 2)

pytestmark = [needs_triton, needs_kernels]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# N, R, rank, bias, activation: of a group; the second has no work in phase 1
QKV = ((72, 40, 33, True, None), (40, 16, 0, True, "gelu"), (56, 24, 24, False, "silu"))


def group(dtype, *, M=37, Ks=(72,), layers=QKV):
    """Layers on one x (one K) or on one each."""
    shared = torch.randn(M, Ks[0], device=DEVICE).to(dtype) if len(Ks) == 1 else None
    Ks = Ks * len(layers) if len(Ks) == 1 else Ks
    return [
        Layer.make(M, N, K, R, rank, dtype, bias=bias, activation=activation, seed=i, x=shared)
        for i, (K, (N, R, rank, bias, activation)) in enumerate(zip(Ks, layers, strict=True))
    ]


def ranks_of(layers, tensor):
    ranks = tuple(layer.rank for layer in layers)
    return rank_tensor(*ranks) if tensor else ranks


def forward(layers, *, shared, tensor=False, **options):
    options = {"save_h": True, "config": TILES, "num_programs": 2} | options
    return two_phase.two_phase_grouped(
        [layers[0].x] if shared else [layer.x for layer in layers],
        [layer.v for layer in layers],
        [layer.u for layer in layers],
        [layer.bias for layer in layers],
        ranks_of(layers, tensor),
        [layer.activation for layer in layers],
        **options,
    )


def backward(layers, *, shared, tensor=False, **options):
    options = {"config": TILES, "num_programs": 2} | options
    return two_phase.two_phase_dx_grouped(
        [layer.x for layer in layers],
        [layer.u for layer in layers],
        [layer.v for layer in layers],
        ranks_of(layers, tensor),
        shared_x=shared,
        **options,
    )


def check(layers, ys, hs, *, tensor=False):
    assert len(ys) == len(layers)
    hs = [None] * len(layers) if hs is None else hs
    for layer, y, h in zip(layers, ys, hs, strict=True):
        layer.check(y, h, tensor_rank=tensor)


def with_dy(layers):
    """The same layers with x replaced by a dy (M, N)."""
    for layer in layers:
        layer.x = torch.randn(layer.x.shape[0], layer.u.shape[0], device=DEVICE).to(layer.x.dtype)
    return layers


def check_shared_dx(layers, dx):
    """One dx: the sum over the layers, against the sum of rounded products and of exact ones."""
    parts = [(t.x, t.u[:, : t.rank], t.v[: t.rank]) for t in layers]
    two = sum((dy @ u) @ v for dy, u, v in parts)
    exact = sum((dy.double() @ u.double()) @ v.double() for dy, u, v in parts)
    assert_accurate("dx", dx, two, exact)


@pytest.mark.parametrize("tensor", [False, True], ids=["int", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_x(dtype, tensor):
    layers = group(dtype)
    check(layers, *forward(layers, shared=True, tensor=tensor), tensor=tensor)


@pytest.mark.parametrize("tensor", [False, True], ids=["int", "tensor"])
def test_one_x_each(tensor):
    layers = group(torch.bfloat16, Ks=(72, 33, 104))
    ys, hs = forward(layers, shared=False, tensor=tensor, save_h=False)
    assert hs is None
    check(layers, ys, None)


def test_one_activation_for_all_and_no_bias():
    layers = group(torch.float32, layers=((40, 16, 9, False, "relu"), (33, 24, 24, False, "relu")))
    check(layers, *forward(layers, shared=True))


def test_only_some_factors_have_a_width_divisible_by_8():
    """R = 13 beside R = 16: read with exact masks, as NaN beyond the factors shows."""
    layers = group(torch.float32, layers=((40, 13, 11, True, None), (33, 16, 15, True, None)))
    plain = [(layer.u, layer.v) for layer in layers]
    for layer in layers:
        wide = torch.full((layer.u.shape[0], 32), float("nan"), device=DEVICE)
        wide[:, : layer.u.shape[1]] = layer.u
        layer.u = wide[:, : layer.u.shape[1]]
    ys, hs = forward(layers, shared=True)
    for layer, (u, v) in zip(layers, plain, strict=True):
        layer.u, layer.v = u, v
    check(layers, ys, hs)


def test_factors_of_different_layout():
    layers = group(torch.float32)
    layers[0].u = layers[0].u.t().contiguous().t()
    layers[2].v = layers[2].v.t().contiguous().t()
    check(layers, *forward(layers, shared=True))


def test_tensor_ranks_are_clamped_and_may_be_strided():
    layers = group(torch.float32, layers=((40, 16, 16, True, None), (33, 24, 0, True, None)))
    ranks = rank_tensor(99, 7, -4, 7)[::2]
    ys, hs = two_phase.two_phase_grouped(
        [layers[0].x], [t.v for t in layers], [t.u for t in layers], [t.bias for t in layers],
        ranks, [None, None], save_h=True, config=TILES, num_programs=1,
    )  # fmt: skip
    check(layers, ys, hs, tensor=True)


def test_all_ranks_zero():
    layers = group(torch.float32, M=64, layers=((40, 16, 0, True, "relu"), (33, 8, 0, True, None)))
    for tensor in (False, True):
        ys, hs = forward(layers, shared=True, tensor=tensor)
        assert torch.equal(ys[0], layers[0].bias.relu().expand(64, 40))
        assert torch.equal(ys[1], layers[1].bias.expand(64, 33))
        assert all(not h.any() for h in hs)


@pytest.mark.parametrize("tensor", [False, True], ids=["int", "tensor"])
def test_more_layers_than_one_launch_takes(tensor):
    sizes = [(64 + i, 8, i % 9, i % 2 == 0, None) for i in range(MAX_LAYERS + 2)]
    layers = group(torch.float32, M=16, Ks=(20,), layers=sizes)
    check(layers, *forward(layers, shared=True, tensor=tensor), tensor=tensor)


def test_different_numbers_of_rows():
    layers = group(torch.float32, Ks=(70, 33, 50))
    layers[1].x = layers[1].x[:35]
    layers[2].x = layers[2].x[:35]
    check(layers, *forward(layers, shared=False, tensor=True), tensor=True)


@pytest.mark.parametrize("programs", [1, 2, 7])
def test_any_number_of_programs_twice(programs):
    layers = group(torch.bfloat16)
    ys, hs = forward(layers, shared=True, num_programs=1)
    for _ in range(2):
        again, hs_again = forward(layers, shared=True, num_programs=programs)
        assert all(map(torch.equal, again + hs_again, ys + hs))
        assert not workspace.counters(ys[0].device, 1).any()


@pytest.mark.skipif(not INTERPRETED, reason="a GPU interleaves by itself")
@pytest.mark.parametrize("tensor", [False, True], ids=["int", "tensor"])
def test_interleaved_programs(tensor):
    layers, dy_layers = group(torch.float32, M=20), with_dy(group(torch.float32, M=20))

    def both(programs):
        options = {"shared": True, "tensor": tensor, "num_programs": programs}
        ys, hs = forward(layers, **options)
        dxs, dhs = backward(dy_layers, **options)
        return ys + hs + dxs + dhs

    alone = both(1)
    for seed in range(2):
        with interleaved(seed) as launches:
            together = both(5)
        assert [launch.programs for launch in launches] == [5, 5]
        assert all(map(torch.equal, together, alone))
        assert not workspace.counters(layers[0].x.device, 1).any()


@pytest.mark.skipif(not INTERPRETED, reason="watches the interpreter's stores")
@pytest.mark.parametrize("tensor", [False, True], ids=["int", "tensor"])
def test_longest_rank_first(tensor, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    stored = []
    store = InterpreterBuilder.create_masked_store

    def watched(self, pointers, *arguments):
        stored.append(int(pointers.data.flat[0]))
        return store(self, pointers, *arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", watched)
    sizes = ((40, 16, 5, False, None), (40, 48, 33, False, None), (40, 24, 20, False, None))
    layers = group(torch.float32, M=33, layers=sizes)
    ys, _ = forward(layers, shared=True, tensor=tensor, num_programs=1)
    spans = [(y.data_ptr(), y.data_ptr() + y.nbytes) for y in ys]
    order = [i for p in stored for i, (begin, end) in enumerate(spans) if begin <= p < end]
    assert list(dict.fromkeys(order)) == [1, 2, 0]
    assert order == sorted(order, key=[1, 2, 0].index)


@pytest.mark.parametrize("tensor", [False, True], ids=["int", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dx_of_a_shared_x(dtype, tensor):
    layers = with_dy(group(dtype))
    dxs, dhs = backward(layers, shared=True, tensor=tensor)
    assert len(dxs) == 1
    check_shared_dx(layers, dxs[0])
    for layer, dh in zip(layers, dhs, strict=True):
        exact = layer.x.double() @ layer.u[:, : layer.rank].double()
        layer.check_h(dh, layer.x @ layer.u[:, : layer.rank], exact, tensor)


@pytest.mark.parametrize("tensor", [False, True], ids=["int", "tensor"])
def test_dx_of_one_x_each(tensor):
    layers = with_dy(group(torch.bfloat16, Ks=(72, 33, 104)))
    dxs, dhs = backward(layers, shared=False, tensor=tensor)
    for layer, dx, dh in zip(layers, dxs, dhs, strict=True):
        layer.check_dx(dx, dh, tensor_rank=tensor)


def test_dx_of_a_shared_x_in_several_launches():
    sizes = [(20 + i, 8, 8 - i % 3, False, None) for i in range(MAX_LAYERS + 2)]
    layers = with_dy(group(torch.float32, M=64, Ks=(20,), layers=sizes))
    dxs, dhs = backward(layers, shared=True)
    assert len(dxs) == 1
    assert len(dhs) == len(layers)
    check_shared_dx(layers, dxs[0])
