"""The residual and the scale in the row and the two-phase kernel, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from triton_support import DEVICE, needs_kernels
from two_phase_cases import allocations  # noqa: F401  # poisons what launchers allocate

from maestro_kernels.backends import triton as backend
from maestro_kernels.backends.reference import ACTIVATIONS, lod_linear_ref
from maestro_kernels.call import Call
from maestro_kernels.testing import assert_accurate, make_inputs, rounding_errors

pytestmark = needs_kernels
SCALE = -0.5
SHAPES = ((70, 96, 80, 48), (33, 50, 37, 19))  # aligned, and with no common divisor


def made(M, N, K, R, dtype, seed=0):
    x, u, v, b = make_inputs(M, N, K, R, dtype=dtype, device=DEVICE, seed=seed)
    # Rows that lie apart, as a part of a wider output does.
    residual = torch.randn(M, N + 8, device=DEVICE).to(dtype)[:, :N]
    return x, u, v, b, residual


def library(x, u, v, b, residual, rank, activation):
    y = torch.addmm(residual, SCALE * F.linear(x, v[:rank]), u[:, :rank].T)
    return ACTIVATIONS[activation](y if b is None else y + b)


def rank_of(kind, R):
    return torch.tensor(R - 3, dtype=torch.int32, device=DEVICE) if kind == "tensor" else R - 3


@pytest.mark.parametrize("strategy", ["row", "two_phase"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int", "tensor"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_one_layer(strategy, shape, dtype, kind, activation):
    M, N, _, R = shape
    x, u, v, b, residual = made(*shape, dtype)
    u[:, R - 3 :] = float("nan")
    v[R - 3 :] = float("nan")
    rank, r = rank_of(kind, R), R - 3
    b = b if activation != "relu" else None
    call = Call("lod_linear", [x], [u], [v], [b], rank if kind == "tensor" else [rank],
                [activation], [residual], [SCALE])  # fmt: skip
    (y,), (h,) = backend.forward(call, save_h=True, strategy=strategy)
    leaves = [t for t in (x, u[:, :r], v[:r], b, residual) if t is not None]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    given = wide if b is not None else [*wide[:3], None, wide[3]]
    exact = lod_linear_ref(*given[:4], activation=activation, residual=given[4], scale=SCALE)
    pair = library(x, u, v, b, residual, r, activation)
    dy = torch.randn(M, N, device=DEVICE).to(dtype)
    z_added = residual if b is None else residual + b
    rounding = rounding_errors(
        x, u[:, :r], v[:r] * SCALE, activation=activation, bias=z_added, dy=dy
    )
    assert_accurate("y", y, pair, exact, rounding["y"])
    exact_h = SCALE * given[0] @ given[2].T
    assert_accurate("H", h[:, :r], SCALE * F.linear(x, v[:r]), exact_h, rounding["h"])
    assert not h[:, r:].any()
    ys = [y if activation == "relu" else None]
    for hs in ([h], [None]):
        needs = (True, True, True, b is not None)
        options = {"needs": needs, "strategy": strategy}
        (dx,), _, (dz,), *kept = backend.input_grads(call, [dy], hs, ys, **options)
        (du,), (dv,), _ = backend.weight_grads(call, [dz], *kept, **options)
        library_leaves = [t.detach().clone().requires_grad_() for t in leaves]
        ours = library_leaves if b is not None else [*library_leaves[:3], None, library_leaves[3]]
        by_pair = torch.autograd.grad(
            library(*ours[:3], ours[3], ours[4], r, activation), library_leaves, dy
        )
        expected = torch.autograd.grad(exact, wide, dy.double(), retain_graph=True)
        # dx, du as of v' = scale · v; dv is scale times that one's.
        factors = {"dx": None, "du": None, "dv": abs(SCALE)}
        found = {"dx": dx, "du": du[:, :r], "dv": dv[:r], "dresidual": dz}
        places = {"dx": 0, "du": 1, "dv": 2, "dresidual": -1}
        for name, grad in found.items():
            error = rounding.get(name)
            error = error if error is None else error * (factors[name] or 1)
            assert_accurate(name, grad, by_pair[places[name]], expected[places[name]], error)
        assert not du[:, r:].any()
        assert not dv[r:].any()


@pytest.mark.parametrize("kind", ["int", "tensor"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_group_of_which_some_have_a_residual(kind, shared):
    dtype, K = torch.float32, 40
    layers = [made(21, n, K, 24, dtype, seed=n) for n in (16, 40, 9)]
    xs, us, vs, biases, residuals = (list(column) for column in zip(*layers, strict=True))
    xs = xs[:1] if shared else xs
    biases[1], residuals[1] = None, None
    scales, ranks, activations = [2.0, 1.0, -0.25], [24, 5, 13], [None, "silu", "relu"]
    given = torch.tensor(ranks, dtype=torch.int32, device=DEVICE) if kind == "tensor" else ranks
    call = Call("lod_linear_grouped", xs, us, vs, biases, given, activations, residuals, scales)
    ys, hs = backend.forward(call, save_h=True, strategy="two_phase")
    dys = [torch.randn_like(y) for y in ys]
    needs = (True, True, True, True)
    kept = [None, None, ys[2]]
    dxs, _, dzs, *rest = backend.input_grads(call, dys, hs, kept, needs=needs, strategy="two_phase")
    dus, dvs, _ = backend.weight_grads(call, dzs, *rest, needs=needs, strategy="two_phase")
    wide = [t.double().requires_grad_() for t in (*xs, *us, *vs)]
    n = len(xs)
    expected = []
    for i in range(3):
        x, u, v = wide[0 if shared else i], wide[n + i], wide[n + 3 + i]
        b, t = (None if s[i] is None else s[i].double() for s in (biases, residuals))
        expected.append(
            lod_linear_ref(
                x, u, v, b, rank=ranks[i], activation=activations[i], residual=t, scale=scales[i]
            )
        )
    for y, want in zip(ys, expected, strict=True):
        torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    wanted = torch.autograd.grad(expected, wide, [dy.double() for dy in dys])
    for got, want in zip([*dxs, *dus, *dvs], wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
