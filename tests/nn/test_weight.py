"""`layer.weight`: free to ask about, computed when used, never written to."""

import operator

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from layer_support import K, N, layer, merged
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close

from maestro_kernels.nn import LoDLinear


@pytest.fixture
def merges(monkeypatch):
    calls = []
    original = LoDLinear._merged
    monkeypatch.setattr(
        LoDLinear, "_merged", lambda self, *a: calls.append(1) or original(self, *a)
    )
    return calls


def test_asking_for_metadata_computes_nothing(merges):
    weight = layer().weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.device) == (torch.float64, torch.device("cpu"))
    assert (weight.shape, weight.dim(), weight.numel(), len(weight)) == ((N, K), 2, N * K, N)
    assert weight.is_floating_point()
    assert weight.requires_grad
    assert weight.data.dtype == weight.detach().dtype == torch.float64
    assert not weight.data.requires_grad
    assert merges == []
    weight.sum()
    assert merges == [1]


def test_weight_is_the_active_prefix_with_gradients():
    made = layer()
    x = torch.randn(3, K, dtype=torch.float64)
    assert_close(F.linear(x, made.weight, made.bias), made(x))
    assert_close(made.weight + 0, merged(made))
    assert_close(made.weight.data.T[2:], merged(made).detach().T[2:])
    made.weight.square().sum().backward()
    got = made.u.grad.clone()
    made.zero_grad()
    merged(made).square().sum().backward()
    assert_close(got, made.u.grad)
    assert not layer().requires_grad_(False).weight.requires_grad
    made.rank = 0
    assert (made.weight == 0).all()


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda w: w.add_(1), "add_"),
        (lambda w: w.data.normal_(), "normal_"),
        (lambda w: w.detach().copy_(w + 0), "copy_"),
        (lambda w: w.__setitem__(0, 1.0), "__setitem__"),
        (lambda w: operator.imul(w, 2), "mul_"),
        (lambda w: setattr(w, "data", torch.zeros(N, K)), "__set__"),
        (lambda w: nn.init.zeros_(w), "zero_"),
        (lambda w: torch.add(w + 0, 1, out=w), "add"),
    ],
    ids=["method", "data", "detach", "item", "augmented", "set", "init", "out"],
)
def test_writing_into_the_weight_is_refused(write, name):
    made = layer()
    before = made.u.detach().clone()
    with (
        pytest.raises(NotImplementedError, match=f"^weight: {name}: expected a read, got a write"),
        torch.no_grad(),
    ):
        write(made.weight)
    assert torch.equal(made.u, before)


class ReadsDtype(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.to(self.inner.weight.dtype))


def test_reading_the_dtype_compiles_and_leaves_no_product_behind():
    model = ReadsDtype(layer())
    x = torch.randn(3, K)
    torch._dynamo.reset()
    graphs = []

    def capture(module, inputs):
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=capture)
    with torch.no_grad():
        expected = model(x)
        assert_close(torch.compile(model, fullgraph=True, backend=backend)(x), expected)
        program = torch.export.export(model, (x,))
        assert_close(program.module()(x), expected)
    program.graph.eliminate_dead_code()
    for graph in (*graphs, program.graph):
        targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        assert [t for t in targets if "lod_linear" in t]
        assert not [t for t in targets if "mm" in t or "matmul" in t], targets
    assert len(graphs) == 1
    made = model.inner
    torch._dynamo.reset()
    compiled = torch.compile(lambda: made.weight * 1, fullgraph=True, backend="aot_eager")
    assert_close(compiled(), merged(made))
    made.rank = 2
    assert_close(compiled(), merged(made))


def test_a_layer_takes_its_own_weight_back_and_no_other(merges):
    one, other = layer(), layer()
    one.weight = one.weight
    assert merges == []
    for value in (other.weight, torch.zeros(N, K, dtype=torch.float64)):
        with pytest.raises(AttributeError, match=r"LoDLinear: weight: expected it to be read, got"):
            one.weight = value
