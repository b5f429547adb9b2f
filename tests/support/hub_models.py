"""Factorised models of transformers' architectures, and what two of them must have in common."""

import torch
from hf_models import tiny
from torch import nn

import maestro_kernels as mk
from maestro_kernels.nn import PivotedLinear, groups


def small(kind, **options):
    """A model in eval mode, a function that runs it, by kind of architecture."""
    import transformers as hf

    if kind in ("bert", "llama", "qwen3", "gpt2", "t5"):
        model, ids = tiny(kind)
        return model, {"input_ids": ids}
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    if kind == "vit":
        config = hf.ViTConfig(**sizes, intermediate_size=128, image_size=32, patch_size=8)
        model = hf.ViTForImageClassification(config)
        return model.eval(), {"pixel_values": torch.randn(2, 3, 32, 32)}
    if kind == "classifier":
        config = hf.BertConfig(**sizes, intermediate_size=128, vocab_size=50, **options)
        model = hf.BertForSequenceClassification(config)
        return model.eval(), {"input_ids": torch.arange(24).reshape(2, 12)}
    if kind == "seq2seq":
        config = hf.T5Config(
            d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=50
        )
        ids = torch.arange(24).reshape(2, 12)
        model = hf.T5ForConditionalGeneration(config)
        return model.eval(), {"input_ids": ids, "decoder_input_ids": ids}
    if kind == "mixtral":
        config = hf.MixtralConfig(
            **sizes, intermediate_size=96, num_key_value_heads=2, vocab_size=50, num_local_experts=4
        )
        model = hf.MixtralForCausalLM(config)
        return model.eval(), {"input_ids": torch.arange(24).reshape(2, 12)}
    raise ValueError(kind)


def mixed(model):
    """Factorise a model so that everything a save has to keep is in it."""
    mk.convert(model, rank=0.5)
    names = [n for n, m in model.named_modules() if isinstance(m, mk.LoDLinear)]
    mk.set_ranks(model, {names[0]: 7, names[3]: 0, names[-1]: "dense"})
    layer = model.get_submodule(names[1])
    mk.truncate(layer)
    parent, _, key = names[4].rpartition(".")
    pivoted = PivotedLinear.from_lod(model.get_submodule(names[4]))
    setattr(model.get_submodule(parent), key, pivoted)
    mk.group(model)
    return model


def outputs(model, batch):
    with torch.no_grad():
        return [value for value in model(**batch).values() if isinstance(value, torch.Tensor)]


def assert_same(model, other, batch):
    """Two models are one, bit for bit."""
    state, again = model.state_dict(), other.state_dict()
    assert state.keys() == again.keys()
    for key, value in state.items():
        assert value.dtype == again[key].dtype, key
        assert torch.equal(value, again[key]), key
    assert mk.ranks(model) == mk.ranks(other)
    assert [len(g) for g in groups(model)] == [len(g) for g in groups(other)]
    kinds = [(n, type(m)) for n, m in model.named_modules()]
    assert kinds == [(n, type(m)) for n, m in other.named_modules()]
    for a, b in zip(outputs(model, batch), outputs(other, batch), strict=True):
        assert torch.equal(a, b)


def tied(model):
    """Which parameters are one, by name."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return sorted(sorted(same) for same in names.values() if len(same) > 1)


class Wrapped(nn.Module):
    """A model of the user's with one of transformers inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **batch):
        return self.inner(**batch)
