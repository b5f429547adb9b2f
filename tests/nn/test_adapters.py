"""PEFT on factorised models: LoRA runs, trains, is saved and loaded, merged and unmerged."""

import subprocess
import sys

import pytest
import torch
from hf_models import output, tiny
from torch import nn
from torch.testing import assert_close

import maestro_kernels as mk
from maestro_kernels.nn import merge_adapters

peft = pytest.importorskip("peft")
# PEFT asks transformers for what transformers will call otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

K, N, R, A = 20, 16, 8, 3


class Block(nn.Module):
    def __init__(self, dtype=torch.float64, **options):
        super().__init__()
        self.up = mk.LoDLinear(K, N, R, dtype=dtype, **options)
        self.down = nn.Linear(N, K, dtype=dtype)
        self.up.rank = 5

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Dense(nn.Module):
    """A block before it was factorised."""

    forward = Block.forward

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(K, N), nn.Linear(N, K)


def adapted(model=None, **options):
    """A block with LoRA on its factorised layer, whose B is no longer zero."""
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"r": A, "lora_alpha": 5, "target_modules": ["up"], **options})
    model = peft.get_peft_model(model or Block(), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return model.eval()


def lora(model):
    return model.get_submodule("base_model.model.up")


def by_hand(layer, x, factors=None):
    """Base and adapter in float64, as the papers have them."""
    base = layer.base_layer
    y = x @ base.v[: base.rank].T @ base.u[:, : base.rank].T + base.bias
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return y + layer.scaling["default"] * (x @ A.T @ B.T)


def x_like(model, rows=6):
    return torch.randn(rows, K, dtype=next(model.parameters()).dtype)


def state(base):
    return base.u.clone(), base.v.clone(), base.bias.clone(), base.rank, base.max_rank


def same(a, b):
    return all(
        torch.equal(s, t) if torch.is_tensor(s) else s == t for s, t in zip(a, b, strict=True)
    )


def test_lora_on_a_factorised_layer():
    model = adapted()
    layer, x = lora(model), x_like(model)
    assert isinstance(layer.base_layer, mk.LoDLinear)
    assert_close(layer(x), by_hand(layer, x))
    assert_close(model(x), model.base_model.model.down(torch.relu(by_hand(layer, x))))
    with model.disable_adapter():
        assert_close(layer(x), layer.base_layer(x))


def test_only_the_adapter_trains_and_its_gradients_are_right():
    model = adapted()
    layer, x = lora(model), x_like(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition("up.")[2] for name in trained} == {
        "lora_A.default.weight",
        "lora_B.default.weight",
    }
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    got = torch.autograd.grad(layer(x).square().sum(), factors)
    expected = torch.autograd.grad(by_hand(layer, x).square().sum(), factors)
    for g, e in zip(got, expected, strict=True):
        assert_close(g, e)


def test_one_call_adds_the_adapter(monkeypatch):
    from maestro_kernels.nn import lora as module

    calls = []

    def watched(*args, **kwargs):
        calls.append(kwargs)
        return mk.lod_linear(*args, **kwargs)

    monkeypatch.setattr(module, "lod_linear", watched)
    model = adapted()
    layer, x = lora(model), x_like(model)
    assert_close(layer(x), by_hand(layer, x))
    (call,) = calls
    assert_close(call["residual"], layer.base_layer(x))
    assert call["scale"] == 5 / 3


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_has_float32_adapters(autocast):
    layer = lora(adapted(Block(torch.bfloat16)))
    x = x_like(layer.base_layer)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (A.dtype, B.dtype) == (torch.float32, torch.float32)
    delta = layer.scaling["default"] * (x.float() @ A.T @ B.T)
    expected = (layer.base_layer(x).float() + delta).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    # In float32 one rounding at the end, under autocast those of bfloat16.
    assert_close(y, expected, rtol=5e-2 if autocast else 8e-3, atol=5e-2 if autocast else 1e-6)


def test_dropout_bias_and_two_adapters():
    model = adapted(lora_dropout=0.5, lora_bias=True)
    layer, x = lora(model), x_like(model)
    bias = layer.lora_B["default"].bias
    nn.init.normal_(bias)
    assert_close(layer(x), by_hand(layer, x) + layer.scaling["default"] * bias)
    model.train()
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    delta = layer.lora_B["default"](layer.lora_A["default"](dropped)) * layer.scaling["default"]
    assert_close(layer(x), layer.base_layer(x) + delta)
    model.eval()
    first = layer(x)
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["up"]))
    nn.init.normal_(layer.lora_B["other"].weight)
    second = layer.lora_B["other"](layer.lora_A["other"](x)) * 1.5
    model.base_model.set_adapter(["default", "other"])
    assert_close(layer(x), first + second)
    mixed = layer(x, adapter_names=["default"] * 3 + ["other"] * 3)
    assert_close(mixed[:3], first[:3])
    assert_close(mixed[3:], layer.base_layer(x)[3:] + second[3:])


def test_packed_and_grouped_layers_serve_as_bases():
    model, ids = tiny("bert")
    mk.convert(model, 0.5)
    config = peft.LoraConfig(target_modules=["query", "key", "value"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    expected = output(model, ids)
    mk.prepack(mk.group(model))
    assert_close(output(model, ids), expected, rtol=1e-4, atol=1e-5)


def test_a_converted_conv1d_is_a_linear_layer():
    model, ids = tiny("gpt2")
    mk.convert(model, 0.5)
    config = peft.LoraConfig(
        target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
    )
    model = peft.get_peft_model(model, config).eval()
    expected = output(model, ids)
    assert_close(output(model.merge_and_unload(), ids), expected, rtol=1e-4, atol=1e-5)


def test_all_linear_means_ours_too():
    model, _ = tiny("llama")
    mk.convert(model, 0.5, exclude="*.q_proj")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    found = {name for name, m in model.named_modules() if hasattr(m, "lora_A")}
    kinds = {name.rpartition(".")[2] for name in found}
    projections = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    # The head is left out, as PEFT does, factorised or not.
    assert kinds == projections
    assert len(found) == 2 * 7


def test_adapters_are_saved_and_loaded(tmp_path):
    model, ids = tiny("llama")
    mk.convert(model, 0.5)
    mk.save_pretrained(model, tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    expected = output(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    base = mk.load_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(output(again, ids), expected)
    # What transformers itself calls.
    base = mk.load_pretrained(tmp_path / "base")
    base.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(output(base, ids), expected)


# --- merging --------------------------------------------------------------------------------------


def test_merging_puts_the_adapter_in_front_and_unmerging_is_exact():
    model = adapted()
    layer, x = lora(model), x_like(model)
    base, expected = layer.base_layer, layer(x)
    before = state(base)
    layer.merge()
    A_, B_ = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (base.rank, base.max_rank) == (5 + A, R + A)
    assert torch.equal(base.v, torch.cat((A_, before[1])))
    assert torch.equal(base.u[:, A:], before[0])
    assert_close(base.u[:, :A], B_ * layer.scaling["default"])
    assert_close(layer(x), expected)
    # Components beyond the active rank are still there, and still beyond it.
    layer.unmerge()
    assert same(state(base), before)
    assert_close(layer(x), expected)
    # In memory of their own size.
    for factor in (base.u, base.v):
        assert factor.is_contiguous()
        assert factor.untyped_storage().nbytes() == factor.nbytes


def test_two_adapters_with_a_bias_come_off_in_any_case():
    model = adapted(Block(torch.bfloat16), lora_bias=True)
    layer = lora(model)
    nn.init.normal_(layer.lora_B["default"].bias)
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["up"]))
    nn.init.normal_(layer.lora_B["other"].weight)
    base, x = layer.base_layer, x_like(layer.base_layer)
    before, alone = state(base), base(x)
    model.base_model.set_adapter(["default", "other"])
    expected = layer(x)
    model.merge_adapter()
    assert base.rank == 5 + A + 2
    assert_close(layer(x), expected, rtol=2e-2, atol=2e-2)
    # PEFT unmerges where adapters are switched off.
    with model.disable_adapter():
        assert torch.equal(layer(x), alone)
    assert same(state(base), before)


def test_merge_and_unload_gives_a_factorised_model(tmp_path):
    model = adapted()
    x = x_like(model)
    expected = model(x)
    plain = model.merge_and_unload()
    assert type(plain) is Block
    assert mk.ranks(plain)["up"] == 5 + A
    assert_close(plain(x), expected)
    mk.save_pretrained(plain, tmp_path / "merged")
    again = mk.load_pretrained(tmp_path / "merged", Dense())
    assert torch.equal(again(x), plain(x))


def test_svd_rounds_back_to_the_rank_of_before():
    model = adapted()
    x, layer = x_like(model), lora(model)
    y, base = layer(x), layer.base_layer
    product = layer.get_delta_weight("default") + base.weight
    plain = merge_adapters(model, method="svd")
    assert plain.up is base
    assert (base.rank, base.max_rank) == (5, R)
    u, s, v = torch.linalg.svd(product)
    assert_close(base.weight + 0, (u[:, :5] * s[:5]) @ v[:5])
    # The components beyond it make the rest: rank 5 + 3 is all there is.
    base.rank = R
    assert_close(base(x), y)


def test_merge_adapters_by_columns_is_merge_and_unload():
    model = adapted()
    x = x_like(model)
    expected = model(x)
    plain = merge_adapters(model)
    assert_close(plain(x), expected)
    assert plain.up.rank == 5 + A


def test_what_was_rounded_cannot_be_taken_off():
    layer = lora(adapted())
    layer.merge_method = "svd"
    layer.merge()
    before = state(layer.base_layer)
    with pytest.raises(NotImplementedError, match=r'LoRA\.unmerge: merge_method: .*, got "svd"'):
        layer.unmerge()
    assert same(state(layer.base_layer), before)


def test_a_rank_that_does_not_fit():
    model = adapted(r=N)
    layer = lora(model)
    before = state(layer.base_layer)
    with pytest.raises(
        ValueError, match=r"LoRA\.merge: adapter_names: .* min\(N, K\) = 16 .*got 24"
    ):
        merge_adapters(model)
    assert same(state(layer.base_layer), before)
    assert not layer.merged
    assert merge_adapters(model, method="svd").up.max_rank == R


def test_a_safe_merge_looks_for_nan():
    layer = lora(adapted())
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = float("nan")
    before = state(layer.base_layer)
    with pytest.raises(ValueError, match=r"LoRA\.merge: adapter_names: expected finite weights"):
        layer.merge(safe_merge=True)
    assert same(state(layer.base_layer), before)


# --- what does not fit ----------------------------------------------------------------------------


def test_variants_that_need_the_matrix_are_refused():
    with pytest.raises(NotImplementedError, match=r"LoRA: config: expected plain LoRA on a LoDLin"):
        adapted(use_dora=True)
    with pytest.raises(NotImplementedError, match=r"LoRA: init_lora_weights: .*, got 'olora'"):
        adapted(init_lora_weights="olora")
    with pytest.raises(NotImplementedError, match=r"LoRA: base_layer: .* activation .*'relu'"):
        adapted(Block(activation="relu"))


def test_wrong_arguments_of_merge_adapters():
    with pytest.raises(TypeError, match=r"merge_adapters: model: expected an nn\.Module, got str"):
        merge_adapters("model")
    with pytest.raises(ValueError, match=r"merge_adapters: method: expected one of .*, got 'qr'"):
        merge_adapters(adapted(), method="qr")
    with pytest.raises(
        ValueError, match=r"merge_adapters: model: expected a model of peft's .*Block"
    ):
        merge_adapters(Block())


def test_svd_wants_adapters_that_are_not_merged():
    model = adapted()
    model.merge_adapter()
    before = state(lora(model).base_layer)
    with pytest.raises(
        ValueError, match=r"merge_adapters: model: expected .* got default: unmerge"
    ):
        merge_adapters(model, method="svd")
    assert same(state(lora(model).base_layer), before)
    model.unmerge_adapter()
    assert merge_adapters(model, method="svd").up.rank == 5


def test_a_lowered_model_keeps_its_adapters_but_cannot_merge():
    model = adapted()
    x = x_like(model)
    expected = model(x)
    mk.nn.lower(model)
    assert_close(model(x), expected)
    with pytest.raises(NotImplementedError, match=r"LoRA\.merge: base_layer: .*before the"):
        model.merge_and_unload()


def test_what_was_merged_and_lowered_stays_merged():
    model = adapted()
    model.merge_adapter()
    x = x_like(model)
    expected = model(x)
    mk.nn.lower(model)
    assert_close(model(x), expected)
    with pytest.raises(NotImplementedError, match=r"LoRA\.unmerge: base_layer: .* got Sequential"):
        model.unmerge_adapter()


@pytest.mark.parametrize(
    "lines",
    [
        "import peft\nconfig = peft.LoraConfig(target_modules=['0'])\nimport maestro_kernels as mk",
        "import maestro_kernels as mk\nimport sys\nassert 'peft' not in sys.modules\nimport peft\n"
        "config = peft.LoraConfig(target_modules=['0'])",
    ],
    ids=["peft first", "peft later"],
)
def test_either_may_be_imported_first(lines):
    code = f"{lines}\nimport torch\nmodel = torch.nn.Sequential(mk.LoDLinear(8, 8, 2))\n"
    code += "print(type(peft.get_peft_model(model, config).base_model.model[0]).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "LoraLoDLinear"
    assert "Unsupported layer type" not in done.stderr
