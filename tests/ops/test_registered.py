"""What torch asks of an op: opcheck, compile, export, functorch, checkpointing, autocast, FLOP."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import maestro_kernels as mk
from maestro_kernels.backends.reference import lod_linear_ref
from maestro_kernels.testing import make_inputs

N, K, R = 6, 7, 5
OPS = torch.ops.maestro_kernels


def leaves(lead=(2, 3), dtype=torch.float64, grad=True):
    return make_inputs(lead, N, K, R, dtype=dtype, requires_grad=grad)


def split(ranks):
    return (None, ranks) if isinstance(ranks, torch.Tensor) else (ranks, None)


def one(x, u, v, bias, rank=None, activation=None, residual=None, scales=(1.0,), norm=None):
    """The arguments of an op for one layer: a group of one."""
    ranks = rank if rank is None or isinstance(rank, torch.Tensor) else [rank]
    added = [] if residual is None else [residual]
    norms = [] if norm is None else [norm]
    has = [True], [bool(added)], [bool(norms)]
    rest = [activation or "none"], list(scales), 1e-3, None
    return [x], [u], [v], [bias], added, norms, *has, *split(ranks), *rest


def tensor_rank(value):
    return torch.tensor(value, dtype=torch.int32)


RANKS = [None, 0, 3, tensor_rank(3)]


@pytest.mark.parametrize("rank", RANKS, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("name", ["lod_linear", "lod_linear_train"])
def test_opcheck(name, rank, activation):
    args = one(*leaves(), rank, activation)
    torch.library.opcheck(getattr(OPS, name).default, args)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("name", ["lod_linear", "lod_linear_train"])
def test_opcheck_with_a_residual(name, activation):
    residual = torch.randn(2, 3, N, dtype=torch.float64, requires_grad=True)
    args = one(*leaves(), 3, activation, residual, [0.5])
    torch.library.opcheck(getattr(OPS, name).default, args)


@pytest.mark.parametrize("rank", [None, 3, torch.tensor(3, dtype=torch.int32)], ids=str)
@pytest.mark.parametrize("name", ["lod_linear", "lod_linear_train"])
def test_opcheck_with_a_norm(name, rank):
    norm = torch.rand(R, dtype=torch.float64, requires_grad=True)
    args = one(*leaves(), rank, "silu", scales=[0.5], norm=norm)
    torch.library.opcheck(getattr(OPS, name).default, args)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
def test_opcheck_backward_with_a_norm_and_a_residual(wanted):
    x, u, v, bias = leaves(grad=False)
    h, norm = torch.randn(6, R, dtype=torch.float64), torch.rand(R, dtype=torch.float64)
    dy, residual = torch.randn(2, 2, 3, N, dtype=torch.float64)
    called = one(x, u, v, bias, None, "silu", residual, [0.5], norm)
    args = ([dy], [h], [], [True] * 4 + [*wanted], *called)
    torch.library.opcheck(OPS.lod_linear_backward.default, args)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_opcheck_backward_with_a_residual(activation):
    x, u, v, bias = leaves(grad=False)
    h = torch.randn(6, R, dtype=torch.float64)
    dy, residual = torch.randn(2, 2, 3, N, dtype=torch.float64)
    args = ([dy], [h], [], [True] * 6, *one(x, u, v, bias, None, activation, residual, [0.5]))
    torch.library.opcheck(OPS.lod_linear_backward.default, args)


@pytest.mark.parametrize("needs", [[True] * 6, [True, *[False] * 5], [False, True] * 3])
def test_opcheck_backward(needs):
    x, u, v, bias = leaves(grad=False)
    h = torch.randn(6, R, dtype=torch.float64)
    dy = torch.randn(2, 3, N, dtype=torch.float64)
    args = ([dy], [h], [], needs, *one(x, u, v, bias, None, "silu"))
    torch.library.opcheck(OPS.lod_linear_backward.default, args)


def group():
    layers = [make_inputs((2, 3), n, K, R, dtype=torch.float64, seed=n) for n in (4, 3)]
    _, us, vs, biases = (list(column) for column in zip(*layers, strict=True))
    return [layers[0][0]], us, vs, [biases[0]], [True, False]


@pytest.mark.parametrize("ranks", [None, [2, 5], tensor_rank([2, 5])], ids=str)
@pytest.mark.parametrize("name", ["lod_linear", "lod_linear_train"])
def test_opcheck_grouped(name, ranks):
    xs, us, vs, biases, has_bias = group()
    for t in (*xs, *us, *vs, *biases):
        t.requires_grad_()
    has = [], [], has_bias, [False] * 2, [False] * 2
    args = (xs, us, vs, biases, *has, *split(ranks), ["silu", "none"], [1.0] * 2, 0.0, None)
    torch.library.opcheck(getattr(OPS, name).default, args)


@pytest.mark.parametrize("rank", RANKS, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "silu"])
def test_double_backward_through_the_opaque_op(rank, activation):
    # The op hides its inside from autograd: an opaque backward would give silent zeros here.
    def opaque(*tensors):
        return OPS.lod_linear_train(*one(*tensors, rank, activation))[0][0]

    inputs = leaves((2,))
    torch.autograd.gradcheck(opaque, inputs)
    torch.autograd.gradgradcheck(opaque, inputs)
    second = torch.autograd.grad(
        torch.autograd.grad(opaque(*inputs).pow(2).sum(), inputs[0], create_graph=True)[0].sum(),
        inputs[0],
    )[0]
    assert rank == 0 or torch.count_nonzero(second) > 0


@pytest.mark.parametrize("rank", RANKS, ids=str)
def test_double_backward_of_the_eager_path(rank):
    def eager(*tensors):
        return mk.lod_linear(*tensors, rank=rank, activation="silu")

    torch.autograd.gradgradcheck(eager, leaves((2,)))


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
def test_a_gradient_to_be_differentiated_again_is_the_gradient(activation):
    # gradgradcheck compares it with its own slope only.
    inputs = leaves((2,))
    for call in (
        lambda: mk.lod_linear(*inputs, rank=3, activation=activation),
        lambda: OPS.lod_linear_train(*one(*inputs, 3, activation))[0][0],
    ):
        once = torch.autograd.grad(call().square().sum(), inputs)
        again = torch.autograd.grad(call().square().sum(), inputs, create_graph=True)
        torch.testing.assert_close(once, again)


def test_double_backward_of_a_group():
    xs, us, vs, biases, _ = group()
    inputs = [t.requires_grad_() for t in (*xs, *us, *vs, *biases)]

    def eager(x, u0, u1, v0, v1, bias):
        ys = mk.lod_linear_grouped(x, [u0, u1], [v0, v1], [bias, None], ranks=[2, 5])
        return tuple(ys)

    def opaque(x, u0, u1, v0, v1, bias):
        has = [], [], [True, False], [False, False], [False, False]
        args = ([x], [u0, u1], [v0, v1], [bias], *has, [2, 5], None, ["silu", "none"], [1.0, 1.0])
        return tuple(OPS.lod_linear_train(*args, 0.0, None)[0])

    for fn in (eager, opaque):
        torch.autograd.gradcheck(fn, inputs)
        torch.autograd.gradgradcheck(fn, inputs)


def compiled_loss(x, u, v, bias, rank):
    return mk.lod_linear(x, u, v, bias, rank=rank, activation="gelu").sin().sum()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_follows_a_tensor_rank_without_recompiling(backend):
    torch._dynamo.reset()
    inputs, rank = leaves(), tensor_rank(0)
    compiled = torch.compile(compiled_loss, fullgraph=True, backend=backend)
    compiled(*inputs, rank)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for value in (4, 2, 0, R):
            rank.fill_(value)
            got = torch.autograd.grad(compiled(*inputs, rank), inputs)
            expected = lod_linear_ref(*inputs, rank=value, activation="gelu").sin().sum()
            for a, b in zip(got, torch.autograd.grad(expected, inputs), strict=True):
                torch.testing.assert_close(a, b)


def test_compile_without_gradients_and_with_int_ranks():
    torch._dynamo.reset()
    inputs = leaves(grad=False)
    compiled = torch.compile(compiled_loss, fullgraph=True, backend="aot_eager")
    for rank in (None, 3, 4):
        torch.testing.assert_close(compiled(*inputs, rank), compiled_loss(*inputs, rank))


def test_compile_group():
    torch._dynamo.reset()
    xs, us, vs, biases, _ = group()
    inputs = [t.requires_grad_() for t in (*xs, *us, *vs, *biases)]
    ranks = tensor_rank([2, 5])

    def loss(x, u0, u1, v0, v1, bias):
        ys = mk.lod_linear_grouped(
            x, [u0, u1], [v0, v1], [bias, None], ranks=ranks, activation=["silu", None]
        )
        return sum(y.sin().sum() for y in ys)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled(*inputs)
    ranks.copy_(tensor_rank([4, 1]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = torch.autograd.grad(compiled(*inputs), inputs)
    for a, b in zip(got, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_export_with_dynamic_rows():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            _, self.u, self.v, self.bias = (torch.nn.Parameter(t) for t in leaves(grad=False))

        def forward(self, x):
            return mk.lod_linear(x, self.u, self.v, self.bias, rank=3)

    layer, rows = Layer(), torch.export.Dim("rows", min=2, max=64)
    x = torch.randn(4, K, dtype=torch.float64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
    calls = [n for n in program.graph.nodes if "maestro_kernels" in str(n.target)]
    assert len(calls) == 1
    other = torch.randn(9, K, dtype=torch.float64)
    torch.testing.assert_close(program.module()(other), layer(other))


@pytest.mark.parametrize("rank", RANKS, ids=str)
def test_functorch_transforms(rank):
    inputs = [t.detach() for t in leaves()]

    def ours(*tensors):
        return mk.lod_linear(*tensors, rank=rank, activation="gelu").sin().sum()

    def reference(*tensors):
        return lod_linear_ref(*tensors, rank=rank, activation="gelu").sin().sum()

    def check(transform):
        got, expected = transform(ours)(*inputs), transform(reference)(*inputs)
        torch.testing.assert_close(got, expected)

    everything = (0, 1, 2, 3)
    check(lambda f: torch.func.grad(f, everything))
    check(lambda f: torch.func.jacrev(torch.func.grad(f, 1), 1))
    rows = (0, None, None, None)
    check(lambda f: torch.func.vmap(f, in_dims=rows))
    check(lambda f: torch.func.vmap(torch.func.grad(f, everything), in_dims=rows))


def test_vmap_over_an_ensemble_of_factors():
    us, vs = torch.randn(4, N, R), torch.randn(4, R, K)
    x = torch.randn(3, K)
    got = torch.func.vmap(lambda u, v: mk.lod_linear(x, u, v, rank=2))(us, vs)
    expected = torch.stack([lod_linear_ref(x, u, v, rank=2) for u, v in zip(us, vs, strict=True)])
    torch.testing.assert_close(got, expected)


def test_vmap_of_a_group():
    xs, us, vs, biases, _ = group()

    def grouped(x):
        return tuple(mk.lod_linear_grouped(x, us, vs, [biases[0], None]))

    for got, want in zip(torch.func.vmap(grouped)(xs[0]), grouped(xs[0]), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("grouped", [False, True])
def test_forward_mode_raises_instead_of_returning_zero(grouped):
    x, u, v, bias = (t.detach() for t in leaves())

    def call(x):
        if grouped:
            return mk.lod_linear_grouped(x, [u], [v], [bias])[0]
        return mk.lod_linear(x, u, v, bias)

    with pytest.raises(NotImplementedError, match="forward-mode AD"):
        torch.func.jvp(call, (x,), (x,))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="forward-mode AD"),
    ):
        call(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    inputs = leaves()

    def run(*tensors):
        return mk.lod_linear(*tensors, rank=3, activation="silu").sin()

    saved = checkpoint(run, *inputs, use_reentrant=use_reentrant)
    saved.sum().backward()
    got = [t.grad for t in inputs]
    for a, b in zip(got, torch.autograd.grad(run(*inputs).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_save_h_false_keeps_less():
    def saved(save_h):
        sizes = []

        def pack(t):
            sizes.append(t.numel())
            return t

        x, u, v, bias = leaves((64,))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            mk.lod_linear(x, u, v, bias, activation="silu", save_h=save_h)
        return sum(sizes)

    assert saved(True) - saved(False) == 64 * R


@pytest.mark.parametrize("grouped", [False, True])
def test_autocast_casts_inputs_and_returns_gradients_in_the_parameter_dtype(grouped):
    x, u, v, bias = leaves(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if grouped:
            (y,) = mk.lod_linear_grouped(x.half(), [u], [v], [bias])
        else:
            y = mk.lod_linear(x.half(), u, v, bias)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert u.grad.dtype == v.grad.dtype == bias.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert OPS.lod_linear(*one(x, u, v, bias))[0].dtype == torch.bfloat16
    assert mk.lod_linear(x, u, v, bias).dtype == torch.float32


def test_flop_counter():
    inputs = leaves(dtype=torch.float32)
    rank, M = 3, 6
    with FlopCounterMode(display=False) as counter:
        mk.lod_linear(*inputs, rank=rank).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * M * rank * (K + N)
    xs, us, vs, biases, _ = group()
    us[0].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        ys = mk.lod_linear_grouped(xs[0], us, vs, [biases[0], None], ranks=[2, 5])
    assert counter.get_total_flops() == 2 * M * (2 * (K + 4) + 5 * (K + 3))
    assert [y.shape for y in ys] == [(2, 3, 4), (2, 3, 3)]


def test_fake_tensors_and_meta():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t.detach()) for t in leaves()]
        assert mk.lod_linear(*fakes, rank=3).shape == (2, 3, N)
    metas = [t.detach().to("meta") for t in leaves()]
    assert mk.lod_linear(*metas, rank=3).shape == (2, 3, N)


def test_inference_mode_and_no_grad():
    inputs = leaves(dtype=torch.float32)
    expected = F.linear(F.linear(inputs[0], inputs[2][:3]), inputs[1][:, :3], inputs[3])
    with torch.inference_mode():
        torch.testing.assert_close(mk.lod_linear(*inputs, rank=3), expected.detach())
    with torch.no_grad():
        assert not mk.lod_linear(*inputs, rank=3).requires_grad
