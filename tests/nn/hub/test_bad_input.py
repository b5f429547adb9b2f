"""Folders of transformers models that are not one save: each gets an error that says which."""

import json
import re
import shutil
import sys

import pytest
import transformers
from hub_models import mixed, outputs, small
from safetensors import safe_open
from safetensors.torch import save_file

import maestro_kernels as mk
from maestro_kernels.nn.hub import registration

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    """Two saves of one model, in shards: the second after a change."""
    folder = tmp_path_factory.mktemp("saves")
    model, _ = small("llama")
    mixed(model)
    for name in ("a", "b"):
        mk.save_pretrained(model, folder / name, max_shard_size="60KB")
        mk.set_ranks(model, {next(iter(mk.ranks(model))): 3})
    mk.save_pretrained(model, folder / "one")
    return folder


@pytest.fixture
def folders(saves, tmp_path):
    shutil.copytree(saves, tmp_path / "saves")
    return tmp_path / "saves"


def shard(folder, number=2):
    return sorted(folder.glob("model-*.safetensors"))[number - 1]


def edit(path, change):
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def rewritten(path, change):
    """Write a file of tensors again, with its header, as a tool that knows nothing of us would."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def flipped(folder):
    path = shard(folder)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def cut_off(folder):
    path = shard(folder)
    path.write_bytes(path.read_bytes()[:-10])


def not_a_header(folder):
    shard(folder).write_bytes(b"\xff" * 100)


def missing(folder):
    shard(folder).unlink()


def left_out(folder):
    gone = shard(folder).name

    def change(index):
        weights = index["weight_map"]
        index["weight_map"] = {key: name for key, name in weights.items() if name != gone}

    edit(folder / INDEX, change)


def of_another_save(folder):
    shutil.copy(shard(folder.parent / "b"), shard(folder))


def all_of_another_save(folder):
    for path in folder.glob("model*"):
        path.unlink()
    for path in (folder.parent / "b").glob("model*"):
        shutil.copy(path, folder)
    edit(folder / "config.json", lambda config: config.update(rms_norm_eps=0.5))


def without_header(folder):
    rewritten(shard(folder), lambda tensors, metadata: metadata.clear() or metadata.update(a="b"))


def other_ranks_in_the_config(folder):
    def change(config):
        layers = config["quantization_config"]["layers"]
        name = "model.layers.0.self_attn.q_proj"
        layers[name]["rank"] = 1

    edit(folder / "config.json", change)


def other_version(folder):
    edit(folder / "config.json", lambda c: c["quantization_config"].update(version=99))


def no_layers(folder):
    edit(folder / "config.json", lambda c: c["quantization_config"].pop("layers"))


def odd_names(folder):
    edit(folder / "config.json", lambda c: c["quantization_config"].update(stored=[]))


def unknown_architecture(folder):
    edit(folder / "config.json", lambda c: c.update(architectures=["OurOwnModel"]))


def no_architecture(folder):
    edit(folder / "config.json", lambda c: c.pop("architectures"))


def no_config(folder):
    (folder / "config.json").unlink()


def half_a_config(folder):
    path = folder / "config.json"
    path.write_text(path.read_text()[:-20])


WRONG = {
    flipped: "model-00002-of-{n}.safetensors: expected a whole safetensors file, got a damaged one "
    "(content that does not match its digest)",
    cut_off: "model-00002-of-{n}.safetensors: expected a whole safetensors file, got a damaged one",
    not_a_header: "model-00002-of-{n}.safetensors: expected a whole safetensors file, got a dam",
    missing: "model-00002-of-{n}.safetensors: expected the file that model.safetensors.index.json "
    "names, got no such file",
    left_out: "a: expected ",
    of_another_save: "model-00002-of-{n}.safetensors: expected a file of the save of "
    "model-00001-of-{n}.safetensors, got one of another save",
    all_of_another_save: "config.json: expected the architecture of the tensors in ",
    without_header: "model-00002-of-{n}.safetensors: expected a file of the save of ",
    other_ranks_in_the_config: "config.json: expected 'model.layers.0.self_attn.q_proj' as in "
    "model-00001-of-{n}.safetensors, ",
    other_version: "config.json: expected format version 3, got 99; a newer maestro_kernels wrote",
    no_layers: "config.json: expected 'layers' to be a dict, got NoneType",
    odd_names: "config.json: expected names as 'stored', got []",
}
OURS = {
    unknown_architecture: "config.json: expected an architecture of transformers ",
    no_architecture: "config.json: expected the name of an architecture in ",
    no_config: "directory: expected a folder with model.safetensors, got ",
    half_a_config: "directory: expected a folder with model.safetensors, got ",
}


@pytest.mark.parametrize("damage", [*WRONG, *OURS], ids=lambda damage: damage.__name__)
def test_one_error_that_names_what_is_wrong(damage, folders):
    folder = folders / "a"
    number = len(list(folder.glob("model-*.safetensors")))
    damage(folder)
    message = {**WRONG, **OURS}[damage].replace("{n}", f"{number:05d}")
    with pytest.raises(ValueError, match="^" + re.escape(f"load_pretrained: {message}")):
        mk.load_pretrained(folder)
    if damage in WRONG:
        with pytest.raises(ValueError, match="^" + re.escape(f"from_pretrained: {message}")):
            transformers.AutoModelForCausalLM.from_pretrained(folder)


def dropped(tensors, metadata):
    metadata.clear()
    del tensors["model.layers.1.mlp.up_proj.u"]


def other_rank(tensors, metadata):
    metadata.clear()
    tensors["model.layers.1.mlp.up_proj.active_rank"] += 1


def other_size(tensors, metadata):
    metadata.clear()
    key = "model.layers.1.mlp.up_proj.u"
    tensors[key] = tensors[key][:, :-1].contiguous()


def other_rows(tensors, metadata):
    metadata.clear()
    key = "model.layers.1.mlp.up_proj.u"
    tensors[key] = tensors[key][:-1].contiguous()


def no_permutation(tensors, metadata):
    metadata.clear()
    (key,) = [key for key in tensors if key.endswith(".order")]
    tensors[key][0] = tensors[key][1]


DISAGREE = {
    dropped: "tensors: expected 'model.layers.1.mlp.up_proj.u', got no such tensor",
    other_rank: "tensors: expected the rank 21 of 'model.layers.1.mlp.up_proj' as its active_rank",
    other_size: "tensors: expected u of 'model.layers.1.mlp.up_proj' with shape (N, 21), got",
    other_rows: "config.json: expected a linear layer of 127 x 64 at 'model.layers.1.mlp.up_proj'",
    no_permutation: "tensors: expected a permutation of 0..127 in int32 as the order of ",
}


@pytest.mark.parametrize("change", DISAGREE, ids=lambda change: change.__name__)
def test_tensors_that_disagree_with_the_config(change, folders):
    """Files that another tool wrote again have no digest, so what they hold is looked at."""
    rewritten(folders / "one" / "model.safetensors", change)
    with pytest.raises(ValueError, match="^" + re.escape(f"load_pretrained: {DISAGREE[change]}")):
        mk.load_pretrained(folders / "one")


def test_files_that_another_tool_wrote_again_load(folders):
    rewritten(folders / "one" / "model.safetensors", lambda tensors, metadata: metadata.clear())
    assert mk.ranks(mk.load_pretrained(folders / "one"))


def test_the_config_of_a_save_before_serves_the_same_architecture(folders):
    """As after a save that was stopped when its tensors were there and its config.json was not."""
    shutil.copy(folders / "a" / "config.json", folders / "one" / "config.json")
    again = mk.load_pretrained(folders / "one")
    assert 3 in mk.ranks(again).values()


def test_a_model_of_another_size_and_of_another_kind(folders):
    other, _ = small("bert")
    with pytest.raises(ValueError, match="load_pretrained: "):
        mk.load_pretrained(folders / "one", other)
    config = transformers.AutoConfig.from_pretrained(folders / "one")
    config.num_hidden_layers = 1
    with pytest.raises(ValueError, match=r"config.json: expected a layer 'model.layers.1"):
        transformers.AutoModelForCausalLM.from_pretrained(folders / "one", config=config)


def test_a_model_is_needed_where_no_config_says_how_to_build_one(tmp_path):
    mk.save_pretrained(mk.LoDLinear(8, 8, 4), tmp_path)
    with pytest.raises(
        ValueError, match="load_pretrained: dense_model: expected a model to load in"
    ):
        mk.load_pretrained(tmp_path)


def test_tensors_without_their_config(folders):
    (folders / "one" / "config.json").unlink()
    model, _ = small("llama")
    for dense in (None, model):
        with pytest.raises(ValueError, match=r"config.json: expected the whole one .* got none"):
            mk.load_pretrained(folders / "one", dense)


def test_dense_weights_cannot_be_factorised_on_the_way(tmp_path):
    model, batch = small("bert")
    model.save_pretrained(tmp_path / "dense")
    mixed(model)
    mk.save_pretrained(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    with pytest.raises(ValueError, match="maestro_kernels does require the model to be pre-quant"):
        transformers.AutoModel.from_pretrained(
            tmp_path / "dense", quantization_config=registration.config_of(config)
        )
    with pytest.raises(NotImplementedError, match="from_pretrained: state_dict: expected a folder"):
        transformers.BertModel.from_pretrained(
            None,
            config=transformers.AutoConfig.from_pretrained(tmp_path / "m"),
            state_dict=model.state_dict(),
        )
    assert outputs(model, batch)


def test_transformers_too_old(folders, monkeypatch):
    model, _ = small("bert")
    mk.convert(model, rank=4)
    # transformers puts another module in its own place when it first loads a class.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    text = "transformers: expected version 5.0 or later, got 4.57.1"
    for call in (
        lambda: mk.save_pretrained(model, folders / "new"),
        lambda: model.save_pretrained(folders / "new"),
        lambda: mk.load_pretrained(folders / "one"),
    ):
        with pytest.raises(NotImplementedError, match=f"_pretrained: {text}"):
            call()
    assert not (folders / "new").exists()
    from transformers.quantizers import auto

    monkeypatch.setattr(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", {})
    registration._register()
    with pytest.raises(NotImplementedError, match=f"from_pretrained: {text}"):
        transformers.AutoModelForCausalLM.from_pretrained(folders / "one")
