"""One-number rules, and which ranks a latency leaves worth choosing."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import maestro_kernels as mk
from maestro_kernels.search import solver
from maestro_kernels.search.costs import below_steps, choices, multiples
from maestro_kernels.search.layers import Layer, considered, count_rows, observe
from maestro_kernels.search.sensitivities import LayerSensitivity

SIZES = [(64, 64), (48, 200), (90, 30)]


def layer(name, N, K, *, dense=True, max_rank=None):
    return Layer(name, "linear", N, K, 1, max_rank or min(N, K), dense)


def every_choice(one, multiple_of=1, min_rank=1):
    return choices(one, multiples(one, multiple_of, min_rank), itemsize=4)


@pytest.fixture
def layers():
    return [every_choice(layer(str(i), N, K)) for i, (N, K) in enumerate(SIZES)]


def as_ranks(layers, chosen):
    """One dictionary of ranks per value of the rule's number."""
    return [
        {c.layer.name: c.ranks[j] for c, j in zip(layers, row, strict=True)}
        for row in zip(*chosen, strict=True)
    ]


def test_choices_are_what_saves_weights_and_dense(layers):
    for c, (N, K) in zip(layers, SIZES, strict=True):
        assert c.ranks == (*range(1, math.ceil(N * K / (N + K))), "dense")
        weights = c.costs.weights
        assert all(w == r * (N + K) for w, r in zip(weights, c.ranks[:-1], strict=False))
        assert weights[-1] == N * K
        assert np.all(np.diff(weights) > 0)
        assert c.costs.macs.tolist() == weights.tolist()
        # The dense layer stores no active rank.
        assert c.costs.bytes.tolist() == [*(4 * weights[:-1] + 4), 4 * N * K]


@pytest.mark.parametrize(
    ("one", "step", "low", "expected"),
    [
        (layer("a", 64, 64), 8, 1, (8, 16, 24, "dense")),
        (layer("a", 64, 64), 8, 0, (0, 8, 16, 24, "dense")),
        (layer("a", 64, 64), 8, 9, (16, 24, "dense")),
        (layer("a", 64, 64, dense=False, max_rank=20), 8, 1, (8, 16, 20)),
        (layer("a", 64, 64, dense=False, max_rank=5), 8, 1, (5,)),
        (layer("a", 10, 10), 8, 1, ("dense",)),
    ],
)
def test_choices(one, step, low, expected):
    assert every_choice(one, step, low).ranks == expected


def test_uniform_is_what_convert_does(layers):
    found = as_ranks(layers, solver.uniform(layers))
    model = nn.Sequential(*(nn.Linear(K, N) for N, K in SIZES))
    for fraction in (0.1, 0.37, 0.5, 0.77, 0.99):
        converted = mk.convert(model, rank=fraction, init="random", inplace=False)
        assert mk.ranks(converted) in found
    assert found[-1] == {"0": "dense", "1": "dense", "2": "dense"}


def test_threshold_is_welores_rule(layers):
    rng = np.random.default_rng(0)
    values = [np.sort(rng.exponential(size=min(N, K)))[::-1] for N, K in SIZES]
    known = [LayerSensitivity(c.layer, np.zeros(1), v) for c, v in zip(layers, values, strict=True)]
    found = as_ranks(layers, solver.by_threshold(layers, known))
    for threshold in (0.02, 0.1, 0.3, 0.7):
        expected = {}
        for c, v in zip(layers, values, strict=True):
            rank = int(((v - v.min()) / (v.max() - v.min()) >= threshold).sum())
            N, K = c.layer.N, c.layer.K
            expected[c.layer.name] = rank if rank * (N + K) < N * K else "dense"
        assert expected in found
    for a, b in itertools.pairwise(found):
        sizes = [[math.inf if r == "dense" else r for r in one.values()] for one in (a, b)]
        assert all(high >= low for high, low in zip(*sizes, strict=True))


def test_best_of():
    options = [
        (np.array([1.0, 2.0, 3.0]), np.array([5.0, 1.0, 0.0])),
        (np.array([1.0, 4.0]), np.array([9.0, 0.0])),
    ]
    chosen = [np.array([0, 1, 2, 2]), np.array([0, 0, 0, 1])]
    found, least = solver.best_of(chosen, options, 4.0)
    assert (found.choice, found.cost, found.error) == ((2, 0), 4.0, 9.0)
    assert math.isnan(found.gap)
    assert least == 2.0
    assert solver.best_of(chosen, options, 3.9)[0].choice == (1, 0)
    assert solver.best_of(chosen, options, 1.9) == (None, 2.0)


@pytest.mark.parametrize(
    ("ms", "kept"),
    [
        ([1, 2, 3, 4], [0, 1, 2, 3]),
        ([1, 1, 1, 2, 2, 2, 4], [2, 5, 6]),
        # A rank that is slower than a larger one, and ranks slower than the last: the dense layer.
        ([1, 3, 2, 6, 7, 5], [0, 2, 5]),
        ([5, 6, 7], [0, 1, 2]),
        ([9, 8, 7], [2]),
        # Less than 2 % is no step.
        ([0.99, 1.0, 1.0], [2]),
        ([0.97, 1.0, 1.0], [0, 2]),
        ([3], [0]),
    ],
)
def test_below_steps(ms, kept):
    assert below_steps(np.array(ms, float)).tolist() == kept


def test_considered_layers():
    model = nn.Sequential(
        nn.Linear(8, 8),
        mk.LoDLinear(8, 6),
        mk.LoDLinear(8, 6, activation="relu"),
        nn.Conv2d(4, 6, 3),
    )
    found = considered(model, fn="f")
    assert [one.can_be_dense for one in found.values()] == [True, True, False, True]
    assert [one.max_rank for one in found.values()] == [8, 6, 6, 6]
    model[1].rank = 3
    found = considered(model, fn="f")
    assert not found["1"].can_be_dense
    assert found["1"].max_rank == 6
    assert list(considered(model, exclude=["0", "3"], fn="f")) == ["1", "2"]
    assert torch.is_tensor(model[0].weight)


def test_one_hook_sees_rows_of_the_first_batch_and_the_first_input():
    model = nn.ModuleDict(
        {"conv": nn.Conv2d(3, 4, 3), "line": nn.Linear(5, 2), "late": nn.Linear(4, 4)}
    )
    image, x, late = torch.randn(2, 3, 6, 7), torch.randn(3, 5), torch.randn(9, 4)

    def run(model, batch):
        model["line"](batch)
        model["line"](input=2 * batch[:1])
        if len(batch) == 3:
            model["conv"](image)
        else:
            model["late"](late)

    seen = observe(model, dict(model.items()), [x, torch.randn(4, 5)], run, keep_inputs=True)
    assert {name: one.rows for name, one in seen.items()} == {
        "conv": (2 * 4 * 5,), "line": (3, 1), "late": (),
    }  # fmt: skip
    assert torch.equal(seen["line"].x, x)
    assert torch.equal(seen["late"].x, late)
    x.zero_()
    assert seen["line"].x.any()
    rows = count_rows(nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 2)), ["1"], x, fn="f")
    assert rows == {"1": (3,)}
    seen = observe(model, {"line": model["line"]}, [x], run)
    assert seen["line"].x is None


def test_pivoted_forms_cost_what_they_store():
    one = layer("a", 40, 24)
    found = choices(one, [8, 8, 24], ["factors", "pivoted", "dense"], itemsize=2, rows=(3, 4))
    assert found.costs.macs.tolist() == [7 * 8 * 64, 7 * 8 * 56, 7 * 40 * 24]
    # An int32 for every output, beside the matrices of two bytes a weight.
    assert found.costs.weights.tolist() == [8 * 64, 8 * 56 + 80, 40 * 24]
    assert found.costs.bytes.tolist() == [2 * 8 * 64 + 4, 2 * 8 * 56 + 160, 2 * 40 * 24]
    made = mk.nn.PivotedLinear.from_lod(mk.LoDLinear(24, 40, max_rank=8, bias=False))
    assert sum(t.nbytes for t in [*made.parameters(), *made.buffers()]) == 4 * 8 * 56 + 160
