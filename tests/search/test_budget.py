"""Budgets: what they allow, and what they refuse."""

import dataclasses

import numpy as np
import pytest

from maestro_kernels import search
from maestro_kernels.search.budget import check_budget


@pytest.mark.parametrize(
    ("budget", "dense", "limit"),
    [
        (search.Params(0.25), 1000, 250),
        (search.MACs(0.5), 1000, 500),
        (search.Latency(3), 1000, 3),
        (search.Speedup(4), 1000, 250),
        (search.Memory(2**20), 1000, 2**20),
    ],
)
def test_limit(budget, dense, limit):
    assert budget.limit(dense) == limit


def test_budgets_are_values():
    assert search.Params(0.5) == search.Params(np.float32(0.5))
    assert search.Params(0.5) != search.MACs(0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        search.Params(0.5).fraction = 0.7


@pytest.mark.parametrize("kind", [search.Params, search.MACs])
@pytest.mark.parametrize("value", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_fraction_outside_its_range(kind, value):
    message = rf"{kind.__name__}: fraction: expected 0 < fraction <= 1, got {value}"
    with pytest.raises(ValueError, match=message):
        kind(value)


@pytest.mark.parametrize("kind", [search.Latency, search.Speedup, search.Memory])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_not_positive(kind, value):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: \w+: expected a finite number > 0"):
        kind(value)


@pytest.mark.parametrize("kind", [search.Params, search.MACs, search.Latency, search.Speedup])
@pytest.mark.parametrize("value", [True, "0.5", None])
def test_not_a_number(kind, value):
    with pytest.raises(TypeError, match=rf"{kind.__name__}: \w+: expected a number, got"):
        kind(value)


def test_check_budget():
    assert check_budget("allocate", search.Params(1)) == search.Params(1.0)
    with pytest.raises(TypeError, match=r"allocate: budget: expected Params, MACs, .* got float"):
        check_budget("allocate", 0.5)
