"""Library matmuls for a group that reads one x: one product with all v, then one per layer."""

from dataclasses import replace

import pytest
import torch
from first_use_support import measuring, times  # noqa: F401 - fixtures
from torch.utils._python_dispatch import TorchDispatchMode

import maestro_kernels as mk
from maestro_kernels.backends import matmul, reference, workspace
from maestro_kernels.call import Call
from maestro_kernels.ops.gradient import by_halves
from maestro_kernels.problem import describe_call

SIZES = ((48, 16), (24, 9), (24, 5))  # N, R
K, M = 40, 7


def factors(dtype=torch.float64):
    us = [torch.randn(N, R, dtype=dtype) for N, R in SIZES]
    vs = [torch.randn(R, K, dtype=dtype) for _, R in SIZES]
    biases = [torch.randn(48, dtype=dtype), None, torch.randn(24, dtype=dtype)]
    return us, vs, biases


def call_of(us, vs, biases, ranks, activation=None):
    x = torch.randn(M, K, dtype=us[0].dtype)
    return Call("lod_linear_grouped", (x,), us, vs, biases, ranks, [activation] * len(us))


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("ranks", [(16, 9, 5), (11, 1, 5)])
def test_one_shrink_computes_what_the_reference_does(ranks, activation):
    us, vs, biases = factors()
    call = call_of(us, vs, biases, ranks, activation)
    ys, hs = matmul.forward(call, save_h=True, strategy=matmul.ONE_SHRINK)
    expected, right_hs = reference.forward(call, save_h=True, strategy="")
    for found, right in zip([*ys, *hs], [*expected, *right_hs], strict=True):
        torch.testing.assert_close(found, right)
    dys = [torch.randn_like(y) for y in ys]
    none = [None] * 3
    for needs in ((1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 1), (0, 0, 1, 0)):
        for kept in (hs, none):
            found, right = (
                by_halves(own, own, call, dys, kept, none, needs=needs)
                for own in ((matmul, matmul.ONE_SHRINK), (reference, ""))
            )
            for some, others in zip(found, right, strict=True):
                for a, b in zip(some, others, strict=True):
                    assert (a is None) == (b is None)
                    if a is not None:
                        torch.testing.assert_close(a, b)


def test_l_layers_take_l_plus_1_products():
    call = call_of(*factors(), (16, 9, 5))
    for strategy, products in ((matmul.ONE_SHRINK, 4), (matmul.TWO, 6)):
        with Products() as count:
            matmul.forward(call, save_h=True, strategy=strategy)
        assert count.products == products


def test_what_v_hold_beyond_their_ranks_does_not_matter():
    us, vs, biases = factors()
    for u, v, r in zip(us, vs, (11, 1, 5), strict=True):
        u[:, r:], v[r:] = float("nan"), float("inf")
    ys, _ = matmul.forward(
        call_of(us, vs, biases, (11, 1, 5)), save_h=True, strategy=matmul.ONE_SHRINK
    )
    assert all(y.isfinite().all() for y in ys)


class Kernels(TorchDispatchMode):
    """Notes what a GPU would run: every op but views and allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not (func.is_view or func.overloadpacket is torch.ops.aten.empty):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_rank_on_the_device_costs_a_mask_and_two_selections(dtype):
    x, u, v = (torch.empty(*s, dtype=dtype, device="meta") for s in ((7, 40), (24, 9), (9, 40)))
    bias, rank = u.new_empty(24), torch.empty((), dtype=torch.int32, device="meta")
    matmul.layer(x, u, v, bias, rank, None)  # makes what is kept
    with Kernels() as ran:
        matmul.layer(x, u, v, bias, rank, None)
    assert sorted(ran.names) == ["addmm", "ge", "masked_fill_", "mm", "where"]
    with Kernels() as ran:
        matmul.layer(x, u, v, bias, 5, None)
    assert ran.names == ["mm", "addmm"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("r", [-1, 0, 5, 9, 12])
def test_what_lies_beyond_a_rank_on_the_device_does_not_matter(monkeypatch, r, dtype):
    """The host reads no rank of a GPU: as here, where it may read none."""
    monkeypatch.setattr(matmul, "host_rank", lambda rank, R: rank)
    monkeypatch.setattr(workspace, "_ramps", {})
    x, u, v = (torch.randn(*s).to(dtype) for s in ((7, 40), (24, 9), (9, 40)))
    kept = min(max(r, 0), 9)
    expected, h = reference.lod_linear_ref(x, u, v, rank=kept), x @ v[:kept].mT
    u[:, kept:], v[kept:] = float("nan"), float("inf")
    y, found = matmul.layer(x, u, v, None, torch.tensor(r, dtype=torch.int32), None)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(found[:, :kept], h)
    assert found.shape == (7, 9)
    assert not found[:, kept:].any()


def test_a_wide_layer_behind_a_narrow_one_has_all_its_ranks():
    for count in (3, 5000, 7):
        index, zero = workspace.ramp(torch.device("cpu"), count, torch.float64)
        assert torch.equal(index, torch.arange(count, dtype=torch.int32))
        assert zero == 0
        assert zero.dtype == torch.float64


def test_auto_measures_it_for_groups_and_trains_through_it(times):  # noqa: F811
    clock = times(**{"matmul: one shrink": 10.0})
    us, vs, biases = factors(torch.float32)
    x = torch.randn(M, K)
    ranks = [11, 9, 5]
    leaves = [t.requires_grad_() for t in (x, *us, *vs, biases[0], biases[2])]
    ys = mk.lod_linear_grouped(x, us, vs, biases, ranks=ranks)
    assert "matmul: one shrink" in clock.timed
    plan = mk.explain(x, us, vs, biases, rank=ranks).plan
    assert (plan.backend, plan.strategy) == ("matmul", matmul.ONE_SHRINK)
    dys = [torch.randn_like(y) for y in ys]
    found = torch.autograd.grad(ys, leaves, dys)
    ys = mk.lod_linear_grouped(x, us, vs, biases, ranks=ranks, backend="reference")
    for grad, right in zip(found, torch.autograd.grad(ys, leaves, dys), strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-4)
    # A pass that reaches one layer only.
    ys = mk.lod_linear_grouped(x, us, vs, biases, ranks=ranks)
    torch.testing.assert_close(
        torch.autograd.grad(ys[1].sum(), us[1])[0],
        torch.autograd.grad(mk.lod_linear(x, us[1], vs[1], rank=9).sum(), us[1])[0],
        rtol=1e-4,
        atol=1e-4,
    )


def test_it_serves_no_call_that_it_cannot():
    us, vs, biases = factors()
    group = describe_call(call_of(us, vs, biases, (16, 9, 5)))
    assert matmul.takes_one_shrink(group, shared_x=True)
    assert not matmul.takes_one_shrink(group, shared_x=False)
    assert not matmul.takes_one_shrink(group[:1], shared_x=True)
    for rank in (0, None):
        assert not matmul.takes_one_shrink([group[0], replace(group[1], rank=rank)], shared_x=True)
