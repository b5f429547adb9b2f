"""LoDConv1d against nn.Conv1d; what it shares with LoDConv2d is tested there."""

import itertools
import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import maestro_kernels as mk
from maestro_kernels import search
from maestro_kernels.nn import LoDConv1d, LoDConv2d, classify, conv

MODES = ("zeros", "reflect", "replicate", "circular")
EVEN_SAME = "ignore:Using padding='same' with even kernel lengths:UserWarning"


def dense(*args, **options):
    return nn.Conv1d(*args, dtype=torch.float64, **options)


def signals(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.filterwarnings(EVEN_SAME)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_every_geometry_matches_nn_conv1d(mode, groups):
    x = signals(2, 4, 11)
    for stride, padding, kernel, dilation in itertools.product(
        (1, 2, (3,)), (0, 2, (1,), "same", "valid"), (1, 2, 3), (1, 2)
    ):
        if padding == "same" and stride != 1:
            continue
        expected = dense(4, 8, kernel, stride, padding, dilation, groups, True, mode)
        made = LoDConv1d.from_conv(expected)
        y = expected(x)
        assert_close(made(x), y)
        assert_close(made(x[0]), y[0])
        assert_close(made.to_conv()(x), y)
        assert_close(made.weight + 0, expected.weight)
        made.rank = 1
        lower = made(x)
        assert_close(made.to_conv()(x), lower)
        made.rank = 0
        assert torch.equal(made(x), expected.bias[:, None].expand_as(y))


@pytest.mark.parametrize("groups", [1, 2])
def test_factors_gradients_and_truncation(groups):
    original = dense(8, 12, 3, groups=groups)
    made = LoDConv1d.from_conv(original, rank=4)
    assert (made.u.shape, made.v.shape) == ((12, 4), (groups * 4, 8 // groups, 3))
    assert made.matrix_shape == (12 // groups, 8 // groups * 3)
    made.rank = 2
    x = signals(2, 8, 9)
    parameters = list(made.parameters())
    got = torch.autograd.grad(made(x).square().sum(), parameters)
    merged = nn.functional.conv1d(x, made.weight, made.bias, groups=groups)
    assert_close(got, torch.autograd.grad(merged.square().sum(), parameters))
    lower = made(x)
    made.truncate()
    assert made.v.shape == (groups * 2, 8 // groups, 3)
    assert_close(made(x), lower)
    assert_close(torch.compile(made, backend="eager", fullgraph=True)(x), lower)


def test_pointwise_on_channels_last_is_one_call(monkeypatch):
    calls = []
    original = conv.lod_linear
    monkeypatch.setattr(conv, "lod_linear", lambda *a, **k: calls.append(a) or original(*a, **k))
    made = LoDConv1d(6, 4, 1, dtype=torch.float64)
    x = signals(2, 6, 5)
    plain = made(x)
    assert calls == []
    assert_close(made(x.mT.contiguous().mT), plain)
    assert len(calls) == 1
    assert calls[0][0].is_contiguous()


WRONG = {
    "kernel_size: expected an int or one in a tuple, got (3, 3)": lambda: LoDConv1d(4, 4, (3, 3)),
    "padding: expected an int, 'same' or 'valid', got 'full'": (
        lambda: LoDConv1d(4, 4, 3, padding="full")
    ),
    "padding: expected stride 1 with 'same', got stride (2,)": (
        lambda: LoDConv1d(4, 4, 3, 2, "same")
    ),
    "x: expected shape (B, 4, L) or (4, L), got (2, 3, 9)": (
        lambda: LoDConv1d(4, 4, 3)(torch.zeros(2, 3, 9))
    ),
    "x: expected shape (B, 4, L) or (4, L), got (2, 4, 9, 9)": (
        lambda: LoDConv1d(4, 4, 3)(torch.zeros(2, 4, 9, 9))
    ),
    "x: expected at least 3 positions in dimension -1 for kernel_size (3,), got 2": (
        lambda: LoDConv1d(4, 4, 3)(torch.zeros(2, 4, 2))
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_the_argument(message):
    with pytest.raises(ValueError, match=f"^LoDConv1d: {re.escape(message)}$"):
        WRONG[message]()


def test_another_convolution_is_refused():
    with pytest.raises(TypeError, match=r"^LoDConv1d.from_conv: conv: expected an nn.Conv1d, got"):
        LoDConv1d.from_conv(nn.Conv2d(2, 2, 1))
    with pytest.raises(TypeError, match=r"^LoDConv2d.from_conv: conv: expected an nn.Conv2d, got"):
        LoDConv2d.from_conv(nn.Conv1d(2, 2, 1))


def test_a_model_of_convolutions(tmp_path):
    torch.manual_seed(0)

    def make():
        return nn.Sequential(
            nn.Conv1d(8, 24, 3, 2, padding=1, padding_mode="circular"),
            nn.ReLU(),
            nn.Conv1d(24, 12, 5, groups=2, dilation=2),
            nn.Conv1d(12, 12, 3, groups=12),
        )

    model = make()
    x = torch.randn(6, 8, 32)
    found = classify(model)
    assert [(c.kind, c.N, c.K, c.groups) for c in found.values()] == [
        ("conv1d", 24, 24, 1),
        ("conv1d", 6, 60, 2),
        ("conv1d", 1, 3, 12),
    ]
    assert found["3"].reason.startswith("a depthwise convolution")
    expected = model(x)
    by_data = mk.convert(model, 3, init="data", batches=[x], inplace=False)
    by_weight = mk.convert(model, 3, inplace=False)
    # The first layer sees what both were made for.
    errors = [(one[0](x) - model[0](x)).norm() for one in (by_data, by_weight)]
    assert errors[0] < errors[1]
    sensitivity = search.sensitivity(model, [x])
    assert sensitivity.layers["0"].rows == (6 * 16,)
    assert sensitivity.layers["2"].rows == (6 * 8,)
    assert search.profile_model(model, x, seconds=0.05).model({"0": 3, "2": 3}) > 0
    summary = mk.summary(by_data)
    assert [layer.backend for layer in summary.layers] == ["convolutions", "convolutions", None]
    assert summary.parameters == sum(p.numel() for p in by_data.parameters())
    mk.save_pretrained(by_data, tmp_path)
    again = mk.load_pretrained(tmp_path, make())
    assert torch.equal(again(x), by_data(x))
    with pytest.raises(ValueError, match="expected a 1-d convolution at '0', got Conv2d"):
        mk.load_pretrained(tmp_path, nn.Sequential(nn.Conv2d(8, 24, 3), *list(make())[1:]))
    mk.convert(model, allow_larger=True)
    assert_close(model(x), expected)
    assert [type(m) for m in mk.to_dense(model)] == [nn.Conv1d, nn.ReLU, nn.Conv1d, nn.Conv1d]


def test_whisper(tmp_path):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = hf.WhisperConfig(
        vocab_size=50,
        d_model=32,
        num_mel_bins=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=10,
        max_target_positions=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    model = hf.WhisperForConditionalGeneration(config).eval()
    batch = {
        "input_features": torch.randn(2, 8, 20),
        "decoder_input_ids": torch.arange(8).view(2, 4),
    }
    expected = model(**batch).logits
    full = mk.convert(model, allow_larger=True, inplace=False)
    assert type(full.model.encoder.conv1) is type(full.model.encoder.conv2) is LoDConv1d
    assert_close(full(**batch).logits, expected, rtol=1e-3, atol=1e-4)
    mk.convert(model, 0.5, init="data", batches=[batch])
    assert "WhisperPositionalEmbedding" in str(mk.summary(model))
    assert mk.summary(model).layers[2].note.startswith("an embedding is a table")
    mk.save_pretrained(model, tmp_path)
    again = hf.AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert mk.ranks(again) == mk.ranks(model)
