"""act((scale · x @ v[:r].T) @ u[:, :r].T + bias + residual) on every backend."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import maestro_kernels as mk
from maestro_kernels import dispatch
from maestro_kernels.backends import native
from maestro_kernels.backends.reference import ACTIVATIONS, lod_linear_ref
from maestro_kernels.testing import assert_accurate, make_inputs, poison, rounding_errors

M, N, K, R = 19, 24, 40, 16
NAMES = ("y", "dx", "du", "dv", "dbias", "dresidual")
LIBRARY = native.load_error() is None
BACKENDS = ["reference", "matmul", *(["native"] if LIBRARY else [])]


def made(lead=M, dtype=torch.float64, bias=True, grad=True):
    """(x, u, v, bias, residual); the rows of the residual lie apart."""
    x, u, v, b = make_inputs(lead, N, K, R, dtype=dtype, bias=bias, requires_grad=grad)
    residual = torch.randn(*x.shape[:-1], N + 8, dtype=torch.float64).to(dtype)[..., :N]
    return x, u, v, b, residual.requires_grad_(grad)


def by_hand(x, u, v, bias, residual, *, rank, activation, scale):
    """The formula written without the package."""
    z = scale * (x @ v[:rank].T) @ u[:, :rank].T
    for t in (bias, residual):
        z = z if t is None else z + t
    return ACTIVATIONS[activation](z)


def pair(x, u, v, bias, residual, *, rank, activation, scale):
    """What one writes with the library: two matmuls, the second with a matrix to add."""
    y = torch.addmm(residual, scale * F.linear(x, v[:rank]), u[:, :rank].T)
    return ACTIVATIONS[activation](y if bias is None else y + bias)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [None, 0, 7, "tensor"])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_accurate(backend, dtype, rank, activation, bias):
    leaves = made(dtype=dtype, bias=bias)
    r = {None: R, "tensor": 7}.get(rank, rank)
    given = torch.tensor(7, dtype=torch.int32) if rank == "tensor" else rank
    options = {"activation": activation, "scale": -0.5}
    x, u, v, b, residual = leaves
    poison(torch.empty(M, N, dtype=dtype))
    y = mk.lod_linear(x, u, v, b, residual=residual, rank=given, backend=backend, **options)
    exact_leaves = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    exact = by_hand(*exact_leaves, rank=r, **options)
    library = pair(*leaves, rank=r, **options)
    dy = torch.randn(M, N).to(dtype)
    z_added = residual.detach() if b is None else (residual + b).detach()
    rounding = rounding_errors(
        x, u, v * -0.5, rank=r, activation=activation, bias=z_added.double(), dy=dy
    )
    assert_accurate("y", y, library, exact, rounding["y"])
    found = [
        torch.autograd.grad(out, [t for t in ts if t is not None], g)
        for out, ts, g in (
            (y, leaves, dy),
            (library, leaves, dy),
            (exact, exact_leaves, dy.double()),
        )
    ]
    names = [n for n, t in zip(NAMES[1:], leaves, strict=True) if t is not None]
    # The gradients are those of v' = scale · v but for dv itself; a residual's are one of dz.
    rounding |= {"dv": 0.5 * rounding["dv"], "dresidual": None}
    for name, *grads in zip(names, *found, strict=True):
        assert_accurate(name, *grads, rounding[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_output_is_no_alias_and_the_residual_stays_as_it_is(backend):
    x, u, v, _, residual = made(dtype=torch.float32, grad=False)
    before = residual.clone()
    for rank in (0, R):
        y = mk.lod_linear(x, u, v, rank=rank, residual=residual, backend=backend)
        assert y.untyped_storage().data_ptr() != residual.untyped_storage().data_ptr()
        y.fill_(7)
        assert torch.equal(residual, before)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("save_h", [False, True])
@pytest.mark.parametrize("rank", [None, 0, 7, torch.tensor(7, dtype=torch.int32)], ids=str)
def test_leading_dimensions_and_layouts(activation, save_h, rank):
    x, u, v, b, _ = made((3, 5))
    residual = torch.randn(5, N, 3, dtype=torch.float64).permute(2, 0, 1).requires_grad_()
    r = R if rank is None else int(rank)
    y = mk.lod_linear(
        x, u, v, b, rank=rank, activation=activation, residual=residual, scale=3, save_h=save_h
    )
    expected = by_hand(x, u, v, b, residual, rank=r, activation=activation, scale=3)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    leaves = (x, u, v, b, residual)
    for got, want in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("wanted", range(1, 32))
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_only_the_gradients_asked_for(wanted, activation):
    leaves = made(grad=False)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(bool(wanted >> i & 1))
    x, u, v, b, residual = leaves
    options = {"rank": 7, "activation": activation, "scale": 0.5}
    mk.lod_linear(x, u, v, b, residual=residual, **options).sum().backward()
    got = [t.grad for t in leaves]
    for t in leaves:
        t.grad = None
    by_hand(*leaves, **options).sum().backward()
    for name, a, t in zip(NAMES[1:], got, leaves, strict=True):
        assert (a is None) == (t.grad is None), name
        if a is not None:
            torch.testing.assert_close(a, t.grad)


def group(dtype=torch.float64):
    layers = [make_inputs(M, n, K, R, dtype=dtype, seed=n, requires_grad=True) for n in (8, 12, 16)]
    _, us, vs, biases = (list(column) for column in zip(*layers, strict=True))
    residuals = [torch.randn(M, n, dtype=dtype, requires_grad=True) for n in (8, 12, 16)]
    return layers[0][0], us, vs, [biases[0], None, biases[2]], [residuals[0], None, residuals[2]]


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize(
    "ranks", [[3, 16, 9], torch.tensor([3, 16, 9], dtype=torch.int32)], ids=str
)
def test_a_group_of_which_some_have_a_residual(backend, ranks):
    dtype = torch.float32 if backend == "native" else torch.float64
    x, us, vs, biases, residuals = group(dtype)
    scales, activations = [2.0, 1, 0.25], ["relu", "silu", None]
    ys = mk.lod_linear_grouped(
        x, us, vs, biases, ranks=ranks, activation=activations, residuals=residuals, scales=scales,
        backend=backend,
    )  # fmt: skip
    kinds = zip(us, vs, biases, residuals, scales, activations, [3, 16, 9], strict=True)
    expected = [
        by_hand(x, u, v, b, t, rank=r, activation=a, scale=s) for u, v, b, t, s, a, r in kinds
    ]
    leaves = [t for t in (x, *us, *vs, *biases, *residuals) if t is not None]
    for y, want in zip(ys, expected, strict=True):
        torch.testing.assert_close(y, want)
    # One layer after the other: what a later pass needs is kept.
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

    def call(x, u, v, b, residual, scale=0.5):
        return mk.lod_linear(
            x, u, v, b, rank=7, activation=activation, residual=residual, scale=scale
        )

    expected = by_hand(*leaves, rank=7, activation=activation, scale=0.5)
    want = torch.autograd.grad(expected.square().sum(), leaves, create_graph=True)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    runs = {
        "eager": call,
        "compiled": compiled,
        "checkpointed": lambda *ts: checkpoint(call, *ts, use_reentrant=False),
        "compiled for another scale": lambda *ts: compiled(*ts, 0.25) * 0 + compiled(*ts, 0.5),
    }
    for name, run in runs.items():
        y = run(*leaves)
        torch.testing.assert_close(y, expected, msg=name)
        for got, w in zip(torch.autograd.grad(y.square().sum(), leaves), want, strict=True):
            torch.testing.assert_close(got, w, msg=name)
    got = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)
    twice = [
        torch.autograd.grad(sum(g.sin().sum() for g in gs), leaves, allow_unused=True)
        for gs in (got, want)
    ]
    for g, w in zip(*twice, strict=True):
        torch.testing.assert_close(g, w)
    functional = torch.func.grad(lambda *ts: call(*ts).square().sum(), argnums=(0, 1, 2, 3, 4))
    for g, w in zip(functional(*(t.detach() for t in leaves)), want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("batched", ["both", "x", "residual"])
def test_vmap(batched):
    x, u, v, b, residual = made((2, 5), grad=False)
    dims = (0 if batched != "residual" else None, 0 if batched != "x" else None)
    given = (x if dims[0] == 0 else x[0], residual if dims[1] == 0 else residual[0])

    def call(x, residual):
        return mk.lod_linear(x, u, v, b, residual=residual, scale=2)

    expected = torch.stack(
        [call(*(t[i] if d == 0 else t for t, d in zip(given, dims, strict=True))) for i in (0, 1)]
    )
    torch.testing.assert_close(torch.func.vmap(call, dims)(*given), expected)


def test_autocast_casts_the_residual_too():
    leaves = made(dtype=torch.float32)
    x, u, v, b, residual = leaves
    with torch.autocast("cpu", torch.bfloat16):
        y = mk.lod_linear(x, u, v, b, residual=residual)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert residual.grad.dtype == torch.float32


def test_flop_are_those_of_the_products():
    x, u, v, b, residual = made()
    with FlopCounterMode(display=False) as counter:
        mk.lod_linear(x, u, v, b, rank=3, residual=residual, scale=2).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * M * 3 * (K + N)


def test_what_runs_says_so_and_counts_the_residual():
    x, u, v, b, residual = made(dtype=torch.float32, grad=False)
    plain, added = mk.explain(x, u, v, b), mk.explain(x, u, v, b, residual=residual, scale=0.5)
    assert "scale · x (19, 40)" in str(added)
    assert "+ bias + residual" in str(added)
    assert added.bytes - plain.bytes == residual.numel() * 4
    on_gpu = [
        p.__class__(**{**vars(p), "device": torch.device("cuda")}) for p in added.plan.problems
    ]
    if LIBRARY:
        why = "the CUDA kernels take no residual, no scale and no norm"
        assert native.unsupported(on_gpu[0]) == why


def test_a_layer_takes_a_residual_alone_grouped_and_packed():
    model = torch.nn.ModuleDict({n: mk.LoDLinear(K, N, 8) for n in ("q_proj", "k_proj")}).eval()
    x, residual = torch.randn(M, K), torch.randn(M, N)

    def wanted(layer):
        u, v, b = layer.u, layer.v, layer.bias
        return lod_linear_ref(x, u, v, b, rank=layer.rank, residual=residual, scale=0.5)

    model["q_proj"].rank = 5
    forms = [lambda: None, lambda: mk.prepack(model), lambda: mk.nn.group(model)]
    for change in forms:
        change()
        with torch.no_grad():
            for layer in model.values():
                got = layer(x, residual=residual, scale=0.5)
                torch.testing.assert_close(got, wanted(layer), rtol=1e-4, atol=1e-4)
                plain = lod_linear_ref(x, layer.u, layer.v, layer.bias, rank=layer.rank)
                torch.testing.assert_close(layer(x), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not LIBRARY, reason="no compiled library")
def test_a_packed_layer_adds_in_its_own_pass(monkeypatch):
    layer = mk.prepack(mk.LoDLinear(K, N, 8).eval(), form="fused")
    x, residual = torch.randn(2, 3, K), torch.randn(2, N, 3).mT
    monkeypatch.setattr("maestro_kernels.nn.linear.lod_linear", None)  # not from the factors
    with torch.no_grad():
        for rank in (8, 3):
            layer.rank = rank
            got = layer(x, residual=residual, scale=-2.0)
            factors = layer.u, layer.v, layer.bias
            want = lod_linear_ref(x, *factors, rank=rank, residual=residual, scale=-2.0)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        swapped = torch.randn(3, 2, N)
        for wrong, text in (({"residual": swapped}, "residual: expected shape"),
                            ({"scale": math.nan}, "scale: expected a finite number"),
                            ({"scale": "1"}, "scale: expected a number")):  # fmt: skip
            with pytest.raises((ValueError, TypeError), match=f"lod_linear: {text}"):
                layer(x, **wrong)


WRONG = {
    "residual's shape": (
        {"residual": torch.zeros(M, N + 1)},
        ValueError,
        r"residual: expected shape \(19, 24\) to match x \(19, 40\) and u \(24, 16\), "
        r"got \(19, 25\)",
    ),
    "broadcast": (
        {"residual": torch.zeros(N)},
        ValueError,
        r"residual: expected shape \(19, 24\) .*, got \(24,\)",
    ),
    "dtype": (
        {"residual": torch.zeros(M, N, dtype=torch.float64)},
        TypeError,
        r"residual: expected torch.float32 like x, got torch.float64",
    ),
    "device": (
        {"residual": torch.zeros(M, N, device="meta")},
        ValueError,
        r"residual: expected device cpu like x, got meta",
    ),
    "a list": ({"residual": [1.0]}, TypeError, r"residual: expected a Tensor, got list"),
    "sparse": (
        {"residual": torch.zeros(M, N).to_sparse()},
        TypeError,
        r"residual: expected a dense tensor, got a torch.sparse_coo one",
    ),
    "text": ({"scale": "1"}, TypeError, r"scale: expected a number, got str"),
    "True": ({"scale": True}, TypeError, r"scale: expected a number, got bool"),
    "a tensor": ({"scale": torch.ones(())}, TypeError, r"scale: expected a number, got Tensor"),
    "NaN": ({"scale": math.nan}, ValueError, r"scale: expected a finite number, got nan"),
    "infinite": ({"scale": -math.inf}, ValueError, r"scale: expected a finite number, got -inf"),
}


@pytest.mark.parametrize("backend", [None, "matmul"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(name, backend):
    wrong, error, text = WRONG[name]
    x, u, v, b, residual = made(dtype=torch.float32, grad=False)
    good = {"residual": residual, "scale": 0.5}
    given = {**good, **wrong}
    mk.lod_linear(x, u, v, b, **good, backend=backend)  # its plan is remembered
    for fn in (mk.lod_linear, mk.explain):
        with pytest.raises(error, match=rf"lod_linear: {text}"):
            fn(x, u, v, b, **given, backend=backend)
    as_lists = {"residuals": [given["residual"]], "scales": [given["scale"]]}
    text = text.replace("residual:", r"residuals\[0\]:").replace("scale:", r"scales\[0\]:")
    text = text.replace("and u ", r"and us\[0\] ")
    with pytest.raises(error, match=rf"lod_linear_grouped: {text}"):
        mk.lod_linear_grouped(x, [u], [v], [b], **as_lists, backend=backend)


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"residuals": []}, None, None),
        ({"residuals": [None] * 2}, ValueError, "residuals: expected 3 entries like us, got 2"),
        ({"residuals": "abc"}, TypeError, "residuals: expected None or a sequence .*, got str"),
        ({"scales": [1.0]}, ValueError, "scales: expected 3 entries like us, got 1"),
        ({"scales": "abc"}, TypeError, "scales: expected a number or a sequence .*, got str"),
    ],
)
def test_wrong_lists_are_named(wrong, error, text):
    x, us, vs, biases, _ = group()
    if error is None:
        assert len(mk.lod_linear_grouped(x, us, vs, biases, **wrong)) == 3
        return
    with pytest.raises(error, match=f"lod_linear_grouped: {text}"):
        mk.lod_linear_grouped(x, us, vs, biases, **wrong)


def test_another_scale_needs_no_other_plan():
    x, u, v, b, residual = made(dtype=torch.float32, grad=False)
    mk.lod_linear(x, u, v, b, residual=residual, scale=0.5)
    before = len(dispatch._plans)
    for step in range(1, 6):
        mk.lod_linear(x, u, v, b, residual=residual, scale=step / 7)
    assert len(dispatch._plans) == before


def test_a_residual_whose_storage_was_freed_is_named():
    x, u, v, b, _ = made(dtype=torch.float32, grad=False)
    residual = torch.zeros(M, N)
    residual.untyped_storage().resize_(0)
    backend = "native" if LIBRARY else None
    with pytest.raises(ValueError, match="residual: expected a storage of at least 1824"):
        mk.lod_linear(x, u, v, b, residual=residual, backend=backend)
