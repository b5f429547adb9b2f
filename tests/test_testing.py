"""The accuracy gate itself: it must reject what a broken kernel would give."""

import pytest
import torch
import torch.nn.functional as F

from maestro_kernels.backends.reference import lod_linear_ref
from maestro_kernels.testing import (
    accuracy_error,
    assert_accurate,
    make_inputs,
    poison,
    rounding_errors,
)


def _case(dtype=torch.bfloat16, rank=13):
    x, u, v, bias = make_inputs(37, 75, 50, 16, dtype=dtype)
    two = F.linear(F.linear(x, v[:rank]), u[:, :rank], bias)
    exact = lod_linear_ref(x.double(), u.double(), v.double(), bias.double(), rank=rank)
    return x, u, v, bias, two, exact


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_accepts_two_matmuls(dtype):
    *_, two, exact = _case(dtype)
    assert_accurate("y", two, two, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rejects_one_wrong_element(dtype):
    *_, two, exact = _case(dtype)
    wrong = two.clone()
    wrong[5, 7] += 0.25
    with pytest.raises(AssertionError, match="y: max error: expected <="):
        assert_accurate("y", wrong, two, exact)


def test_rejects_a_small_error_everywhere():
    # One bad element of the baseline widens the bound on the maximum; RMS still sees the rest.
    *_, two, exact = _case(torch.float32)
    baseline = two.clone()
    baseline[0, 0] += 1e-3
    assert accuracy_error(two * (1 + 1e-4), baseline, exact).startswith("RMS error: expected <=")


def test_rejects_missing_bias_and_rank_off_by_one():
    x, u, v, bias, two, exact = _case()
    assert accuracy_error(two - bias, two, exact) is not None
    assert accuracy_error(lod_linear_ref(x, u, v, bias, rank=12), two, exact) is not None


def test_rejects_nan_and_wrong_shape():
    *_, two, exact = _case()
    assert accuracy_error(poison(two.clone()), two, exact) is not None
    assert accuracy_error(two[:-1], two, exact).startswith("shape")


def test_refuses_a_baseline_that_is_not_finite():
    *_, two, exact = _case()
    assert "not finite" in accuracy_error(two, poison(two.clone()), exact)


def test_poison_covers_integers():
    assert poison(torch.zeros(3, dtype=torch.int32)).tolist() == [-(2**31)] * 3


DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_does_not_hide_what_is_wrong(dtype):
    # A baseline without any error, so that only what follows from the arithmetic is allowed.
    x, u, v, bias, two, exact = _case(dtype)
    lucky, rounding = exact.to(dtype), rounding_errors(x, u, v, rank=13)["y"]
    assert_accurate("y", two, lucky, exact, rounding)
    one = two.clone()
    one[5, 7] += 0.25
    for wrong in (one, two - bias, poison(two.clone()), lod_linear_ref(x, u, v, bias, rank=12)):
        assert accuracy_error(wrong, lucky, exact, rounding) is not None
    assert accuracy_error(two * (1 + 64 * torch.finfo(dtype).eps), lucky, exact, rounding)


def test_rounding_is_only_asked_where_the_baseline_is_not_enough():
    x, u, v, bias = make_inputs(8, 50, 4096, 16)
    two = lod_linear_ref(x, u, v, bias)
    exact = lod_linear_ref(*(t.double() for t in (x, u, v, bias)))

    def unwanted():
        raise AssertionError("asked")

    assert_accurate("y", two, two, exact, unwanted)
    lucky, rounding = exact.float(), rounding_errors(x, u, v)["y"]
    fair = (exact + rounding).float()
    assert accuracy_error(fair, lucky, exact) is not None
    assert_accurate("y", fair, lucky, exact, lambda: rounding)
    assert accuracy_error(fair - bias, lucky, exact, lambda: rounding) is not None


def test_rounding_of_a_large_float32_layer_leaves_no_room_for_less_precision():
    x, u, v, _ = make_inputs(8, 512, 4096, 256)
    exact = (x.double() @ v.double().T) @ u.double().T
    lucky, rounding = exact.float(), rounding_errors(x, u, v)["y"]
    h = F.linear(x, v)
    assert_accurate("y", F.linear(h, u), lucky, exact, rounding)
    for less in (torch.bfloat16, torch.float16):
        assert accuracy_error(F.linear(h.to(less).float(), u), lucky, exact, rounding) is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "gelu", "silu"])
def test_rounding_covers_two_matmuls_that_rest_on_one_scalar(dtype, activation):
    # H is M r numbers: where that is few, a baseline may happen to round them all well.
    for seed in range(40):
        leaves = make_inputs(1 + seed % 2, 50, 60, 4, dtype=dtype, seed=seed, requires_grad=True)
        dy = torch.randn(1 + seed % 2, 50).to(dtype)
        doubled = [t.detach().double().requires_grad_() for t in leaves]
        results = []
        for x, u, v, bias in (leaves, doubled):
            y = lod_linear_ref(x, u, v, bias, rank=1, activation=activation)
            results.append((y, *torch.autograd.grad(y, (x, u, v, bias), dy.to(y.dtype))))
        rounding = rounding_errors(
            *leaves[:3], rank=1, activation=activation, bias=leaves[3], dy=dy
        )
        for name, got, exact in zip(("y", "dx", "du", "dv", "dbias"), *results, strict=True):
            assert_accurate(f"{name} {seed}", got, exact.to(dtype), exact, rounding[name])
