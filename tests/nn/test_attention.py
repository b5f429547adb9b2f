"""LoDMultiheadAttention against nn.MultiheadAttention, which knows nothing of factors."""

import itertools
import re
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import maestro_kernels as mk
from maestro_kernels import search
from maestro_kernels.nn import LoDLinear, LoDMultiheadAttention, classify

E, HEADS, B, L, S = 16, 4, 3, 5, 7
# What torch says of the fast paths it does not take.
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")


def dense(**options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, HEADS, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def inputs(module, batched=True):
    sizes = (L, E), (S, module.kdim), (S, module.vdim)
    xs = [torch.randn(n, B, K).double() for n, K in sizes]
    if not batched:
        return [x[:, 0] for x in xs]
    return [x.transpose(0, 1).contiguous() for x in xs] if module.batch_first else xs


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 10, "vdim": 12}], ids=["packed", "separate"])
@pytest.mark.parametrize("more", [False, True])
def test_every_option_matches_nn_multihead_attention(batch_first, sizes, more):
    for bias, batched in itertools.product((True, False), repeat=2):
        module = dense(
            batch_first=batch_first, bias=bias, add_bias_kv=more, add_zero_attn=more, **sizes
        )
        made = mk.convert(module, allow_larger=True, inplace=False)
        assert type(made) is LoDMultiheadAttention
        call = inputs(module, batched)
        padding = torch.zeros(B, S, dtype=torch.bool) if batched else torch.zeros(S).bool()
        padding[..., -2:] = True
        causal = torch.ones(L, S).bool().triu(1)
        own = torch.randn((B if batched else 1) * HEADS, L, S).double()
        for key_padding_mask, (attn_mask, is_causal), need, average in itertools.product(
            (None, padding),
            ((None, False), (causal, False), (causal, True), (own, False)),
            (True, False),
            (True, False),
        ):
            masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
            options = {"need_weights": need, "average_attn_weights": average}
            options |= {"is_causal": is_causal, **masks}
            mixed = own is attn_mask and key_padding_mask is not None
            with pytest.warns(UserWarning, match="mismatched") if mixed else nullcontext():
                expected = module(*call, **options)
            y, weights = made(*call, **options)
            assert_close(y, expected[0])
            assert (weights is None) == (expected[1] is None)
            if weights is not None:
                assert_close(weights, expected[1])


@pytest.mark.parametrize(
    "options",
    [{}, {"kdim": 10}, {"bias": False}, {"add_bias_kv": True, "batch_first": True}],
    ids=str,
)
def test_it_becomes_exactly_what_it_was(options):
    module = dense(**options).eval()
    module.in_proj_bias is None or module.in_proj_bias.requires_grad_(False)
    made = mk.convert(module, allow_larger=True, inplace=False)
    assert made.training is False
    again = mk.to_dense(made)
    assert type(again) is nn.MultiheadAttention
    assert repr(again) == repr(module)
    assert {k: v for k, v in vars(again).items() if k[0] != "_"} == {
        k: v for k, v in vars(module).items() if k[0] != "_"
    }
    names = [(n, p.requires_grad) for n, p in module.named_parameters()]
    assert [(n, p.requires_grad) for n, p in again.named_parameters()] == names
    assert_close(dict(again.state_dict()), dict(module.state_dict()))
    call = inputs(module)
    assert_close(again(*call)[0], module(*call)[0])


def test_ranks_and_gradients_are_those_of_the_merged_weights():
    module = dense(batch_first=True)
    made = mk.convert(module, allow_larger=True)
    assert list(mk.ranks(made)) == ["q_proj", "k_proj", "v_proj", "out_proj"]
    mk.set_ranks(made, {"q_proj": 3, "k_proj": "dense", "v_proj": 5, "out_proj": 0})
    mk.truncate(made)
    mk.set_ranks(made, {"out_proj": "dense"})
    merged = mk.to_dense(made, inplace=False)
    grads = []
    for one in (made, merged):
        torch.manual_seed(1)
        x = torch.randn(B, L, E).double().requires_grad_()
        one(x, x, x)[0].square().sum().backward()
        grads.append(x.grad)
    assert_close(grads[0], grads[1])
    dw = merged.in_proj_weight.grad.chunk(3)
    assert_close(made.q_proj.u.grad, dw[0] @ made.q_proj.v.detach().mT)
    assert_close(made.k_proj.weight.grad, dw[1])
    assert_close(made.in_proj_weight + 0, merged.in_proj_weight)
    assert_close(made.in_proj_bias, merged.in_proj_bias)
    assert made.in_proj_weight.shape == (3 * E, E)


def test_dropout_is_for_training():
    module = dense(dropout=0.5, batch_first=True)
    made = mk.convert(module, allow_larger=True, inplace=False)
    call = inputs(module)
    for mode, need in itertools.product((True, False), repeat=2):
        results = []
        for one in (module.train(mode), made.train(mode)):
            torch.manual_seed(2)
            results.append(one(*call, need_weights=need)[0])
        # One drop of the random numbers for weights, of the layout (B, heads, L, S), in both.
        assert_close(results[0], results[1])
    torch.manual_seed(3)
    first = made.train()(*call)[0]
    assert not torch.equal(made(*call)[0], first)


def test_one_group_of_siblings_that_read_one_input():
    made = mk.group(mk.convert(dense(batch_first=True), 5))
    assert mk.nn.groups(made) == [("q_proj", "k_proj", "v_proj")]
    x = torch.randn(B, L, E).double()
    y = made(x, x, x)[0]
    assert_close(mk.ungroup(made)(x, x, x)[0], y)


def test_compiled_and_exported_in_one_graph():
    made = mk.convert(dense(batch_first=True), 5).eval()
    x = torch.randn(B, L, E).double()
    expected = made(x, x, x)[0]
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    assert_close(compiled(x, x, x)[0], expected)
    assert_close(torch.export.export(made, (x, x, x)).module()(x, x, x)[0], expected)
    torch._dynamo.reset()


def transformer():
    torch.manual_seed(0)
    return nn.Transformer(E, HEADS, 2, 2, 32, dropout=0.0, batch_first=True)


def test_a_transformer_in_both_modes_and_saved(tmp_path):
    model = transformer()
    src, tgt = torch.randn(B, S, E), torch.randn(B, L, E)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0, -2:] = True
    options = {
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
        "tgt_mask": torch.ones(L, L).bool().triu(1),
        "tgt_is_causal": True,
    }
    expected = model.train()(src, tgt, **options)
    # With q, k and v alone torch's fast path finds plain weights everywhere else.
    mk.convert(model, include="*_proj", allow_larger=True)
    assert len(mk.nn.lod_layers(model)) == 4 * 6
    assert_close(model(src, tgt, **options), expected, rtol=1e-4, atol=1e-5)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = model.eval()(src, tgt, **options)
            assert_close(y, expected, rtol=1e-4, atol=1e-5)
    mk.set_ranks(model, dict.fromkeys(mk.nn.lod_layers(model), 4))
    lower = model(src, tgt, **options)
    assert (lower - expected).abs().max() > 1e-3
    mk.save_pretrained(model, tmp_path)
    for fresh in (transformer(), model):
        again = mk.load_pretrained(tmp_path, fresh.eval())
        assert torch.equal(again(src, tgt, **options), lower)
    with torch.device("meta"):
        empty = transformer().eval()
    assert torch.equal(mk.load_pretrained(tmp_path, empty)(src, tgt, **options), lower)
    assert_close(mk.to_dense(model)(src, tgt, **options), lower, rtol=1e-4, atol=1e-5)
    assert [type(m) for n, m in model.named_modules() if n.endswith("attn")] == [
        nn.MultiheadAttention
    ] * 6


def test_an_encoder_that_would_make_nested_tensors():
    layer = nn.TransformerEncoderLayer(E, HEADS, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    assert model.use_nested_tensor
    x, padding = torch.randn(B, S, E), torch.zeros(B, S, dtype=torch.bool)
    padding[0, -2:] = True
    expected = model(x, src_key_padding_mask=padding)
    # What torch looks at to decide is plain but for the weight of q, k and v.
    mk.convert(model, include="*.[qkv]_proj", allow_larger=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = model(x, src_key_padding_mask=padding)
        assert_close(y[~padding], expected[~padding], rtol=1e-4, atol=1e-5)


def test_factors_by_data_and_searched_ranks():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, HEADS, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    # Inputs in few directions.
    x = torch.randn(40, S, 3) @ torch.randn(3, E)
    own = model.layers[0].self_attn
    by_data = mk.convert(model, 3, init="data", batches=[x], inplace=False)
    by_weight = mk.convert(model, 3, inplace=False)
    expected = own(x, x, x)[0]
    errors = [(m.layers[0].self_attn(x, x, x)[0] - expected).norm() for m in (by_data, by_weight)]
    assert errors[0] < errors[1]
    found = search.sensitivity(model, [x], include="*attn*")
    assert list(found.layers) == [
        f"layers.0.self_attn.{part}_proj" for part in ("q", "k", "v", "out")
    ]
    assert found.layers["layers.0.self_attn.k_proj"].rows == (40 * S,)
    ranks = search.allocate(model, search.Params(0.5), found, multiple_of=1)
    assert model.layers[0].self_attn is own
    small = ranks.apply(model, inplace=False)
    assert {name: mk.ranks(small)[name] for name in ranks} == dict(ranks)


def test_a_model_of_hugging_face_that_draws_its_attention_afresh(tmp_path):
    hf = pytest.importorskip("transformers")
    config = hf.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    model = hf.SiglipVisionModel(config).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x).pooler_output
    full = mk.convert(model, allow_larger=True, inplace=False)
    heads = [m for m in full.modules() if isinstance(m, LoDMultiheadAttention)]
    assert len(heads) == 1
    assert_close(full(x).pooler_output, expected, rtol=1e-3, atol=1e-4)
    mk.convert(model, {"*attention.[qk]_proj": 4, "*": "dense"})
    mk.save_pretrained(model, tmp_path)
    again = hf.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(again(x).pooler_output, model(x).pooler_output)
    assert list(again.state_dict()) == list(model.state_dict())


def test_what_is_no_plain_attention_stays():
    class Own(nn.MultiheadAttention):
        pass

    assert classify(Own(E, 2))[""].reason.startswith("nn.MultiheadAttention keeps q, k and v")
    module = dense()
    shared = nn.ModuleDict({"a": module, "b": module})
    assert classify(shared)["a"].reason == "one module in several places: a, b"
    found = classify(nn.ModuleDict({"a": module}), exclude="a.out_proj")
    assert [c.reason for c in found.values()] == [None, None, None, "excluded"]
    part = mk.convert(module, 4, exclude="out_proj")
    assert type(part.out_proj) is not LoDLinear
    assert type(mk.to_dense(part).out_proj) is type(dense().out_proj)


X = torch.zeros(B, L, E)
WRONG = {
    "query: expected 2 dimensions, or 3 with a batch, as query (16,), got (16,)": (
        (X[0, 0], X[0, 0], X[0, 0]),
        {},
    ),
    "key: expected 2 dimensions, or 3 with a batch, as query (3, 5, 16), got (5, 16)": (
        (X, X[0], X[0]),
        {},
    ),
    "value: expected as many positions as key (3, 5, 16), got (3, 4, 16)": ((X, X, X[:, 1:]), {}),
    "attn_mask: expected a mask with is_causal, got None": ((X, X, X), {"is_causal": True}),
    "attn_mask: expected shape (5, 5) or (12, 5, 5), got (5, 4)": (
        (X, X, X),
        {"attn_mask": torch.zeros(5, 4)},
    ),
    "key_padding_mask: expected shape (3, 5), got (5, 3)": (
        (X, X, X),
        {"key_padding_mask": torch.zeros(5, 3).bool()},
    ),
    "attn_mask: expected bool or floating point, got torch.int64": (
        (X, X, X),
        {"attn_mask": torch.zeros(5, 5).long()},
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_the_argument(message):
    made = mk.convert(dense(batch_first=True).float(), 4)
    args, options = WRONG[message]
    error = TypeError if "int64" in message else ValueError
    with pytest.raises(error, match=f"^LoDMultiheadAttention: {re.escape(message)}$"):
        made(*args, **options)
