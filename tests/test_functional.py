"""Values and gradients of lod_linear and lod_linear_grouped on the library backends."""

import pytest
import torch
import torch.nn.functional as F

import maestro_kernels as mk
from maestro_kernels.backends import matmul, reference
from maestro_kernels.backends.reference import lod_linear_ref
from maestro_kernels.call import Call
from maestro_kernels.ops.gradient import by_halves
from maestro_kernels.testing import assert_accurate, make_inputs

ACTIVATIONS = [None, "relu", "gelu", "gelu_tanh", "silu"]
TORCH_ACTIVATION = {
    None: lambda z: z,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}
M, N, K, R = 19, 21, 34, 16
RANKS = [None, 0, 1, 7, R - 1, R, "tensor"]


def device_rank(value):
    return torch.tensor(value, dtype=torch.int32)


def as_rank(rank):
    return device_rank(5) if rank == "tensor" else rank


def host_rank(rank, R=R):
    return R if rank is None else int(rank)


def by_hand(x, u, v, bias, r, activation):
    """The formula written without the package."""
    return TORCH_ACTIVATION[activation](F.linear(F.linear(x, v[:r]), u[:, :r], bias))


@pytest.mark.parametrize("backend", [None, "auto", "matmul", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", RANKS)
def test_forward_is_accurate(backend, dtype, rank):
    rank = as_rank(rank)
    x, u, v, bias = make_inputs(M, N, K, R, dtype=dtype)
    y = mk.lod_linear(x, u, v, bias, rank=rank, activation="gelu", backend=backend)
    r = host_rank(rank)
    doubles = [t.double() for t in (x, u, v, bias)]
    two = by_hand(x, u, v, bias, r, "gelu")
    assert y.dtype == dtype
    assert_accurate("y", y, two, by_hand(*doubles, r, "gelu"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("save_h", [True, False])
def test_gradients_match_autograd_of_the_formula(activation, rank, save_h):
    rank = as_rank(rank)
    leaves = make_inputs((3, 4), N, K, R, dtype=torch.float64, requires_grad=True)
    y = mk.lod_linear(*leaves, rank=rank, activation=activation, save_h=save_h)
    expected = by_hand(*leaves, host_rank(rank), activation)
    dy = torch.randn_like(y)
    for name, got, want in zip(
        ("dx", "du", "dv", "dbias"),
        torch.autograd.grad(y, leaves, dy),
        torch.autograd.grad(expected, leaves, dy),
        strict=True,
    ):
        torch.testing.assert_close(got, want, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("rank", [0, 5, "tensor"])
def test_gradients_beyond_the_rank_are_exactly_zero(rank):
    leaves = make_inputs(M, N, K, R, requires_grad=True)
    mk.lod_linear(*leaves, rank=as_rank(rank), activation="silu").sum().backward()
    _, u, v, _ = leaves
    r = 5 if rank == "tensor" else rank
    assert torch.count_nonzero(u.grad[:, r:]) == 0
    assert torch.count_nonzero(v.grad[r:]) == 0
    assert r == 0 or torch.count_nonzero(v.grad[r - 1]) > 0


@pytest.mark.parametrize("rank", [5, "tensor"])
def test_contents_beyond_the_rank_never_matter(rank):
    x, u, v, bias = make_inputs(M, N, K, R)
    rank = as_rank(rank)
    expected = mk.lod_linear(x, u, v, bias, rank=rank)
    u[:, 5:] = 1e4
    v[5:] = -1e4
    assert torch.equal(mk.lod_linear(x, u, v, bias, rank=rank), expected)


@pytest.mark.parametrize("wanted", range(1, 16))
def test_only_the_gradients_asked_for_are_computed(wanted):
    leaves = make_inputs(M, N, K, R)
    flags = [bool(wanted >> i & 1) for i in range(4)]
    for leaf, flag in zip(leaves, flags, strict=True):
        leaf.requires_grad_(flag)
    mk.lod_linear(*leaves, rank=9, activation="relu").sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == flags


@pytest.mark.parametrize("backend", [matmul, reference])
@pytest.mark.parametrize("wanted", range(16))
def test_what_nobody_asks_for_is_none(backend, wanted):
    x, u, v, bias = make_inputs(M, N, K, R)
    needs = tuple(bool(wanted >> i & 1) for i in range(4))
    call, none = Call("lod_linear", [x], [u], [v], [bias], [9], ["silu"]), [None]
    dys = [x.new_ones(M, N)]
    with torch.no_grad():
        own = backend, "two matmuls"
        *found, _, _ = by_halves(own, own, call, dys, none, none, needs=needs)
    assert tuple(grad is not None for (grad,) in found) == needs


@pytest.mark.parametrize("activation", [None, "silu"])
def test_only_the_products_needed_are_computed(activation):
    x, u, v, bias = make_inputs(M, N, K, R)
    from torch.utils.flop_counter import FlopCounterMode

    def flop(*wanted):
        for leaf in (x, u, v, bias):
            leaf.requires_grad_(any(leaf is w for w in wanted))
        y = mk.lod_linear(x, u, v, bias, activation=activation, backend="matmul")
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(y.sum(), wanted)
        return counter.get_total_flops()

    product_n, product_k = 2 * M * R * N, 2 * M * R * K
    # Of an activation z is computed again, whoever asks.
    again = 0 if activation is None else product_n
    assert flop(u) == again + product_n
    assert flop(x) == again + product_n + product_k
    assert flop(v) == again + product_n + product_k
    assert flop(bias) == again
    assert flop(x, u, v, bias) == again + 2 * (product_n + product_k)


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 0, 3), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("grad", [False, True])
def test_any_leading_shape(lead, grad):
    leaves = make_inputs(lead, N, K, R, dtype=torch.float64, requires_grad=grad)
    y = mk.lod_linear(*leaves, rank=7)
    torch.testing.assert_close(y, by_hand(*leaves, 7, None))
    assert y.shape == (*lead, N)
    if grad:
        y.sum().backward()
        assert leaves[0].grad.shape == leaves[0].shape
        assert leaves[1].grad.shape == (N, R)


def test_strided_inputs():
    x, u, v, bias = make_inputs(2 * M, N, K, R, dtype=torch.float64)
    cases = {
        "rows skipped": (x[::2], u, v),
        "x transposed": (x.t().contiguous().t(), u, v),
        "u transposed": (x, u.t().contiguous().t(), v),
        "v transposed": (x, u, v.t().contiguous().t()),
        "columns skipped": (x, u.repeat_interleave(2, 1)[:, ::2], v),
        "x expanded": (x[:1].expand(5, K), u, v),
    }
    for name, (a, b, c) in cases.items():
        got = mk.lod_linear(a, b, c, bias, rank=7)
        torch.testing.assert_close(got, by_hand(a, b, c, bias, 7, None), msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_rank_zero_is_act_of_bias(activation, has_bias):
    x, u, v, bias = make_inputs((2, 3), N, K, R, bias=has_bias)
    expected = TORCH_ACTIVATION[activation](bias if has_bias else torch.zeros(N))
    y = mk.lod_linear(x, u, v, bias, rank=0, activation=activation)
    # Vector and scalar code of one activation differ in the last bit.
    torch.testing.assert_close(y, expected.expand(2, 3, N))


def test_a_tensor_rank_is_clamped_and_never_read_by_the_host():
    x, u, v, bias = make_inputs(M, N, K, R)
    for value, effective in ((-3, 0), (R + 9, R), (4, 4)):
        y = mk.lod_linear(x, u, v, bias, rank=device_rank(value))
        torch.testing.assert_close(y, by_hand(x, u, v, bias, effective, None))
    # A meta tensor has no value to read: reading it would raise.
    metas = [t.to("meta") for t in (x, u, v, bias)]
    rank = torch.empty((), dtype=torch.int32, device="meta")
    assert mk.lod_linear(*metas, rank=rank).shape == (M, N)


def test_repeated_calls_are_bitwise_equal():
    leaves = make_inputs(M, N, K, R, requires_grad=True)
    first = mk.lod_linear(*leaves, rank=7)
    grads = torch.autograd.grad(first.sum(), leaves)
    for _ in range(3):
        again = mk.lod_linear(*leaves, rank=7)
        assert torch.equal(again, first)
        for a, b in zip(torch.autograd.grad(again.sum(), leaves), grads, strict=True):
            assert torch.equal(a, b)


GROUP = [(21, 16), (5, 8), (9, 12)]
GROUP_ACTIVATIONS = ["silu", None, "gelu"]


def make_group(shared, dtype=torch.float64):
    parts = [
        make_inputs((2, 3), n, K, r, dtype=dtype, seed=i, bias=i != 1, requires_grad=True)
        for i, (n, r) in enumerate(GROUP)
    ]
    xs, us, vs, biases = (list(column) for column in zip(*parts, strict=True))
    return (xs[:1] if shared else xs), us, vs, biases


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("ranks", [None, 4, [16, 0, 5], "tensor", "mixed"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_group_matches_its_layers(shared, ranks, backend):
    xs, us, vs, biases = make_group(shared)
    if ranks == "tensor":
        ranks = torch.tensor([16, 0, 5], dtype=torch.int32)
    elif ranks == "mixed":
        ranks = [device_rank(3), None, 5]
    x = xs[0] if shared else xs
    ys = mk.lod_linear_grouped(
        x, us, vs, biases, ranks=ranks, activation=GROUP_ACTIVATIONS, backend=backend
    )
    spread = [ranks] * 3 if ranks is None or isinstance(ranks, int) else ranks
    expected = [
        by_hand(
            xs[0 if shared else i],
            us[i],
            vs[i],
            biases[i],
            host_rank(spread[i], GROUP[i][1]),
            GROUP_ACTIVATIONS[i],
        )
        for i in range(3)
    ]
    leaves = [t for t in (*xs, *us, *vs, *biases) if t is not None]
    weights = [torch.randn_like(y) for y in ys]
    for got, want in zip(ys, expected, strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(
        torch.autograd.grad(ys, leaves, weights),
        torch.autograd.grad(expected, leaves, weights),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_group_gradient_with_an_unused_output():
    xs, us, vs, biases = make_group(shared=True)
    ys = mk.lod_linear_grouped(xs[0], us, vs, biases)
    ys[1].sum().backward()
    expected = by_hand(xs[0].detach(), us[1].detach(), vs[1].detach(), None, 8, None)
    torch.testing.assert_close(ys[1].detach(), expected)
    assert us[0].grad is None
    assert torch.count_nonzero(us[1].grad) > 0


def test_group_takes_one_value_for_every_layer():
    x, u, v, bias = make_inputs(M, N, K, R)
    ys = mk.lod_linear_grouped(x, [u, u], [v, v], bias, ranks=3, activation="relu")
    for y in ys:
        torch.testing.assert_close(y, by_hand(x, u, v, bias, 3, "relu"))


@pytest.mark.parametrize("rank", [0, 3, R])
def test_float64_reference_is_exact(rank):
    x, u, v, bias = make_inputs(M, N, K, R, dtype=torch.float64)
    expected = x @ (u[:, :rank] @ v[:rank]).T + bias
    torch.testing.assert_close(lod_linear_ref(x, u, v, bias, rank=rank), expected)
