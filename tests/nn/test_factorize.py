"""Factors of a matrix: every prefix is optimal, also where numbers are extreme."""

import re

import pytest
import torch
from torch.testing import assert_close

from maestro_kernels.nn.factorize import factorize, recompress


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9), (1, 5), (5, 1)])
def test_every_prefix_is_the_best_approximation_of_its_rank(shape):
    weight = torch.randn(*shape, dtype=torch.float64)
    s2 = torch.linalg.svdvals(weight).square()
    u, v = factorize(weight, min(shape))
    for r in range(min(shape) + 1):
        error = (weight - u[:, :r] @ v[:r]).square().sum()
        assert_close(error, s2[r:].sum(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_components_carry_the_same_norm_in_both_factors(shape):
    weight = torch.randn(*shape, dtype=torch.float64)
    u, v = factorize(weight, 5)
    s = torch.linalg.svdvals(weight)[:5]
    assert_close(u.square().sum(0), s)
    assert_close(v.square().sum(1), s)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
@pytest.mark.parametrize("samples", [7, 50, 500])
def test_weighting_by_moments_minimises_the_output_error(shape, samples):
    weight = torch.randn(*shape, dtype=torch.float64)
    scales = torch.logspace(2, -3, shape[1], dtype=torch.float64)
    x = torch.randn(samples, shape[1], dtype=torch.float64) * scales
    u, v = factorize(weight, 10, x.T @ x)
    plain_u, plain_v = factorize(weight, 10)
    y = x @ weight.T
    got = (y - x @ v.T @ u.T).square().sum()
    plain = (y - x @ plain_v.T @ plain_u.T).square().sum()
    best = torch.linalg.svdvals(y)[10:].square().sum()
    assert got <= plain
    # Only the ridge keeps it from the optimum that the singular values of the outputs give.
    assert got - best <= 1e-5 * y.square().sum()


@pytest.mark.parametrize("samples", [0, 1, 3])
def test_a_singular_moment_still_orders_what_the_data_never_showed(samples):
    weight = torch.randn(12, 20, dtype=torch.float64)
    x = torch.randn(samples, 20, dtype=torch.float64)
    u, v = factorize(weight, 12, x.T @ x)
    assert_close(u @ v, weight)
    # Beyond the samples the components follow the weight: close to the SVD of what is left.
    left = weight - u[:, :samples] @ v[:samples]
    tail = (weight - u[:, :8] @ v[:8]).square().sum()
    best = torch.linalg.svdvals(left)[8 - samples :].square().sum()
    assert tail <= best * (1 + 1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_factors_of_low_precision_weights_are_as_good_as_their_rounding(dtype):
    weight = torch.randn(32, 48).to(dtype)
    u, v = factorize(weight, 32)
    assert (u.dtype, v.dtype) == (dtype, dtype)
    error = torch.linalg.matrix_norm(u.double() @ v.double() - weight.double())
    assert error <= 2 * torch.finfo(dtype).eps * torch.linalg.matrix_norm(weight.double())


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30, 1e-200, 1e200])
def test_extreme_and_zero_weights_give_finite_trainable_factors(scale):
    dtype = torch.float32 if 1e-40 < scale < 1e40 else torch.float64
    weight = torch.randn(8, 6, dtype=dtype) * scale
    u, v = factorize(weight, 6)
    assert_close(u @ v, weight, rtol=1e-5, atol=1e-6 * scale)
    if scale:
        best = torch.linalg.svdvals(weight / scale)[0]
        assert_close((u[:, :1] @ v[:1] / scale).norm(), best, rtol=1e-5, atol=0)
    assert u.isfinite().all()
    assert v.isfinite().all()
    # Where both factors of a component are zero, neither ever gets a gradient.
    assert (u.abs().amax(0) > 0).all()


def test_rank_deficient_weights_reconstruct():
    weight = torch.randn(10, 2, dtype=torch.float64) @ torch.randn(2, 15, dtype=torch.float64)
    u, v = factorize(weight, 10)
    assert_close(u[:, :2] @ v[:2], weight)
    assert_close(u @ v, weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.zeros(2, 3, 4), 1),
            "factorize: weight: expected a matrix (N, K), got shape (2, 3, 4)",
        ),
        ((torch.zeros(2, 3), 3), "factorize: rank: expected 0 <= rank <= 2, got 3"),
        (
            (torch.zeros(2, 3), 1, torch.eye(2)),
            "factorize: moment: expected shape (3, 3), got (2, 2)",
        ),
    ],
)
def test_factorize_errors(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        factorize(*arguments)


@pytest.mark.parametrize(("shape", "R"), [((12, 20), 7), ((20, 12), 12), ((6, 5), 9)])
def test_recompressed_factors_are_those_of_the_product(shape, R):
    u = torch.randn(shape[0], R, dtype=torch.float64)
    v = torch.randn(R, shape[1], dtype=torch.float64)
    rank = min(4, R)
    new_u, new_v = recompress(u, v, rank)
    best_u, best_v = factorize(u @ v, rank)
    assert_close(new_u @ new_v, best_u @ best_v)
    assert_close(new_u.square().sum(0), new_v.square().sum(1))
    assert new_u.is_contiguous()
    assert new_v.is_contiguous()
