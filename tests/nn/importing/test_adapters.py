"""import_factors(format="peft"): LoRA adapters that PEFT saved, merged or kept beside the layer."""

import copy
import json

import pytest
import torch
from hub_models import small
from safetensors.torch import load_file, save_file
from torch import nn

import maestro_kernels as mk
from maestro_kernels.testing import assert_accurate, rounding_errors

# Of PEFT's own use of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def outputs(model, batch):
    with torch.no_grad():
        return model(**batch)[0]


def trained(kind, folder, **options):
    """A model, and PEFT's own with an adapter that is not zero, saved into a folder."""
    peft = pytest.importorskip("peft")
    dense, batch = small(kind)
    torch.manual_seed(2)
    targets = ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": targets, "lora_dropout": 0.1, **options}
    )
    theirs = peft.get_peft_model(copy.deepcopy(dense), config)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(folder)
    return dense, theirs.eval(), batch


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 9}},
}


@pytest.mark.parametrize("adapter", ["merge", "beside"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_of_llama(tmp_path, adapter, variant):
    dense, theirs, batch = trained("llama", tmp_path, **VARIANTS[variant])
    before = outputs(dense, batch)
    model = mk.import_factors(tmp_path, dense, format="peft", adapter=adapter)
    assert model is dense
    wanted, exact = outputs(theirs, batch), outputs(copy.deepcopy(theirs).double(), batch)
    assert (wanted - before).abs().max() > 100 * (wanted - exact).abs().max()
    assert_accurate("logits", outputs(model, batch), wanted, exact)
    assert len(mk.nn.lod_layers(model)) == (6 if adapter == "beside" else 0)
    if adapter == "merge":
        mk.save_pretrained(model, tmp_path / "ours")
        assert torch.equal(
            outputs(mk.load_pretrained(tmp_path / "ours"), batch), outputs(model, batch)
        )
    else:
        with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.q_proj' with an ada"):
            mk.save_pretrained(model, tmp_path / "ours")
        assert not (tmp_path / "ours" / "config.json").exists()


def test_a_transposed_weight(tmp_path):
    dense, theirs, batch = trained("gpt2", tmp_path, fan_in_fan_out=True)
    twin = copy.deepcopy(dense)
    wanted, exact = outputs(theirs, batch), outputs(copy.deepcopy(theirs).double(), batch)
    for adapter, model in (("merge", dense), ("beside", twin)):
        made = mk.import_factors(tmp_path, model, format="peft", adapter=adapter)
        assert_accurate(adapter, outputs(made, batch), wanted, exact)


def write(folder, names, K, N, **options):
    """An adapter of a few lines, for modules of the same sizes."""
    torch.manual_seed(4)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, **options}
    tensors = {}
    for name in names:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(3, K)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(N, 3)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def test_on_a_factorised_base_the_adapter_comes_first_and_ranks_grow(tmp_path):
    torch.manual_seed(0)
    model = mk.convert(nn.Sequential(nn.Linear(24, 20)), rank=6)
    model[0].rank = 5
    tensors = write(tmp_path, ["0"], 24, 20)
    a, b = (tensors[f"base_model.model.0.lora_{part}.weight"] for part in "AB")
    x = torch.randn(5, 24)

    def wanted(layer, dtype):
        base, rows = copy.deepcopy(layer).to(dtype), x.to(dtype)
        return base(rows) + 2 * (rows @ a.to(dtype).T @ b.to(dtype).T)

    theirs, exact = wanted(model[0], torch.float32), wanted(model[0], torch.float64)
    beside = mk.import_factors(tmp_path, copy.deepcopy(model), format="peft", adapter="beside")
    merged = mk.import_factors(tmp_path, model, format="peft")
    assert mk.ranks(merged) == {"0": 8}
    assert torch.equal(merged[0].v[:3], a)
    # The two products are one here: three roundings less than theirs, and other sums.
    layer = merged[0]
    rounding = rounding_errors(x, layer.u, layer.v, bias=layer.bias)["y"]
    assert_accurate("merged", merged(x), theirs, exact, rounding)
    assert_accurate("beside", beside(x), theirs, exact, rounding)
    mk.save_pretrained(beside, tmp_path / "ours")
    fresh = mk.convert(nn.Sequential(nn.Linear(24, 20)), rank=6)
    fresh = mk.import_factors(tmp_path, fresh, format="peft", adapter="beside")
    assert torch.equal(mk.load_pretrained(tmp_path / "ours", fresh)(x), beside(x))


def test_gradients_reach_the_base_and_the_factors(tmp_path):
    write(tmp_path, ["0"], 24, 20)
    model = mk.import_factors(tmp_path, nn.Sequential(nn.Linear(24, 20)), format="peft",
                              adapter="beside")  # fmt: skip
    model(torch.randn(5, 24)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_what_does_not_fit_is_named(tmp_path):
    model = nn.Sequential(nn.Linear(24, 20), nn.LayerNorm(20))
    before = copy.deepcopy(model.state_dict())

    def fails(match, kind=ValueError, source=tmp_path, into=model, **options):
        with pytest.raises(kind, match=match):
            mk.import_factors(source, into, format="peft", **options)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    fails("expected a folder with model.safetensors")
    tensors = write(tmp_path, ["0"], 24, 20)
    fails("adapter: expected 'merge' or 'beside', got 'fold'", adapter="fold")
    fails("dense_model: expected the model that the adapter was trained for", into=None)
    fails("its merge_and_unload", source=nn.Linear(2, 2))
    write(tmp_path, ["0"], 24, 20, peft_type="LOHA")
    fails("peft_type 'LORA', got 'LOHA'")
    write(tmp_path, ["0"], 24, 20, use_dora=True)
    fails("got one with use_dora", NotImplementedError)
    write(tmp_path, ["0"], 24, 20, init_lora_weights="pissa_niter_4")
    fails("leaves the base as it was, got .* 'pissa_niter_4'", NotImplementedError)
    write(tmp_path, ["0"], 24, 20, r=8)
    fails("the rank 8 of adapter_config.json in '0', got 3")
    write(tmp_path, ["2"], 24, 20)
    fails("expected a linear layer '2', got none")
    write(tmp_path, ["1"], 24, 20)
    fails("expected a linear layer '1', got LayerNorm")
    write(tmp_path, ["0"], 12, 20)
    fails(r"lora_A \(R, 24\) and lora_B \(20, R\) of '0', got \(3, 12\) and \(20, 3\)")
    write(tmp_path, ["0"], 24, 20)
    file = tmp_path / "adapter_model.safetensors"
    (key, value), other = next(iter(tensors.items())), {"0.lora_magnitude_vector": torch.ones(3)}
    save_file({key: value}, file)
    fails("lora_A and lora_B of '0', got lora_. alone")
    save_file({**tensors, **other}, file)
    fails("tensors lora_A and lora_B of linear layers, got '0.lora_magn", NotImplementedError)
    save_file({}, file)
    fails("expected tensors lora_A and lora_B, got none")
    save_file(tensors, file)
    assert load_file(file).keys() == tensors.keys()
    full = mk.convert(nn.Sequential(nn.Linear(24, 20)), rank=None, allow_larger=True)
    fails("at most 20 components in '0', got 20 and 3 of the adapter; use 'beside'", into=full)
    tied = nn.Sequential(nn.Embedding(20, 24), nn.Linear(24, 20))
    tied[1].weight = tied[0].weight
    write(tmp_path, ["1"], 24, 20)
    fails("'1' to merge an adapter into, but its weight is tied to 0.weight; use", into=tied)
    write(tmp_path, ["0"], 24, 20)
    active = nn.Sequential(mk.LoDLinear(24, 20, 4, activation="relu"))
    fails("expected 'beside' for '0', whose activation 'relu' comes before", into=active)
