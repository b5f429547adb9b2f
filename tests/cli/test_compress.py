"""`maestro-kernels compress` on a tiny encoder folder, end to end, and its error messages."""

import json

import pytest
import torch

import maestro_kernels as mk
from maestro_kernels.cli import main

WORDS = ["the", "a", "model", "rank", "weight", "is", "runs", "keeps", "small", "fast", "it", "."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import transformers

    path = tmp_path_factory.mktemp("encoder")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=128,
        vocab_size=len(vocabulary),
    )
    transformers.BertModel(config).save_pretrained(path)
    (path / "text.txt").write_text("the model keeps a small rank .\n\nit runs fast .\n" * 20)
    return path


def fresh(folder):
    import transformers

    return transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()


@pytest.mark.parametrize("init", ["svd", "data"])
def test_compress_writes_a_model_that_loads(folder, tmp_path, init, capsys):
    out = tmp_path / "small"
    arguments = ["compress", str(folder), "--budget", "0.5", "--init", init, "--out", str(out)]
    arguments += ["--data", str(folder / "text.txt"), "--json", "--group"]
    assert main(arguments) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["folder"] == str(out)
    assert 0.4 < record["weights"] / record["dense_weights"] <= 0.5
    loaded = mk.load_pretrained(out, fresh(folder))
    ranks = mk.ranks(loaded)
    assert ranks["encoder.layer.0.attention.self.query"] == 16
    assert len(mk.nn.groups(loaded)) == 2
    ids = torch.arange(10)[None]
    with torch.no_grad():
        again = mk.load_pretrained(out, fresh(folder))(input_ids=ids)[0]
        assert torch.equal(loaded(input_ids=ids)[0], again)


def test_compress_prints_a_summary(folder, tmp_path, capsys):
    out = tmp_path / "small"
    assert main(["compress", str(folder), "--budget", "0.5", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "encoder.layer.1.output.dense" in text
    assert f"saved    {out}" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere"}, "MODEL: expected 'minilm' or a folder with config.json"),
        ({"--budget": "0"}, "--budget: expected 0 < FRACTION <= 1, got 0.0"),
        ({"--budget": "1.2"}, "--budget: expected 0 < FRACTION <= 1, got 1.2"),
        ({"--init": "data"}, "--data: expected a file or folder for --init data, got none"),
        (
            {"--init": "data", "--data": "missing.txt"},
            "--data: expected a file, got no file 'missing.txt'",
        ),
    ],
    ids=str,
)
def test_compress_says_what_is_wrong(folder, tmp_path, change, message, capsys):
    options = {"--budget": "0.5", "--out": str(tmp_path / "out"), **change}
    model = options.pop("model", str(folder))
    arguments = ["compress", model, *(part for pair in options.items() for part in pair)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("maestro-kernels compress: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_compress_refuses_an_empty_file_and_a_foreign_folder(folder, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n\n")
    arguments = ["compress", str(folder), "--budget", "0.5", "--init", "data"]
    arguments += ["--data", str(tmp_path / "empty.txt"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "expected sentences in" in capsys.readouterr().err
    (tmp_path / "model.safetensors").write_bytes(b"somebody's")
    assert main(["compress", str(folder), "--budget", "0.5", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "expected a folder without a model.safetensors of another origin" in error
    assert "reading" not in error
    assert (tmp_path / "model.safetensors").read_bytes() == b"somebody's"
