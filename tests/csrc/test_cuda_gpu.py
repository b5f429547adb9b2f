"""The CUDA kernels decode and rows on a GPU, also under compute-sanitizer.

    compute-sanitizer --tool {memcheck,racecheck,synccheck} pytest tests/csrc/test_cuda_gpu.py

test_cuda_host.py has run the same code on a CPU; here it meets hardware, torch's allocator,
streams and graphs. Sizes are small: a sanitizer slows a launch down a thousandfold.
"""

import pytest
import torch
import torch.nn.functional as F

import maestro_kernels as mk
from maestro_kernels.backends import native
from maestro_kernels.backends.reference import lod_linear_ref
from maestro_kernels.testing import assert_accurate, make_inputs, poison

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.load_error() is not None, reason="no compiled library"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["highest", "high"])
def precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def run(x, u, v, b, strategy, **options):
    """The call, after a check that it takes the kernel that is meant."""
    plan = mk.explain(x, u, v, b, backend="native", **options).plan
    if plan.strategy != strategy:
        pytest.skip(f"this device takes {plan.strategy}: {plan.reason}")
    return mk.lod_linear(x, u, v, b, backend="native", **options)


def gate(y, x, u, v, b, r, activation=None):
    act = {None: lambda z: z, "relu": torch.relu, "gelu": F.gelu, "silu": F.silu}[activation]
    bias64 = None if b is None else b.double()
    exact = lod_linear_ref(
        x.double(), u.double(), v.double(), bias64, rank=r, activation=activation
    )
    assert_accurate("y", y, act(F.linear(F.linear(x, v[:r]), u[:, :r], b)), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 2, 16, 17, 33, 64])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_decode(dtype, M, activation, precision):
    if dtype is not torch.float32 and precision == "high":
        pytest.skip("the setting concerns float32")
    x, u, v, b = make_inputs(M, 1000, 776, 48, dtype=dtype, device="cuda")
    for rank in (0, 1, 8, 31, 48):
        y = run(x, u, v, b, "decode", rank=rank, activation=activation)
        gate(y, x, u, v, b, rank, activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(3, 1, 7, 8), (5, 131, 777, 16), (64, 33, 1, 24), (1, 9, 4097, 40)]
)
def test_decode_of_odd_sizes(dtype, sizes):
    M, N, K, R = sizes
    x, u, v, b = make_inputs(M, N, K, R, dtype=dtype, device="cuda", bias=N != 33)
    for rank in (1, R - 1, R):
        gate(run(x, u, v, b, "decode", rank=rank), x, u, v, b, rank)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(65, 77, 64, 40), (200, 520, 1032, 136), (1000, 1000, 256, 64)])
def test_rows(dtype, sizes):
    M, N, K, R = sizes
    torch.set_float32_matmul_precision("high")
    try:
        x, u, v, b = make_inputs(M, N, K, R, dtype=dtype, device="cuda")
        for rank in (1, 9, R - 1, R):
            gate(run(x, u, v, b, "rows", rank=rank, activation="gelu"), x, u, v, b, rank, "gelu")
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("M", "strategy"), [(5, "decode"), (130, "rows")])
def test_what_lies_beyond_the_rank_never_matters(M, strategy):
    x, u, v, b = make_inputs(M, 256, 512, 64, dtype=torch.bfloat16, device="cuda")
    expected = run(x, u, v, b, strategy, rank=19)
    u[:, 19:] = 3e4
    v[19:] = -3e4
    assert torch.equal(run(x, u, v, b, strategy, rank=19), expected)


@pytest.mark.parametrize(("M", "strategy"), [(5, "decode"), (130, "rows")])
def test_a_rank_on_the_device_is_clamped_and_never_read_by_the_host(M, strategy):
    x, u, v, b = make_inputs(M, 264, 512, 64, dtype=torch.bfloat16, device="cuda")
    for value, r in ((-5, 0), (0, 0), (1, 1), (33, 33), (64, 64), (1000, 64)):
        rank = torch.tensor(value, dtype=torch.int32, device="cuda")
        gate(run(x, u, v, b, strategy, rank=rank), x, u, v, b, r)


@pytest.mark.parametrize("M", [4, 130])
@pytest.mark.parametrize("on_device", [False, True])
def test_groups_of_different_n_and_r(M, on_device):
    sizes = ((512, 64), (136, 24), (1000, 128))
    layers = [
        make_inputs(M, N, 384, R, dtype=torch.bfloat16, device="cuda", seed=i)
        for i, (N, R) in enumerate(sizes)
    ]
    x, ranks = layers[0][0], (64, 0, 77)
    given = torch.tensor(ranks, dtype=torch.int32, device="cuda") if on_device else ranks
    us, vs, bs = ([layer[i] for layer in layers] for i in (1, 2, 3))
    activations = ["silu", None, "gelu"]
    options = {"ranks": given, "activation": activations, "backend": "native"}
    for _ in range(3):
        ys = mk.lod_linear_grouped(x, us, vs, bs, **options)
        for y, u, v, b, r, activation in zip(ys, us, vs, bs, ranks, activations, strict=True):
            gate(y, x, u, v, b, r, activation)


@pytest.mark.parametrize(("M", "strategy"), [(1, "decode"), (300, "rows")])
def test_a_captured_graph_follows_the_rank(M, strategy):
    x, u, v, b = make_inputs(M, 1024, 1024, 128, dtype=torch.bfloat16, device="cuda")
    rank = torch.tensor(128, dtype=torch.int32, device="cuda")
    run(x, u, v, b, strategy, rank=rank)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mk.lod_linear(x, u, v, b, rank=rank, backend="native")
    for r in (128, 1, 64, 0, 127, 8):
        rank.fill_(r)
        poison(y)
        graph.replay()
        gate(y, x, u, v, b, r)


@pytest.mark.parametrize(("M", "strategy"), [(16, "decode"), (256, "rows")])
def test_two_streams_do_not_block_or_disturb_each_other(M, strategy):
    layers = [
        make_inputs(M, 2048, 2048, 256, dtype=torch.bfloat16, device="cuda", seed=i)
        for i in range(2)
    ]
    alone = [run(*layer, strategy) for layer in layers]
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    for _ in range(20):
        ys = []
        for layer, stream in zip(layers, streams, strict=True):
            with torch.cuda.stream(stream):
                ys += [mk.lod_linear(*layer, backend="native") for _ in range(4)]
        torch.cuda.synchronize()
        assert all(torch.equal(y, alone[i // 4]) for i, y in enumerate(ys))


@pytest.mark.parametrize(("M", "strategy"), [(1, "decode"), (64, "decode"), (200, "rows")])
def test_a_thousand_calls_agree_to_the_bit(M, strategy):
    # K is split here, and the order in which the splits arrive differs from call to call.
    x, u, v, b = make_inputs(M, 512, 2048, 64, dtype=torch.bfloat16, device="cuda")
    first = run(x, u, v, b, strategy)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        differing += (mk.lod_linear(x, u, v, b, backend="native") != first).sum()
    assert int(differing) == 0


@pytest.mark.parametrize(("M", "strategy"), [(8, "decode"), (130, "rows")])
def test_gradients_use_the_h_of_the_kernel(M, strategy):
    x, u, v, b = make_inputs(
        M, 256, 512, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True
    )
    r, dy = 40, torch.randn(M, 256, device="cuda").bfloat16()
    run(x, u, v, b, strategy, rank=r)
    y = mk.lod_linear(x, u, v, b, rank=r, backend="native")
    got = torch.autograd.grad(y, (x, u, v, b), dy)
    same = F.linear(F.linear(x, v[:r]), u[:, :r], b)
    torch_grads = torch.autograd.grad(same, (x, u, v, b), dy)
    wide = [t.detach().double().requires_grad_() for t in (x, u, v, b)]
    exact = F.linear(F.linear(wide[0], wide[2][:r]), wide[1][:, :r], wide[3])
    refs = torch.autograd.grad(exact, wide, dy.double())
    for name, g, other, ref in zip("xuvb", got, torch_grads, refs, strict=True):
        assert_accurate(f"d{name}", g, other, ref)
    assert not got[1][:, r:].any()
    assert not got[2][r:].any()


def test_what_no_kernel_takes_is_said():
    x, u, v, b = make_inputs(4, 64, 64, 13, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(NotImplementedError, match="16-byte pieces"):
        mk.lod_linear(x, u, v, b, backend="native")
