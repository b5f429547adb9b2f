"""LoDExperts against the fused experts of transformers, which know nothing of factors."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import maestro_kernels as mk
from maestro_kernels import search
from maestro_kernels.nn import LoDExperts, LoDLinear, classify, conversion_report, experts

hf = pytest.importorskip("transformers")
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralExperts  # noqa: E402

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
IDS = torch.arange(20).reshape(2, 10)


def mixtral(**options):
    return hf.MixtralForCausalLM(hf.MixtralConfig(num_local_experts=4, **{**SIZES, **options}))


def qwen2_moe():
    own = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 32}
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(num_experts=4, **own, **SIZES))


def qwen3_moe():
    own = {"moe_intermediate_size": 24, "head_dim": 16}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(num_experts=4, **own, **SIZES))


def gpt_oss():
    return hf.GptOssForCausalLM(hf.GptOssConfig(num_local_experts=4, head_dim=16, **SIZES))


def double(make):
    """In eval mode, with values in biases too; transformers' grouped matmul has no float64."""
    torch.manual_seed(0)
    model = make().double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.set_experts_implementation("eager")
    return model


def fused(E=4, K=16):
    """A MixtralExperts on its own, and a call of it in which expert 2 gets nothing."""
    torch.manual_seed(0)
    config = hf.MixtralConfig(hidden_size=K, intermediate_size=24, num_local_experts=E)
    config._experts_implementation = "eager"
    module = MixtralExperts(config).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    index = torch.tensor([[0, 1], [1, 3], [3, 0], [1, 0], [3, 1]])
    call = torch.randn(5, K).double(), index, torch.rand(5, 2).double()
    return module, call


FAMILIES = [mixtral, qwen2_moe, qwen3_moe, gpt_oss]


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_models_keep_their_outputs_and_become_what_they_were(make):
    model = double(make)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    block = model.model.layers[0].mlp
    kind, router = type(block.experts), [m for n, m in block.named_children() if n != "experts"]
    expected = model(IDS).logits
    assert mk.convert(model, include="*experts*", allow_larger=True) is model
    assert type(block.experts) is LoDExperts
    assert [m for n, m in block.named_children() if n != "experts"] == router
    assert len(mk.nn.lod_layers(model)) == 2 * 2 * 4
    assert_close(model(IDS).logits, expected, rtol=1e-9, atol=1e-11)
    mk.to_dense(model)
    assert type(block.experts) is kind
    assert list(model.state_dict()) == list(before)
    assert_close(dict(model.state_dict()), before, rtol=1e-9, atol=1e-12)
    assert_close(model(IDS).logits, expected, rtol=1e-9, atol=1e-11)


SETTINGS = SimpleNamespace(
    _experts_implementation="eager",
    hidden_size=16,
    intermediate_size=24,
    moe_hidden_size=16,
    moe_intermediate_size=24,
    moe_latent_size=None,
    moe_num_experts=3,
    n_routed_experts=3,
    num_local_experts=3,
    mlp_hidden_act="relu",
    hidden_act="silu",
    post_norm_eps=1e-6,
)
OTHERS = {
    # No gate; transposed without a bias; a norm behind every expert.
    "nemotron_h.NemotronHExperts": ["up", "down"],
    "aria.AriaExperts": ["gate_up", "down"],
    "muse_spark.MuseSparkExperts": ["gate_up", "down"],
}


@pytest.mark.parametrize("name", OTHERS)
def test_experts_of_other_contracts(name):
    folder, _, kind = name.partition(".")
    module = f"transformers.models.{folder}.modeling_{folder}"
    kind = getattr(pytest.importorskip(module), kind)
    module = kind(SETTINGS).double()
    if not LoDExperts.recognises(module):
        # Aria had experts of another kind in transformers 5.17.
        assert tuple(map(int, hf.__version__.split(".")[:2])) <= (5, 17)
        pytest.skip("experts without the contract that their decorator makes")
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    index = torch.tensor([[0, 1], [1, 2], [0, 2]])
    call = torch.randn(3, 16).double(), index, torch.rand(3, 2).double()
    expected = module(*call)
    made = mk.convert(module, allow_larger=True)
    assert [n for n, m in made.named_children() if isinstance(m, nn.ModuleList)] == OTHERS[name]
    assert_close(made(*call), expected)
    again = mk.to_dense(made)
    assert type(again) is kind
    assert_close(again(*call), expected)


def test_every_expert_has_a_rank_of_its_own():
    module, call = fused()
    made = mk.convert(module, allow_larger=True, inplace=False)
    assert type(module) is MixtralExperts
    names = list(mk.ranks(made))
    assert names == [f"{part}.{e}" for part in ("gate_up", "down") for e in range(4)]
    mk.set_ranks(made, {"gate_up.0": 3, "gate_up.1": 0, "down.3": "dense", "down.0": 5})
    mk.truncate(made)
    assert made.gate_up[0].u.shape == (48, 3)
    dense = mk.to_dense(made, inplace=False)
    assert type(dense) is MixtralExperts
    assert torch.linalg.matrix_rank(dense.gate_up_proj[0]) == 3
    assert not dense.gate_up_proj[1].any()
    assert_close(made(*call), dense(*call))
    assert (made(*call) - module(*call)).abs().max() > 1e-2
    assert type(made) is LoDExperts


def test_gradients_are_those_of_the_dense_experts():
    module, (x, index, weights) = fused()
    made = mk.convert(module, 5, inplace=False).train()
    dense = mk.to_dense(made, inplace=False)
    grads = []
    for one in (made, dense):
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        one(leaves[0], index, leaves[1]).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert_close(grads[0], grads[1])
    for e in range(4):
        layer, dw = made.gate_up[e], dense.gate_up_proj.grad[e]
        assert_close(layer.u.grad, dw @ layer.v.detach().mT)
        assert_close(layer.v.grad, layer.u.detach().mT @ dw)
    # As the tensor that holds all experts; without a gradient DDP would wait for it.
    assert not made.gate_up[2].u.grad.any()
    assert not made.down[2].v.grad.any()


def test_experts_without_tokens_are_not_touched(monkeypatch):
    module, call = fused()
    made = mk.convert(module, 5).eval()
    expected = made(*call)
    calls = []
    grouped = experts.lod_linear_grouped
    monkeypatch.setattr(
        experts, "lod_linear_grouped", lambda xs, *a, **k: calls.append(xs) or grouped(xs, *a, **k)
    )
    with torch.no_grad():
        made.gate_up[2].u.fill_(torch.nan)
        made.down[2].v.fill_(torch.nan)
        assert_close(made(*call), expected)
    assert [[len(x) for x in xs] for xs in calls] == [[3, 4, 3]] * 2
    x, index, weights = call
    assert made(x[:0], index[:0], weights[:0]).shape == (0, 16)
    # What belongs to another device has an index beyond the last.
    index = index.masked_fill(index == 1, 4)
    kept = weights.masked_fill(index == 4, 0)
    assert_close(made(x, index, weights), made(x, index.clamp(max=3), kept))


def test_a_layer_that_is_watched_or_packed_runs_by_itself():
    module, call = fused(K=32)
    made = mk.convert(module.float(), 8).eval()
    call = call[0].float(), call[1], call[2].float()
    expected = made(*call)
    seen = []
    handle = made.gate_up[1].register_forward_hook(lambda m, a, y: seen.append(y.shape))
    assert_close(made(*call), expected)
    assert seen == [(4, 48)]
    handle.remove()
    mk.prepack(made, form="merged dense")
    with torch.no_grad():
        assert_close(made(*call), expected, rtol=1e-4, atol=1e-5)


def test_factors_by_data_where_some_experts_see_none():
    module, call = fused()
    made = mk.convert(fused()[0], 5, init="data", batches=[call])
    plain = mk.convert(fused()[0], 5)
    error = [(one(*call) - module(*call)).norm() for one in (made, plain)]
    assert error[0] < error[1]
    assert_close(made.gate_up[2].weight + 0, plain.gate_up[2].weight + 0)


def test_what_is_not_converted_stays_closed_and_what_fails_changes_nothing():
    model = mixtral()
    first = model.model.layers[0].mlp.experts
    mk.convert(model, 8, include="model.layers.1.mlp.experts")
    assert model.model.layers[0].mlp.experts is first
    assert type(model.model.layers[1].mlp.experts) is LoDExperts
    other = mixtral()
    closed = [layer.mlp.experts for layer in other.model.layers]
    closed[1].down_proj.data[3, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"got NaN or infinity in model.layers.1.mlp.experts.down"):
        mk.convert(other, 8)
    assert [layer.mlp.experts for layer in other.model.layers] == closed
    copied = mk.convert(model, 8, include="*q_proj*", inplace=False)
    again = copied.model.layers[0].mlp.experts
    assert type(again) is MixtralExperts
    assert again is not first
    assert torch.equal(again.down_proj, first.down_proj)
    assert again.down_proj.data_ptr() != first.down_proj.data_ptr()


def test_dense_experts_let_the_fused_tensor_go():
    module, call = fused()
    expected = module(*call)
    made = mk.convert(module, {"gate_up.1": 8, "*": "dense"})
    assert [type(layer) for layer in made.gate_up] == [nn.Linear, LoDLinear, nn.Linear, nn.Linear]
    sizes = [p.untyped_storage().nbytes() - p.numel() * 8 for p in made.parameters()]
    assert not any(sizes)
    made.gate_up[1].rank = 8
    assert made(*call).shape == expected.shape
    again = pickle.loads(pickle.dumps(made))
    assert torch.equal(again(*call), made(*call))
    assert torch.equal(copy.deepcopy(made)(*call), made(*call))


def test_classify_names_the_layers_that_convert_makes():
    model = mixtral(num_hidden_layers=1)
    found = classify(model)
    parts = [name for name in found if ".experts." in name]
    where = "model.layers.0.mlp.experts"
    assert parts == [f"{where}.{part}.{e}" for part in ("gate_up", "down") for e in range(4)]
    assert (found[parts[0]].N, found[parts[0]].K, found[parts[0]].reason) == (96, 32, None)
    assert found["model.layers.0.mlp.gate"].reason == "it chooses among the experts beside it"
    assert type(model.model.layers[0].mlp.experts) is MixtralExperts
    # A router that is an nn.Linear is one all the same.
    block = nn.ModuleDict({"router": nn.Linear(32, 4), "head": nn.Linear(32, 4)})
    block["experts"] = fused(K=32)[0]
    assert classify(block)["router"].reason == "it chooses among the experts beside it"
    shared = nn.ModuleDict({"a": block["experts"], "b": block["experts"]})
    assert classify(shared)["a"].reason == "one module in several places: a, b"


def test_experts_of_another_contract_stay_with_the_reason():
    config = hf.Llama4TextConfig(hidden_size=16, intermediate_size=24, num_local_experts=2)
    found = classify(nn.ModuleDict({"experts": Llama4TextExperts(config)}))
    assert "is a fused 3-d tensor (as experts have)" in found["experts"].reason
    own = fused()[0]
    own.forward = lambda *args: args
    with pytest.raises(ValueError, match="fused 3-d tensor"):
        mk.convert(own, 4)


def test_the_summary_counts_every_weight():
    model = mixtral()
    total = sum(p.numel() for p in model.parameters())
    report = mk.summary(model)
    assert report.parameters == report.dense_parameters == total
    assert sum(layer.parameters for layer in report.layers) + report.vectors == total
    mk.convert(model, 0.25, include="*experts*")
    report = mk.summary(model)
    now = sum(p.numel() for p in model.parameters())
    assert (report.parameters, report.dense_parameters) == (now, total)
    assert sum(layer.parameters for layer in report.layers) + report.vectors == now
    text = str(report)
    assert f"whole model: {now:,} parameters of {total:,} ({now / total:.0%})" in text
    mk.set_ranks(model, {"model.layers.0.mlp.experts.gate_up.2": 3})
    (line,) = (row for row in str(mk.summary(model)).splitlines() if "0.mlp.experts.gate_up" in row)
    assert "gate_up.0-3" in line
    assert " 3-6/6 " in line


def test_ranks_are_searched_in_the_dense_model():
    torch.manual_seed(0)
    model = mixtral(num_hidden_layers=1, num_experts_per_tok=1).eval()
    batch = IDS[:1, :3]
    closed = model.model.layers[0].mlp.experts
    options = {"include": "*experts*"}
    found = search.sensitivity(model, [batch], method="loss", points=1, **options)
    assert len(found.layers) == 8
    assert min(len(one.rows) for one in found.layers.values()) == 0
    ranks = search.allocate(model, search.Params(0.5), sensitivity=found, batches=[batch], passes=2)
    assert model.model.layers[0].mlp.experts is closed
    small = ranks.apply(model, inplace=False)
    assert type(small.model.layers[0].mlp.experts) is LoDExperts
    assert dict(ranks).items() <= mk.ranks(small).items()
    timed = search.profile_model(model, batch, seconds=0.05, **options)
    assert timed.model(dict.fromkeys(ranks, 4)) > 0


class Block(nn.Module):
    """Experts in a model that is none of transformers."""

    def __init__(self):
        super().__init__()
        self.experts = fused()[0]

    def forward(self, call):
        return self.experts(*call)


def test_saved_in_our_format(tmp_path):
    _, call = fused()
    model = mk.convert(Block(), {"*.gate_up.*": 6, "*.1": 4})
    assert conversion_report(model).kept
    mk.set_ranks(model, {"experts.gate_up.3": 2})
    mk.save_pretrained(model, tmp_path)
    for dense in (Block(), copy.deepcopy(model)):
        again = mk.load_pretrained(tmp_path, dense)
        assert torch.equal(again(call), model(call))
        assert mk.ranks(again) == mk.ranks(model)
    other = Block()
    closed, other.more = other.experts, nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"expected 'more.bias' \(2,\), got no such tensor"):
        mk.load_pretrained(tmp_path, other)
    assert other.experts is closed


@pytest.mark.parametrize("make", [mixtral, gpt_oss], ids=lambda make: make.__name__)
def test_saved_in_the_format_of_hugging_face(make, tmp_path):
    config = make().config
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    mk.convert(model, {"*.experts.gate_up.*": 6, "*.experts.down.1": 4})
    mk.set_ranks(model, {"model.layers.1.mlp.experts.gate_up.3": 2})
    mk.save_pretrained(model, tmp_path / "first")
    first = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    # Of a model that was loaded transformers remembers how its own checkpoints are laid out.
    first.save_pretrained(tmp_path / "second")
    second = mk.load_pretrained(tmp_path / "second")
    third = mk.load_pretrained(tmp_path / "second", make().eval())
    for again in (first, second, third):
        assert list(again.state_dict()) == list(model.state_dict())
        assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert mk.ranks(again) == mk.ranks(model)


def test_compiled_it_runs_outside_of_the_graph():
    x, index, weights = fused()[1]
    model = mk.convert(Block(), 5).eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for shift in range(3):
            moved = x, (index + shift) % 4, weights
            assert_close(compiled(moved), model(moved))
    torch._dynamo.reset()
