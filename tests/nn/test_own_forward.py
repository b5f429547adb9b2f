"""Subclasses of nn.Linear with a forward of their own, and models whose q/k/v are one layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import maestro_kernels as mk
from maestro_kernels.nn import LoDLinear, classify
from maestro_kernels.nn.own_forward import is_linear


class Spelled(nn.Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Called(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, bias=self.bias)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) + super().forward(x)


class NoBias(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight)


class Clipped(nn.Linear):
    """What a probe with small numbers would not tell from nn.Linear."""

    def forward(self, x):
        return super().forward(x.clamp(-100, 100))


class Dropped(nn.Linear):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class ByValue(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


class Raises(nn.Linear):
    def forward(self, x):
        raise RuntimeError


class AddsASetting(nn.Linear):
    scale = 1.0

    def forward(self, x):
        return super().forward(x) * self.scale


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [Spelled, Called])
def test_a_linear_layer_spelled_otherwise_is_one(kind, bias):
    layer = kind(32, 24, bias)
    state = torch.get_rng_state()
    assert is_linear(layer)
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.training
    assert layer.weight.shape == (24, 32)
    x = torch.randn(4, 32)
    made = mk.convert(layer, allow_larger=True)
    assert type(made) is LoDLinear
    assert_close(made(x), layer(x))
    with torch.device("meta"):
        assert is_linear(kind(32, 24, bias))


@pytest.mark.parametrize("kind", [Doubled, NoBias, Clipped, Dropped, ByValue, Raises, AddsASetting])
def test_any_other_forward_stays_with_the_reason(kind):
    assert not is_linear(kind(8, 8))
    assert classify(kind(8, 8))[""].reason == f"{kind.__name__} has a forward of its own"


IDS = torch.arange(14).reshape(2, 7)
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def falcon(hf):
    return hf.FalconForCausalLM(hf.FalconConfig(**SIZES, bias=True, alibi=False))


def gpt_neox(hf):
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES, intermediate_size=32))


def phi3(hf):
    return hf.Phi3ForCausalLM(hf.Phi3Config(**SIZES, intermediate_size=32))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (falcon, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
        (gpt_neox, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
        (phi3, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    ],
    ids=["falcon", "gpt_neox", "phi3"],
)
def test_fused_projections_of_models_are_factorised(make, names, tmp_path):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = make(hf).double().eval()
    expected = model(IDS).logits
    mk.convert(model, allow_larger=True, exclude="*head*")
    found = [name.rpartition(".")[2] for name in mk.nn.lod_layers(model)]
    assert sorted(found) == sorted(names)
    assert_close(model(IDS).logits, expected, rtol=1e-8, atol=1e-10)
    mk.set_ranks(model, dict.fromkeys(mk.nn.lod_layers(model), 5))
    lower = model(IDS).logits
    assert (lower - expected).abs().max() > 1e-6
    mk.save_pretrained(model, tmp_path)
    assert torch.equal(mk.load_pretrained(tmp_path)(IDS).logits, lower)
    assert_close(mk.to_dense(model)(IDS).logits, lower)
