"""act((scale · RMSNorm(x @ v[:r].T)) @ u[:, :r].T + bias + residual) on every backend."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import maestro_kernels as mk
from maestro_kernels import dispatch
from maestro_kernels.backends import native
from maestro_kernels.backends.reference import ACTIVATIONS, lod_linear_ref
from maestro_kernels.testing import assert_accurate, make_inputs, poison

M, N, K, R = 37, 24, 40, 48
NAMES = ("y", "dx", "du", "dv", "dbias", "dnorm", "dresidual")
LIBRARY = native.load_error() is None
BACKENDS = ["reference", "matmul", *(["native"] if LIBRARY else [])]
EPS = 1e-3


def made(lead=M, dtype=torch.float64, grad=True):
    """(x, u, v, bias, norm, residual)."""
    x, u, v, b = make_inputs(lead, N, K, R, dtype=dtype, requires_grad=grad)
    norm = (1 + 0.3 * torch.randn(R, dtype=torch.float64)).to(dtype).requires_grad_(grad)
    residual = torch.randn(*x.shape[:-1], N, dtype=torch.float64).to(dtype)
    return x, u, v, b, norm, residual.requires_grad_(grad)


def call(leaves, **options):
    x, u, v, b, norm, residual = leaves
    return mk.lod_linear(x, u, v, b, norm=norm, norm_eps=EPS, residual=residual, **options)


def by_hand(x, u, v, bias, norm, residual, *, rank=None, activation=None, scale=1.0):
    """What one writes with torch: linear, norm, linear."""
    r = v.shape[0] if rank is None else int(rank)
    g = scale * F.rms_norm(F.linear(x, v[:r]), (r,), norm[:r], EPS)
    return ACTIVATIONS[activation](F.linear(g, u[:, :r], bias) + residual)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [None, 1, 7, "tensor"])
@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
def test_values_and_gradients_are_accurate(backend, dtype, rank, activation):
    leaves = made(dtype=dtype)
    r = {None: R, "tensor": 33}.get(rank, rank)
    given = torch.tensor(r, dtype=torch.int32) if rank == "tensor" else rank
    options = {"activation": activation, "scale": -0.5}
    poison(torch.empty(M, N, dtype=dtype))
    y = call(leaves, rank=given, backend=backend, **options)
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact = by_hand(*exact_leaves, rank=r, **options)
    library = by_hand(*leaves, rank=r, **options)
    assert_accurate("y", y, library, exact)
    dy = torch.randn(M, N).to(dtype)
    found = [
        torch.autograd.grad(out, ts, g)
        for out, ts, g in (
            (y, leaves, dy),
            (library, leaves, dy),
            (exact, exact_leaves, dy.double()),
        )
    ]
    for name, *grads in zip(NAMES[1:], *found, strict=True):
        assert_accurate(name, *grads)
    _, du, dv, _, dnorm, _ = found[0]
    assert not any(t.any() for t in (du[:, r:], dv[r:], dnorm[r:]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 3, 600])
@pytest.mark.parametrize("rank", [1, 33, 200], ids=str)
def test_many_shapes_of_tasks(backend, rows, rank):
    """One row, dot products, several blocks of rows, several groups of panels, parts of K."""
    x, u, v, b = make_inputs(rows, 70, 1024, 256)
    norm = 1 + torch.rand(256)
    u[:, rank:], v[rank:], norm[rank:] = math.nan, math.nan, math.nan
    y = mk.lod_linear(x, u, v, b, rank=rank, norm=norm, backend=backend)
    leaves = [t.double() for t in (x, u[:, :rank], v[:rank], b, norm[:rank])]
    exact = lod_linear_ref(*leaves[:4], norm=leaves[4])
    library = F.linear(
        F.rms_norm(F.linear(x, v[:rank]), (rank,), norm[:rank], 1e-6), u[:, :rank], b
    )
    assert_accurate("y", y, library, exact)
    assert torch.equal(y, mk.lod_linear(x, u, v, b, rank=rank, norm=norm, backend=backend))


def test_the_mean_is_over_the_active_components():
    x, u, v, b, norm, _ = made(grad=False)
    cut = mk.lod_linear(x, u[:, :7], v[:7], b, norm=norm[:7], norm_eps=EPS)
    torch.testing.assert_close(mk.lod_linear(x, u, v, b, norm=norm, norm_eps=EPS, rank=7), cut)
    doubled = mk.lod_linear(2 * x, u, v, b, norm=norm, norm_eps=1e-30)
    torch.testing.assert_close(doubled, mk.lod_linear(x, u, v, b, norm=norm, norm_eps=1e-30))


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_a_tensor_rank_of_zero_leaves_bias_and_residual(backend):
    leaves = made(dtype=torch.float32)
    _, _, _, b, _, residual = leaves
    rank = torch.zeros((), dtype=torch.int32)
    y = call(leaves, rank=rank, backend=backend)
    torch.testing.assert_close(y, b + residual)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert not any(g.any() for g in (*grads[:3], grads[4]))


@pytest.mark.parametrize("backend", [None, "reference", "matmul"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lead", [0, (0,), (2, 0, 3), (3,)], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_nothing_to_normalise(lead, dtype, grad, backend):
    """No rows, no inputs, no outputs."""
    leaves = made(lead, dtype, grad)
    x, u, v, b, norm, residual = leaves
    y = call(leaves, backend=backend)
    assert y.shape == residual.shape
    torch.testing.assert_close(y, by_hand(*leaves))
    if grad:
        for got, leaf in zip(torch.autograd.grad(y.sum(), leaves), leaves, strict=True):
            assert got.shape == leaf.shape
    for others in ((x[..., :0], u, v[:, :0], b), (x, u[:0], v, b[:0])):
        y = mk.lod_linear(*others, norm=norm, backend=backend)
        torch.testing.assert_close(y, others[3].expand_as(y))


@pytest.mark.skipif(not LIBRARY, reason="no compiled library")
def test_the_librarys_norm_of_no_rows():
    assert native.rms_norm(torch.empty(0, R), torch.ones(R), EPS, 1.0).shape == (0, R)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("save_h", [False, True])
@pytest.mark.parametrize("rank", [None, 7, torch.tensor(7, dtype=torch.int32)], ids=str)
def test_leading_dimensions_and_strided_norms(activation, save_h, rank):
    x, u, v, b, _, residual = made((3, 5))
    norm = torch.rand(2 * R, dtype=torch.float64)[::2].requires_grad_()
    leaves = (x, u, v, b, norm, residual)
    options = {"rank": rank, "activation": activation, "scale": 3}
    y, expected = call(leaves, save_h=save_h, **options), by_hand(*leaves, **options)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for got, want in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("wanted", range(1, 64))
@pytest.mark.parametrize("activation", [None, "relu"])
def test_only_the_gradients_asked_for(wanted, activation):
    leaves = made(grad=False)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(bool(wanted >> i & 1))
    options = {"rank": 7, "activation": activation}
    call(leaves, **options).sum().backward()
    got = [t.grad for t in leaves]
    for t in leaves:
        t.grad = None
    by_hand(*leaves, **options).sum().backward()
    for name, a, t in zip(NAMES[1:], got, leaves, strict=True):
        assert (a is None) == (t.grad is None), name
        if a is not None:
            torch.testing.assert_close(a, t.grad)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("tensor_ranks", [False, True])
def test_a_group_of_which_some_have_a_norm(backend, tensor_ranks):
    dtype = torch.float32 if backend == "native" else torch.float64
    layers = [make_inputs(M, n, K, R, dtype=dtype, seed=n, requires_grad=True) for n in (8, 12, 16)]
    _, us, vs, biases = (list(column) for column in zip(*layers, strict=True))
    x, norms = layers[0][0], [torch.rand(R, dtype=dtype, requires_grad=True) for _ in range(3)]
    norms[1] = None
    residuals = [None, torch.randn(M, 12, dtype=dtype, requires_grad=True), None]
    ranks, scales, activations = [3, 48, 9], [2.0, 1, 0.25], ["relu", "silu", None]
    ys = mk.lod_linear_grouped(
        x, us, vs, biases, activation=activations, scales=scales, norms=norms, norm_eps=EPS,
        ranks=torch.tensor(ranks, dtype=torch.int32) if tensor_ranks else ranks,
        residuals=residuals, backend=backend,
    )  # fmt: skip
    kinds = zip(us, vs, biases, norms, residuals, scales, activations, ranks, strict=True)
    expected = [
        lod_linear_ref(x, u, v, b, rank=r, activation=a, residual=t, scale=s, norm=w, norm_eps=EPS)
        for u, v, b, w, t, s, a, r in kinds
    ]
    leaves = [t for t in (x, *us, *vs, *biases, *norms, *residuals) if t is not None]
    for y, want in zip(ys, expected, strict=True):
        torch.testing.assert_close(y, want)
    for part in ([1], [0, 2]):
        found = [
            torch.autograd.grad([out[i].square().sum() for i in part], leaves, allow_unused=True)
            for out in (ys, expected)
        ]
        for got, want in zip(*found, strict=True):
            if want is None:
                assert got is None or not got.any()
            else:
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_compiled_checkpointed_transformed_and_differentiated_twice(activation):
    leaves = made()

    def run(*ts):
        return call(ts, rank=7, activation=activation, scale=0.5)

    expected = by_hand(*leaves, rank=7, activation=activation, scale=0.5)
    want = torch.autograd.grad(expected.square().sum(), leaves, create_graph=True)
    runs = {
        "eager": run,
        "compiled": torch.compile(run, fullgraph=True, backend="aot_eager"),
        "checkpointed": lambda *ts: checkpoint(run, *ts, use_reentrant=False),
    }
    for name, one in runs.items():
        y = one(*leaves)
        torch.testing.assert_close(y, expected, msg=name)
        for got, w in zip(torch.autograd.grad(y.square().sum(), leaves), want, strict=True):
            torch.testing.assert_close(got, w, msg=name)
    got = torch.autograd.grad(run(*leaves).square().sum(), leaves, create_graph=True)
    twice = [
        torch.autograd.grad(sum(g.sin().sum() for g in gs), leaves, allow_unused=True)
        for gs in (got, want)
    ]
    for g, w in zip(*twice, strict=True):
        torch.testing.assert_close(g, w)
    functional = torch.func.grad(lambda *ts: run(*ts).square().sum(), argnums=tuple(range(6)))
    for g, w in zip(functional(*(t.detach() for t in leaves)), want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("batched", ["x", "norm"])
def test_vmap(batched):
    x, u, v, b, norm, _ = made((2, 5), grad=False)
    norm = torch.stack([norm, 2 * norm])
    dims = (0, None) if batched == "x" else (None, 0)
    given = (x if batched == "x" else x[0], norm if batched == "norm" else norm[0])

    def one(x, norm):
        return mk.lod_linear(x, u, v, b, norm=norm)

    expected = torch.stack(
        [one(*(t[i] if d == 0 else t for t, d in zip(given, dims, strict=True))) for i in (0, 1)]
    )
    torch.testing.assert_close(torch.func.vmap(one, dims)(*given), expected)


def test_autocast_casts_the_norm_too():
    leaves = made(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(leaves)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert leaves[4].grad.dtype == torch.float32


def test_what_runs_says_so_and_no_plan_of_a_plain_call_serves_it():
    x, u, v, b, norm, _ = made(2, dtype=torch.float32, grad=False)
    plain = mk.lod_linear(x, u, v, b)
    said = mk.explain(x, u, v, b, norm=norm, scale=2)
    assert "scale · RMSNorm(x (2, 40) · v[:48]ᵀ) · u" in str(said)
    for _ in range(3):
        normed = mk.lod_linear(x, u, v, b, norm=norm)
        torch.testing.assert_close(normed, lod_linear_ref(x, u, v, b, norm=norm))
        assert torch.equal(mk.lod_linear(x, u, v, b), plain)
        # An int scale of 1 is no plain call, and has a key that a norm's must not be.
        assert torch.equal(mk.lod_linear(x, u, v, b, scale=1), plain)
    before = len(dispatch._plans)
    mk.lod_linear(x, u, v, b, norm=norm * 2)
    assert len(dispatch._plans) == before


WRONG = {
    "shape": (
        {"norm": torch.ones(R - 1)},
        ValueError,
        r"norm: expected shape \(48,\) to match v \(48, 40\), got \(47,\)",
    ),
    "dtype": (
        {"norm": torch.ones(R, dtype=torch.float64)},
        TypeError,
        r"norm: expected torch.float32 like x, got torch.float64",
    ),
    "device": (
        {"norm": torch.ones(R, device="meta")},
        ValueError,
        r"norm: expected device cpu like x, got meta",
    ),
    "a list": ({"norm": [1.0] * R}, TypeError, r"norm: expected a Tensor, got list"),
    "sparse": (
        {"norm": torch.ones(R).to_sparse()},
        TypeError,
        r"norm: expected a dense tensor, got a torch.sparse_coo one",
    ),
    "rank 0": ({"rank": 0}, ValueError, r"rank: expected at least 1 with a norm, got 0"),
    "eps 0": ({"norm_eps": 0.0}, ValueError, r"norm_eps: expected a finite number > 0, got 0.0"),
    "NaN": ({"norm_eps": math.nan}, ValueError, r"norm_eps: expected a finite number > 0, got nan"),
    "text": ({"norm_eps": "1"}, TypeError, r"norm_eps: expected a number, got str"),
    "True": ({"norm_eps": True}, TypeError, r"norm_eps: expected a number, got bool"),
}


@pytest.mark.parametrize("backend", [None, "matmul"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(name, backend):
    wrong, error, text = WRONG[name]
    x, u, v, b, norm, _ = made(dtype=torch.float32, grad=False)
    good = {"norm": norm, "norm_eps": EPS, "rank": R}
    mk.lod_linear(x, u, v, b, **good, backend=backend)  # its plan is remembered
    given = {**good, **wrong}
    for fn in (mk.lod_linear, mk.explain):
        with pytest.raises(error, match=rf"lod_linear: {text}"):
            fn(x, u, v, b, **given, backend=backend)
    lists = {"norms": [given["norm"]], "norm_eps": given["norm_eps"], "ranks": [given["rank"]]}
    for single in ("norm:", "rank:", "match v "):
        plural = single.replace("norm:", r"norms\[0\]:").replace("rank:", r"ranks\[0\]:")
        text = text.replace(single, plural.replace("match v ", r"match vs\[0\] "))
    with pytest.raises(error, match=rf"lod_linear_grouped: {text}"):
        mk.lod_linear_grouped(x, [u], [v], [b], **lists, backend=backend)


@pytest.mark.parametrize(
    ("norms", "error", "text"),
    [
        ([None] * 2, ValueError, "norms: expected 1 entries like us, got 2"),
        ("abc", TypeError, "norms: expected None or a sequence .*, got str"),
    ],
)
def test_wrong_lists_are_named(norms, error, text):
    x, u, v, b, _, _ = made()
    with pytest.raises(error, match=f"lod_linear_grouped: {text}"):
        mk.lod_linear_grouped(x, [u], [v], [b], norms=norms)


def test_a_norm_whose_storage_was_freed_is_named():
    x, u, v, b, _, _ = made(dtype=torch.float32, grad=False)
    norm = torch.ones(R)
    norm.untyped_storage().resize_(0)
    backend = "native" if LIBRARY else None
    with pytest.raises(ValueError, match="norm: expected a storage of at least 192"):
        mk.lod_linear(x, u, v, b, norm=norm, backend=backend)
