"""What u and v hold beyond the rank never matters, NaN and infinity included, on any path."""

from __future__ import annotations

import itertools

import pytest
import torch
from triton_support import INTERPRETED, WHY_NOT

import maestro_kernels as mk
from maestro_kernels.backends import matmul, native, packed, reference
from maestro_kernels.call import Call
from maestro_kernels.ops.gradient import by_halves
from maestro_kernels.testing import make_inputs

INF, NAN = float("inf"), float("nan")
# The interpreter warns of every product with NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

# N, K, R: rows that kernels read in wide pieces, wide factors beside narrow rows, nothing aligned.
SIZES = {"aligned": (72, 40, 24), "eights": (37, 45, 40), "odd": (37, 45, 13)}


def path(name, module, strategy, reason):
    mark = pytest.mark.skipif(reason is not None, reason=str(reason))
    return pytest.param(module, strategy, id=name, marks=mark)


def triton_path(strategy):
    reason = WHY_NOT or (None if INTERPRETED else "compiled kernels: see test_gpu.py")
    if reason is not None:
        return path(strategy, None, strategy, reason)
    from maestro_kernels.backends import triton

    return path(strategy, triton, strategy, None)


PATHS = [
    path("reference", reference, "formula", None),
    path("matmul", matmul, "two matmuls", None),
    path("native", native, "fused", native.load_error()),
    triton_path("row"),
    triton_path("two_phase"),
]


def planted(u, v, rank, what):
    """Copies of the factors with `what` beyond the rank: everywhere, or in one place of each."""
    u, v = u.clone(), v.clone()
    u[:, rank:], v[rank:] = what, what
    if what == INF:  # of both signs: their sum is NaN
        u[::2, rank:], v[rank:, ::2] = -INF, -INF
    return u, v


def ranks_of(R):
    return sorted({0, 1, 8, R // 2 + 1, R - 1})


def same(name, got, expected):
    assert (got is None) == (expected is None)
    if got is not None:
        assert got.isfinite().all(), f"{name} is not finite"
        assert torch.equal(got, expected), f"{name} differs"


def run(module, strategy, x, u, v, bias, rank, activation, dy):
    """(y, H, dx, du, dv, dbias) of one backend, H of the forward used in the backward."""
    ranks = rank if isinstance(rank, torch.Tensor) else [rank]
    call = Call("lod_linear", [x], [u], [v], [bias], ranks, [activation])
    ys, hs = module.forward(call, save_h=True, strategy=strategy)
    own = module, strategy
    *grads, _, _ = by_halves(own, own, call, [dy], hs, ys, needs=(True,) * 4)
    return ys[0], hs[0], *(of_layer[0] for of_layer in grads)


@pytest.mark.parametrize("tensor_rank", [False, True], ids=["int", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("module", "strategy"), PATHS)
def test_of_one_layer(module, strategy, size, dtype, tensor_rank):
    N, K, R = SIZES[size]
    x, u, v, bias = make_inputs(19, N, K, R, dtype=dtype)
    dy = torch.randn(19, N).to(dtype)
    for i, r in enumerate(ranks_of(R)):
        if r == 0 and strategy == "row" and not tensor_rank:
            continue  # no kernel runs
        activation = ("gelu", None, "silu", "relu")[i % 4]
        rank = torch.tensor(r, dtype=torch.int32) if tensor_rank else r
        clean = run(module, strategy, x, *planted(u, v, r, 0), bias, rank, activation, dy)
        for what in (NAN, INF):
            got = run(module, strategy, x, *planted(u, v, r, what), bias, rank, activation, dy)
            for name, a, b in zip(("y", "H", "dx", "du", "dv", "db"), got, clean, strict=True):
                same(f"{name} at rank {r}", a, b)
        assert not clean[3][:, r:].any()
        assert not clean[4][r:].any()


@pytest.mark.parametrize("shared", [False, True], ids=["an x each", "one x"])
@pytest.mark.parametrize("tensor_rank", [False, True], ids=["int", "tensor"])
@pytest.mark.parametrize("backend", ["reference", "matmul", "native", "triton"])
def test_of_a_group(backend, tensor_rank, shared):
    if backend == "native" and native.load_error() is not None:
        pytest.skip(native.load_error())
    if backend == "triton" and (WHY_NOT or not INTERPRETED):
        pytest.skip(WHY_NOT or "compiled kernels: see test_gpu.py")
    sizes, K = ((24, 16, 9), (40, 24, 0), (33, 8, 7), (16, 16, 15)), 40
    made = [
        make_inputs(5, N, K, R, dtype=torch.bfloat16, seed=i) for i, (N, R, _) in enumerate(sizes)
    ]
    ranks = [r for *_, r in sizes]
    given = torch.tensor(ranks, dtype=torch.int32) if tensor_rank else ranks
    activations = [None, "gelu", "relu", "silu"]
    dys = [torch.randn(5, N).bfloat16() for N, *_ in sizes]

    def outputs(what):
        xs = [m[0].clone().requires_grad_() for m in made]
        factors = [planted(m[1], m[2], r, what) for m, r in zip(made, ranks, strict=True)]
        us, vs = ([f[i].requires_grad_() for f in factors] for i in (0, 1))
        ys = mk.lod_linear_grouped(
            xs[0] if shared else xs,
            us,
            vs,
            [m[3] for m in made],
            ranks=given,
            activation=activations,
            backend=backend,
        )
        torch.autograd.backward(ys, dys)
        grads = [t.grad for t in (*(xs[:1] if shared else xs), *us, *vs)]
        return [y.detach() for y in ys], grads

    clean = outputs(0)
    for what in (NAN, INF):
        for kind, a, b in zip(("y", "gradient"), outputs(what), clean, strict=True):
            for i, pair in enumerate(zip(a, b, strict=True)):
                same(f"{kind} {i}", *pair)


@pytest.mark.parametrize("backend", ["reference", "matmul", "native", "triton"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_of_the_op_with_a_tensor_rank_and_gradients_of_gradients(backend, activation):
    if backend == "native" and native.load_error() is not None:
        pytest.skip(native.load_error())
    if backend == "triton" and (WHY_NOT or not INTERPRETED):
        pytest.skip(WHY_NOT or "compiled kernels: see test_gpu.py")
    x, u, v, bias = make_inputs(7, 16, 24, 8)
    rank = torch.tensor(5, dtype=torch.int32)

    def second_order(what):
        leaf = x.clone().requires_grad_()
        u_leaf, v_leaf = (t.requires_grad_() for t in planted(u, v, 5, what))
        y = mk.lod_linear(
            leaf, u_leaf, v_leaf, bias, rank=rank, activation=activation, backend=backend
        )
        (dx,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        return y, dx, *torch.autograd.grad(dx.square().sum(), (u_leaf, v_leaf))

    clean = second_order(0.0)
    for what in (NAN, INF):
        for name, a, b in zip(("y", "dx", "d2u", "d2v"), second_order(what), clean, strict=True):
            same(name, a.detach(), b.detach())


@pytest.mark.parametrize("M", [1, 4, 33, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", [f for f in packed.FORMS if f != "unpacked"])
def test_of_every_packed_form(form, dtype, M):
    x, u, v, bias = make_inputs(M, 70, 40, 40, dtype=dtype)
    for r, activation in itertools.product((1, 7, 16, 31, 33, 39), (None, "gelu")):
        if not packed.can_make(form, u, v, r):
            pytest.skip(f"{form} cannot serve {dtype} here")
        clean = packed.make_form(form, *planted(u, v, r, 0), r, activation)
        for what in (NAN, INF):
            dirty = packed.make_form(form, *planted(u, v, r, what), r, activation)
            same(f"y at rank {r}", dirty(x, bias), clean(x, bias))


@pytest.mark.skipif(native.load_error() is not None, reason="no native library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_of_a_packed_group(dtype):
    sizes = ((24, 16, 9), (40, 33, 0), (33, 8, 7), (16, 40, 39))
    made = [make_inputs(5, N, 40, R, dtype=dtype, seed=i) for i, (N, R, _) in enumerate(sizes)]
    ranks = [r for *_, r in sizes]

    def outputs(what):
        factors = [planted(m[1], m[2], r, what) for m, r in zip(made, ranks, strict=True)]
        us, vs = zip(*factors, strict=True)
        form = packed.make_group_form(us, vs, ranks, [None] * 4)
        return form(made[0][0], [m[3] for m in made])

    clean = outputs(0)
    for what in (NAN, INF):
        for i, pair in enumerate(zip(outputs(what), clean, strict=True)):
            same(f"y {i}", *pair)


def test_of_a_compiled_layer_and_a_prepacked_one():
    layer = mk.LoDLinear(24, 16, max_rank=8)
    layer.rank = 5
    x = torch.randn(3, 24)
    clean = layer(x).detach()
    with torch.no_grad():
        layer.u[:, 5:], layer.v[5:] = NAN, NAN
    for name, call in {
        "eager": layer,
        "compiled": torch.compile(layer, backend="aot_eager", fullgraph=True),
        "prepacked": mk.prepack(layer),
    }.items():
        with torch.no_grad():
            torch.testing.assert_close(call(x), clean, msg=name)
