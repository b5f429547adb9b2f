"""save_pretrained and load_pretrained: what survives, and what is refused in time."""

import errno
import os
import re
import shutil
from pathlib import Path

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


def truncate_file(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "no folder": (shutil.rmtree, "directory: expected a folder with model.safetensors, got"),
    "no tensors": (
        lambda f: (f / "model.safetensors").unlink(),
        "directory: expected a folder with model.safetensors, got",
    ),
    "truncated tensors": (
        lambda f: truncate_file(f / "model.safetensors"),
        "model.safetensors: expected a whole safetensors file, got a damaged one",
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


def test_saving_replaces_only_its_own_files(saved):
    model = mk.load_pretrained(saved, plain())
    with torch.no_grad():
        model[0].u.zero_()
    (saved / ".git").mkdir()
    for name in ("tokenizer.json", ".git/HEAD", "notes"):
        (saved / name).write_text(name)
    mk.save_pretrained(model, saved)
    again = mk.load_pretrained(saved, plain())
    assert torch.count_nonzero(again[0].u) == 0
    assert (saved / ".git" / "HEAD").read_text() == ".git/HEAD"
    names = sorted(path.name for path in saved.iterdir())
    assert names == [".git", "maestro.json", "model.safetensors", "notes", "tokenizer.json"]


def test_a_refused_save_changes_nothing(tmp_path):
    (tmp_path / "maestro.json").write_text("mine")
    with pytest.raises(ValueError, match=r"expected a folder without a maestro\.json of another"):
        mk.save_pretrained(plain(), tmp_path)
    with torch.device("meta"), pytest.raises(ValueError, match=r"save_pretrained: model: .* meta"):
        mk.save_pretrained(plain(), tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["maestro.json"]
    assert (tmp_path / "maestro.json").read_text() == "mine"


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "best").symlink_to("run5")
    for rank in (4, 8):
        mk.save_pretrained(mk.convert(plain(), rank=rank), tmp_path / "best")
        assert (tmp_path / "best").is_symlink()
        loaded = mk.load_pretrained(tmp_path / "run5", plain())
        assert mk.ranks(loaded) == {"0": rank, "1": rank}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "run5"]


class PathOnly(os.PathLike):
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)


def test_paths_of_every_kind(tmp_path, monkeypatch):
    model = mk.convert(plain(), rank=4)
    monkeypatch.chdir(tmp_path)
    for place in (".", "a b/ü", os.fsdecode(b"\xff"), tmp_path / "p", PathOnly(tmp_path / "q")):
        mk.save_pretrained(model, place)
        assert mk.ranks(mk.load_pretrained(place, plain())) == mk.ranks(model)
    assert not list(tmp_path.rglob(".*"))


def test_factors_may_be_shared(tmp_path):
    first, second = mk.LoDLinear(16, 16, 4), mk.LoDLinear(16, 16, 4)
    second.u = first.u
    second.rank = 2
    model = nn.Sequential(first, second, first)
    mk.save_pretrained(model, tmp_path)
    x = torch.randn(3, 16)
    one = nn.Linear(16, 16)
    for layers in ([one, nn.Linear(16, 16), one], [nn.Linear(16, 16) for _ in range(3)]):
        same = layers[0] is layers[2]
        loaded = mk.load_pretrained(tmp_path, nn.Sequential(*layers))
        assert loaded[0].u is loaded[1].u
        assert loaded[0].v is loaded[2].v
        assert (loaded[0] is loaded[2]) == same
        assert torch.equal(loaded(x), model(x))
    with pytest.raises(ValueError, match="expected two layers at '0' and '1' as saved, got one"):
        mk.load_pretrained(tmp_path, nn.Sequential(one, one, one))


@pytest.mark.parametrize("which", ["the model", "a layer"])
def test_a_compiled_model_is_saved_as_what_it_computes(which, tmp_path):
    model = mk.convert(plain(), rank=4)
    x = torch.randn(3, 32)
    expected = model(x)
    if which == "a layer":
        model[0] = torch.compile(model[0])
    mk.save_pretrained(model if which == "a layer" else torch.compile(model), tmp_path)
    assert torch.equal(mk.load_pretrained(tmp_path, plain())(x), expected)
    wrapped = torch.compile(plain())
    assert mk.load_pretrained(tmp_path, wrapped) is wrapped
    assert torch.equal(wrapped._orig_mod(x), expected)


def test_a_parametrised_dense_layer_and_an_lstm_are_filled(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(16, 16)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
            self.head = nn.Linear(16, 16)

        def forward(self, x):
            return self.head(self.normed(self.lstm(x)[0]))

    model = mk.convert(Model(), rank=4)
    x = torch.randn(2, 3, 16)
    mk.save_pretrained(model, tmp_path)
    # An LSTM runs on a list of its parameters, which has to follow what is loaded.
    assert torch.equal(mk.load_pretrained(tmp_path, Model())(x), model(x))


@pytest.mark.parametrize("kind", ["bert", "llama", "qwen3"])
def test_a_meta_model_gets_the_buffers_that_state_dict_leaves_out(kind, tmp_path):
    model, ids = tiny(kind)
    mk.save_pretrained(mk.convert(model, rank=12), tmp_path)
    with torch.device("meta"):
        empty, _ = tiny(kind)
    loaded = mk.load_pretrained(tmp_path, empty)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(output(loaded, ids), output(model, ids))


def test_what_is_frozen_stays_frozen_and_memory_is_aligned(tmp_path):
    mk.save_pretrained(mk.convert(plain(), rank=4), tmp_path)
    frozen = plain()
    frozen[0].requires_grad_(False)
    loaded = mk.load_pretrained(tmp_path, frozen)
    assert [p.requires_grad for p in loaded.parameters()] == [False] * 3 + [True] * 3
    # Fast kernels read in pieces of 16 bytes; a mapped file has its tensors anywhere.
    assert all(p.data_ptr() % 16 == 0 for p in loaded.parameters())


class Refusing(nn.Linear):
    """A layer that does not let its bias be replaced."""

    def __setattr__(self, name, value):
        if name == "bias" and "bias" in self._parameters and value is not self.bias:
            raise RuntimeError("no")
        super().__setattr__(name, value)


def test_a_failure_in_the_middle_of_the_change_is_undone(tmp_path):
    mk.save_pretrained(mk.convert(plain(), rank={"0": 4}), tmp_path)
    model = nn.Sequential(nn.Linear(32, 48), Refusing(48, 32))
    before = [(id(p), p.clone()) for p in model.parameters()]
    with pytest.raises(RuntimeError, match="no"):
        mk.load_pretrained(tmp_path, model)
    assert type(model[0]) is nn.Linear
    after = list(model.parameters())
    assert [id(p) for p in after] == [key for key, _ in before]
    assert all(torch.equal(p, old) for p, (_, old) in zip(after, before, strict=True))


def test_a_disk_that_cannot_be_read_is_named(saved, monkeypatch):
    def broken(*_, **__):
        raise OSError(errno.EIO, "Input/output error", "a")

    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(OSError, match="load_pretrained: directory: Input/output error"):
        mk.load_pretrained(saved, plain())


def test_a_conv1d_that_is_dense_again_is_not_taken_for_its_transpose(tmp_path):
    model, ids = tiny("gpt2")
    mk.convert(model, rank=12)
    square = "transformer.h.0.attn.c_proj"
    mk.set_ranks(model, {square: "dense", "transformer.h.1.mlp.c_fc": "dense"})
    outer = nn.ModuleList([model])
    mk.save_pretrained(outer, tmp_path)
    loaded = mk.load_pretrained(tmp_path, nn.ModuleList([tiny("gpt2")[0]]))
    assert type(loaded[0].get_submodule(square)) is nn.Linear
    assert torch.equal(output(loaded[0], ids), output(model, ids))
