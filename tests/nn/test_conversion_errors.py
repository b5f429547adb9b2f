"""Errors of convert and to_dense name the argument and change nothing."""

import re

import pytest
import torch
from convert_support import assert_unchanged, mlp, snapshot
from torch import nn

from maestro_kernels.nn import LoDLinear, convert, to_dense


def broken():
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")
    return model


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.used(x)


PATTERNS = "expected patterns that match a module (such as '0', '1', '2', '3'), got 'encoder.*'"
SELECTOR = "expected a pattern, a list of patterns or a function (name, module) -> bool, got"
RANK = 'expected an int >= 1, a fraction 0 < f <= 1, None or "dense", got'
X = torch.zeros(2, 16)
ERRORS = [
    (mlp, {"rank": 0}, ValueError, f"rank: 0: {RANK} 0"),
    (mlp, {"rank": 1.5}, ValueError, f"rank: 0: {RANK} 1.5"),
    (mlp, {"rank": float("nan")}, ValueError, f"rank: 0: {RANK} nan"),
    (mlp, {"rank": True}, TypeError, f"rank: 0: {RANK} bool"),
    (mlp, {"rank": "low"}, TypeError, f"rank: 0: {RANK} 'low'"),
    (mlp, {"rank": torch.tensor(3)}, TypeError, f"rank: 0: {RANK} Tensor"),
    (mlp, {"rank": {"0": 4, "2": -1}}, ValueError, f"rank: 2: {RANK} -1"),
    (mlp, {"rank": lambda n, m: [4]}, TypeError, f"rank: 0: {RANK} list"),
    (
        mlp,
        {"rank": {"0": 4, "3": 4}},
        ValueError,
        "rank: expected patterns that match a layer (such as '0', '2'), got '3'",
    ),
    (mlp, {"rank": {0: 4}}, TypeError, "rank: expected patterns (str) as keys, got int"),
    (mlp, {"include": "encoder.*"}, ValueError, f"include: {PATTERNS}"),
    (mlp, {"exclude": ["0", "encoder.*"]}, ValueError, f"exclude: {PATTERNS}"),
    (mlp, {"include": 3}, TypeError, f"include: {SELECTOR} int"),
    (mlp, {"exclude": [3]}, TypeError, f"exclude: {SELECTOR} a int in it"),
    (
        mlp,
        {"init": "pca"},
        ValueError,
        "init: expected one of ('svd', 'data', 'random'), got 'pca'",
    ),
    (mlp, {"batches": [X]}, ValueError, "batches: expected None with init='svd', got batches"),
    (
        mlp,
        {"init": "data"},
        TypeError,
        "batches: expected an iterable of batches (tensors, tuples or dicts), got NoneType",
    ),
    (
        mlp,
        {"init": "data", "batches": X},
        TypeError,
        "batches: expected an iterable of batches (tensors, tuples or dicts), got Tensor",
    ),
    (
        mlp,
        {"init": "data", "batches": [X, "text"]},
        TypeError,
        "batches: expected batches that are tensors, tuples or dicts, got str",
    ),
    (
        mlp,
        {"init": "data", "batches": []},
        ValueError,
        "batches: expected at least one batch, got none",
    ),
    (
        mlp,
        {"init": "data", "batches": [X * float("nan")]},
        ValueError,
        "batches: expected finite inputs in every layer, got NaN or infinity in the input of '0'",
    ),
    (
        Skips,
        {"init": "data", "batches": [X]},
        ValueError,
        "batches: expected batches that reach every layer to convert, got none for 'unused'; "
        "exclude it or add batches",
    ),
    (
        broken,
        {},
        ValueError,
        "model: expected finite weights, got NaN or infinity in 2.weight",
    ),
    (
        lambda: mlp(device="meta"),
        {},
        ValueError,
        "model: expected weights in memory for init='svd', got 0.weight on the meta device",
    ),
    (
        lambda: nn.Sequential(nn.LayerNorm(4), nn.ReLU()),
        {},
        ValueError,
        "model: expected at least one layer to factorise, got a model without a linear or "
        "convolution layer",
    ),
    (
        lambda: nn.Sequential(nn.Embedding(4, 4), nn.Linear(2, 2)),
        {},
        ValueError,
        "model: expected at least one layer to factorise, got 0: an embedding is a table that is "
        "looked up, not multiplied with; 1: factors of rank 2 hold 8 weights, the dense layer 4 "
        "(break-even rank 1.0)",
    ),
    (mlp, {"multiple_of": 0}, ValueError, "multiple_of: expected an int >= 1, got 0"),
]


@pytest.mark.parametrize(("make", "options", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_leave_the_model_as_it_was(make, options, error, message):
    model = make()
    if not next(model.parameters(), X).is_meta:
        before = snapshot(model)
    with pytest.raises(error, match=f"^convert: {re.escape(message)}$"):
        convert(model, **{"rank": 4, **options})
    if not next(model.parameters(), X).is_meta:
        assert_unchanged(model, before)


def test_an_error_inside_the_model_leaves_it_as_it_was():
    model = mlp()
    model[1].eval()
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        convert(model, 4, init="data", batches=[X, torch.zeros(2, 5)])
    assert_unchanged(model, before)


def test_errors_about_the_model_itself():
    message = "model: expected an nn.Module, got list"
    with pytest.raises(TypeError, match=f"^convert: {message}$"):
        convert([], 4)
    with pytest.raises(TypeError, match=f"^to_dense: {message}$"):
        to_dense([])
    model = nn.Sequential(LoDLinear(4, 4), LoDLinear(4, 4, activation="relu"))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^LoDLinear\.to_linear: activation: expected None"):
        to_dense(model)
    assert_unchanged(model, before)
    long = nn.Sequential(*(nn.Embedding(2, 2) for _ in range(9)))
    with pytest.raises(ValueError, match=r"; and 3 more$"):
        convert(long, 1)
