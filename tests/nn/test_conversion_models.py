"""What convert leaves alone and why, and whole models: torch's transformer, Hugging Face."""

import pytest
import torch
from convert_support import kinds
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close

from maestro_kernels.nn import LoDLayer, LoDLinear, classify, conversion_report, convert, to_dense

# --- what stays -----------------------------------------------------------------------------------


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


class OwnAttention(nn.MultiheadAttention):
    """May do anything with its weights."""


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
        self.attention = OwnAttention(16, 2)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.experts = Experts()
        self.normed = weight_norm(nn.Linear(16, 16))
        self.own = OwnForward(16, 16)
        self.patched = nn.Linear(16, 16)
        self.patched.forward = lambda x: x
        self.scaled = WithScale(16, 16)
        self.lazy = nn.LazyLinear(16)
        self.conv3d = nn.Conv3d(16, 16, 3)
        self.relative = nn.Module()
        self.relative.relative_position_bias_table = nn.Parameter(torch.zeros(9, 16, 2))
        self.positions = nn.Module()
        self.positions.pos_embed = nn.Parameter(torch.zeros(1, 9, 16))
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
        "ParametrizationList is no linear layer or 1-d or 2-d convolution; "
        "it owns original1 (16, 16)"
    ),
    "own": "OwnForward has a forward of its own",
    "patched": "Linear has a forward of its own",
    "scaled": "WithScale holds more than a weight and a bias",
    "lazy": "it is lazy and has no weight yet",
    "conv3d": (
        "Conv3d is no linear layer or 1-d or 2-d convolution; it owns weight (16, 16, 3, 3, 3)"
    ),
    "relative": "relative_position_bias_table (9, 16, 2) is a table of values, no matrix that "
    "multiplies x",
    "positions": "pos_embed (1, 9, 16) is a table of values, no matrix that multiplies x",
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
    assert isinstance(model.layers[0].self_attn.out_proj, LoDLinear)
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
    model.layers[0].linear1.rank, model.layers[1].self_attn.v_proj.rank = 16, 2
    with torch.no_grad():
        assert (model(x, src_key_padding_mask=mask) - fused)[keep].abs().max() > 1e-3


# --- Hugging Face ---------------------------------------------------------------------------------


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
    convert(model, allow_larger=True, init=init, batches=[inputs] if init == "data" else None)
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
