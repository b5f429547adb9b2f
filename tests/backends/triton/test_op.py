"""The public op on the Triton backend, in the interpreter: the path a GPU user takes."""

import pytest
import torch
import torch.nn.functional as F
from triton_support import DEVICE, needs_kernels

import maestro_kernels as mk
from maestro_kernels.backends.reference import lod_linear_ref
from maestro_kernels.testing import assert_accurate, make_inputs

pytestmark = needs_kernels
M, N, K, R = 37, 56, 72, 24


def layer(dtype, seed=0, n=N, r=R, grad=True):
    return make_inputs(M, n, K, r, dtype=dtype, device=DEVICE, seed=seed, requires_grad=grad)


def plain(x, u, v, bias, r, activation):
    """Two library matmuls in the dtype of the inputs."""
    z = F.linear(F.linear(x, v[:r]), u[:, :r], bias)
    return z if activation is None else lod_linear_activation(z, activation)


def lod_linear_activation(z, activation):
    from maestro_kernels.backends.reference import ACTIVATIONS

    return ACTIVATIONS[activation](z)


def doubled(leaves):
    return [t.detach().double().requires_grad_() for t in leaves]


def test_relu_passes_the_gradient_at_nan_as_torch_does():
    x, u, v, bias = layer(torch.float32)
    x.data[3, 5] = float("nan")
    dy = torch.randn(M, N, device=DEVICE)
    got = torch.autograd.grad(
        mk.lod_linear(x, u, v, bias, activation="relu", backend="triton"), bias, dy
    )[0]
    want = torch.autograd.grad(plain(x, u, v, bias, R, "relu"), bias, dy)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def check(names, got, pair, exact):
    for name, a, b, c in zip(names, got, pair, exact, strict=True):
        assert_accurate(name, a, b, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [None, 1, 13, "tensor"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_values_and_gradients(dtype, rank, activation):
    leaves = layer(dtype)
    r = {"tensor": 13, None: R}.get(rank, rank)
    if rank == "tensor":
        rank = torch.tensor(13, dtype=torch.int32, device=DEVICE)
    y = mk.lod_linear(*leaves, rank=rank, activation=activation, backend="triton")
    exact_leaves = doubled(leaves)
    exact = lod_linear_ref(*exact_leaves, rank=r, activation=activation)
    pair = plain(*leaves, r, activation)
    assert_accurate("y", y, pair, exact)
    dy = torch.randn(M, N, device=DEVICE).to(dtype)
    check(
        ("dx", "du", "dv", "dbias"),
        torch.autograd.grad(y, leaves, dy),
        torch.autograd.grad(pair, leaves, dy),
        torch.autograd.grad(exact, exact_leaves, dy.double()),
    )


@pytest.mark.parametrize("save_h", [True, False])
def test_h_saved_or_computed_again_gives_the_same_gradients(save_h):
    leaves = layer(torch.float32)
    y = mk.lod_linear(*leaves, rank=13, activation="silu", backend="triton", save_h=save_h)
    exact_leaves = doubled(leaves)
    exact = lod_linear_ref(*exact_leaves, rank=13, activation="silu")
    check(
        ("dx", "du", "dv", "dbias"),
        torch.autograd.grad(y.sum(), leaves),
        torch.autograd.grad(plain(*leaves, 13, "silu").sum(), leaves),
        torch.autograd.grad(exact.sum(), exact_leaves),
    )


@pytest.mark.parametrize("wanted", [1, 2, 4, 8, 6])
def test_only_the_gradients_asked_for(wanted):
    leaves = layer(torch.float32, grad=False)
    flags = [bool(wanted >> i & 1) for i in range(4)]
    for leaf, flag in zip(leaves, flags, strict=True):
        leaf.requires_grad_(flag)
    mk.lod_linear(*leaves, rank=13, activation="relu", backend="triton").sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == flags


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tensor_ranks", [True, False])
def test_group(shared, tensor_ranks):
    shapes, ranks, activations = [(56, 24), (16, 8), (40, 16)], [13, 0, 16], ["silu", None, None]
    parts = [layer(torch.float32, i, n, r) for i, (n, r) in enumerate(shapes)]
    xs, us, vs, biases = (list(column) for column in zip(*parts, strict=True))
    xs = xs[:1] if shared else xs
    given = torch.tensor(ranks, dtype=torch.int32, device=DEVICE) if tensor_ranks else ranks
    leaves = [*xs, *us, *vs, *biases]
    exact_leaves = doubled(leaves)

    def split(flat):
        n_x = len(xs)
        x, rest = flat[:n_x], flat[n_x:]
        return x, rest[:3], rest[3:6], rest[6:]

    def run(call, flat):
        x, u, v, b = split(flat)
        return [
            call(x[0 if shared else i], u[i], v[i], b[i], ranks[i], activations[i])
            for i in range(3)
        ]

    ys = mk.lod_linear_grouped(
        xs[0] if shared else xs, us, vs, biases, ranks=given, activation=activations,
        backend="triton",
    )  # fmt: skip
    pair = run(plain, leaves)
    exact = run(lambda *a: lod_linear_ref(*a[:4], rank=a[4], activation=a[5]), exact_leaves)
    check([f"y{i}" for i in range(3)], ys, pair, exact)
    weights = [torch.randn_like(y) for y in ys]
    check(
        [f"leaf {i}" for i in range(len(leaves))],
        torch.autograd.grad(ys, leaves, weights),
        torch.autograd.grad(pair, leaves, weights),
        torch.autograd.grad(exact, exact_leaves, [w.double() for w in weights]),
    )


def test_leading_dimensions_empty_batches_and_rank_zero():
    x, u, v, bias = layer(torch.float32, grad=False)
    y = mk.lod_linear(x[:36].reshape(3, 12, K), u, v, bias, rank=5, backend="triton")
    assert y.shape == (3, 12, N)
    assert mk.lod_linear(x[:0], u, v, bias, backend="triton").shape == (0, N)
    zero = mk.lod_linear(x, u, v, bias, rank=0, backend="triton")
    assert torch.equal(zero, bias.expand(M, N))
    rank = torch.zeros((), dtype=torch.int32, device=DEVICE)
    assert torch.equal(mk.lod_linear(x, u, v, bias, rank=rank, backend="triton"), zero)


def test_unaligned_sizes_and_strides():
    x, u, v, bias = make_inputs(21, 19, 45, 11, device=DEVICE)
    wide = torch.randn(21, 60, device=DEVICE)
    wide[:, 3:48] = x
    for a in (x, wide[:, 3:48], x.repeat_interleave(2, 0)[::2]):
        y = mk.lod_linear(a, u, v, bias, rank=7, backend="triton")
        pair = plain(x, u, v, bias, 7, None)
        exact = lod_linear_ref(x.double(), u.double(), v.double(), bias.double(), rank=7)
        assert_accurate("y", y, pair, exact)


def test_the_reason_is_named_where_it_cannot_serve():
    x, u, v, _ = layer(torch.float32, grad=False)
    with pytest.raises(NotImplementedError, match="last stride 1, not"):
        mk.lod_linear(x.t().contiguous().t(), u, v, backend="triton")


def test_explain_names_strategy_and_rule():
    x, u, v, _ = layer(torch.float32, grad=False)
    plan = mk.explain(x, u, v, backend="triton").plan
    assert plan.strategy == "two_phase"
    assert "forced" in plan.reason
    assert mk.explain(x, [u, u], [v, v], backend="triton").plan.strategy == "two_phase"


def test_compile_on_the_triton_backend_follows_a_tensor_rank():
    torch._dynamo.reset()
    leaves = layer(torch.float32)
    rank = torch.tensor(5, dtype=torch.int32, device=DEVICE)

    def loss(x, u, v, bias, rank):
        return mk.lod_linear(x, u, v, bias, rank=rank, backend="triton").sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled(*leaves, rank)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for value in (13, 0):
            rank.fill_(value)
            got = torch.autograd.grad(compiled(*leaves, rank), leaves)
            want = torch.autograd.grad(lod_linear_ref(*leaves, rank=value).sin().sum(), leaves)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
