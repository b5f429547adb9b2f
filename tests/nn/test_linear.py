"""LoDLinear: values, rank, truncation, checkpoints, and the way from and to nn.Linear."""

import copy
import io
import pickle
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from layer_support import K, N, R, layer, merged
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from maestro_kernels.backends.reference import lod_linear_ref
from maestro_kernels.nn import LoDLinear
from maestro_kernels.nn import layer as layers
from maestro_kernels.testing import assert_accurate

# --- forward --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 1, 4, R])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_forward_is_the_formula_at_the_active_prefix(rank, activation, dtype):
    made = layer(dtype, activation=activation)
    made.rank = rank
    x = torch.randn(33, 2, K).to(dtype)
    args = [t.detach() for t in (x, made.u, made.v, made.bias)]
    ref = lod_linear_ref(*(t.double() for t in args), rank=rank, activation=activation)
    h = F.linear(args[0], args[2][:rank])
    plain = F.linear(h, args[1][:, :rank], args[3])
    plain = plain if activation is None else F.gelu(plain)
    assert_accurate("y", made(x), plain, ref)


def test_gradients_beyond_the_active_rank_are_exactly_zero():
    made = layer()
    made(torch.randn(5, K, dtype=torch.float64)).square().sum().backward()
    assert (made.u.grad[:, 4:] == 0).all()
    assert (made.v.grad[4:] == 0).all()
    assert (made.u.grad[:, :4] != 0).all()
    assert (made.v.grad[:4] != 0).all()


def test_a_new_layer_varies_like_nn_linear():
    made = LoDLinear(300, 500, 200)
    assert_close((made.u @ made.v).var(), torch.tensor(1 / (3 * 300)), rtol=0.05, atol=0)
    assert_close(made.u.square().sum(0).mean(), made.v.square().sum(1).mean(), rtol=0.05, atol=0)
    assert made.bias.abs().max() <= 300**-0.5
    assert made.bias.std() > 0.4 * 300**-0.5
    assert made.rank == made.max_rank == 200
    assert LoDLinear(300, 500).max_rank == 300


def test_compiled_layer_follows_the_rank_without_recompiling():
    made = layer()
    x = torch.randn(5, K, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rank in (4, 0, 1, R):
            made.rank = rank
            made.zero_grad()
            y = compiled(x)
            y.square().sum().backward()
            grads = [p.grad.clone() for p in made.parameters()]
            made.zero_grad()
            expected = made(x)
            expected.square().sum().backward()
            assert_close(y, expected)
            assert_close(grads, [p.grad for p in made.parameters()])


def test_exported_layer_carries_its_rank_as_a_buffer():
    made = layer()
    x = torch.randn(5, K, dtype=torch.float64)
    program = torch.export.export(made, (x,))
    module = program.module()
    assert_close(module(x), made(x))
    made.rank = 2
    module.load_state_dict(made.state_dict())
    assert_close(module(x), made(x))


def test_while_a_graph_is_captured_the_buffer_decides(monkeypatch):
    made = layer()
    x = torch.randn(5, K, dtype=torch.float64)
    made.active_rank.fill_(2)
    assert_close(made(x), F.linear(x, made.u[:, :4] @ made.v[:4], made.bias))
    for module in (layers, sys.modules["maestro_kernels.nn.linear"]):
        monkeypatch.setattr(module, "is_capturing", lambda tensor: True)
    assert made.call_rank(x) is made.active_rank
    assert_close(made(x), F.linear(x, made.u[:, :2] @ made.v[:2], made.bias))


def test_checkpointing_and_autocast():
    made = layer(torch.float32)
    x = torch.randn(5, K, requires_grad=True)
    plain = torch.autograd.grad(made(x).square().sum(), [x, *made.parameters()])
    again = torch.autograd.grad(
        checkpoint(made, x, use_reentrant=False).square().sum(), [x, *made.parameters()]
    )
    assert_close(again, plain)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert made.u.grad.dtype == torch.float32


# --- rank -----------------------------------------------------------------------------------------


def test_setting_the_rank_writes_the_host_value_and_the_same_buffer():
    made = layer()
    buffer = made.active_rank
    made.rank = 2
    assert made.rank == 2
    assert isinstance(made.rank, int)
    assert made.active_rank is buffer
    assert (buffer.item(), buffer.dtype, buffer.dim()) == (2, torch.int32, 0)
    assert made.max_rank == R


@pytest.mark.parametrize(
    ("value", "error", "got"),
    [
        (True, TypeError, "bool"),
        (2.0, TypeError, "float"),
        (torch.tensor(2), TypeError, "Tensor"),
        ("2", TypeError, "str"),
        (-1, ValueError, "-1"),
        (R + 1, ValueError, str(R + 1)),
    ],
)
def test_a_wrong_rank_is_refused_and_changes_nothing(value, error, got):
    made = layer()
    message = f"LoDLinear: rank: expected an int, 0 <= rank <= {R}, got {got}"
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        made.rank = value
    assert (made.rank, made.active_rank.item()) == (4, 4)


def test_importance_is_the_product_of_tail_norms():
    made = layer()
    u, v = made.u.detach(), made.v.detach()
    expected = torch.stack([u[:, b:].norm() * v[b:].norm() for b in range(R)])
    got = made.importance()
    assert_close(got, expected)
    assert not got.requires_grad
    assert (got.diff() <= 0).all()


def test_break_even_rank():
    assert LoDLinear(4608, 512, 1).break_even_rank == 460.8


# --- truncate -------------------------------------------------------------------------------------


def test_truncate_drops_the_tail_for_good():
    made = layer()
    made.v.requires_grad_(False)
    x = torch.randn(3, K, dtype=torch.float64)
    before, u = made(x), made.u
    before.sum().backward()
    gradient = u.grad[:, :4].clone()
    made.truncate()
    assert (made.u.shape, made.v.shape) == ((N, 4), (4, K))
    assert (made.max_rank, made.rank) == (4, 4)
    assert_close(made(x), before)
    assert made.u.untyped_storage().nbytes() == N * 4 * 8
    assert made.v.untyped_storage().nbytes() == 4 * K * 8
    assert made.u.is_contiguous()
    assert isinstance(made.u, nn.Parameter)
    assert (made.u.requires_grad, made.v.requires_grad) == (True, False)
    assert torch.equal(made.u.grad, gradient)
    assert dict(made.named_parameters())["u"] is made.u
    assert u.shape == (N, R)


@pytest.mark.parametrize(
    ("rank", "multiple_of", "stored", "active"),
    [(3, 1, 3, 3), (3, 2, 4, 3), (5, 4, 7, 4), (2, 8, 7, 2), (6, 1, 6, 4), (0, 2, 0, 0)],
)
def test_truncate_rounds_what_is_stored_but_not_what_is_active(rank, multiple_of, stored, active):
    made = layer()
    made.truncate(rank, multiple_of=multiple_of)
    assert (made.max_rank, made.rank, made.active_rank.item()) == (stored, active, active)
    x = torch.randn(2, K, dtype=torch.float64)
    assert_close(made(x), F.linear(x, merged(made), made.bias))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((R + 1,), ValueError, f"rank: expected an int, 0 <= rank <= {R}, got {R + 1}"),
        ((False,), TypeError, f"rank: expected an int, 0 <= rank <= {R}, got bool"),
        ((2, 0), ValueError, "multiple_of: expected an int >= 1, got 0"),
    ],
)
def test_truncate_errors(arguments, error, message):
    made = layer()
    with pytest.raises(error, match=f"^{re.escape('LoDLinear.truncate: ' + message)}$"):
        made.truncate(*arguments)
    assert made.max_rank == R


# --- checkpoints and copies -----------------------------------------------------------------------


def same(a, b):
    assert (a.rank, a.active_rank.item(), a.max_rank) == (b.rank, b.active_rank.item(), b.max_rank)
    x = torch.randn(3, K, dtype=a.u.dtype)
    assert torch.equal(a(x), b(x))


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_keeps_the_active_rank(assign):
    made, other = layer(), LoDLinear(K, N, R, dtype=torch.float64)
    state = through_file(made.state_dict())
    other.load_state_dict(state, assign=assign)
    same(made, other)
    other.rank = 1
    assert state["active_rank"].item() == 4


def test_assign_into_the_meta_device_with_another_integer_type():
    made = layer()
    other = LoDLinear(K, N, R, dtype=torch.float64, device="meta")
    state = made.state_dict() | {"active_rank": torch.tensor([4])}
    other.load_state_dict(state, assign=True)
    assert other.active_rank.dtype == torch.int32
    same(made, other)


def test_a_state_dict_without_values_keeps_the_rank():
    made = layer()
    made.load_state_dict(LoDLinear(K, N, R, device="meta").state_dict(), assign=True)
    assert made.u.is_meta
    assert made.rank == 4
    assert made.to_empty(device="cpu").active_rank.item() == 4


def test_a_dict_without_the_rank_is_reported_and_keeps_the_rank():
    made = layer()
    state = {"u": made.u.detach() + 1}
    missing = made.load_state_dict(state, strict=False).missing_keys
    assert sorted(missing) == ["active_rank", "bias", "v"]
    assert made.rank == 4
    assert torch.equal(made.u, state["u"])
    with pytest.raises(RuntimeError, match=r"Missing key.*active_rank"):
        made.load_state_dict(state)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (torch.tensor(R + 1), str(R + 1)),
        (torch.tensor(-1), "-1"),
        (torch.tensor(2.0), "torch.float32 ()"),
        (torch.tensor([1, 2]), "torch.int64 (2,)"),
        (3, "3"),
    ],
)
def test_a_wrong_rank_in_a_checkpoint_is_refused_and_changes_nothing(value, got):
    made = nn.Sequential(layer())
    u = made[0].u.detach().clone()
    state = {key: t + 1 for key, t in made.state_dict().items()} | {"0.active_rank": value}
    message = (
        f"LoDLinear.load_state_dict: 0.active_rank: expected an integer, 0 <= active_rank <= {R}, "
        f"got {got}"
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        made.load_state_dict(state)
    assert torch.equal(made[0].u, u)
    assert (made[0].rank, made[0].active_rank.item()) == (4, 4)


def test_a_checkpoint_of_a_truncated_layer_needs_a_truncated_layer():
    made, other = nn.Sequential(layer()), nn.Sequential(layer())
    made[0].truncate(3)
    message = (
        f"LoDLinear.load_state_dict: 0.u: expected shape ({N}, {R}) (max_rank {R}), got ({N}, 3): "
        "a checkpoint of a truncated layer fits a layer built or truncated to the same max_rank"
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        other.load_state_dict(made.state_dict())
    assert other[0].rank == 4
    other[0].truncate(3)
    other.load_state_dict(made.state_dict())
    same(made[0], other[0])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(clone):
    made = layer()
    other = clone(made)
    same(made, other)
    other.rank = 1
    assert (made.rank, made.active_rank.item()) == (4, 4)


def test_moving_between_dtypes_and_devices_keeps_the_rank():
    made = layer().half()
    assert (made.u.dtype, made.active_rank.dtype, made.rank) == (torch.float16, torch.int32, 4)
    meta = copy.deepcopy(made).to("meta")
    assert meta(torch.empty(2, K, dtype=torch.float16, device="meta")).shape == (2, N)
    meta.rank = 3
    real = meta.to_empty(device="cpu")
    assert (real.rank, real.active_rank.item()) == (3, 3)


# --- dense and back -------------------------------------------------------------------------------


def test_from_linear_and_back():
    dense = nn.Linear(K, N, dtype=torch.float64).eval()
    dense.weight.requires_grad_(False)
    made = LoDLinear.from_linear(dense)
    x = torch.randn(3, K, dtype=torch.float64)
    assert_close(made(x), dense(x))
    assert (made.max_rank, made.training) == (N, False)
    assert (made.u.requires_grad, made.bias.requires_grad) == (False, True)
    assert made.bias is not dense.bias
    made.rank = 5
    back = made.to_linear()
    assert type(back) is nn.Linear
    assert_close(back(x), made(x))
    assert (back.weight.requires_grad, back.bias.requires_grad) == (False, True)
    assert back.bias is not made.bias
    assert not back.training


def test_from_linear_without_bias_at_a_rank_and_at_random():
    dense = nn.Linear(K, N, bias=False)
    made = LoDLinear.from_linear(dense, rank=3)
    s2 = torch.linalg.svdvals(dense.weight)[3:].square().sum()
    assert made.bias is None
    assert_close((dense.weight - made.weight).square().sum(), s2)
    fresh = LoDLinear.from_linear(dense, rank=3, init="random")
    assert fresh.u.shape == (N, 3)
    assert (fresh.weight - dense.weight).square().sum() > 1.5 * s2


def nan_linear():
    bad = nn.Linear(3, 2)
    with torch.no_grad():
        bad.weight[1, 2] = float("nan")
    return bad


FACTORS = (torch.zeros(4, 2), torch.zeros(2, 3), torch.zeros(4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: LoDLinear(4, 6, 5),
            ValueError,
            "LoDLinear: max_rank: expected an int, 0 <= max_rank <= 4, got 5",
        ),
        (
            lambda: LoDLinear(4, 2.5),
            TypeError,
            "LoDLinear: out_features: expected an int >= 0, got float",
        ),
        (
            lambda: LoDLinear(4, 6, dtype=torch.int8),
            TypeError,
            "LoDLinear: dtype: expected float16, bfloat16, float32, float64, got torch.int8",
        ),
        (
            lambda: LoDLinear(4, 6, activation="tanh"),
            ValueError,
            "LoDLinear: activation: expected one of (None, 'relu', 'gelu', 'gelu_tanh', 'silu'), "
            "got 'tanh'",
        ),
        (
            lambda: LoDLinear.from_linear(nn.Conv2d(3, 3, 1)),
            TypeError,
            "LoDLinear.from_linear: linear: expected an nn.Linear, got Conv2d",
        ),
        (
            lambda: LoDLinear.from_linear(nn.Linear(3, 2), rank=3),
            ValueError,
            "LoDLinear.from_linear: rank: expected an int, 0 <= rank <= 2, got 3",
        ),
        (
            lambda: LoDLinear.from_linear(nn.Linear(3, 2), init="data"),
            ValueError,
            "LoDLinear.from_linear: init: expected 'svd' or 'random', got 'data'",
        ),
        (
            lambda: LoDLinear.from_linear(nan_linear()),
            ValueError,
            "LoDLinear.from_linear: weight: expected finite values, got NaN or infinity",
        ),
        (
            lambda: LoDLinear.from_linear(nn.Linear(3, 2, device="meta")),
            ValueError,
            "LoDLinear.from_linear: weight: expected values to factorise, got the meta device",
        ),
        (
            lambda: LoDLinear(4, 6, activation="relu").to_linear(),
            ValueError,
            "LoDLinear.to_linear: activation: expected None, which is all an nn.Linear can do, "
            "got 'relu'",
        ),
        (
            lambda: LoDLinear.from_factors(torch.zeros(4), FACTORS[1]),
            ValueError,
            "LoDLinear.from_factors: u: expected a matrix (N, R), got shape (4,)",
        ),
        (
            lambda: LoDLinear.from_factors(FACTORS[0], torch.zeros(3, 3)),
            ValueError,
            "LoDLinear.from_factors: v: expected shape (2, K) to match u (4, 2), got (3, 3)",
        ),
        (
            lambda: LoDLinear.from_factors(*FACTORS[:2], torch.zeros(3)),
            ValueError,
            "LoDLinear.from_factors: bias: expected shape (4,), got (3,)",
        ),
        (
            lambda: LoDLinear.from_factors(FACTORS[0], FACTORS[1].half()),
            ValueError,
            "LoDLinear.from_factors: v: expected torch.float32 on cpu like u, "
            "got torch.float16 on cpu",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


def test_forward_errors_name_what_does_not_fit():
    with pytest.raises(ValueError, match=rf"lod_linear: v: expected shape \(R, {K + 1}\)"):
        layer()(torch.zeros(3, K + 1, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"lod_linear: x: expected a Tensor, got list"):
        layer()([1.0])


def test_printed_form():
    assert repr(layer(activation="relu")) == (
        f"LoDLinear(in_features={K}, out_features={N}, rank=4/{R}, bias=True, activation=relu)"
    )


def test_a_group_is_asked_before_the_layer_runs():
    made = layer()
    x = torch.randn(2, K, dtype=torch.float64)
    alone, asked = made(x), []
    for answer, expected in ((None, alone), (x, x)):
        made.group = lambda *call, answer=answer: asked.append(call) or answer
        assert_close(made(x), expected)
        assert asked.pop() == (made, x, made.rank)
