"""save_pretrained and load_pretrained: what survives, and what is refused in time."""

import json
import re
import shutil

import pytest
import torch
from hf_models import output, tiny
from torch import nn

import maestro_kernels as mk
from maestro_kernels.nn import groups


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5"])
def test_a_fresh_model_gives_the_same_outputs(kind, tmp_path):
    model, ids = tiny(kind)
    mk.convert(model, rank=12)
    first = next(iter(mk.ranks(model)))
    mk.set_ranks(model, {first: 7})
    mk.group(model)
    expected = output(model, ids)
    mk.save_pretrained(model, tmp_path / "saved")
    fresh, _ = tiny(kind)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    loaded = mk.load_pretrained(tmp_path / "saved", fresh)
    assert torch.equal(output(loaded, ids), expected)
    assert mk.ranks(loaded) == mk.ranks(model)
    assert groups(loaded) == groups(model)
    assert not loaded.training


def conv_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 32, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(32),
        nn.Conv2d(32, 32, 3, groups=2, dilation=2, bias=False),
    )


def test_convolutions_buffers_and_dtype_survive(tmp_path):
    model = mk.convert(conv_model(), rank=4).double().eval()
    model[1].running_mean.normal_()
    x = torch.randn(2, 8, 16, 16, dtype=torch.float64)
    mk.save_pretrained(model, tmp_path / "m")
    loaded = mk.load_pretrained(tmp_path / "m", conv_model().eval())
    assert loaded[0].u.dtype == torch.float64
    assert torch.equal(loaded(x), model(x))


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    model, _ = tiny("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    mk.convert(model, rank=12)
    mk.save_pretrained(model, tmp_path / "m")
    loaded = mk.load_pretrained(tmp_path / "m", tiny("gpt2")[0])
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_activation_and_frozen_parameters(tmp_path):
    layer = mk.LoDLinear(16, 16, 4, activation="silu")
    model = nn.Sequential(layer)
    mk.save_pretrained(model, tmp_path / "m")
    loaded = mk.load_pretrained(tmp_path / "m", nn.Sequential(nn.Linear(16, 16)))
    assert loaded[0].activation == "silu"
    x = torch.randn(3, 16)
    assert torch.equal(loaded(x), model(x))


def test_a_meta_model_is_filled(tmp_path):
    model = mk.convert(nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)), rank=4)
    mk.save_pretrained(model, tmp_path / "m")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32))
    loaded = mk.load_pretrained(tmp_path / "m", empty)
    x = torch.randn(3, 32)
    assert torch.equal(loaded(x), model(x))


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))


@pytest.fixture
def saved(tmp_path):
    return mk.save_pretrained(mk.convert(plain(), rank={"0": 4, "1": None}), tmp_path / "m")


def edit(folder, **changes):
    path = folder / "maestro.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate_file(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "no folder": (shutil.rmtree, "directory: expected a folder with maestro.json, got"),
    "no tensors": (
        lambda f: (f / "model.safetensors").unlink(),
        "directory: expected model.safetensors in",
    ),
    "truncated tensors": (
        lambda f: truncate_file(f / "model.safetensors"),
        "model.safetensors: expected a whole safetensors file, got a damaged one",
    ),
    "truncated json": (
        lambda f: truncate_file(f / "maestro.json"),
        "maestro.json: expected JSON, got a damaged file",
    ),
    "foreign json": (
        lambda f: (f / "maestro.json").write_text("{}"),
        "maestro.json: expected a file written by save_pretrained, got another file",
    ),
    "newer version": (
        lambda f: edit(f, version=2),
        "maestro.json: expected format version 1, got 2",
    ),
    "no layers": (
        lambda f: edit(f, layers=None),
        "maestro.json: expected 'layers' to be a dict, got NoneType",
    ),
    "bad record": (
        lambda f: edit(f, layers={"0": {"kind": "lod_linear"}}),
        "maestro.json: expected kind, max_rank, rank, bias for layer '0', got",
    ),
    "bad rank": (
        lambda f: edit(
            f, layers={"0": {"kind": "lod_linear", "max_rank": 4, "rank": 9, "bias": True}}
        ),
        "maestro.json: expected max_rank 4 and 0 <= rank <= max_rank for '0', got max_rank 4 and "
        "rank 9",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused_and_the_model_unchanged(saved, name):
    damage, message = DAMAGE[name]
    damage(saved)
    model = plain()
    with pytest.raises(ValueError, match="^" + re.escape(f"load_pretrained: {message}")):
        mk.load_pretrained(saved, model)
    for a, b in zip(model.parameters(), plain().parameters(), strict=True):
        assert torch.equal(a, b)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]


WRONG = {
    "missing layer": (nn.Sequential(), "dense_model: expected a layer '0'"),
    "other size": (
        nn.Sequential(nn.Linear(32, 40), nn.Linear(40, 32)),
        "dense_model: expected a linear layer of 48 x 32 at '0', got Linear of 40 x 32",
    ),
    "other kind": (
        nn.Sequential(nn.LayerNorm(32), nn.Linear(48, 32)),
        "dense_model: expected a linear layer of 48 x 32 at '0', got LayerNorm",
    ),
    "other dense shape": (
        nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 16)),
        "dense_model: expected '1.bias' of shape (32,) as saved, got (16,)",
    ),
    "one layer more": (
        nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 2)),
        "model.safetensors: expected '2.bias' (2,), got no such tensor",
    ),
    "one bias less": (
        nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32, bias=False)),
        "dense_model: expected a place for '1.bias'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_architecture_is_refused_and_unchanged(saved, name):
    model, message = WRONG[name]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="^" + re.escape(f"load_pretrained: {message}")):
        mk.load_pretrained(saved, model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_a_model_is_expected(saved, tmp_path):
    with pytest.raises(TypeError, match=r"load_pretrained: dense_model: expected an nn\.Module"):
        mk.load_pretrained(saved, {})
    with pytest.raises(TypeError, match=r"save_pretrained: model: expected an nn\.Module"):
        mk.save_pretrained({}, tmp_path / "n")


def test_saving_replaces_only_what_it_wrote(saved, tmp_path):
    with torch.no_grad():
        model = mk.load_pretrained(saved, plain())
        model[0].u.zero_()
    mk.save_pretrained(model, saved)
    again = mk.load_pretrained(saved, plain())
    assert torch.count_nonzero(again[0].u) == 0
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.png").write_text("meow")
    with pytest.raises(ValueError, match="save_pretrained: directory: expected a new or empty"):
        mk.save_pretrained(model, foreign)
    assert (foreign / "cat.png").read_text() == "meow"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "photos"]


def test_a_failed_save_leaves_the_old_folder(saved, monkeypatch):
    import safetensors.torch

    before = (saved / "model.safetensors").read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        mk.save_pretrained(plain(), saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["m"]
    with torch.device("meta"), pytest.raises(ValueError, match=r"save_pretrained: model: .* meta"):
        mk.save_pretrained(plain(), saved)
