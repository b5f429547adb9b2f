"""ranks, set_ranks, truncate, summary and group on whole models."""

import copy
import gc
import pickle
import re
import weakref

import pytest
import torch
from hf_models import output, tiny
from torch import nn
from torch.utils.checkpoint import checkpoint

import maestro_kernels as mk
from maestro_kernels.backends import native
from maestro_kernels.nn import LoDLinear, groups


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 4))
    return mk.convert(model, rank={"0": 8, "2": 12, "3": None})


class Attention(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.q_proj = LoDLinear(32, 48, 16, bias=bias)
        self.k_proj = LoDLinear(32, 16, 8, bias=bias)
        self.v_proj = LoDLinear(32, 24, 12, bias=bias)

    def forward(self, x, other=None):
        other = x if other is None else other
        return torch.cat([self.q_proj(x), self.k_proj(other), self.v_proj(other)], -1)


def test_ranks_lists_factorised_and_dense_layers():
    assert mk.ranks(small()) == {"0": 8, "2": 12, "3": "dense"}


def test_set_ranks_then_truncate():
    model, x = small(), torch.randn(5, 32)
    mk.set_ranks(model, {"0": 5, "2": "dense"})
    assert mk.ranks(model) == {"0": 5, "2": "dense", "3": "dense"}
    assert type(model[2]) is nn.Linear
    expected = model(x)
    mk.truncate(model, multiple_of=4)
    assert (model[0].max_rank, model[0].rank) == (8, 5)
    mk.truncate(model)
    assert (model[0].max_rank, model[0].u.shape) == (5, (64, 5))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("new", "error", "message"),
    [
        ({"0": 4, "9": 4}, ValueError, "ranks: expected names of layers (0, 2, 3, ...), got '9'"),
        (
            {"0": 4, "2": 13},
            ValueError,
            "ranks['2']: expected an int, 0 <= ranks['2'] <= 12, got 13",
        ),
        (
            {"0": 4, "2": True},
            TypeError,
            "ranks['2']: expected an int, 0 <= ranks['2'] <= 12, got bool",
        ),
        ({"0": 4, "2": "full"}, ValueError, "ranks['2']: expected an int or 'dense', got 'full'"),
        ({"0": 4, "3": 2}, ValueError, "ranks['3']: expected 'dense', because the layer is dense"),
        ([4], TypeError, "ranks: expected a mapping of names to ranks, got list"),
    ],
)
def test_set_ranks_checks_everything_before_it_changes_anything(new, error, message):
    model = small()
    with pytest.raises(error, match="^" + re.escape(f"set_ranks: {message}")):
        mk.set_ranks(model, new)
    assert mk.ranks(model) == {"0": 8, "2": 12, "3": "dense"}


@pytest.mark.parametrize("fn", [mk.ranks, mk.truncate, mk.summary, mk.group, mk.ungroup])
def test_a_model_is_expected(fn):
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        fn(3)


def test_summary_counts():
    model = small()
    model[0].rank = 4
    report = mk.summary(model)
    first, second, last = report.layers
    backend = "native" if native.load_error() is None else "matmul"
    assert (first.rank, first.max_rank, first.backend) == (4, 8, backend)
    assert first.break_even_rank == 64 * 32 / 96
    assert first.parameters == 8 * 96
    assert first.macs == 4 * 96
    assert (last.rank, last.backend) == (None, None)
    assert report.weights == 8 * 96 + 12 * 96 + 128
    assert report.dense_weights == 2 * 2048 + 128
    assert report.parameters == sum(p.numel() for p in model.parameters())
    text = str(report)
    assert "4/8" in text
    assert second.name == "2"
    assert f"whole model: {report.parameters:,} parameters" in text
    assert report.to_dict()["layers"][0]["N"] == 64


def test_summary_lists_an_embedding_but_counts_products():
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64))
    report = mk.summary(mk.convert(model, rank=8))
    assert [layer.kind for layer in report.layers] == ["Embedding", "lod_linear"]
    assert (report.dense_weights, report.macs) == (64 * 64, 8 * 128)
    assert report.parameters == 50 * 64 + 8 * 128 + 64


def test_summary_says_why_a_layer_is_dense():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(8, 2), nn.Conv2d(8, 8, 3, groups=8))
    mk.convert(model, rank=8)
    notes = {layer.name: layer.note for layer in mk.summary(model).layers}
    assert notes["0"] == ""
    assert notes["1"]
    assert "depthwise" in notes["2"]


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_grouped_models_give_the_same_outputs(kind):
    model, ids = tiny(kind)
    mk.convert(model, rank=12)
    for layer in model.modules():
        if isinstance(layer, LoDLinear):
            # auto chooses by size, and a group is larger than its layers.
            layer.backend = "matmul"
    before, keys = output(model, ids), list(model.state_dict())
    mk.group(model)
    found = groups(model)
    assert len(found) == {"bert": 2, "llama": 4, "t5": 2}[kind]
    assert torch.equal(output(model, ids), before)
    assert list(model.state_dict()) == keys
    mk.ungroup(model)
    assert groups(model) == []
    assert torch.equal(output(model, ids), before)


def test_gpt2_has_nothing_to_group():
    model, ids = tiny("gpt2")
    mk.convert(model, rank=12)
    before = output(model, ids)
    assert groups(mk.group(model)) == []
    assert torch.equal(output(model, ids), before)


def count_grouped_calls(monkeypatch):
    from maestro_kernels.nn import grouping

    calls, original = [], grouping.lod_linear_grouped

    def spy(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(grouping, "lod_linear_grouped", spy)
    return calls


def test_one_grouped_call_serves_all_siblings(monkeypatch):
    model, calls = mk.group(Attention()), count_grouped_calls(monkeypatch)
    x = torch.randn(5, 32)
    for n in (1, 2, 3):
        model(x)
        assert len(calls) == n
    assert model.q_proj.group._own.waiting is None


def test_gradients_of_a_group():
    model = Attention()
    x = torch.randn(5, 32, requires_grad=True)
    leaves = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).sin().sum(), leaves)
    got = torch.autograd.grad(mk.group(model)(x).sin().sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_siblings_that_read_different_tensors_stay_right_and_the_group_gives_up(monkeypatch):
    model = Attention()
    xs = [torch.randn(5, 32) for _ in range(8)]
    expected = [model(x, -x) for x in xs]
    mk.group(model)
    calls = count_grouped_calls(monkeypatch)
    for x, want in zip(xs, expected, strict=True):
        torch.testing.assert_close(model(x, -x), want)
    assert not model.q_proj.group.active
    assert len(calls) <= 4


def test_a_waiting_output_is_not_used_after_its_own_factor_was_written_to():
    model = mk.group(Attention())
    x = torch.randn(5, 32)
    with torch.no_grad():
        model.q_proj(x)
        model.k_proj.u.mul_(2)
        got = model.k_proj(x)
        torch.testing.assert_close(got, mk.ungroup(copy.deepcopy(model)).k_proj(x))


def test_nothing_stale_is_returned():
    model = mk.group(Attention())
    x = torch.randn(5, 32)
    plain = mk.ungroup(copy.deepcopy(model))

    def fresh():
        with torch.no_grad():
            return plain.k_proj(x)

    model.q_proj(x)  # leaves k and v waiting
    x.add_(1)
    torch.testing.assert_close(model.k_proj(x).detach(), fresh())
    model.q_proj(x)
    for layer, twin in ((model.k_proj, plain.k_proj),):
        with torch.no_grad():
            layer.u.mul_(2)
            twin.u.mul_(2)
    model.q_proj.group._own.misses = 0
    torch.testing.assert_close(model.k_proj(x).detach(), fresh())
    model.q_proj.group._own.misses = 0
    model.q_proj(x)
    model.k_proj.rank = plain.k_proj.rank = 3
    torch.testing.assert_close(model.k_proj(x).detach(), fresh())
    model.q_proj.group._own.misses = 0
    with torch.no_grad():
        model.q_proj(x)
    assert model.k_proj(x).requires_grad


def test_the_same_member_twice_computes_twice():
    model, x = mk.group(Attention()), torch.randn(5, 32)
    torch.testing.assert_close(model.q_proj(x), model.q_proj(x))


def test_nothing_is_held_after_the_last_sibling():
    model, x = mk.group(Attention()), torch.randn(5, 32)
    with torch.no_grad():
        model(x)
    ref = weakref.ref(x)
    del x
    gc.collect()
    assert ref() is None


def test_group_survives_deepcopy_pickle_and_truncate():
    model, x = mk.group(Attention()), torch.randn(5, 32)
    with torch.no_grad():
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert len(groups(twin)) == 1
            assert twin.q_proj.group.layers[0] is twin.q_proj
            assert torch.equal(twin(x), expected)
        mk.set_ranks(model, {"q_proj": 5})
        before = model(x)
        mk.truncate(model)
        torch.testing.assert_close(model(x), before)
        mk.set_ranks(model, {"q_proj": "dense"})
        assert groups(model) == []
        torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_group_under_checkpointing(use_reentrant):
    model = Attention()
    x = torch.randn(5, 32, requires_grad=True)
    leaves = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).sin().sum(), leaves)
    mk.group(model)
    for _ in range(5):
        for leaf in leaves:
            leaf.grad = None
        checkpoint(lambda t: model(t).sin(), x, use_reentrant=use_reentrant).sum().backward()
        for leaf, want in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, want)
    assert model.q_proj.group.active


def test_group_compiles_in_one_graph_and_follows_ranks():
    torch._dynamo.reset()
    model, x = mk.group(Attention()), torch.randn(5, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x)
    for rank in (3, 7):
        model.k_proj.rank = rank
        torch.testing.assert_close(compiled(x), model(x))


def test_layers_that_do_not_fit_are_not_grouped():
    model = Attention()
    model.k_proj = LoDLinear(16, 16, 8)
    assert groups(mk.group(model)) == []
    model = Attention()
    model.v_proj = nn.Linear(32, 24)
    assert groups(mk.group(model)) == [("q_proj", "k_proj")]


def test_deployed_weights_count_the_smaller_form():
    sizes = ((64, 128), (128, 128), (128, 10))
    model = nn.Sequential(*(nn.Linear(K, N) for K, N in sizes))
    dense = 64 * 128 + 128 * 128 + 128 * 10
    assert mk.summary(model).deployed_weights == dense
    model = mk.convert(model, allow_larger=True)
    assert mk.summary(model).deployed_weights == dense
    model[0].rank = 16
    found = mk.summary(model)
    assert found.deployed_weights == dense - 64 * 128 + 16 * 192
    assert found.dense_weights == dense
