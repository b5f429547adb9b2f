"""convert and to_dense: what is swapped, what stays and why, and that errors change nothing."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close

from maestro_kernels.nn import (
    LoDConv2d,
    LoDLayer,
    LoDLinear,
    classify,
    conversion_report,
    convert,
    to_dense,
)
from maestro_kernels.nn.moments import input_moments


def mlp(**options):
    return nn.Sequential(
        nn.Linear(16, 24, **options), nn.ReLU(), nn.Linear(24, 16, **options), nn.ReLU()
    )


def kinds(model):
    return [type(module).__name__ for module in model]


def snapshot(model):
    modules = dict(model.named_modules())
    modes = {name: module.training for name, module in modules.items()}
    hooks = {name: len(module._forward_pre_hooks) for name, module in modules.items()}
    values = {name: t.clone() for name, t in model.state_dict().items()}
    return modules, modes, hooks, values, {n: id(p) for n, p in model.named_parameters()}


def assert_unchanged(model, before):
    modules, modes, hooks, values, ids = snapshot(model)
    assert list(modules) == list(before[0])
    assert all(modules[name] is before[0][name] for name in modules)
    assert (modes, hooks, ids) == (before[1], before[2], before[4])
    for name, value in before[3].items():
        assert torch.equal(torch.nan_to_num(values[name]), torch.nan_to_num(value))
    assert conversion_report(model) is None


# --- ranks ---------------------------------------------------------------------------------------

BREAK_EVEN = 16 * 24 / (16 + 24)  # 9.6


@pytest.mark.parametrize(
    ("rank", "multiple_of", "expected"),
    [
        (5, 1, 5),
        (5, 4, 8),
        (1.0, 1, 9),
        (0.5, 1, 4),
        (0.5, 3, 3),
        (0.01, 1, 1),
        (0.01, 4, 4),
        ({"*": 3}, 1, 3),
        (lambda name, module: module.out_features // 8, 1, (3, 2)),
    ],
)
def test_rank_of_each_layer(rank, multiple_of, expected):
    model = convert(mlp(), rank, multiple_of=multiple_of)
    first, second = expected if isinstance(expected, tuple) else (expected, expected)
    assert (model[0].rank, model[2].rank) == (first, second)
    assert (model[0].max_rank, model[2].max_rank) == (first, second)


def test_a_fraction_is_not_lost_to_rounding():
    for percent in (29, 57, 58):
        assert int(percent / 100 * 100) == percent - 1
        assert convert(nn.Linear(200, 200), percent / 100).rank == percent


def test_full_rank_and_more_need_allow_larger():
    for rank in (None, 16, 1000):
        model = convert(mlp(dtype=torch.float64), rank, allow_larger=True)
        assert (model[0].rank, model[2].rank) == (16, 16)
    source = mlp(dtype=torch.float64)
    x = torch.randn(3, 16, dtype=torch.float64)
    expected = source(x)
    assert_close(convert(source, allow_larger=True)(x), expected)


def test_layers_whose_factors_would_not_be_smaller_stay():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    convert(model, 31)
    assert model[0].rank == 31
    assert type(model[1]) is nn.Linear
    assert conversion_report(model).kept == {
        "1": "factors of rank 8 hold 576 weights, the dense layer 512 (break-even rank 7.1)"
    }
    # Equal is not smaller: 32 * (64 + 64) = 64 * 64.
    with pytest.raises(ValueError, match="factors of rank 32 hold 4096 weights"):
        convert(nn.Linear(64, 64), 32)


def test_the_first_matching_pattern_counts_and_dense_is_a_rank():
    model = nn.Sequential(mlp(), mlp(), mlp())
    convert(model, {"0.2": "dense", "0": 2, "1.*": 0.5, "2.0": None, "*.0": 7}, allow_larger=True)
    ranks = {name: m.rank for name, m in model.named_modules() if isinstance(m, LoDLayer)}
    assert ranks == {"0.0": 2, "1.0": 4, "1.2": 4, "2.0": 16}
    assert conversion_report(model).kept == {
        "0.2": "asked to stay dense",
        "2.2": "no pattern in rank matches it",
    }


def test_asking_for_dense_everywhere_is_granted():
    model = mlp()
    assert convert(model, "dense") is model
    assert kinds(model) == kinds(mlp())


@pytest.mark.parametrize(
    ("include", "exclude", "converted"),
    [
        ("0", None, {"0.0", "0.2"}),
        ("*.0", None, {"0.0", "1.0"}),
        (["0.0", "1.2"], None, {"0.0", "1.2"}),
        (None, "1", {"0.0", "0.2"}),
        ("0", ["*.2"], {"0.0"}),
        (lambda name, module: module.in_features == 24, None, {"0.2", "1.2"}),
        (None, lambda name, module: name == "0.0", {"0.2", "1.0", "1.2"}),
    ],
)
def test_include_and_exclude(include, exclude, converted):
    model = nn.Sequential(mlp(), mlp())
    convert(model, 2, include=include, exclude=exclude)
    assert {n for n, m in model.named_modules() if isinstance(m, LoDLinear)} == converted
    report = conversion_report(model)
    assert set(report.converted) == converted
    assert set(report.kept.values()) <= {"excluded", "not included"}


# --- what a converted model keeps ----------------------------------------------------------------


def test_mode_dtype_gradients_and_bias_are_kept():
    model = mlp(dtype=torch.bfloat16)
    model[0].eval()
    model[2].weight.requires_grad_(False)
    biases = [model[0].bias, model[2].bias]
    convert(model, 4)
    assert (model[0].training, model[2].training, model.training) == (False, True, True)
    assert model[0].u.dtype == torch.bfloat16
    assert (model[0].u.requires_grad, model[2].u.requires_grad) == (True, False)
    assert model[2].bias.requires_grad
    assert [model[0].bias, model[2].bias] == biases
    assert model[0].bias is biases[0]


def test_call_hooks_move_to_the_new_layer_and_can_still_be_removed():
    model = mlp()
    seen = []
    handles = [
        model[0].register_forward_hook(lambda m, a, y: seen.append(type(m))),
        model[0].register_forward_pre_hook(lambda m, a: seen.append("pre")),
        model[0].register_full_backward_hook(lambda m, gx, gy: seen.append("backward")),
    ]
    convert(model, 4)
    x = torch.randn(2, 16, requires_grad=True)
    model(x).sum().backward()
    assert seen == ["pre", LoDLinear, "backward"]
    for handle in handles:
        handle.remove()
    model(x)
    assert len(seen) == 3


def test_a_copy_shares_nothing_with_the_model():
    model = mlp()
    before = snapshot(model)
    made = convert(model, 4, inplace=False)
    assert_unchanged(model, before)
    assert kinds(made) == ["LoDLinear", "ReLU", "LoDLinear", "ReLU"]
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in made.parameters()}
    twin = convert(copy.deepcopy(model), 4)
    x = torch.randn(3, 16)
    assert torch.equal(made(x), twin(x))
    dense = to_dense(made, inplace=False)
    assert kinds(made)[0] == "LoDLinear"
    assert not {p.data_ptr() for p in made.parameters()} & {
        p.data_ptr() for p in dense.parameters()
    }


def test_the_model_itself_may_be_a_layer():
    source = nn.Linear(16, 24, dtype=torch.float64)
    made = convert(source, 4)
    assert isinstance(made, LoDLinear)
    assert type(source) is nn.Linear
    x = torch.randn(3, 16, dtype=torch.float64)
    back = to_dense(made)
    assert type(back) is nn.Linear
    assert_close(back(x), made(x))


def test_a_converted_model_pickles_with_its_report():
    model = pickle.loads(pickle.dumps(convert(mlp(), 4)))
    assert conversion_report(model).converted == {"0": 4, "2": 4}
    assert str(conversion_report(model)) == "0: rank 4\n2: rank 4"


def test_to_dense_merges_the_active_prefix_everywhere():
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=2)
    model = nn.Sequential(conv, nn.Flatten(2), nn.Linear(25, 30)).double().eval()
    model[0].bias.requires_grad_(False)
    convert(model, 3, allow_larger=True)
    model[0].rank, model[2].rank = 1, 2
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    y, bias = model(x), model[2].bias
    assert to_dense(model) is model
    assert kinds(model) == ["Conv2d", "Flatten", "Linear"]
    assert_close(model(x), y)
    assert model[2].bias is bias
    assert conversion_report(model) is None
    assert to_dense(model) is model


def test_a_factorised_layer_used_in_two_places_stays_one_when_dense():
    shared = LoDLinear(8, 8, 2)
    model = to_dense(nn.Sequential(shared, nn.ReLU(), shared))
    assert type(model[0]) is nn.Linear
    assert model[0] is model[2]


def test_random_factors_do_not_know_the_weight():
    torch.manual_seed(3)
    a = convert(mlp(), 4, init="random")
    torch.manual_seed(3)
    b = convert(mlp().double().float(), 4, init="random")
    assert torch.equal(a[0].u, b[0].u)
    with torch.device("meta"):
        on_meta = convert(mlp(), 4, init="random")
    assert on_meta[0].u.is_meta


# --- data-aware factors --------------------------------------------------------------------------


def narrow_inputs(count=3, rows=40, features=16):
    scales = torch.logspace(1, -3, features)
    return [torch.randn(rows, features) * scales for _ in range(count)]


def layer_errors(model, factorised, batches):
    """Summed squared output error of each layer on the inputs that the dense model gives it."""
    errors = dict.fromkeys(("0", "2"), 0.0)
    for batch in batches:
        x = batch
        for name in errors:
            dense = model.get_submodule(name)
            errors[name] += (dense(x) - factorised.get_submodule(name)(x)).square().sum().item()
            x = F.relu(dense(x))
    return errors


def test_data_aware_factors_err_less_on_the_data():
    model = mlp().eval()
    batches = narrow_inputs()
    plain = layer_errors(model, convert(model, 4, inplace=False), batches)
    aware = layer_errors(
        model, convert(model, 4, init="data", data=batches, inplace=False), batches
    )
    assert aware["0"] < 0.2 * plain["0"]
    assert aware["2"] < plain["2"]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_data_aware_convolutions_reach_the_optimum_of_their_outputs(groups, mode):
    conv = nn.Conv2d(8, 8, 3, 2, (1, 2), 1, groups, False, mode, dtype=torch.float64)
    x = torch.randn(10, 8, 7, 6, dtype=torch.float64)
    scales = torch.logspace(1, -2, 4, dtype=torch.float64)
    x *= torch.cat((scales, scales.flip(0)))[:, None, None]
    made = convert(conv, 2, init="data", data=[x[:9], (x[9],)])
    y = conv(x)
    per_group = y.unflatten(1, (groups, -1)).movedim(2, 0).movedim(2, 0).flatten(2)
    best = torch.linalg.svdvals(per_group)[:, 2:].square().sum()
    got = (y - made(x)).square().sum()
    assert best <= got * (1 + 1e-9)
    assert got - best <= 1e-4 * y.square().sum()


class Keyed(nn.Module):
    """Reads its input by name, feeds siblings with one tensor and writes into it in between."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(16, 20), nn.Linear(16, 12)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        x = self.drop(x) * scale
        y = self.a(input=x)
        z = self.c(x)
        x.mul_(3)
        return y.sum() + z.sum() + self.b(x).sum()


def test_batches_are_called_by_their_kind_and_inputs_written_in_between_are_seen():
    x = torch.randn(30, 16)
    results = []
    for data in ([{"x": x, "scale": 2.0}], [(x, 2.0)], [[x, 2.0]], [x * 2], iter([x * 2])):
        torch.manual_seed(0)
        model = Keyed()
        model.drop.train()
        model.b.eval()
        convert(model, 5, init="data", data=data)
        assert (model.drop.training, model.b.training) == (True, False)
        results.append(model)
    for model in results[1:]:
        assert torch.equal(model.a.u, results[0].a.u)
    model = Keyed()
    moments = input_moments(model, dict(model.named_children()), [x, x], fn="test")
    assert_close(moments["a"][0], 2 * x.double().T @ x.double(), rtol=1e-6, atol=1e-6)
    assert_close(moments["b"], 9 * moments["a"], rtol=1e-6, atol=1e-6)
    assert_close(moments["c"], moments["a"])


def test_calibration_leaves_batch_norm_alone():
    model = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24)).train()
    convert(model, 4, init="data", data=narrow_inputs())
    assert model[1].num_batches_tracked == 0
    assert model[1].training


# --- what stays ----------------------------------------------------------------------------------


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Renamed(nn.Linear):
    """Adds nothing that a factorised layer would lose."""


class WithScale(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.scale = nn.Parameter(torch.ones(1))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(4, 16, 16))


class Zoo(nn.Module):
    """One layer of each kind that must not be swapped, and two that may."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight
        self.twin_a, self.twin_b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.twin_b.weight = self.twin_a.weight
        self.viewed_a, self.viewed_b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.viewed_b.weight.data = self.viewed_a.weight.data
        self.once = nn.Linear(16, 16)
        self.again = self.once
        self.attention = nn.MultiheadAttention(16, 2)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.experts = Experts()
        self.normed = weight_norm(nn.Linear(16, 16))
        self.own = OwnForward(16, 16)
        self.patched = nn.Linear(16, 16)
        self.patched.forward = lambda x: x
        self.scaled = WithScale(16, 16)
        self.lazy = nn.LazyLinear(16)
        self.conv1d = nn.Conv1d(16, 16, 3)
        self.integer = nn.Linear(16, 16)
        self.integer.weight = nn.Parameter(
            torch.zeros(16, 16, dtype=torch.int8), requires_grad=False
        )
        self.empty = nn.Linear(16, 16)
        self.empty.weight = nn.Parameter(torch.zeros(0, 16))
        self.plain = nn.Linear(16, 16)
        self.renamed = Renamed(16, 16)


STAYS = {
    "embedding": "an embedding is a table that is looked up, not multiplied with",
    "head": "its weight is tied to embedding.weight",
    "twin_a": "its weight is tied to twin_b.weight",
    "twin_b": "its weight is tied to twin_a.weight",
    "viewed_a": "its weight is tied to viewed_b.weight",
    "viewed_b": "its weight is tied to viewed_a.weight",
    "once": "one module in several places: once, again",
    "attention": "nn.MultiheadAttention keeps q, k and v in parameters of its own",
    "attention.out_proj": "nn.MultiheadAttention reads its weight without calling it",
    "depthwise": "a depthwise convolution: each channel has its own small kernel",
    "experts": "gate_up (4, 16, 16) is a fused 3-d tensor (as experts have)",
    "normed": "its weight is computed by a parametrization or a hook",
    "normed.parametrizations.weight": (
        "ParametrizationList is no linear layer or 2-d convolution; it owns original1 (16, 16)"
    ),
    "own": "OwnForward has a forward of its own",
    "patched": "Linear has a forward of its own",
    "scaled": "WithScale holds more than a weight and a bias",
    "lazy": "it is lazy and has no weight yet",
    "conv1d": "Conv1d is no linear layer or 2-d convolution; it owns weight (16, 16, 3)",
    "integer": "its weight is torch.int8",
    "empty": "the weight is empty",
}


def test_what_cannot_be_factorised_stays_with_the_reason():
    model = Zoo()
    before = dict(model.named_modules())
    convert(model, 3, allow_larger=True)
    report = conversion_report(model)
    assert report.converted == {"plain": 3, "renamed": 3}
    assert report.kept == STAYS
    after = dict(model.named_modules())
    assert all(after[name] is before[name] for name in STAYS)
    assert model.again is model.once
    assert model.head.weight is model.embedding.weight


def test_classify_describes_without_changing():
    model = nn.Sequential(nn.Linear(16, 24), nn.Conv2d(8, 12, (3, 2), groups=2), LoDLinear(5, 4))
    found = classify(model, exclude="0")
    assert [(c.kind, c.N, c.K, c.groups) for c in found.values()] == [
        ("linear", 24, 16, 1),
        ("conv2d", 6, 24, 2),
        ("lod_linear", 4, 5, 1),
    ]
    reasons = [c.reason for c in found.values()]
    assert reasons == ["excluded", None, "already factorised, rank 4 of 4"]
    conv = found["1"]
    assert (conv.full_rank, conv.break_even_rank) == (6, 4.8)
    assert (conv.dense_weights, conv.factor_weights(2)) == (12 * 4 * 6, 2 * 2 * (6 + 24))
    assert kinds(model) == ["Linear", "Conv2d", "LoDLinear"]


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_encoder_runs_converted_in_both_modes(batch_first):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
    x = torch.randn(3, 5, 16)
    mask = torch.zeros(x.shape[:2] if batch_first else x.shape[:2][::-1], dtype=torch.bool)
    mask[0, -1] = True
    expected = model.train()(x, src_key_padding_mask=mask)
    convert(model, allow_larger=True)
    assert isinstance(model.layers[0].linear1, LoDLinear)
    assert type(model.layers[0].self_attn.out_proj) is not LoDLinear
    for module in model.modules():
        if isinstance(module, LoDLinear):
            module.truncate(16)
    assert_close(model(x, src_key_padding_mask=mask), expected, rtol=1e-4, atol=1e-5)
    model.layers[0].linear1.rank = 3
    lower = model(x, src_key_padding_mask=mask)
    # torch's fused inference path would read the weights and skip the layer.
    with torch.no_grad():
        fused = model.eval()(x, src_key_padding_mask=mask)
    keep = ~(mask if batch_first else mask.T)
    assert_close(fused[keep], lower[keep], rtol=1e-4, atol=1e-5)
    assert (lower - expected).abs().max() > 1e-3


# --- Hugging Face --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


IDS = torch.arange(14).reshape(2, 7)
TINY = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def gpt2(hf):
    config = hf.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=16, **TINY)
    return hf.GPT2LMHeadModel(config), {"input_ids": IDS}


def bert(hf):
    config = hf.BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        **TINY,
    )
    return hf.BertForMaskedLM(config), {"input_ids": IDS, "attention_mask": (IDS < 12).long()}


def t5(hf):
    config = hf.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, **TINY
    )
    return hf.T5ForConditionalGeneration(config), {"input_ids": IDS, "decoder_input_ids": IDS}


def llama(hf):
    config = hf.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        **TINY,
    )
    return hf.LlamaForCausalLM(config), {"input_ids": IDS}


FAMILIES = [
    (gpt2, 4, "lm_head"),
    (bert, 7, "cls.predictions.decoder"),
    (t5, 16, None),
    (llama, 7, "lm_head"),
]


@pytest.mark.parametrize(("family", "count", "tied"), FAMILIES, ids=["gpt2", "bert", "t5", "llama"])
@pytest.mark.parametrize("init", ["svd", "data"])
def test_hugging_face_models_keep_their_outputs_and_their_ties(
    transformers, family, count, tied, init
):
    model, inputs = family(transformers)
    model = model.double().eval()
    expected = model(**inputs).logits
    convert(model, allow_larger=True, init=init, data=[inputs] if init == "data" else None)
    assert_close(model(**inputs).logits, expected, rtol=1e-6, atol=1e-8)
    report = conversion_report(model)
    assert len(report.converted) == count
    if tied is not None:
        assert "is tied to" in report.kept[tied]
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    layers = [m for m in model.modules() if isinstance(m, LoDLinear)]
    for layer in layers:
        layer.rank = 3
    lower = model(**inputs).logits
    assert (lower - expected).abs().max() > 1e-6
    to_dense(model)
    assert_close(model(**inputs).logits, lower)
    assert not [m for m in model.modules() if isinstance(m, LoDLayer)]


def test_t5_reads_the_weight_dtype_without_a_product(transformers, monkeypatch):
    model, inputs = t5(transformers)
    model = convert(model.eval(), allow_larger=True)
    monkeypatch.setattr(LoDLinear, "_merged", lambda *args: pytest.fail("merged the weight"))
    reads = []
    weight = LoDLinear.weight
    monkeypatch.setattr(
        LoDLinear, "weight", property(lambda self: reads.append(1) or weight.fget(self))
    )
    model(**inputs)
    assert reads


# --- errors --------------------------------------------------------------------------------------


def broken():
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")
    return model


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.used(x)


PATTERNS = "expected patterns that match a module (such as '0', '1', '2', '3'), got 'encoder.*'"
SELECTOR = "expected a pattern, a list of patterns or a function (name, module) -> bool, got"
RANK = 'expected an int >= 1, a fraction 0 < f <= 1, None or "dense", got'
X = torch.zeros(2, 16)
ERRORS = [
    (mlp, {"rank": 0}, ValueError, f"rank: 0: {RANK} 0"),
    (mlp, {"rank": 1.5}, ValueError, f"rank: 0: {RANK} 1.5"),
    (mlp, {"rank": float("nan")}, ValueError, f"rank: 0: {RANK} nan"),
    (mlp, {"rank": True}, TypeError, f"rank: 0: {RANK} bool"),
    (mlp, {"rank": "low"}, TypeError, f"rank: 0: {RANK} 'low'"),
    (mlp, {"rank": torch.tensor(3)}, TypeError, f"rank: 0: {RANK} Tensor"),
    (mlp, {"rank": {"0": 4, "2": -1}}, ValueError, f"rank: 2: {RANK} -1"),
    (mlp, {"rank": lambda n, m: [4]}, TypeError, f"rank: 0: {RANK} list"),
    (
        mlp,
        {"rank": {"0": 4, "3": 4}},
        ValueError,
        "rank: expected patterns that match a layer (such as '0', '2'), got '3'",
    ),
    (mlp, {"rank": {0: 4}}, TypeError, "rank: expected patterns (str) as keys, got int"),
    (mlp, {"include": "encoder.*"}, ValueError, f"include: {PATTERNS}"),
    (mlp, {"exclude": ["0", "encoder.*"]}, ValueError, f"exclude: {PATTERNS}"),
    (mlp, {"include": 3}, TypeError, f"include: {SELECTOR} int"),
    (mlp, {"exclude": [3]}, TypeError, f"exclude: {SELECTOR} a int in it"),
    (
        mlp,
        {"init": "pca"},
        ValueError,
        "init: expected one of ('svd', 'data', 'random'), got 'pca'",
    ),
    (mlp, {"data": [X]}, ValueError, "data: expected None with init='svd', got batches"),
    (
        mlp,
        {"init": "data"},
        TypeError,
        "data: expected an iterable of batches (tensors, tuples or dicts), got NoneType",
    ),
    (
        mlp,
        {"init": "data", "data": X},
        TypeError,
        "data: expected an iterable of batches (tensors, tuples or dicts), got Tensor",
    ),
    (
        mlp,
        {"init": "data", "data": [X, "text"]},
        TypeError,
        "data: expected batches that are tensors, tuples or dicts, got str",
    ),
    (mlp, {"init": "data", "data": []}, ValueError, "data: expected at least one batch, got none"),
    (
        mlp,
        {"init": "data", "data": [X * float("nan")]},
        ValueError,
        "data: expected finite inputs in every layer, got NaN or infinity in the input of '0'",
    ),
    (
        Skips,
        {"init": "data", "data": [X]},
        ValueError,
        "data: expected batches that reach every layer to convert, got none for 'unused'; "
        "exclude it or add data",
    ),
    (
        broken,
        {},
        ValueError,
        "model: expected finite weights, got NaN or infinity in 2.weight",
    ),
    (
        lambda: mlp(device="meta"),
        {},
        ValueError,
        "model: expected weights in memory for init='svd', got 0.weight on the meta device",
    ),
    (
        lambda: nn.Sequential(nn.LayerNorm(4), nn.ReLU()),
        {},
        ValueError,
        "model: expected at least one layer to factorise, got a model without a linear or 2-d "
        "convolution layer",
    ),
    (
        lambda: nn.Sequential(nn.Embedding(4, 4), nn.Linear(2, 2)),
        {},
        ValueError,
        "model: expected at least one layer to factorise, got 0: an embedding is a table that is "
        "looked up, not multiplied with; 1: factors of rank 2 hold 8 weights, the dense layer 4 "
        "(break-even rank 1.0)",
    ),
    (mlp, {"multiple_of": 0}, ValueError, "multiple_of: expected an int >= 1, got 0"),
]


@pytest.mark.parametrize(("make", "options", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_leave_the_model_as_it_was(make, options, error, message):
    model = make()
    if not next(model.parameters(), X).is_meta:
        before = snapshot(model)
    with pytest.raises(error, match=f"^convert: {re.escape(message)}$"):
        convert(model, **{"rank": 4, **options})
    if not next(model.parameters(), X).is_meta:
        assert_unchanged(model, before)


def test_an_error_inside_the_model_leaves_it_as_it_was():
    model = mlp()
    model[1].eval()
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        convert(model, 4, init="data", data=[X, torch.zeros(2, 5)])
    assert_unchanged(model, before)


def test_errors_about_the_model_itself():
    message = "model: expected an nn.Module, got list"
    with pytest.raises(TypeError, match=f"^convert: {message}$"):
        convert([], 4)
    with pytest.raises(TypeError, match=f"^to_dense: {message}$"):
        to_dense([])
    model = nn.Sequential(LoDLinear(4, 4), LoDLinear(4, 4, activation="relu"))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^LoDLinear\.to_linear: activation: expected None"):
        to_dense(model)
    assert_unchanged(model, before)
    long = nn.Sequential(*(nn.Embedding(2, 2) for _ in range(9)))
    with pytest.raises(ValueError, match=r"; and 3 more$"):
        convert(long, 1)


def test_convolutions_convert_with_their_geometry():
    model = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, 1, 2, False, "reflect"), nn.BatchNorm2d(16))
    x = torch.randn(2, 8, 7, 7)
    expected = model(x)
    made = convert(model, allow_larger=True)
    assert isinstance(made[0], LoDConv2d)
    assert_close(made(x), expected, rtol=1e-4, atol=1e-5)
    assert convert(nn.Conv2d(8, 16, 3), 0.5).rank == int(0.5 * 16 * 72 / 88)
