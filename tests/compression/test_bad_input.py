"""One named error for each thing that can be wrong, and nothing half-written."""

import json
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import trained

from maestro_kernels.cli import main
from maestro_kernels.compression import work


def copy(folder, place, **config):
    """The files of a model, with other words in its config.json."""
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("images", "text.txt"))
    path = place / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return place


def fails(capsys, tmp_path, *words, out="small"):
    """The last line of a run that is refused and leaves nothing."""
    before = sorted(tmp_path.rglob("*"))
    assert main(["compress", *map(str, words), "--out", str(tmp_path / out)]) == 2
    assert sorted(tmp_path.rglob("*")) == before
    return capsys.readouterr().err.splitlines()[-1].removeprefix("maestro-kernels compress: ")


@pytest.mark.parametrize(
    ("budget", "line"),
    [
        (
            ("--params", 0.001),
            "--params: expected one that ranks can meet, the best within reach is 0",
        ),
        (("--macs", 0.001), "--macs: expected one that ranks can meet, the best within reach is 0"),
        (
            ("--memory", "10KB"),
            "--memory: expected one that ranks can meet, the best within reach is ",
        ),
        (
            ("--memory", "0.01"),
            "--memory: expected one that ranks can meet, the best within reach is ",
        ),
        (
            ("--speedup", 1e6),
            "--speedup: expected one that ranks can meet, the best within reach is ",
        ),
        (
            ("--latency", 1e-6),
            "--latency: expected one that ranks can meet, the best within reach is ",
        ),
        (("--memory", "2"), "--memory: expected a size like 500MB or 1.2GB, or 0 < FRACTION <= 1"),
        (("--memory", "0MB"), "--memory: expected a size like 500MB or 1.2GB, or 0 < FRACTION"),
        (("--params", 1.5), "--params: expected 0 < FRACTION <= 1, got '1.5'"),
        (("--params", 0.5, "--macs", 0.5), "--macs: not allowed with argument --params"),
        (("--params", 0.5, "--recover", 5), "--data: expected a file or folder for --recover"),
        (("--params", 0.5, "--require", 0.5), "--require: expected nothing without --data"),
        (("--params", 0.5, "--require", 2), "--require: expected 0 <= QUALITY <= 1, got '2'"),
        (("--params", 0.5, "--max-shard-size", "5"), "--max-shard-size: expected a size like 500"),
    ],
    ids=str,
)
def test_what_cannot_be_met_is_said_before_anything_is_written(
    language, budget, line, tmp_path, capsys
):
    assert fails(capsys, tmp_path, language, *budget).startswith(line)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            {"quantization_config": {"quant_method": "maestro_kernels"}},
            "MODEL: expected a dense model, got ",
        ),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "MODEL: expected a model that is not quantised, got ",
        ),
        ({"auto_map": {"AutoModel": "mine.Model"}}, "MODEL: expected an architecture of transf"),
        ({"architectures": ["NoSuchModel"]}, "MODEL: expected an architecture of transformers 5"),
        (
            {"architectures": None, "model_type": "none such"},
            "MODEL: expected a model type of transformers in ",
        ),
        ({"hidden_size": 64}, "MODEL: expected the weights of a LlamaForCausalLM in "),
        ({"num_hidden_layers": 3}, "MODEL: expected the weights of a LlamaForCausalLM in "),
    ],
    ids=str,
)
def test_models_that_are_not_for_us(language, config, line, tmp_path, capsys):
    folder = copy(language, tmp_path / "model", **config)
    assert fails(capsys, tmp_path, folder, "--params", 0.6).startswith(line)


def test_damaged_folders(language, tmp_path, capsys):
    folder = copy(language, tmp_path / "model")
    words = (folder, "--params", 0.6)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:1000])
    line = fails(capsys, tmp_path, *words)
    assert line.startswith("MODEL: expected the weights of a LlamaForCausalLM in ")
    (folder / "model.safetensors").unlink()
    line = fails(capsys, tmp_path, *words)
    assert line.startswith("MODEL: expected the weights of a LlamaForCausalLM in ")
    (folder / "config.json").write_text("[]")
    assert fails(capsys, tmp_path, *words).startswith("MODEL: expected a JSON object in ")
    (folder / "config.json").unlink()
    line = fails(capsys, tmp_path, *words)
    assert line.startswith("MODEL: expected 'minilm' or a folder with config.json, got ")


def test_the_model_itself_is_never_the_result(language, tmp_path, capsys):
    folder = copy(language, tmp_path / "model")
    line = fails(capsys, tmp_path, folder, "--params", 0.6, out="model")
    assert "expected a folder without another model's config.json" in line


def test_weights_that_are_not_finite(language, tmp_path, capsys):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(language)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "model")
    words = ["compress", str(tmp_path / "model"), "--params", "0.6"]
    assert main([*words, "--out", str(tmp_path / "small")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "got NaN or infinity in model.layers.1.mlp.up_proj.weight" in line
    assert not (tmp_path / "small").exists()


def test_transformers_that_is_too_old(language, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    line = fails(capsys, tmp_path, language, "--params", 0.6)
    assert line == "transformers: expected version 5.0 or later, got 4.57.1"


def test_data_of_another_kind(language, vision, tmp_path, capsys):
    text, images = language / "text.txt", vision / "images"
    line = fails(capsys, tmp_path, language, "--params", 0.6, "--data", images)
    assert line.startswith("--data: expected a text file, got ")
    line = fails(capsys, tmp_path, vision, "--params", 0.6, "--data", text)
    assert line.startswith("--data: expected a folder of images, got ")
    (tmp_path / "short.txt").write_text("Too short.\n")
    line = fails(capsys, tmp_path, language, "--params", 0.6, "--data", tmp_path / "short.txt")
    assert line.startswith("--data: expected at least 20 tokens to calibrate with and 8 to judge")
    (tmp_path / "pictures").mkdir()
    line = fails(capsys, tmp_path, vision, "--params", 0.6, "--data", tmp_path / "pictures")
    assert line.startswith("--data: expected images in ")
    for name in ("a.png", "b.png"):
        (tmp_path / "pictures" / name).write_bytes(b"no picture")
    line = fails(capsys, tmp_path, vision, "--params", 0.6, "--data", tmp_path / "pictures")
    assert line.startswith("--data: expected images, got ")


def test_sound_of_another_kind(tmp_path, capsys):
    import transformers

    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        conv_dim=(32,), conv_stride=(5,), conv_kernel=(10,), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, vocab_size=30,
    )  # fmt: skip
    transformers.Wav2Vec2ForCTC(config).save_pretrained(tmp_path / "model")
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "model")
    for name in ("a", "b"):
        trained.tone(tmp_path / "sound" / f"{name}.wav", rate=8000)
    words = (tmp_path / "model", "--params", 0.6, "--data", tmp_path / "sound")
    line = fails(capsys, tmp_path, *words)
    assert line.startswith("--data: expected sound of 16 bits and 16000 Hz, got ")
    assert line.endswith("with 16 bits and 8000 Hz")
    (tmp_path / "sound" / "a.wav").write_bytes(b"RIFF no sound")
    assert fails(capsys, tmp_path, *words).startswith("--data: expected .wav files, got ")


@pytest.mark.parametrize("kilobytes", [4, 40])
def test_a_disk_that_is_full(language, kilobytes, tmp_path):
    """A limit on the size of a file, in a process of its own, is what a full disk looks like.

    The lower one meets the factors, the higher one a shard of the result.
    """
    out = tmp_path / "small"
    words = ["compress", str(language), "--params", "0.6", "--max-shard-size", "60KB"]
    words += ["--out", str(out)]
    code = f"""
        import resource, signal, sys
        from maestro_kernels.cli import main
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes * 1024}, {kilobytes * 1024}))
        sys.exit(main({words!r}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "File too large" in done.stderr.splitlines()[-1]
    assert not out.exists()
    stages = {path.name for path in work.folder_for(out).glob("*.stage")}
    assert ("ranks.stage" in stages) == (kilobytes == 40)
    assert main(words) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    import transformers

    small = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        assert small(torch.arange(8)[None]).logits.isfinite().all()
