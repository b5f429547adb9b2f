"""The accuracy gate itself: it must reject what a broken kernel would give."""

import pytest
import torch
import torch.nn.functional as F

from maestro_kernels.backends.reference import lod_linear_ref
from maestro_kernels.testing import accuracy_error, assert_accurate, make_inputs, poison


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
