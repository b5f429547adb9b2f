"""Every rejected input of the op, with its message: function, argument, expected, got."""

import re

import pytest
import torch

import maestro_kernels as mk
from maestro_kernels.testing import make_inputs

X, U, V, B = make_inputs(4, 6, 8, 3)

CASES = {
    "x no tensor": (TypeError, [1, U, V], {}, "x: expected a Tensor, got int"),
    "u no tensor": (TypeError, [X, [1], V], {}, "u: expected a Tensor, got list"),
    "bias no tensor": (TypeError, [X, U, V, 0.0], {}, "bias: expected a Tensor, got float"),
    "x dtype": (
        TypeError,
        [X.long(), U, V],
        {},
        "x: expected dtype float16, bfloat16, float32, float64, got torch.int64",
    ),
    "x 0-d": (ValueError, [X[0, 0], U, V], {}, "x: expected shape (..., K), got a 0-d tensor"),
    "v shape": (
        ValueError,
        [X, U, V[:, :7]],
        {},
        "v: expected shape (R, 8) to match x (4, 8), got (3, 7)",
    ),
    "v 1-d": (ValueError, [X, U, V[0]], {}, "v: expected a 2-d factor, got shape (8,)"),
    "factors disagree": (
        ValueError,
        [X, U[:, :2], V],
        {},
        "u: expected shape (N, 3) to match v (3, 8), got (6, 2)",
    ),
    "bias shape": (
        ValueError,
        [X, U, V, B[:5]],
        {},
        "bias: expected shape (6,) to match u (6, 3), got (5,)",
    ),
    "bias broadcast": (
        ValueError,
        [X, U, V, B[:1]],
        {},
        "bias: expected shape (6,) to match u (6, 3), got (1,)",
    ),
    "u dtype": (
        TypeError,
        [X, U.half(), V],
        {},
        "u: expected torch.float32 like x, got torch.float16",
    ),
    "bias dtype": (
        TypeError,
        [X, U, V, B.double()],
        {},
        "bias: expected torch.float32 like x, got torch.float64",
    ),
    "v device": (ValueError, [X, U, V.to("meta")], {}, "v: expected device cpu like x, got meta"),
    "rank negative": (ValueError, [X, U, V], {"rank": -1}, "rank: expected 0 <= rank <= 3, got -1"),
    "rank above R": (ValueError, [X, U, V], {"rank": 4}, "rank: expected 0 <= rank <= 3, got 4"),
    "rank bool": (
        TypeError,
        [X, U, V],
        {"rank": True},
        "rank: expected None, an int or a 0-d int32 tensor, got bool",
    ),
    "rank float": (
        TypeError,
        [X, U, V],
        {"rank": 2.0},
        "rank: expected None, an int or a 0-d int32 tensor, got float",
    ),
    "rank tensor dtype": (
        TypeError,
        [X, U, V],
        {"rank": torch.tensor(2)},
        "rank: expected a 0-d int32 tensor, got torch.int64",
    ),
    "rank tensor shape": (
        ValueError,
        [X, U, V],
        {"rank": torch.tensor([2], dtype=torch.int32)},
        "rank: expected a 0-d int32 tensor, got (1,)",
    ),
    "rank tensor device": (
        ValueError,
        [X, U, V],
        {"rank": torch.empty((), dtype=torch.int32, device="meta")},
        "rank: expected device cpu, got meta",
    ),
    "activation": (
        ValueError,
        [X, U, V],
        {"activation": "tanh"},
        "activation: expected one of (None, 'relu', 'gelu', 'gelu_tanh', 'silu'), got 'tanh'",
    ),
    "backend": (
        ValueError,
        [X, U, V],
        {"backend": "cublas"},
        "backend: expected one of (None, 'auto', 'reference', 'matmul', 'triton', 'native'), "
        "got 'cublas'",
    ),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_lod_linear_says_what_is_wrong(name, grad):
    error, args, kwargs, message = CASES[name]
    args = [
        a.detach().requires_grad_(grad)
        if isinstance(a, torch.Tensor) and a.is_floating_point()
        else a
        for a in args
    ]
    with pytest.raises(error, match="^" + re.escape(f"lod_linear: {message}")):
        mk.lod_linear(*args, **kwargs)


# The schema rejects a wrong type before our code sees it, meta tensors go to the fake, and ranks
# (1,) are right for a group of one.
OP_CASES = [
    name
    for name in CASES
    if not name.endswith(
        ("no tensor", "device", "rank bool", "rank float", "rank tensor dtype", "rank tensor shape")
    )
]


@pytest.mark.parametrize("name", OP_CASES)
def test_the_registered_op_says_the_same(name):
    error, args, kwargs, message = CASES[name]
    rank = kwargs.get("rank")
    is_tensor = isinstance(rank, torch.Tensor)
    bias = args[3] if len(args) > 3 else None
    full = (
        *([t] for t in args[:3]),
        [] if bias is None else [bias],
        [],
        [],
        [bias is not None],
        [False],
        [False],
        None if rank is None or is_tensor else [rank],
        rank if is_tensor else None,
        [kwargs.get("activation") or "none"],
        [1.0],
        0.0,
        kwargs.get("backend"),
    )
    with pytest.raises(error, match=re.escape(message)):
        torch.ops.maestro_kernels.lod_linear(*full)


GROUPED = {
    "us no sequence": (TypeError, (X, U, [V]), {}, "us: expected a sequence of factors"),
    "empty": (ValueError, (X, [], []), {}, "us: expected at least one layer, got none"),
    "vs length": (ValueError, (X, [U, U], [V]), {}, "vs: expected 2 entries like us, got 1"),
    "x length": (
        ValueError,
        ([X, X, X], [U, U], [V, V]),
        {},
        "x: expected one tensor or 2 (one per layer), got 3",
    ),
    "biases length": (
        ValueError,
        (X, [U, U], [V, V], [B]),
        {},
        "biases: expected 2 entries like us, got 1",
    ),
    "ranks length": (
        ValueError,
        (X, [U, U], [V, V]),
        {"ranks": [1]},
        "ranks: expected 2 entries like us, got 1",
    ),
    "rank of one layer": (
        ValueError,
        (X, [U, U], [V, V]),
        {"ranks": [1, 4]},
        "ranks[1]: expected 0 <= rank <= 3, got 4",
    ),
    "ranks tensor shape": (
        ValueError,
        (X, [U, U], [V, V]),
        {"ranks": torch.tensor([1], dtype=torch.int32)},
        "ranks: expected an int32 tensor (2,), got shape (1,)",
    ),
    "ranks tensor dtype": (
        TypeError,
        (X, [U, U], [V, V]),
        {"ranks": torch.tensor([1, 2])},
        "ranks: expected an int32 tensor (2,), got torch.int64",
    ),
    "activation of one layer": (
        ValueError,
        (X, [U, U], [V, V]),
        {"activation": [None, "swish"]},
        "activation: expected one of",
    ),
    "activation length": (
        ValueError,
        (X, [U, U], [V, V]),
        {"activation": [None]},
        "activation: expected 2 entries like us, got 1",
    ),
    "second v": (
        ValueError,
        (X, [U, U], [V, V[:, :5]]),
        {},
        "vs[1]: expected shape (R, 8) to match x (4, 8), got (3, 5)",
    ),
    "x dtypes": (
        TypeError,
        ([X, X.double()], [U, U.double()], [V, V.double()]),
        {},
        "x[1]: expected torch.float32 like x[0], got torch.float64",
    ),
}


@pytest.mark.parametrize("name", GROUPED)
def test_lod_linear_grouped_says_what_is_wrong(name):
    error, args, kwargs, message = GROUPED[name]
    with pytest.raises(error, match="^" + re.escape(f"lod_linear_grouped: {message}")):
        mk.lod_linear_grouped(*args, **kwargs)


def test_a_valid_call_does_not_hide_a_later_invalid_one():
    # The eager path remembers calls it has checked; the memory must tell these apart.
    mk.lod_linear(X, U, V, rank=1)
    with pytest.raises(TypeError, match="got bool"):
        mk.lod_linear(X, U, V, rank=True)
    with pytest.raises(TypeError, match=r"got torch\.float16"):
        mk.lod_linear(X, U, V.half(), rank=1)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("backend", [None, "matmul"])
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("M", [2, 300])
@pytest.mark.parametrize("wrong", ["u", "v", "bias"])
@pytest.mark.parametrize("kind", ["meta", "sparse", "dtype", "shape"])
def test_a_remembered_call_is_not_taken_for_one_that_is_wrong(
    kind, wrong, M, rank, backend, grouped
):
    x, u, v, bias = make_inputs(M, 48, 40, 16)
    changes = {
        "meta": lambda t: t.to("meta"),
        "sparse": lambda t: t.to_sparse(),
        "dtype": lambda t: t.double(),
        "shape": lambda t: t[:1] if wrong == "bias" else t[:, :7],
    }
    given = {"u": u, "v": v, "bias": bias}

    def call(u, v, bias):
        if grouped:
            return mk.lod_linear_grouped(x, [u], [v], [bias], ranks=rank, backend=backend)
        return mk.lod_linear(x, u, v, bias, rank=rank, backend=backend)

    for _ in range(2):
        call(**given)
    for grad in (False, True):
        x.requires_grad_(grad)
        with pytest.raises((TypeError, ValueError), match=wrong):
            call(**{**given, wrong: changes[kind](given[wrong])})


def test_a_backend_that_is_not_built_says_so(no_library):
    with pytest.raises(NotImplementedError, match=r"lod_linear: backend: .*'native': .*compiled"):
        mk.lod_linear(X, U, V, backend="native")
    assert mk.lod_linear(X[:1], U, V, rank=1).shape == (1, 6)
    with pytest.raises(NotImplementedError, match=r"lod_linear_grouped: backend: .*'native'"):
        mk.lod_linear_grouped(X, [U], [V], backend="native")


def test_triton_without_a_gpu_or_interpreter_says_so(monkeypatch):
    from maestro_kernels import dispatch

    with pytest.raises(NotImplementedError, match=r"lod_linear: backend: .*'triton': .*float64"):
        mk.lod_linear(X.double(), U.double(), V.double(), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    dispatch._plans.clear()
    with pytest.raises(NotImplementedError, match=r"'triton': .*TRITON_INTERPRET"):
        mk.lod_linear(X, U, V, backend="triton")
