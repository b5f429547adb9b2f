"""The norm between the factors in the row and the two-phase kernel."""

import pytest
import torch
import torch.nn.functional as F
from triton_support import DEVICE, needs_kernels
from two_phase_cases import allocations  # noqa: F401  # poisons what launchers allocate

from maestro_kernels import hardware
from maestro_kernels.backends import triton as backend
from maestro_kernels.backends.reference import ACTIVATIONS, lod_linear_ref
from maestro_kernels.backends.triton import choose, two_phase_config
from maestro_kernels.call import Call
from maestro_kernels.testing import assert_accurate, make_inputs

pytestmark = needs_kernels
SCALE, EPS = -0.5, 1e-3
SHAPES = ((70, 96, 80, 48), (33, 50, 37, 19))  # aligned, and with no common divisor


def made(M, N, K, R, dtype, seed=0):
    x, u, v, b = make_inputs(M, N, K, R, dtype=dtype, device=DEVICE, seed=seed)
    norm = (0.5 + torch.rand(R, device=DEVICE)).to(dtype)
    return x, u, v, b, norm


@pytest.mark.parametrize("strategy", ["row", "two_phase"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int", "tensor"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_one_layer(strategy, shape, dtype, kind, with_residual):
    M, N, _, R = shape
    x, u, v, b, norm = made(*shape, dtype)
    r = R - 3
    u[:, r:], v[r:], norm[r:] = float("nan"), float("nan"), float("nan")
    rank = torch.tensor(r, dtype=torch.int32, device=DEVICE) if kind == "tensor" else r
    residual = torch.randn(M, N, device=DEVICE).to(dtype) if with_residual else None
    activation = "gelu" if with_residual else None
    given = rank if kind == "tensor" else [rank]
    residuals = [residual] if with_residual else ()
    call = Call("lod_linear", [x], [u], [v], [b], given, [activation], residuals, [SCALE],
                [norm], EPS)  # fmt: skip
    (y,), (h,) = backend.forward(call, save_h=True, strategy=strategy)
    wide = [t.double() for t in (x, u[:, :r], v[:r], b, norm[:r])]
    added = None if residual is None else residual.double()
    exact = lod_linear_ref(
        *wide[:4], activation=activation, residual=added, scale=SCALE, norm=wide[4], norm_eps=EPS
    )
    g = SCALE * F.rms_norm(F.linear(x, v[:r]), (r,), norm[:r], EPS)
    z = F.linear(g, u[:, :r], b)
    library = ACTIVATIONS[activation](z if residual is None else z + residual)
    assert_accurate("y", y, library, exact)
    # What the gradient needs is H from before the norm, not scaled.
    assert_accurate("H", h[:, :r], F.linear(x, v[:r]), wide[0] @ wide[2].T)
    assert not h[:, r:].any()
    again, nothing = backend.forward(call, save_h=False, strategy=strategy)
    assert torch.equal(again[0], y)
    assert nothing == [None]


@pytest.mark.parametrize("kind", ["int", "tensor"])
def test_a_group_of_which_some_have_a_norm(kind):
    layers = [made(21, n, 40, 24, torch.float32, seed=n) for n in (16, 40, 9)]
    xs, us, vs, biases, norms = (list(column) for column in zip(*layers, strict=True))
    norms[1] = None
    scales, ranks, activations = [2.0, -0.5, 1.0], [24, 5, 13], [None, "silu", "relu"]
    given = torch.tensor(ranks, dtype=torch.int32, device=DEVICE) if kind == "tensor" else ranks
    call = Call("lod_linear_grouped", xs[:1], us, vs, biases, given, activations, (), scales,
                norms, EPS)  # fmt: skip
    ys, hs = backend.forward(call, save_h=True, strategy="two_phase")
    wide = [t.double().requires_grad_() for t in (xs[0], *us, *vs)]
    weights = [None if w is None else w.double().requires_grad_() for w in norms]
    expected = [
        lod_linear_ref(
            wide[0], wide[1 + i], wide[4 + i], biases[i].double(), rank=ranks[i],
            activation=activations[i], scale=scales[i], norm=weights[i], norm_eps=EPS,
        )
        for i in range(3)
    ]  # fmt: skip
    for y, want in zip(ys, expected, strict=True):
        torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    dys = [torch.randn_like(y) for y in ys]
    needs = (True, True, True, True)
    kept = [None, None, ys[2]]
    for saved in (hs, [None] * 3):
        dxs, dnorms, dzs, *rest = backend.input_grads(
            call, dys, saved, kept, needs=needs, strategy="two_phase"
        )
        dus, dvs, _ = backend.weight_grads(call, dzs, *rest, needs=needs, strategy="two_phase")
        leaves = [*wide, weights[0], weights[2]]
        wanted = torch.autograd.grad(
            expected, leaves, [dy.double() for dy in dys], retain_graph=True
        )
        found = [*dxs, *dus, *dvs, dnorms[0], dnorms[2]]
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
        assert dnorms[1] is None


@pytest.mark.parametrize("M", [1, 64, 256, 8192])
def test_a_norm_gets_tiles_that_have_registers_for_it(M):
    sizes = (M, (4096,), (4096,), (1024,), torch.bfloat16)
    chosen = choose.two_phase(hardware.H100, *sizes, normed=True)
    assert chosen.takes_norm
    offered = two_phase_config.CANDIDATES["sm_90", "16-bit"]
    assert not all(config.takes_norm for config in offered)
