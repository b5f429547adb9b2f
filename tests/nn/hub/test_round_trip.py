"""Models of transformers saved and loaded, by us and by transformers: every bit comes back."""

import json

import pytest
import torch
import transformers
from hub_models import Wrapped, assert_same, mixed, outputs, small, tied
from safetensors.torch import load_file, save_file
from torch import nn

import maestro_kernels as mk
from maestro_kernels.nn import PivotedLinear, groups, saved_file

KINDS = ["bert", "llama", "gpt2", "seq2seq", "vit", "classifier", "mixtral"]


def hub_save(model, folder):
    model.save_pretrained(folder)


def our_save(model, folder):
    mk.save_pretrained(model, folder)


def hub_load(model, folder):
    return type(model).from_pretrained(folder)


def our_load(model, folder):
    return mk.load_pretrained(folder)


def load_into(model, folder):
    dense = type(model)(model.config).eval()
    again = mk.load_pretrained(folder, dense)
    assert again is dense
    return again


@pytest.mark.parametrize("load", [hub_load, our_load, load_into])
@pytest.mark.parametrize("save", [hub_save, our_save])
@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_comes_back(kind, save, load, tmp_path):
    model, batch = small(kind)
    mixed(model)
    save(model, tmp_path / "m")
    again = load(model, tmp_path / "m")
    assert_same(model, again, batch)
    assert tied(model) == tied(again)
    assert any(isinstance(m, PivotedLinear) for m in again.modules())
    assert kind in ("gpt2", "vit") or groups(again)
    assert not again.training
    assert all(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_what_was_loaded_is_saved_again_as_it_is_then(kind, tmp_path):
    model, batch = small(kind)
    mixed(model)
    mk.save_pretrained(model, tmp_path / "a")
    again = transformers.AutoModel.from_pretrained(tmp_path / "a")
    assert not hasattr(again, "hf_quantizer")
    assert not hasattr(again.config, "quantization_config")
    name = next(iter(mk.ranks(again)))
    mk.set_ranks(again, {name: 5})
    mk.truncate(again)
    again.save_pretrained(tmp_path / "b")
    third = transformers.AutoModel.from_pretrained(tmp_path / "b")
    assert third.get_submodule(name).max_rank == 5
    assert_same(again, third, batch)
    mk.to_dense(third)
    third.save_pretrained(tmp_path / "b")
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_keep_their_dtypes_unless_another_is_asked_for(dtype, tmp_path):
    model, _ = small("llama")
    mixed(model.to(dtype))
    model.model.norm.float()
    model.model.layers[0].self_attn.o_proj.float()
    mk.save_pretrained(model, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    kept = {key: value.dtype for key, value in model.state_dict().items()}
    assert {key: value.dtype for key, value in again.state_dict().items()} == kept
    assert again.dtype == dtype
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {v.dtype for v in other.state_dict().values()} == {torch.float32, torch.int32}
    expected = {key: value.to(torch.float32) for key, value in model.named_parameters()}
    assert all(torch.equal(value, expected[key]) for key, value in other.named_parameters())


def test_layers_that_transformers_keeps_in_float32(tmp_path):
    model, batch = small("seq2seq")
    mixed(model.half())
    assert "wo" in model._keep_in_fp32_modules
    mk.save_pretrained(model, tmp_path / "half")
    again = mk.load_pretrained(tmp_path / "half")
    block = again.encoder.block[0].layer[1].DenseReluDense
    # Up to transformers 5.17 a layer that was saved in half precision comes back in float32.
    if block.wo.u.dtype is torch.float32:
        assert tuple(map(int, transformers.__version__.split(".")[:2])) <= (5, 17)
        for name, module in model.named_modules():
            if name.endswith(".wo"):
                module.float()
    assert_same(model, again, batch)
    for block in model.encoder.block:
        block.layer[1].DenseReluDense.wo.float()
    mk.save_pretrained(model, tmp_path / "mixed")
    assert_same(model, mk.load_pretrained(tmp_path / "mixed"), batch)


def test_a_head_is_added_or_left_out_as_transformers_does(tmp_path):
    model, batch = small("classifier", num_labels=3)
    mixed(model)
    mk.save_pretrained(model, tmp_path / "head")
    base = transformers.AutoModel.from_pretrained(tmp_path / "head")
    assert len(mk.ranks(base)) >= len(mk.ranks(model)) - 1
    hidden = model.bert(**batch).pooler_output
    assert torch.equal(base(**batch).pooler_output, hidden)
    mk.save_pretrained(base, tmp_path / "base")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(again.bert(**batch).pooler_output, hidden)
    with pytest.raises(
        ValueError, match="load_pretrained: directory: expected the tensors of a Be"
    ):
        mk.load_pretrained(tmp_path / "base", again)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map(device_map, tmp_path):
    model, batch = small("llama")
    mixed(model)
    mk.save_pretrained(model, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert_same(model, again, batch)


def test_layers_that_lie_on_a_disk(tmp_path):
    model, batch = small("llama")
    mk.convert(model, rank=0.5)
    mk.save_pretrained(model, tmp_path / "m", max_shard_size="40KB")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", device_map=places, offload_folder=tmp_path / "disk"
    )
    layer = again.model.layers[1].mlp.up_proj
    assert layer.u.is_meta
    assert layer.rank == model.model.layers[1].mlp.up_proj.rank
    for a, b in zip(outputs(model, batch), outputs(again, batch), strict=True):
        assert torch.equal(a, b)
    with pytest.warns(UserWarning, match="offloaded modules"):
        mk.save_pretrained(again, tmp_path / "again")
    assert_same(model, mk.load_pretrained(tmp_path / "again"), batch)


def test_the_meta_device(tmp_path):
    model, _ = small("llama")
    mixed(model)
    mk.save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match=r"save_pretrained: model: expected values, got .* meta"):
        mk.save_pretrained(model.to("meta"), tmp_path)


def test_shared_factors_and_a_head_that_is_no_longer_tied(tmp_path):
    model, batch = small("gpt2")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    mk.convert(model, rank=8)
    first, second = (block.attn.c_proj for block in model.transformer.h)
    second.u = first.u
    one, other = (block.mlp.c_fc for block in model.transformer.h)
    other.u, other.v, other.bias = one.u, one.v, one.bias
    assert isinstance(model.lm_head, mk.LoDLinear)
    expected = tied(model)
    assert len(expected) >= 4
    for save in (hub_save, our_save):
        save(model, tmp_path / save.__name__)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / save.__name__)
        assert_same(model, again, batch)
        assert tied(again) == expected
        hub_save(again, tmp_path / "again")
        assert tied(mk.load_pretrained(tmp_path / "again")) == expected


def test_names_that_transformers_saves_under_older_ones(tmp_path):
    names = {r"^net\.": "model."}
    model, batch = small("llama")
    model.save_pretrained(tmp_path / "new")
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    old = {key.replace("model.", "net.", 1): value for key, value in tensors.items()}
    save_file(old, tmp_path / "new" / "model.safetensors", {"format": "pt"})
    kind = transformers.LlamaForCausalLM
    model = mixed(kind.from_pretrained(tmp_path / "new", key_mapping=names))
    first, second = (layer.mlp.down_proj for layer in model.model.layers)
    second.u = first.u
    mk.save_pretrained(model, tmp_path / "m")
    assert "net.layers.0.mlp.down_proj.u" in load_file(tmp_path / "m" / "model.safetensors")
    again = kind.from_pretrained(tmp_path / "m", key_mapping=names)
    assert_same(model, again, batch)
    assert tied(model) == tied(again) != []


def test_a_compiled_model_and_a_compiled_layer(tmp_path):
    model, batch = small("llama")
    mk.convert(model, rank=8)
    layers = model.model.layers
    layers[0].mlp.up_proj = torch.compile(layers[0].mlp.up_proj)
    mk.save_pretrained(torch.compile(model), tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    layers[0].mlp.up_proj = layers[0].mlp.up_proj._orig_mod
    for name in "ab":
        assert_same(model, mk.load_pretrained(tmp_path / name), batch)


def test_a_dense_model_and_a_model_around_one(tmp_path):
    model, batch = small("bert")
    mk.save_pretrained(model, tmp_path / "dense")
    assert_same(model, transformers.AutoModel.from_pretrained(tmp_path / "dense"), batch)
    assert "transformers_weights" not in (tmp_path / "dense" / "config.json").read_text()
    mixed(model)
    mk.save_pretrained(Wrapped(model), tmp_path / "around")
    names = sorted(path.name for path in (tmp_path / "around").iterdir())
    assert names == ["maestro.json", "model.safetensors"]
    around = Wrapped(small("bert")[0])
    again = mk.load_pretrained(tmp_path / "around", around)
    assert_same(model, again.inner, batch)


def test_memory_is_aligned_for_the_kernels(tmp_path):
    model, _ = small("bert")
    mk.save_pretrained(mk.convert(model, rank=3), tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    layers = [m for m in again.modules() if isinstance(m, mk.LoDLinear)]
    assert all(p.data_ptr() % 16 == 0 for layer in layers for p in layer.parameters())


def test_a_saved_pair_of_before_is_built_from_the_config_beside_it(tmp_path):
    model, batch = small("llama")
    mixed(model)
    mk.save_pretrained(Wrapped(model), tmp_path / "old")
    structure, tensors = saved_file.read(tmp_path / "old" / "model.safetensors")
    plain = json.loads(structure.replace('"inner.', '"'))
    with (tmp_path / "old" / "model.safetensors").open("wb") as file:
        saved_file.write(
            "test",
            file,
            {key.removeprefix("inner."): value for key, value in tensors.items()},
            json.dumps(plain),
        )
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "old")
    assert_same(model, mk.load_pretrained(tmp_path / "old"), batch)
