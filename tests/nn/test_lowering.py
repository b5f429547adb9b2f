"""lower: the same function in standard layers, and the tools that then take the model."""

import copy
import io
import warnings

import pytest
import torch
from convert_support import assert_unchanged, kinds, snapshot
from hf_models import output, tiny
from packing_support import make
from torch import nn
from torch.testing import assert_close

import maestro_kernels as mk
from maestro_kernels.nn import (
    AtenLinear,
    LoDConv1d,
    LoDConv2d,
    LoDLayer,
    LoDLinear,
    PivotedLinear,
    lower,
)

FORMS = ("linear", "aten")


def linear(rank=4, activation=None, bias=True):
    layer = LoDLinear(20, 12, 7, bias, activation, dtype=torch.float64).eval()
    layer.rank = rank
    return layer


def conv(rank=3, **options):
    options = {"groups": 1, "kernel_size": 3, **options}
    layer = LoDConv2d(4, 6, max_rank=3, dtype=torch.float64, **options)
    layer.rank = rank
    return layer


def factorised(model):
    return [m for m in model.modules() if isinstance(m, LoDLayer | PivotedLinear)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("rank", [0, 4, 7])
def test_a_lowered_layer_computes_what_the_layer_did(rank, activation, bias, form):
    layer, x = linear(rank, activation, bias), torch.randn(3, 20, dtype=torch.float64)
    expected = layer(x)
    assert_close(lower(layer, form=form)(x), expected)


def test_a_layer_becomes_two_linears_and_its_activation():
    pair = lower(linear(activation="gelu_tanh"))
    assert type(pair) is nn.Sequential
    assert [type(m) for m in pair] == [nn.Linear, nn.Linear, nn.GELU]
    assert [m.bias is not None for m in pair[:2]] == [False, True]
    assert (pair[0].weight.shape, pair[1].weight.shape) == ((4, 20), (12, 4))
    assert [type(m) for m in lower(linear())] == [nn.Linear, nn.Linear]


def test_aten_linear_takes_a_residual_and_has_a_weight():
    layer, x = linear(activation="relu"), torch.randn(3, 20, dtype=torch.float64)
    residual = torch.randn(3, 12, dtype=torch.float64)
    expected = layer(x, residual=residual, scale=0.5)
    lowered = lower(layer, form="aten")
    assert type(lowered) is AtenLinear
    assert_close(lowered(x, residual=residual, scale=0.5), expected)
    assert (lowered.weight.shape, lowered.weight.dtype) == ((12, 20), torch.float64)
    assert_close(lowered.weight + 0, layer.u[:, :4] @ layer.v[:4])
    assert "rank=4, bias=True, activation=relu" in repr(lowered)


@pytest.mark.parametrize("form", FORMS)
def test_a_pivoted_layer_keeps_its_function(form):
    layer, x = linear(activation="silu"), torch.randn(3, 20, dtype=torch.float64)
    expected, pivoted = layer(x), PivotedLinear.from_lod(layer)
    lowered = lower(pivoted, form=form)
    assert_close(lowered(x), expected)
    # Plain torch operations already.
    assert (lowered is pivoted) == (form == "aten")


GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1, "bias": False},
    {"padding": "same", "dilation": 2, "padding_mode": "reflect"},
    {"groups": 2, "padding": (1, 0)},
    {"kernel_size": 1},
    {"kernel_size": (1, 3), "padding": "valid", "padding_mode": "circular"},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=repr)
@pytest.mark.parametrize("rank", [0, 2, 3])
def test_a_convolution_becomes_two(rank, geometry):
    layer, x = conv(rank, **geometry), torch.randn(2, 4, 9, 8, dtype=torch.float64)
    expected = layer(x)
    pair = lower(layer)
    assert [type(m) for m in pair] == [nn.Conv2d, nn.Conv2d]
    assert_close(pair(x), expected)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_convolution_over_one_dimension_becomes_two(rank):
    layer = LoDConv1d(4, 6, 3, padding=1, groups=2, max_rank=2, dtype=torch.float64)
    layer.rank, x = rank, torch.randn(2, 4, 9, dtype=torch.float64)
    expected = layer(x)
    pair = lower(layer)
    assert [type(m) for m in pair] == [nn.Conv1d, nn.Conv1d]
    assert_close(pair(x), expected)


@pytest.mark.parametrize("form", FORMS)
def test_attention_and_experts_are_lowered_inside(form):
    torch.manual_seed(0)
    attention = mk.convert(nn.MultiheadAttention(16, 4), rank=3)
    x = torch.randn(5, 2, 16)
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    moe = mk.convert(transformers.MixtralForCausalLM(config).eval(), rank=0.5)
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        for model, run in ((attention, lambda m: m(x, x, x)), (moe, lambda m: m(ids).logits[0])):
            assert factorised(model)
            expected = run(model)
            lowered = lower(model, form=form)
            assert not factorised(lowered)
            for got, want in zip(run(lowered), expected, strict=True):
                assert_close(got, want)


def test_rank_0_holds_no_empty_matrix():
    pair = lower(linear(rank=0))
    assert pair[0].weight.shape == (1, 20)
    assert not pair[0].weight.any()
    assert not pair[1].weight.any()


@pytest.mark.parametrize("form", FORMS)
def test_in_place_the_model_is_changed_and_keeps_its_parameters(form):
    model = nn.ModuleDict({"all": linear(rank=7), "some": linear(rank=4)})
    full, bias = model["all"], model["some"].bias
    assert lower(model, form=form) is model
    assert factorised(model) == []
    kept = set(model["all"].parameters())
    # Nothing is copied of a layer that runs at all that it stores.
    assert kept == {full.u, full.v, full.bias}
    assert any(p is bias for p in model["some"].parameters())


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_shares_nothing_and_leaves_the_model_alone(form):
    model = nn.Sequential(linear(rank=7), PivotedLinear.from_lod(linear()), linear(rank=2))
    before, x = snapshot(model), torch.randn(3, 20, dtype=torch.float64)
    expected = model[0](x)
    copied = lower(model, form=form, inplace=False)
    assert_unchanged(model, before)
    assert factorised(copied) == ([copied[1]] if form == "aten" else [])
    assert_close(copied[0](x), expected)
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in copied.parameters()}


def test_packed_and_grouped_layers():
    layers = nn.ModuleDict({n: make(40, 24, rank=8) for n in ("q_proj", "k_proj", "v_proj")}).eval()
    x = torch.randn(5, 40)
    expected = {name: layer(x) for name, layer in layers.items()}
    mk.prepack(mk.group(layers), rows=5)
    assert len(mk.nn.groups(layers)) == 1
    lower(layers)
    assert mk.nn.groups(layers) == []
    for name, pair in layers.items():
        assert_close(pair(x), expected[name])


def test_mode_hooks_gradients_and_shared_layers_stay():
    model = nn.ModuleDict({"a": linear(), "b": nn.Identity()})
    model["b"] = model["a"]
    calls = []
    model["a"].register_forward_hook(lambda *_: calls.append(1))
    model["a"].u.requires_grad_(False)
    model.train()
    lower(model)
    assert model["a"] is model["b"]
    assert model["a"].training
    model["a"](torch.randn(2, 20, dtype=torch.float64)).sum().backward()
    assert calls == [1]
    assert model["a"][0].weight.grad is not None
    assert not model["a"][1].weight.requires_grad


@pytest.mark.parametrize("inplace", [True, False])
def test_tied_factors_stay_tied(inplace):
    model = nn.Sequential(linear(rank=4), linear(rank=4), linear(rank=2))
    model[1].v = model[2].v = model[0].v
    lowered = lower(model, inplace=inplace)
    assert lowered[0][0].weight is lowered[1][0].weight
    assert lowered[0][0].weight is not lowered[2][0].weight


def test_a_model_without_factors_comes_back():
    model = nn.Sequential(nn.Linear(4, 4))
    before = snapshot(model)
    assert lower(model) is model
    assert_unchanged(model, before)


def test_the_report_of_a_conversion_goes():
    model = mk.convert(nn.Sequential(nn.Linear(32, 32)), 4)
    assert mk.nn.conversion_report(lower(model)) is None
    assert kinds(model) == ["Sequential"]


def test_a_lowered_model_of_transformers_refuses_to_save_itself(tmp_path):
    model, _ = deployed("bert")
    lowered = lower(Logits(model), inplace=False).model
    for save in (lowered.save_pretrained, lambda folder: mk.save_pretrained(lowered, folder)):
        with pytest.raises(NotImplementedError, match=r"save_pretrained: model: .*a lowered model"):
            save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    mk.save_pretrained(model, tmp_path)
    assert mk.ranks(mk.load_pretrained(tmp_path)) == mk.ranks(model)
    # What had nothing to lower saves as before.
    lower(tiny("bert")[0]).save_pretrained(tmp_path / "dense")


class Other(LoDLayer):
    pass


def test_wrong_arguments_have_names_and_change_nothing():
    with pytest.raises(TypeError, match=r"lower: model: expected an nn\.Module, got int"):
        lower(3)
    model = nn.Sequential(linear())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"lower: form: expected one of .*, got 'onnx'"):
        lower(model, form="onnx")
    model.append(Other())
    with pytest.raises(NotImplementedError, match=r"lower: model: .* got Other at '1'"):
        lower(model)
    del model[1]
    assert_unchanged(model, before)


# --- the tools ------------------------------------------------------------------------------------


def deployed(kind):
    model, ids = tiny(kind)
    mk.convert(model, 0.5)
    mk.set_ranks(
        model, {name: max(r - 3, 0) for name, r in mk.ranks(model).items() if r != "dense"}
    )
    return model, ids


def convolutions():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=2))
    return mk.convert(net, 0.5).eval()


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, ids):
        return self.model(input_ids=ids)[0]


# torch's own words about torch.jit, and transformers' about a mask that is traced.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "form"), [("bert", "linear"), ("t5", "aten")])
def test_torch_jit_trace(kind, form):
    model, ids = deployed(kind)
    expected = output(model, ids)
    traced = torch.jit.trace(Logits(lower(model, form=form)), (ids,), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    with torch.no_grad():
        assert_close(torch.jit.load(file)(ids), expected)
    assert "maestro_kernels::" not in str(traced.inlined_graph)


def test_t5_reads_weights_so_it_needs_aten():
    model, ids = deployed("t5")
    expected = output(model, ids)
    assert_close(output(lower(model, form="aten"), ids), expected)


def onnx_outputs(model, inputs, dynamic_shapes=None):
    """What ONNX Runtime computes of a model that torch exported, as a function."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    with warnings.catch_warnings():
        # torch's exporter and copyreg tell each other what will change in torch.
        warnings.simplefilter("ignore", (FutureWarning, DeprecationWarning))
        program = torch.onnx.export(
            model, inputs, dynamo=True, verbose=False, dynamic_shapes=dynamic_shapes
        )
    session = runtime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [entry.name for entry in session.get_inputs()]

    def run(*values):
        feed = dict(zip(names, (v.numpy() for v in values), strict=True))
        return torch.from_numpy(session.run(None, feed)[0])

    return run


@pytest.mark.parametrize("form", FORMS)
def test_onnx_runtime_runs_an_encoder(form):
    model, ids = deployed("bert")
    expected = output(model, ids)
    run = onnx_outputs(Logits(lower(model, form=form)), (ids,))
    assert_close(run(ids), expected, rtol=1e-4, atol=1e-5)


def test_onnx_runtime_runs_every_kind_of_layer_at_any_batch():
    torch.manual_seed(0)
    layers = [LoDLinear(8, 8, 4, activation=name) for name in ("relu", "gelu", "gelu_tanh", "silu")]
    layers[0].rank, layers[1].rank = 0, 2
    net = nn.Sequential(convolutions(), nn.Flatten(), nn.Linear(256, 8), *layers)
    net.append(PivotedLinear.from_lod(LoDLinear(8, 6, 3))).eval()
    batch = torch.export.Dim("batch")
    run = onnx_outputs(lower(net, inplace=False), (torch.randn(2, 4, 6, 6),), ({0: batch},))
    x = torch.randn(3, 4, 6, 6)
    with torch.no_grad():
        assert_close(run(x), net(x), rtol=1e-4, atol=1e-5)


def test_the_copy_of_a_copy():
    model = nn.Sequential(linear())
    assert kinds(copy.deepcopy(lower(model))) == kinds(model)
