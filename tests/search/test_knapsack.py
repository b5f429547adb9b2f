"""The exact knapsack against enumeration, and what it says when it is not exact."""

import functools
import itertools
import operator

import numpy as np
import pytest

from maestro_kernels.search.knapsack import descend, exact, greedy, hull, hull_path


def problem(seed, *, integers, layers=5, options=5):
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(rng.integers(1, layers + 1)):
        k = rng.integers(1, options + 1)
        if integers:
            drawn.append((rng.integers(1, 20, k).astype(float), rng.integers(0, 20, k) * 1.0))
        else:
            drawn.append((rng.uniform(0, 20, k), rng.uniform(0, 1, k)))
    low = sum(costs.min() for costs, _ in drawn)
    high = sum(costs.max() for costs, _ in drawn)
    return drawn, rng.uniform(0.8 * low, 1.05 * high)


def enumerated(options, limit):
    """Least error by trying every choice."""
    totals = [
        (sum(c[j] for (c, _), j in zip(options, choice, strict=True)),
         sum(e[j] for (_, e), j in zip(options, choice, strict=True)))
        for choice in itertools.product(*(range(len(c)) for c, _ in options))
    ]  # fmt: skip
    return min((error for cost, error in totals if cost <= limit), default=None)


def value(options, solution):
    """(cost, error) of a solution's choice, added up here."""
    chosen = list(zip(options, solution.choice, strict=True))
    return sum(c[j] for (c, _), j in chosen), sum(e[j] for (_, e), j in chosen)


@pytest.mark.parametrize("integers", [True, False])
def test_exact_is_the_optimum(integers):
    infeasible = 0
    for seed in range(150):
        options, limit = problem(seed, integers=integers)
        best = enumerated(options, limit)
        found = exact(options, limit)
        if best is None:
            infeasible += 1
            assert found is None
            assert greedy(options, limit) is None
            continue
        assert (found.cost, found.error) == pytest.approx(value(options, found))
        assert found.cost <= limit * (1 + 1e-9)
        assert found.error == pytest.approx(best, abs=1e-12)
        assert found.gap == 0
    assert 0 < infeasible < 75


def test_thinned_states_stay_within_the_reported_gap():
    missed = 0
    for seed in range(150):
        options, limit = problem(seed, integers=False)
        best = enumerated(options, limit)
        for found in (exact(options, limit, states=1), greedy(options, limit)):
            if best is None:
                assert found is None
                continue
            assert value(options, found)[0] <= limit * (1 + 1e-9)
            assert best - 1e-12 <= found.error <= best + found.gap + 1e-12
            missed += found.error > best + 1e-9
    # The rules are weaker than enumeration, or this test would show nothing.
    assert missed > 0


def test_exact_beats_greedy_where_steps_do_not_fit():
    # Greedy takes the steep first step and has no room for the two others.
    options = [
        (np.array([0.0, 6.0]), np.array([10.0, 0.0])),
        (np.array([0.0, 5.0]), np.array([8.0, 0.0])),
        (np.array([0.0, 5.0]), np.array([8.0, 0.0])),
    ]
    assert greedy(options, 10.0).error == 16
    assert exact(options, 10.0).error == 10
    assert exact(options, 10.0).choice == (0, 1, 1)


def test_a_large_model_is_solved_exactly():
    rng = np.random.default_rng(0)
    options = []
    for _ in range(25):
        for N, K in ((2304, 768), (768, 768), (3072, 768), (768, 3072)):
            rank = np.arange(8, int(N * K / (N + K)), 8)
            error = np.exp(-rank / (768 * rng.uniform(0.1, 0.4)))
            options.append(
                (np.append(rank * (N + K) * 1.0, N * K * 1.0), np.append(error, 0.0))
            )  # fmt: skip
    limit = 0.4 * sum(costs[-1] for costs, _ in options)
    found = exact(options, limit)
    assert found.gap == 0
    assert found.cost <= limit
    assert found.error <= greedy(options, limit).error


def test_hull_path_is_optimal_at_its_own_costs():
    for seed in range(30):
        options, _ = problem(seed, integers=False)
        path = hull_path(options)
        assert path[0].cost == pytest.approx(sum(costs.min() for costs, _ in options))
        assert path[-1].error == pytest.approx(sum(errors.min() for _, errors in options))
        for point in path:
            assert value(options, point) == pytest.approx((point.cost, point.error))
            assert enumerated(options, point.cost * (1 + 1e-12)) == pytest.approx(point.error)


@pytest.mark.parametrize("seed", range(20))
def test_hull_is_what_no_line_between_two_options_undercuts(seed):
    rng = np.random.default_rng(seed)
    costs, errors = np.sort(rng.uniform(0, 9, 8)), rng.uniform(0, 1, 8)
    found = hull(costs, errors)
    assert (found[0], found[-1]) == (0, 7)
    assert np.all(np.interp(costs, costs[found], errors[found]) <= errors + 1e-12)
    slopes = np.diff(errors[found]) / np.diff(costs[found])
    assert np.all(np.diff(slopes) > 0)


def rising(seed):
    """Options whose costs rise and whose errors fall, but not along a convex curve."""
    rng = np.random.default_rng(seed)
    return [
        (np.cumsum(rng.uniform(1, 5, 6)), np.sort(rng.uniform(0, 1, 6))[::-1].copy())
        for _ in range(3)
    ]


@pytest.mark.parametrize("seed", range(10))
def test_a_descent_is_the_path_of_optima_walked_down(seed):
    options = rising(seed)
    at, walked = [5, 5, 5], [(5, 5, 5)]
    for i, j in descend(options):
        assert j < at[i]
        at[i] = j
        walked.append(tuple(at))
    assert walked == [point.choice for point in reversed(hull_path(options))]

    def total(choice):
        return sum(float(errors[j]) for (_, errors), j in zip(options, choice, strict=True))

    # The same errors, measured.
    assert list(descend(options, total)) == list(descend(options))


@pytest.mark.parametrize("seed", range(10))
def test_a_measured_descent_takes_the_best_step_there_is(seed):
    """Where layers together lose more than the sum, waiting to measure again changes nothing."""
    options = rising(seed)
    weights = np.random.default_rng(seed).uniform(0.2, 5, 3)

    def loss(choice):
        parts = [w * e[j] for w, (_, e), j in zip(weights, options, choice, strict=True)]
        return sum(parts) + 0.3 * sum(parts) ** 2

    corners = [hull(costs, errors)[:-1] for costs, errors in options]
    at = [5, 5, 5]
    calls = []
    for i, j in descend(options, lambda choice: calls.append(choice) or loss(choice)):
        prices = {}
        for k, left in enumerate(corners):
            if left:
                moved = (*at[:k], left[-1], *at[k + 1 :])
                saved = options[k][0][at[k]] - options[k][0][left[-1]]
                prices[k] = (loss(moved) - loss(tuple(at))) / saved
        assert i == min(prices, key=prices.get)
        assert j == corners[i].pop()
        at[i] = j
    assert at == [0, 0, 0]
    assert len(calls) < 1 + 3 * sum(len(hull(*one)) - 1 for one in options)


def test_a_descent_starts_where_the_error_falls():
    """The dearest option need not be the best: what costs more and loses more goes first."""
    options = [
        (np.array([1.0, 2.0, 3.0]), np.array([1.0, 0.0, 0.5])),
        (np.array([1.0, 2.0, 3.0]), np.array([0.2, 0.1, 0.0])),
    ]
    assert list(descend(options)) == [(0, 1), (1, 0), (0, 0)]


def test_rounding_does_not_cost_a_solution():
    # Thirty times 0.1 is more than 3 in floating point; the sum of Python 3.12 compensates.
    options = [(np.array([0.1, 5.0]), np.array([1.0, 0.0]))] * 30
    assert functools.reduce(operator.add, [0.1] * 30) > 3
    assert exact(options, 3.0).cost == pytest.approx(3.0)


def test_free_options_and_equal_costs():
    options = [(np.array([0.0, 0.0, 0.0]), np.array([3.0, 1.0, 2.0]))] * 3
    found = exact(options, 0.0)
    assert (found.choice, found.error, found.gap) == ((1, 1, 1), 3.0, 0.0)
