"""The expand kernel behind a library's product, in the interpreter: values, layouts, ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from triton_support import DEVICE, WHY_NOT, needs_kernels

import maestro_kernels as mk
from maestro_kernels.backends import reference
from maestro_kernels.testing import assert_accurate, make_inputs

pytestmark = needs_kernels
if WHY_NOT is None:
    from two_phase_cases import allocations  # noqa: F401

    from maestro_kernels.backends import triton as backend
    from maestro_kernels.backends.triton.expand import ExpandConfig, expand, expand_dx

    # Tiles so small that every loop runs several times and ends off the grid, and such as are
    # stored in two parts.
    TILES = {"small": ExpandConfig(16, 32, 16, 4, 2), "halves": ExpandConfig(16, 256, 16, 4, 2)}
else:
    TILES = {}

DTYPES = (torch.float16, torch.bfloat16)
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")
NAN = float("nan")


def inputs(M, N, K, R, rank, dtype=torch.bfloat16, *, bias=True):
    """make_inputs, with NaN in what lies beyond the rank."""
    x, u, v, b = make_inputs(M, N, K, R, dtype=dtype, device=DEVICE, bias=bias)
    u[:, rank:], v[rank:] = NAN, NAN
    return x, u, v, b


def check(y, h, x, u, v, bias, rank, activation):
    """Both results against float64, and against two matmuls for the tolerance."""
    u, v = u[:, :rank], v[:rank]
    h_torch = F.linear(x, v)
    y_torch = reference.ACTIVATIONS[activation](F.linear(h_torch, u, bias))
    wide = [None if t is None else t.double() for t in (x, u, v, bias)]
    assert y.dtype == x.dtype
    assert_accurate("y", y, y_torch, reference.lod_linear_ref(*wide, activation=activation))
    assert h.shape == (x.shape[0], rank)
    assert h.stride(0) % 16 == 0
    assert_accurate("H", h, h_torch, wide[0] @ wide[2].mT)
    # Kernels of the backward read H 8 columns at a time.
    beyond = h.as_strided((h.shape[0], -(-rank // 8) * 8), h.stride())[:, rank:]
    assert (beyond == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("bias", [True, False])
def test_every_dtype_and_activation(dtype, activation, tiles, bias):
    given = x, u, v, b = inputs(37, 392, 40, 24, 13, dtype, bias=bias)
    y, h = expand(x, v, u, b, 13, activation, config=TILES[tiles])
    check(y, h, *given, 13, activation)


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize(
    ("M", "N", "K", "R", "rank"),
    [(1, 8, 1, 8, 1), (16, 256, 32, 16, 16), (50, 40, 97, 48, 47), (17, 128, 3, 200, 129),
     (19, 264, 21, 64, 64), (33, 520, 20, 24, 7)],
)  # fmt: skip
def test_sizes_off_the_grid_and_odd_ranks(M, N, K, R, rank, tiles):
    given = x, u, v, bias = inputs(M, N, K, R, rank)
    y, h = expand(x, v, u, bias, rank, "gelu", config=TILES[tiles])
    check(y, h, *given, rank, "gelu")


LAYOUTS = {
    "every other row of x": lambda x, u, v: (x.repeat_interleave(2, 0)[::2], u, v),
    "columns of a wider x": lambda x, u, v: (F.pad(x, (3, 2))[:, 3:-2], u, v),
    "u stored transposed": lambda x, u, v: (x, u.mT.contiguous().mT, v),
    "u off the 16 bytes": lambda x, u, v: (x, F.pad(u, (1, 7))[:, 1:-7], v),
    "rows of u 42 bytes apart": lambda x, u, v: (x, F.pad(u, (0, 5))[:, :-5], v),
    "v inside a larger one": lambda x, u, v: (x, u, F.pad(v, (1, 2))[:, 1:-2]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    x, u, v, bias = inputs(21, 40, 35, 16, 11)
    given = x, u, v = LAYOUTS[layout](x, u, v)
    y, h = expand(x, v, u, bias, 11, "relu", config=TILES["small"])
    check(y, h, *given, bias, 11, "relu")


@pytest.mark.parametrize("rank", [1, 13, 16])
@pytest.mark.parametrize("needs_x", [True, False])
def test_gradients_through_the_factors(rank, needs_x):
    _, u, v, _ = inputs(1, 40, 35, 16, rank)
    dy = make_inputs(21, 8, 40, 8, dtype=torch.bfloat16, device=DEVICE)[0]
    dx, dh = expand_dx(dy, u, v, rank, needs_x=needs_x)
    assert (dx is not None) == needs_x
    wanted = dy @ u[:, :rank] @ v[:rank] if dx is None else dx
    check(wanted, dh, dy, v.t(), u.t(), None, rank, None)


def test_repeats_bitwise():
    x, u, v, bias = inputs(50, 72, 56, 24, 20)
    first, second = (expand(x, v, u, bias, 20, "gelu") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_a_call_and_its_gradients(monkeypatch):
    """From the public function down and back, with the tiles that ship."""
    monkeypatch.setattr(backend, "choose_strategy", lambda *_: ("expand", "by the test"))
    x, u, v, bias = inputs(70, 264, 48, 24, 24)
    leaves = [t.clone().requires_grad_() for t in (x, u, v, bias)]
    wide = [t.double().requires_grad_() for t in (x, u, v, bias)]
    two = [t.clone().requires_grad_() for t in (x, u, v, bias)]
    assert mk.explain(*leaves, activation="gelu", backend="triton").plan.strategy == "expand"
    dy = make_inputs(70, 8, 264, 8, dtype=torch.bfloat16, device=DEVICE)[0]
    ys = [
        mk.lod_linear(*leaves, activation="gelu", backend="triton"),
        *(reference.lod_linear_ref(*given, activation="gelu") for given in (two, wide)),
    ]
    grads = [
        torch.autograd.grad(y, given, dy.to(y.dtype))
        for y, given in zip(ys, (leaves, two, wide), strict=True)
    ]
    assert_accurate("y", *ys)
    for name, *found in zip(("dx", "du", "dv", "db"), *grads, strict=True):
        assert_accurate(name, *found)


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"rank": None}, True),  # R
        ({"N": 36}, False),
        ({"R": 20, "rank": 20}, False),
        ({"dtype": torch.float32}, False),
        ({"tensor": True}, False),
        ({"group": True}, False),
    ],
    ids=str,
)
def test_which_calls_it_takes(change, taken):
    sizes = {"M": 16, "N": 40, "K": 32, "R": 16} | {k: v for k, v in change.items() if k in "NR"}
    dtype = change.get("dtype", torch.bfloat16)
    x, u, v, _ = make_inputs(**sizes, dtype=dtype, device=DEVICE)
    rank = change.get("rank", 16)
    if "tensor" in change:
        rank = torch.tensor(16, dtype=torch.int32, device=DEVICE)
    factors = ([u, u], [v, v]) if "group" in change else (u, v)
    options = {} if "group" in change else {"rank": rank}
    plan = mk.explain(x, *factors, **options, backend="triton").plan
    assert backend.takes("expand", plan.problems) == taken
