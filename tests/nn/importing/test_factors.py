"""import_factors: factors in other people's formats, written here by a few lines of their own."""

import copy
import json

import pytest
import torch
from hub_models import small
from safetensors.torch import save_file
from torch import nn

import maestro_kernels as mk
from maestro_kernels.testing import assert_accurate

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def pair(linear, rank):
    """Two linear layers in sequence with a random product of this rank, as sizes of `linear`."""
    first = nn.Linear(linear.in_features, rank, bias=False)
    second = nn.Linear(rank, linear.out_features, bias=linear.bias is not None)
    return nn.Sequential(first, second)


def llama(**options):
    """A dense Llama, and one with pairs in the place of its projections."""
    dense, batch = small("llama", **options)
    torch.manual_seed(1)
    dense.model.layers[0].self_attn.q_proj.weight.data.mul_(1.5)
    other = copy.deepcopy(dense)
    for layer in other.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name in PROJECTIONS:
                if hasattr(parent, name) and not (
                    name == "o_proj" and layer is other.model.layers[0]
                ):
                    setattr(parent, name, pair(getattr(parent, name), 11))
    return dense, other.eval(), batch


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def assert_same_function(model, other, batch):
    """Ours is as near to float64 as theirs."""
    exact = logits(copy.deepcopy(other).double(), batch)
    assert_accurate("logits", logits(model, batch), logits(other, batch), exact)


def assert_round_trip(model, folder, batch):
    mk.save_pretrained(model, folder)
    again = mk.load_pretrained(folder)
    assert torch.equal(logits(again, batch), logits(model, batch))


def renamed(state, name_of):
    """A state dict of Sequential pairs under other names: name_of(layer, "u" or "v")."""
    found = {}
    for key, value in state.items():
        layer, _, rest = key.rpartition(".weight")[0].rpartition(".")
        is_pair = layer.rpartition(".")[2] in PROJECTIONS and rest in "01"
        found[name_of(layer, "vu"[int(rest)]) if is_pair else key] = value.clone()
    return found


def svd_llm(layer, part):
    return f"{layer.removesuffix('_proj')}_{part}_proj.weight"


def asvd(layer, part):
    return f"{layer}.{'ALinear' if part == 'u' else 'BLinear'}.weight"


def plain_ab(layer, part):
    return f"{layer}.{'B' if part == 'u' else 'A'}"


def write(folder, state, config, architecture):
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    text = {**config.to_dict(), "architectures": [architecture], "auto_map": {"AutoConfig": "x.Y"}}
    (folder / "config.json").write_text(json.dumps(text, default=str))


@pytest.mark.parametrize("name", ["svd_llm", "asvd", "sequential"])
@pytest.mark.parametrize("kind", ["folder", "state", "torch"])
def test_pairs_in_files(tmp_path, name, kind):
    dense, other, batch = llama()
    naming = {"svd_llm": svd_llm, "asvd": asvd}.get(name)
    state = other.state_dict() if naming is None else renamed(other.state_dict(), naming)
    if kind == "folder":
        write(tmp_path / "theirs", state, dense.config, f"ASVD{type(dense).__name__}")
        model = mk.import_factors(tmp_path / "theirs", format=name)
        assert not model.training
    elif kind == "torch":
        torch.save(state, tmp_path / "theirs.pt")
        model = mk.import_factors(tmp_path / "theirs.pt", dense, format=name)
        assert model is dense
    else:
        model = mk.import_factors(state, dense, format=name)
    assert len(mk.ranks(model)) - list(mk.ranks(model).values()).count("dense") == 13
    assert isinstance(model.model.layers[0].self_attn.o_proj, nn.Linear)
    assert_same_function(model, other, batch)
    assert_round_trip(model, tmp_path / "ours", batch)


def test_buffers_that_models_compute_by_themselves_are_passed_over():
    dense, other, batch = llama()
    state = renamed(other.state_dict(), svd_llm)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    assert_same_function(mk.import_factors(state, dense, format="svd_llm"), other, batch)


def test_a_pattern_of_names(tmp_path):
    dense, other, batch = llama()
    state = renamed(other.state_dict(), plain_ab)
    save_file(state, tmp_path / "ab.safetensors")
    model = mk.import_factors(
        tmp_path / "ab.safetensors", dense, format="pattern", pattern=("{name}.B", "{name}.A")
    )
    assert_same_function(model, other, batch)
    # Factors alone, and a bias: everything else stays.
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6))
    kept = copy.deepcopy(plain[2])
    u, v, b = torch.randn(20, 3), torch.randn(3, 12), torch.randn(20)
    made = mk.import_factors(
        {"left/0": u, "right/0": v, "0.bias": b},
        plain,
        format="pattern",
        pattern=("left/{name}", "right/{name}"),
    )
    x = torch.randn(5, 12)
    ours = made(x)
    theirs = kept(torch.tanh(x @ v.T @ u.T + b))
    exact = copy.deepcopy(kept).double()(torch.tanh((x.double() @ v.double().T) @ u.double().T + b))
    assert_accurate("y", ours, theirs, exact)


def test_biases_between_the_factors_are_folded_and_weights_are_cast():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8, bias=False))
    theirs = nn.Sequential(
        nn.Sequential(nn.Linear(16, 5), nn.Linear(5, 24)),
        nn.GELU(),
        nn.Sequential(nn.Linear(24, 4), nn.Linear(4, 8, bias=False)),
    )
    x = torch.randn(7, 16)
    model = mk.import_factors(theirs.state_dict(), dense, format="sequential")
    exact = copy.deepcopy(theirs).double()(x.double())
    assert_accurate("y", model(x), theirs(x), exact)
    assert isinstance(model[0], mk.LoDLinear)
    assert model[2].bias is not None
    half = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)).to(torch.bfloat16)
    made = mk.import_factors(theirs.state_dict(), half, format="sequential")
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}


def test_a_pair_larger_than_its_product_becomes_dense():
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 8)), nn.ReLU())
    theirs.append(nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8)))
    x = torch.randn(5, 6)
    wanted, exact = theirs(x), copy.deepcopy(theirs).double()(x.double())
    model = mk.import_factors(theirs, format="sequential")
    assert mk.ranks(model) == {"0": "dense", "2": 2}
    assert_accurate("y", model(x), wanted, exact)


# --- models that have the factors ------------------------------------------------------------


class ASVDLinear(nn.Module):
    def __init__(self, pair):
        super().__init__()
        self.BLinear, self.ALinear = pair

    def forward(self, x):
        return self.ALinear(self.BLinear(x))


class SVDMLP(nn.Module):
    """As SVD-LLM writes it: linear layers beside each other, called in sequence."""

    def __init__(self, mlp):
        super().__init__()
        for name in ("gate", "up", "down"):
            first, second = getattr(mlp, f"{name}_proj")
            setattr(self, f"{name}_v_proj", first)
            setattr(self, f"{name}_u_proj", second)

    def forward(self, x):
        up = self.up_u_proj(self.up_v_proj(x))
        gate = self.gate_u_proj(self.gate_v_proj(x))
        return self.down_u_proj(self.down_v_proj(nn.functional.silu(gate) * up))


@pytest.mark.parametrize("name", ["svd_llm", "asvd", "sequential"])
def test_a_model_that_has_pairs_runs_them_fused(name):
    _, other, batch = llama()
    theirs = copy.deepcopy(other)
    for layer in theirs.model.layers:
        if name == "svd_llm":
            layer.mlp = SVDMLP(layer.mlp)
        elif name == "asvd":
            for key in ("gate_proj", "up_proj", "down_proj"):
                setattr(layer.mlp, key, ASVDLinear(getattr(layer.mlp, key)))
    model = mk.import_factors(theirs, format=name)
    assert model is theirs
    assert len(mk.nn.lod_layers(model)) == (13 if name == "sequential" else 6)
    assert not [n for n, _ in model.named_parameters() if "_v_proj" in n or "BLinear" in n]
    assert_same_function(model, other, batch)


def test_a_model_with_factors_is_saved_and_read_into_another(tmp_path):
    def theirs(seed):
        torch.manual_seed(seed)
        middle = ASVDLinear(pair(nn.Linear(12, 10), 3))
        return nn.Sequential(nn.Linear(8, 12), middle, nn.Linear(10, 4))

    model = mk.import_factors(theirs(0), format="asvd")
    mk.save_pretrained(model, tmp_path / "ours")
    again = mk.load_pretrained(tmp_path / "ours", mk.import_factors(theirs(1), format="asvd"))
    x = torch.randn(3, 8)
    assert torch.equal(again(x), model(x))


# --- shared bases ----------------------------------------------------------------------------


class Basis(nn.Linear):
    """As Basis Sharing has it; coefficients are linear layers, too."""

    def __init__(self, count, size):
        super().__init__(size, count, bias=False)


def shared(dense, groups, rank=9):
    """Their state dict, and the dense model with the products as weights, in float64."""
    exact = copy.deepcopy(dense).double()
    bases, state = {}, {k: v.clone() for k, v in dense.state_dict().items()}
    for name, value in dense.state_dict().items():
        leaf = name.split(".")[-2]
        if leaf not in PROJECTIONS or leaf == "o_proj":
            continue
        kind, layer = leaf.removesuffix("_proj"), int(name.split(".")[2])
        group = next(g for g in groups if layer in g)
        basis = bases.setdefault((kind, group[0]), Basis(rank, value.shape[1]).weight.data)
        coefficient = torch.randn(value.shape[0], rank) * 0.1
        state[name] = coefficient
        state[f"model.{kind}_basis.{layer}.weight"] = basis
        exact.state_dict()[name].copy_(coefficient.double() @ basis.double())
    return state, exact


@pytest.mark.parametrize("kind", ["every name", "one name"])
def test_shared_bases(tmp_path, kind):
    dense, _, batch = llama()
    state, exact = shared(dense, [[0, 1]])
    if kind == "one name":
        state = {k: v for k, v in state.items() if "_basis.1" not in k}
        for p in PROJECTIONS:
            setattr(dense.config, f"{p.removesuffix('_proj')}_groups", [[0, 1]])
        write(tmp_path / "theirs", state, dense.config, "ShareLlamaForCausalLM")
        model = mk.import_factors(tmp_path / "theirs", format="basis_sharing")
    else:
        model = mk.import_factors(state, dense, format="basis_sharing")
    layers = [layer.self_attn.q_proj for layer in model.model.layers]
    assert layers[0].v is layers[1].v
    assert layers[0].u is not layers[1].u
    assert isinstance(model.model.layers[0].self_attn.o_proj, nn.Linear)
    assert len(mk.nn.lod_layers(model)) == 12
    theirs = copy.deepcopy(exact).float()
    assert_accurate("logits", logits(model, batch), logits(theirs, batch), logits(exact, batch))
    mk.save_pretrained(model, tmp_path / "ours")
    again = mk.load_pretrained(tmp_path / "ours")
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert again.model.layers[0].mlp.up_proj.v is again.model.layers[1].mlp.up_proj.v


def test_shared_bases_of_gpt2():
    """Its dense weights are transposed, those of coefficients are not."""
    dense, batch = small("gpt2")
    exact, state = copy.deepcopy(dense).double(), dict(dense.state_dict())
    torch.manual_seed(1)
    for kind, leaf, K, N in (("attn", "attn.c_attn", 64, 192), ("down", "mlp.c_proj", 256, 64)):
        basis = torch.randn(7, K) * 0.1
        for layer in (0, 1):
            name = f"transformer.h.{layer}.{leaf}"
            state[f"{name}.weight"] = torch.randn(N, 7)
            state[f"transformer.{kind}_basis.{layer}.weight"] = basis
            product = state[f"{name}.weight"].double() @ basis.double()
            exact.get_submodule(name).weight.data.copy_(product.T)
    model = mk.import_factors(state, dense, format="basis_sharing")
    assert len(mk.nn.lod_layers(model)) == 4
    theirs = copy.deepcopy(exact).float()
    assert_accurate("logits", logits(model, batch), logits(theirs, batch), logits(exact, batch))


class Block(nn.Module):
    def __init__(self, bases):
        super().__init__()
        self.q_basis, self.o_basis = bases
        self.q_proj, self.out_proj = nn.Linear(5, 16), nn.Linear(5, 12)

    def forward(self, x):
        return self.out_proj(self.o_basis(self.q_proj(self.q_basis(x)).tanh()))


def test_a_model_with_shared_bases_runs_them_fused():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            bases = Basis(5, 12), Basis(5, 16)
            self.q_basis, self.o_basis = (nn.ModuleDict({"0": b, "1": b}) for b in bases)
            self.layers = nn.ModuleList([Block(bases), Block(bases)])

        def forward(self, x):
            return self.layers[1](self.layers[0](x))

    theirs, x = Model(), torch.randn(4, 12)
    wanted, exact = theirs(x), copy.deepcopy(theirs).double()(x.double())
    model = mk.import_factors(theirs, format="basis_sharing")
    assert len(mk.nn.lod_layers(model)) == 4
    assert model.layers[0].q_proj.v is model.layers[1].q_proj.v
    assert_accurate("y", model(x), wanted, exact)


# --- what does not fit -----------------------------------------------------------------------


def fails(match, *args, kind=ValueError, **options):
    models = [a for a in args if isinstance(a, nn.Module) and not next(a.parameters()).is_meta]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    with pytest.raises(kind, match=match):
        mk.import_factors(*args, **options)
    for state, model in zip(before, models, strict=True):
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_what_does_not_fit_is_named():
    dense, other, _ = llama()
    state = other.state_dict()
    key = "model.layers.1.mlp.up_proj"

    def changed(**values):
        made = {**state, **{k.replace("__", "."): v for k, v in values.items()}}
        return {k: v for k, v in made.items() if v is not None}

    fails("format: expected one of 'svd_llm', .*, got 'gptq'", state, dense, format="gptq")
    fails("adapter: expected 'merge' for format 'asvd'", state, dense, format="asvd",
          adapter="beside")  # fmt: skip
    fails("source: expected a path, got int", 3, dense, format="asvd", kind=TypeError)
    fails("dense_model: expected an nn.Module, got str", state, "x", format="asvd", kind=TypeError)
    fails(r"expected factors such as 'model.layers.0.self_attn.q_u_proj' .* got none, but '",
          state, dense, format="svd_llm")  # fmt: skip
    fails(f"both factors of '{key}', got '{key}.1.weight' without '{key}.0'",
          changed(**{f"{key}.0.weight": None}), dense, format="sequential")  # fmt: skip
    fails(rf"u \(N, R\) and v \(R, K\) of '{key}', got u \(128, 11\) and v \(10, 64\)",
          changed(**{f"{key}.0.weight": torch.randn(10, 64)}), dense,
          format="sequential")  # fmt: skip
    fails(rf"factors of '{key}' for a weight \(128, 64\), got u \(96, 11\)",
          changed(**{f"{key}.1.weight": torch.randn(96, 11)}), dense,
          format="sequential")  # fmt: skip
    fails("in one floating dtype, got torch.float32 and torch.int8",
          changed(**{f"{key}.0.weight": torch.ones(11, 64, dtype=torch.int8)}), dense,
          format="sequential")  # fmt: skip
    fails(r"a bias \(11,\) between the factors .* got \(4,\)",
          changed(**{f"{key}.0.bias": torch.ones(4)}), dense, format="sequential")  # fmt: skip
    fails("modules 0, 2: an activation or the like lies between them",
          changed(**{f"{key}.1.weight": None, f"{key}.2.weight": torch.randn(128, 11)}), dense,
          format="sequential")  # fmt: skip
    fails("tensors that the LlamaForCausalLM has a place for, got 'model.extra'",
          changed(model__extra=torch.ones(3)), dense, format="sequential")  # fmt: skip
    fails(r"'model.norm.weight' of shape \(64,\), got \(3,\)",
          changed(model__norm__weight=torch.ones(3)), dense, format="sequential")  # fmt: skip
    fails("expected tensors by name, got int at 'epoch'", changed(epoch=3), dense,
          format="sequential")  # fmt: skip
    fails("dense_model: expected the ordinary model .* as a state dict has no config.json", state,
          format="sequential")  # fmt: skip
    tied = copy.deepcopy(dense)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    fails("layer 'lm_head' that can be factorised, but its weight is tied",
          {"lm_head.B": torch.randn(50, 3), "lm_head.A": torch.randn(3, 64)}, tied,
          format="pattern", pattern=("{name}.B", "{name}.A"))  # fmt: skip
    for wrong in (("B", "A"), ("{name}.A", "{name}.A"), "{name}.A", ("{name}.A",)):
        fails("pattern: expected two names", state, dense, format="pattern", pattern=wrong)
    fails("pattern: expected patterns for format 'pattern', got None", state, dense,
          format="pattern")  # fmt: skip
    fails("pattern: expected None for format 'asvd'", state, dense, format="asvd",
          pattern=("{name}.B", "{name}.A"))  # fmt: skip
    fails("values, got 'model.layers.0.self_attn.q_proj' on the meta device", state,
          dense.to("meta"), format="sequential")  # fmt: skip


def test_models_whose_pairs_are_none_are_refused():
    between = nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 8))
    fails("in pairs, got none in the model: Linear, ReLU, Linear", between, format="sequential")

    class Residual(ASVDLinear):
        def __init__(self):
            super().__init__(pair(nn.Linear(8, 8), 2))
            self.weight_residual = nn.Parameter(torch.zeros(8, 8))

    fails("nothing else in '0', got .* weight_residual", nn.Sequential(Residual()), format="asvd")
    alone = nn.ModuleDict({"q_u_proj": nn.Linear(3, 8), "q_proj": nn.Linear(8, 8)})
    fails("'q_u_proj' without a linear layer 'q_v_proj'", alone, format="svd_llm")


def test_folders_and_files_that_do_not_fit_are_named(tmp_path):
    dense, other, _ = llama()
    state = other.state_dict()
    fails("expected a folder with model.safetensors", tmp_path, dense, format="sequential")
    fails("got nothing at", tmp_path / "no.pt", dense, format="sequential")
    torch.save(other, tmp_path / "model.pt")
    fails("which pickles other objects; load it where their classes are", tmp_path / "model.pt",
          dense, format="sequential")  # fmt: skip
    folder = tmp_path / "theirs"
    write(folder, state, dense.config, "ASVDLlamaForNobody")
    fails("perhaps with a prefix, got 'ASVDLlamaForNobody'", folder, format="sequential")
    less = {k: v for k, v in state.items() if k != "model.norm.weight"}
    write(folder, less, dense.config, "LlamaForCausalLM")
    fails("every tensor of a LlamaForCausalLM, got none for 'model.norm.weight'", folder,
          format="sequential")  # fmt: skip
    # What the model has it keeps.
    mk.import_factors(folder, copy.deepcopy(dense), format="sequential")
    (folder / "model.safetensors").write_bytes(b"\x00" * 40)
    fails("a damaged one", folder, dense, format="sequential")
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fails("got none for 'b'", folder, dense, format="sequential")
