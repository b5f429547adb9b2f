"""Models through `maestro-kernels compress`: what is kept, how it is judged, what is written."""

import json

import pytest
import torch
import trained

import maestro_kernels as mk
from maestro_kernels.cli import main
from maestro_kernels.nn.serialization import load_pretrained


def compress(capsys, *words, status=0):
    """The record of one run."""
    capsys.readouterr()
    assert main(["compress", *map(str, words), "--json"]) == status, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_a_language_model_keeps_what_it_is(language, tmp_path, capsys):
    import transformers

    out = tmp_path / "small"
    text = language / "text.txt"
    record = compress(capsys, language, "--params", 0.6, "--data", text, "--out", out)
    judged = record["evaluation"]
    assert judged["measure"] == "perplexity"
    assert judged["passed"]
    assert judged["before"] < judged["after"] < 1.3 * judged["before"]
    assert judged["before"] < 40, "the model has learned nothing"
    small = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert small.dtype == torch.bfloat16
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert type(small.lm_head) is torch.nn.Linear
    dense = transformers.AutoModelForCausalLM.from_pretrained(language)
    assert torch.equal(small.lm_head.weight, dense.lm_head.weight)
    assert small.generation_config.max_new_tokens == 7
    inner = [m for name, m in small.named_modules() if isinstance(m, mk.LoDLinear)]
    kept = sum(m.u.numel() + m.v.numel() for m in inner)
    kept += sum(
        m.weight.numel() for n, m in small.model.named_modules() if type(m) is torch.nn.Linear
    )
    considered = [m for m in dense.model.modules() if isinstance(m, torch.nn.Linear)]
    assert kept <= 0.6 * sum(m.weight.numel() for m in considered)
    words = transformers.AutoTokenizer.from_pretrained(out)
    assert words("a list")["input_ids"] == small_ids(language)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (language / name).read_bytes()
    assert not (out / "text.txt").exists()
    assert json.loads((out / "compression.json").read_text())["evaluation"] == judged
    assert not list(tmp_path.glob("*work*"))


def small_ids(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)("a list")["input_ids"]


def test_inputs_weigh_the_errors_where_there_is_data(language, tmp_path, capsys):
    words = (language, "--budget", 0.4, "--data", language / "text.txt")
    data = compress(capsys, *words, "--out", tmp_path / "data")
    svd = compress(capsys, *words, "--init", "svd", "--out", tmp_path / "svd")
    assert (data["init"], svd["init"]) == ("data", "svd")
    assert data["evaluation"]["after"] < svd["evaluation"]["after"]


def test_distillation_wins_back_some_of_what_was_lost(language, tmp_path, capsys):
    words = (language, "--budget", 0.2, "--data", language / "text.txt", "--require", 0)
    lost = compress(capsys, *words, "--out", tmp_path / "a")
    found = compress(capsys, *words, "--recover", 60, "--out", tmp_path / "b")
    assert found["recovered"]["best_step"] > 0
    won = lost["evaluation"]["after"] - found["evaluation"]["after"]
    assert won > 0.2 * (lost["evaluation"]["after"] - lost["evaluation"]["before"])
    assert load_pretrained(tmp_path / "b").dtype == torch.bfloat16
    other = compress(capsys, *words, "--recover", 60, "--seed", 1, "--out", tmp_path / "c")
    assert other["evaluation"]["after"] != found["evaluation"]["after"]


@pytest.mark.parametrize("kind", ["language", "vision"])
def test_a_model_of_rank_1_fails(kind, request, tmp_path, capsys):
    folder = request.getfixturevalue(kind)
    data = folder / ("text.txt" if kind == "language" else "images")
    words = (folder, "--budget", 0.001, "--data", data, "--out", tmp_path / "small")
    record = compress(capsys, *words, status=1)
    assert set(mk.ranks(load_pretrained(tmp_path / "small")).values()) <= {1, "dense"}
    assert not record["evaluation"]["passed"]
    assert main(["compress", *map(str, words)]) == 1
    assert "It FAILS" in capsys.readouterr().out
    assert compress(capsys, *words, "--require", 0)["evaluation"]["passed"]


def test_a_vision_model_is_judged_by_its_answers(vision, tmp_path, capsys):
    import transformers

    out = tmp_path / "small"
    data = vision / "images"
    record = compress(capsys, vision, "--macs", 0.6, "--data", data, "--out", out)
    judged = record["evaluation"]
    assert judged["measure"] == "agreement"
    assert judged["quality"] > 0.9
    assert judged["more"]["dense_accuracy"] > 0.8
    small = transformers.AutoModelForImageClassification.from_pretrained(out)
    assert type(small.classifier) is torch.nn.Linear
    assert (out / "preprocessor_config.json").read_bytes() == (
        vision / "preprocessor_config.json"
    ).read_bytes()
    other = tmp_path / "held out"
    other.symlink_to(data / "digit 3")
    again = compress(
        capsys, vision, "--macs", 0.6, "--data", data, "--held-out", other, "--out", out
    )
    assert again["evaluation"]["inputs"] == len(list(other.iterdir()))


UNTRAINED = ["t5", "bart", "whisper", "wav2vec2"]


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """A seq2seq and a speech model of two kinds each, with random weights."""
    import transformers

    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 400}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    wide = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "decoder_start_token_id": 0}
    t5 = transformers.T5Config(
        d_model=32, d_ff=64, d_kv=16, num_heads=2, num_layers=1, vocab_size=400, **ends
    )
    bart = transformers.BartConfig(**sizes, **heads, **wide, **ends, forced_eos_token_id=1)
    whisper = transformers.WhisperConfig(
        **sizes, **heads, **wide, **ends, num_mel_bins=8, max_source_positions=50,
        max_target_positions=40, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    wav2vec2 = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        conv_dim=(32, 32), conv_stride=(5, 4), conv_kernel=(10, 8), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, vocab_size=30,
    )  # fmt: skip
    models = {
        "t5": (transformers.T5ForConditionalGeneration, t5),
        "bart": (transformers.BartForConditionalGeneration, bart),
        "whisper": (transformers.WhisperForConditionalGeneration, whisper),
        "wav2vec2": (transformers.Wav2Vec2ForCTC, wav2vec2),
    }
    folder = tmp_path_factory.mktemp("untrained")
    for name, (kind, config) in models.items():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder / name)
    for name in ("t5", "bart"):
        trained.tokenizer(folder / name)
    (folder / "text.txt").write_text("one two three four\nfive six\tseven eight\n" * 6)
    transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(
        folder / "whisper"
    )
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder / "wav2vec2")
    for i in range(6):
        trained.tone(folder / "sound" / f"{i}.wav", hertz=200.0 + 100 * i)
    return folder


@pytest.mark.parametrize("name", UNTRAINED)
def test_other_kinds_keep_their_structure(untrained, name, tmp_path, capsys):
    data = untrained / ("text.txt" if name in ("t5", "bart") else "sound")
    words = (untrained / name, "--params", 0.5, "--init", "svd", "--require", 0)
    record = compress(capsys, *words, "--data", data, "--passes", 0, "--out", tmp_path / "a")
    measure = "perplexity" if name in ("t5", "bart") else "agreement"
    assert record["evaluation"]["measure"] == measure
    # No data, no tokenizer: svd needs neither.
    words = (untrained / name, "--params", 0.5)
    record = compress(capsys, *words, "--out", tmp_path / "b")
    assert record["evaluation"] is None
    small, again = (load_pretrained(tmp_path / "b") for _ in range(2))
    assert any(isinstance(m, mk.LoDLinear) for m in small.modules())
    dense = type(small).from_pretrained(untrained / name)
    replaced = {name for name, rank in mk.ranks(small).items() if rank != "dense"}
    kept = {
        k: t for k, t in dense.state_dict().items() if k.removesuffix(".weight") not in replaced
    }
    for key, value in small.state_dict().items():
        assert key not in kept or torch.equal(value, kept[key])
    with torch.no_grad():
        batch = {"labels": torch.tensor([[5, 6, 1]])}
        if name in ("t5", "bart"):
            batch["input_ids"] = torch.tensor([[7, 8, 9, 1]])
        elif name == "whisper":
            batch["input_features"] = torch.ones(1, 8, 100)
        else:
            batch = {"input_values": torch.ones(1, 800)}
        assert torch.equal(small(**batch).logits, again(**batch).logits)


@pytest.mark.parametrize("init", ["svd", "data"])
def test_experts_are_layers_like_others(untrained, init, tmp_path, capsys):
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    dense = transformers.MixtralForCausalLM(config).bfloat16().eval()
    dense.save_pretrained(tmp_path / "moe")
    trained.tokenizer(tmp_path / "moe")
    words = [tmp_path / "moe", "--params", 0.6, "--init", init, "--out", tmp_path / "small"]
    if init == "data":
        words += ["--data", untrained / "text.txt", "--passes", 0, "--require", 0]
    record = compress(capsys, *words)
    assert record["bytes"] < 0.8 * record["bytes_before"]
    small = load_pretrained(tmp_path / "small")
    ranks = mk.ranks(small)
    assert any(rank != "dense" for name, rank in ranks.items() if ".experts." in name)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    for name, router in small.named_modules():
        if name.endswith("mlp.gate"):
            assert torch.equal(router.weight, dense.get_submodule(name).weight)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(small(ids).logits, load_pretrained(tmp_path / "small")(ids).logits)


def test_an_encoder_without_a_tokenizer(tmp_path, capsys):
    import transformers

    config = transformers.BertConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64,
        vocab_size=40,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    text = tmp_path / "text.txt"
    text.write_text("one\ntwo\n")
    compress(capsys, tmp_path / "bert", "--params", 0.6, "--out", tmp_path / "small")
    words = ["compress", tmp_path / "bert", "--params", 0.6, "--data", text]
    assert main([*map(str, words), "--out", str(tmp_path / "other")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "compress: MODEL: expected a tokenizer for --data in" in line
    assert "without --data none is needed" in line
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("budget", [("--speedup", 0.5), ("--latency", 10000), ("--memory", 0.9)])
def test_budgets_that_are_measured(language, tmp_path, budget, capsys):
    out = tmp_path / "small"
    record = compress(capsys, language, *budget, "--out", out)
    assert record[budget[0].removeprefix("--")] == budget[1]
    if budget[0] == "--memory":
        assert record["bytes"] <= 0.9 * record["bytes_before"]
