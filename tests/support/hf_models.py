"""Tiny randomly initialised models of real architectures, for the model-level tests."""

import torch


def tiny(kind):
    """A model in eval mode and a batch of token ids for it."""
    import transformers as hf

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 50}
    if kind == "bert":
        model = hf.BertModel(hf.BertConfig(**sizes, intermediate_size=128))
    elif kind == "llama":
        config = hf.LlamaConfig(**sizes, intermediate_size=128, num_key_value_heads=2)
        model = hf.LlamaForCausalLM(config)
    elif kind == "qwen3":
        config = hf.Qwen3Config(
            **sizes, intermediate_size=128, num_key_value_heads=2, head_dim=16, pad_token_id=None
        )
        model = hf.Qwen3ForCausalLM(config)
    elif kind == "gpt2":
        config = hf.GPT2Config(n_embd=64, n_head=4, n_layer=2, vocab_size=50, n_positions=32)
        model = hf.GPT2LMHeadModel(config)
    elif kind == "t5":
        config = hf.T5Config(
            d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=50
        )
        model = hf.T5EncoderModel(config)
    else:
        raise ValueError(kind)
    return model.eval(), torch.arange(24).reshape(2, 12)


def output(model, ids):
    """The first tensor a model returns."""
    with torch.no_grad():
        return model(input_ids=ids)[0]
