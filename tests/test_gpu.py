"""What only a GPU can show; `bench/gpu_acceptance.sh` runs it there."""

import pytest
import torch
import torch.nn.functional as F

import maestro_kernels as mk
from maestro_kernels import dispatch, problem
from maestro_kernels.backends.reference import lod_linear_ref
from maestro_kernels.testing import assert_accurate, make_inputs

pytestmark = pytest.mark.gpu
BACKENDS = ("triton", "native")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def call(backend, x, u, v, b, rank):
    """The call, or a skip that names why the backend does not serve it."""
    described = problem.describe(x, u, v, b, rank, None)
    reason = dispatch.unsupported(backend, described)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return mk.lod_linear(x, u, v, b, rank=rank, backend=backend)


def gate(y, x, u, v, b, r):
    same = F.linear(F.linear(x, v[:r]), u[:, :r], b)
    exact = lod_linear_ref(*(t.double() for t in (x, u, v)), b.double(), rank=r)
    assert_accurate("y", y, same, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64, 96, 16), (17, 136, 72, 24), (33, 65, 127, 31)])
def test_small_shapes(backend, dtype, shape):
    M, N, K, R = shape
    x, u, v, b = make_inputs(M, N, K, R, dtype=dtype, device="cuda")
    for rank in {1, R // 2, R}:
        gate(call(backend, x, u, v, b, rank), x, u, v, b, rank)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("M", [1, 64, 1000, 4096])
@pytest.mark.parametrize("R", [16, 127, 256, 1024])
def test_model_shapes(backend, M, R):
    x, u, v, b = make_inputs(M, 4096, 4096, R, dtype=torch.bfloat16, device="cuda")
    gate(call(backend, x, u, v, b, R), x, u, v, b, R)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_graph_follows_the_rank_in_its_tensor(backend):
    x, u, v, b = make_inputs(16, 512, 512, 128, dtype=torch.bfloat16, device="cuda")
    rank = torch.tensor(128, dtype=torch.int32, device="cuda")
    call(backend, x, u, v, b, rank)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mk.lod_linear(x, u, v, b, rank=rank, backend=backend)
    for r in (1, 8, 17, 64, 127, 128):
        rank.fill_(r)
        graph.replay()
        gate(y, x, u, v, b, r)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_streams_at_once(backend):
    layers = [
        make_inputs(64, 1024, 1024, 128, dtype=torch.bfloat16, device="cuda", seed=s)
        for s in range(2)
    ]
    alone = [call(backend, *layer, 128).clone() for layer in layers]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in layers]
    for _ in range(50):
        together = []
        for stream, layer in zip(streams, layers, strict=True):
            with torch.cuda.stream(stream):
                together.append(mk.lod_linear(*layer, rank=128, backend=backend))
        torch.cuda.synchronize()
        assert all(torch.equal(a, y) for a, y in zip(alone, together, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("M", [1, 64, 2048])
def test_a_thousand_calls_give_the_same_bits(backend, M):
    x, u, v, b = make_inputs(M, 1024, 1024, 64, dtype=torch.bfloat16, device="cuda")
    first = call(backend, x, u, v, b, 64)
    for _ in range(1000):
        assert torch.equal(first, mk.lod_linear(x, u, v, b, rank=64, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_two_to_the_31(backend):
    M, N, K, R = 530_000, 4096, 64, 16
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    _, u, v, b = make_inputs(1, N, K, R, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(M, K, dtype=torch.bfloat16, device="cuda")
    y = call(backend, x, u, v, b, R)
    assert y.numel() > 1 << 31
    for rows in (slice(0, 64), slice(M // 2, M // 2 + 64), slice(M - 64, M)):
        gate(y[rows], x[rows], u, v, b, R)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_and_gradients(backend):
    layers = [
        make_inputs(128, N, 512, 64, dtype=torch.bfloat16, device="cuda", seed=s)
        for s, N in enumerate((512, 128, 128))
    ]
    x = layers[0][0].requires_grad_()
    us, vs, bs = ([layer[i].requires_grad_() for layer in layers] for i in (1, 2, 3))
    call(backend, x, us[0], vs[0], bs[0], 64)
    ranks = (64, 16, 40)
    ys = mk.lod_linear_grouped(x, us, vs, bs, ranks=ranks, backend=backend)
    for y, u, v, b, r in zip(ys, us, vs, bs, ranks, strict=True):
        gate(y, x, u, v, b, r)
    grads = torch.autograd.grad([y.float().square().sum() for y in ys], [x, *us, *vs])
    same = [
        F.linear(F.linear(x, v[:r]), u[:, :r], b)
        for u, v, b, r in zip(us, vs, bs, ranks, strict=True)
    ]
    others = torch.autograd.grad([y.float().square().sum() for y in same], [x, *us, *vs])
    args = [t.detach().double().requires_grad_() for t in (x, *us, *vs)]
    n = len(us)
    exact = [
        F.linear(F.linear(args[0], args[1 + n + i][:r]), args[1 + i][:, :r], bs[i].double())
        for i, r in enumerate(ranks)
    ]
    refs = torch.autograd.grad([y.square().sum() for y in exact], args)
    for i, (g, o, e) in enumerate(zip(grads, others, refs, strict=True)):
        assert_accurate(f"gradient {i}", g, o, e)
    for u, v, r in zip(grads[1 : 1 + n], grads[1 + n :], ranks, strict=True):
        assert not u[:, r:].any()
        assert not v[r:].any()


def test_auto_runs_eager_compiled_and_captured():
    x, u, v, b = make_inputs(32, 512, 512, 64, dtype=torch.bfloat16, device="cuda")
    gate(mk.lod_linear(x, u, v, b), x, u, v, b, 64)
    compiled = torch.compile(lambda x: mk.lod_linear(x, u, v, b), fullgraph=True)
    gate(compiled(x), x, u, v, b, 64)
