"""Quantised layers and adapters of other packages: named, left alone, and told of us."""

import subprocess
import sys
import warnings

import pytest
import torch
from convert_support import assert_unchanged, snapshot
from hf_models import tiny
from torch import nn
from torch.testing import assert_close

import maestro_kernels as mk
from maestro_kernels.nn import classify, conversion_report

# Packages that are quantised with warn of each other's versions.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def mlp(K=64, N=64):
    return nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K)).eval()


def torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def torch_dynamic(model):
    with warnings.catch_warnings():
        # torch says once that it will take this out.
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


class Linear4bit(nn.Linear):
    """As bitsandbytes has it: a subclass whose weight is packed into bytes."""

    __module__ = "bitsandbytes.nn.modules"

    def __init__(self, K, N):
        super().__init__(K, N)
        packed = torch.zeros(K * N // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


class QuantLinear(nn.Module):
    """As GPTQ kernels have it: buffers alone."""

    __module__ = "somebody.kernels"

    def __init__(self, K, N):
        super().__init__()
        self.in_features, self.out_features = K, N
        self.register_buffer("qweight", torch.zeros(K // 8, N, dtype=torch.int32))


def replaced(kind):
    def quantise(model):
        model[0] = kind(64, 64)
        model[2] = kind(64, 64)
        return model

    return quantise


BY = {
    "torchao": (torchao, r"torchao \(Int8Tensor\)"),
    "torch": (torch_dynamic, r"torch \(Linear\)"),
    "bitsandbytes": (replaced(Linear4bit), r"bitsandbytes \(Linear4bit\)"),
    "gptq": (replaced(QuantLinear), r"somebody \(QuantLinear\)"),
}


@pytest.mark.parametrize("package", BY)
def test_quantised_layers_are_named_and_left_alone(package):
    quantise, who = BY[package]
    model = quantise(mlp())
    found = classify(model)
    assert [(c.name, c.N, c.K) for c in found.values()] == [("0", 64, 64), ("2", 64, 64)]
    layers = list(model)
    with pytest.raises(ValueError, match=rf"0: quantised by {who}: dequantise it first; 2: quant"):
        mk.convert(model, 0.5)
    assert list(model) == layers
    # Beside them the others are converted, and the report and the summary say why these are not.
    model.append(nn.Linear(64, 64))
    mk.convert(model, 0.5)
    assert isinstance(model[3], mk.LoDLinear)
    reason = conversion_report(model).kept["0"]
    assert reason.startswith("quantised by")
    assert reason in str(mk.summary(model))


def test_quantize_says_what_it_leaves_alone():
    quantization = pytest.importorskip("torchao.quantization")
    model = mk.convert(mlp(), 0.5).append(nn.Linear(64, 64))
    with pytest.warns(UserWarning, match=r"quantize_: model: 2 factorised layers .*nn\.lower"):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model[3].weight) is not nn.Parameter
    assert type(model[0].u) is nn.Parameter


def test_a_filter_of_the_users_own_is_a_choice(recwarn):
    quantization = pytest.importorskip("torchao.quantization")
    model = mk.convert(mlp(), 0.5)
    quantization.quantize_(
        model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, name: False
    )
    assert not [w for w in recwarn if "factorised" in str(w.message)]


def test_a_lowered_model_is_quantised():
    model = mk.convert(mlp(), 0.5)
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected = model(x)
        torchao(mk.nn.lower(model))
        linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        assert len(linears) == 4
        assert all("Int8" in type(m.weight).__name__ for m in linears)
        error = (model(x) - expected).norm() / expected.norm()
    # Eight bits per weight.
    assert 1e-5 < error < 2e-2
    with torch.no_grad():
        dynamic = torch_dynamic(mk.nn.lower(mk.convert(mlp(), 0.5)))
    assert "dynamic" in type(dynamic[0][0]).__module__


@pytest.mark.parametrize("first", ["torchao", "torchao.quantization", "maestro_kernels"])
def test_torchao_may_be_imported_first(first):
    pytest.importorskip("torchao")
    code = f"""
import {first}, warnings
import maestro_kernels as mk, torch
import torchao.quantization as q
from torchao.quantization import quant_api
warnings.simplefilter("ignore")
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    q.quantize_(torch.nn.Sequential(mk.LoDLinear(32, 32, 2)), q.Int8WeightOnlyConfig())
assert quant_api.quantize_ is q.quantize_
print(sum("factorised" in str(w.message) for w in found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"


# --- adapters -------------------------------------------------------------------------------------


def adapted(config):
    peft = pytest.importorskip("peft")
    model, _ = tiny("llama")
    return peft.get_peft_model(model, getattr(peft, config.pop("kind"))(**config))


CONFIGS = {
    "lora": {"kind": "LoraConfig", "target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "loha": {"kind": "LoHaConfig", "target_modules": ["q_proj"]},
    "saved whole": {
        "kind": "LoraConfig",
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head"],
    },
    "prompt": {"kind": "PrefixTuningConfig", "num_virtual_tokens": 4, "prefix_projection": True,
               "encoder_hidden_size": 64, "task_type": "CAUSAL_LM"},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CONFIGS)
def test_convert_leaves_adapters_alone(kind):
    model = adapted(dict(CONFIGS[kind]))
    before = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert before
    mk.convert(model, 0.5)
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    kept = conversion_report(model).kept
    reasons = [why for why in kept.values() if why.endswith("of a PEFT adapter")]
    assert reasons
    assert "of a PEFT adapter" in str(mk.summary(model))
    # What the adapter belongs to is a layer like any other.
    converted = conversion_report(model).converted
    assert any("mlp.up_proj" in name for name in converted)
    assert not any("lora_" in name or "prompt_encoder" in name for name in converted)


@pytest.mark.filterwarnings("ignore")
def test_a_layer_under_an_adapter_can_be_converted():
    model = adapted({"kind": "LoraConfig", "target_modules": ["q_proj"]})
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        mk.convert(model, None, include="*.q_proj.base_layer", allow_larger=True)
        assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match=r"weight: .*: expected a read, got a write"):
        model.merge_adapter()


def test_an_adapter_alone_raises_and_changes_nothing():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(64, 64)), peft.LoraConfig(target_modules=["0"])
    )
    before = snapshot(model)
    with pytest.raises(ValueError, match="lora_A of a PEFT adapter"):
        mk.convert(model, 1, include="*.lora_A.*")
    assert_unchanged(model, before)
