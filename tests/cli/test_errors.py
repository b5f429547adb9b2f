"""How the command line ends: one line and status 2 for what a user can get wrong."""

import io
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch

from maestro_kernels.cli import compress, main, output, profile

BENCH = ["bench", "--shape", "1,2,3,4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the table below names."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "file").write_text("not a folder\n")
    (folder / "latin.txt").write_bytes("café\n".encode("latin-1"))
    (folder / "unknown.json").write_text('{"task": "mine:make", "epochs": 3}')
    (folder / "broken.json").write_text("{")
    (folder / "mine.py").write_text("def make():\n    return 1 // 0\n")
    (folder / "bad_import.py").write_text("raise RuntimeError('half installed')\n")
    damaged = folder / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text(
        '{"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 9,'
        ' "num_attention_heads": 2, "intermediate_size": 32}'
    )
    (damaged / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header")
    (folder / "link").symlink_to(folder / "nothing")
    return folder


# A user's words, and the whole line or its beginning.
TABLE = [
    ([], "maestro-kernels: the following arguments are required: COMMAND"),
    (["paint"], "maestro-kernels: COMMAND: invalid choice: 'paint'"),
    (["bench", "--speed"], "maestro-kernels: unrecognized arguments: --speed"),
    (["bench", "--shape", "1,2"], "maestro-kernels bench: parse_shape: text: expected M,N,K,R"),
    ([*BENCH, "--device", "foo"], "bench: --device: expected cpu, cuda or cuda:INDEX, got 'foo'"),
    ([*BENCH, "--device", "cpu:3"], "bench: --device: expected cpu, cuda or cuda:INDEX, got"),
    ([*BENCH, "--device", "cuda:99"], "bench: --device: expected a device that is here, got"),
    ([*BENCH, "--threads", "100000"], "bench: --threads: expected an integer from 1 to"),
    ([*BENCH, "--threads", "0"], "bench: --threads: expected an integer from 1 to"),
    ([*BENCH, "--threads", "two"], "bench: --threads: expected an integer from 1 to"),
    ([*BENCH, "--seconds", "nan"], "bench: --seconds: expected a number above 0, got 'nan'"),
    ([*BENCH, "--seconds", "-1"], "bench: --seconds: expected a number above 0, got '-1'"),
    ([*BENCH, "--compare", "."], "bench: --compare: expected a file, got the folder '.'"),
    ([*BENCH, "--compare", "none"], "bench: --compare: expected a file, got no file 'none'"),
    ([*BENCH, "--compare", "file"], "bench: load: file, line 1: expected a JSON object"),
    ([*BENCH, "--out", "file"], "bench: --out: expected a folder, got the file 'file'"),
    ([*BENCH, "--out", "file/x"], "bench: --out: expected a path below folders, got 'file/x'"),
    ([*BENCH, "--out", "link"], "bench: --out: expected a folder, got the file 'link'"),
    (["tune", "--out", "."], "tune: --out: expected a file, got the folder '.'"),
    (["tune", "--rows", "0"], "tune: --rows: expected integers >= 1 like 1,64, got '0'"),
    (["tune", "--limit", "0"], "tune: --limit: expected a number above 0, got '0'"),
    (["tune", "--shape", "8"], "tune: --shape: expected N,K with sizes >= 2, got '8'"),
    (["tune", "--device", "cuda:99"], "tune: --device: expected a device that is here"),
    (["profile", "8,8", "--rows", "1,x"], "profile: --rows: expected integers >= 1 like 1,64"),
    (["profile", "8,8", "--ranks", ""], "profile: --ranks: expected integers >= 1 like 1,64"),
    (["profile", "8,8", "--strategy", "x"], "profile: --strategy: expected one of ours, two"),
    (["profile", "8,8", "--speedup", "0"], "profile: --speedup: expected a number above 0"),
    (["profile", "mine:make"], "profile: target: 'mine:make' raised ZeroDivisionError("),
    (["profile", "bad_import:x"], "profile: target: 'bad_import:x' raised RuntimeError('half"),
    (["profile", "damaged"], "profile: target: expected a Hugging Face configuration, got"),
    (["compress", "damaged", "--budget", "0.5", "--out", "o"], "compress: MODEL:"),
    (["compress", "minilm", "--out", "o"], "compress: one of the arguments --params --macs"),
    (["compress", "x", "--budget", "2", "--out", "o"], "compress: --budget: expected 0 < FRACTION"),
    (
        ["compress", "x", "--budget", "1", "--out", "o", "--init", "data", "--data", "latin.txt"],
        "compress: --data: expected UTF-8 text in 'latin.txt', got other bytes",
    ),
    (["compress", "x", "--budget", "1", "--out", "file"], "compress: --out: expected a folder"),
    (["train", "none.toml"], "train: CONFIG: expected a file, got no file 'none.toml'"),
    (["train", "."], "train: CONFIG: expected a file, got the folder '.'"),
    (["train", "unknown.json", "--out", "o"], "train: load_config: epochs:"),
    (["train", "broken.json", "--out", "o"], "train: load_config:"),
    (["train", "unknown.json", "--out", "/etc/passwd"], "train: --out: expected a folder, got"),
]


@pytest.mark.parametrize(("words", "line"), TABLE, ids=[" ".join(row[0]) for row in TABLE])
def test_what_a_user_can_get_wrong_ends_in_one_line(place, words, line, capsys, monkeypatch):
    monkeypatch.chdir(place)
    before = sorted(place.iterdir())
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *before_work, last = err.splitlines()
    assert last.removeprefix("maestro-kernels ").startswith(line.removeprefix("maestro-kernels "))
    assert last.startswith("maestro-kernels")
    # Only where reading the model is the work.
    assert all(text.split(": ")[1].startswith("reading ") for text in before_work)
    assert "compress: compress:" not in err
    assert [p for p in sorted(place.iterdir()) if p.name != "__pycache__"] == before


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (PermissionError(13, "Permission denied", "/x/rows.jsonl"), "/x/rows.jsonl: Permission"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory:\n you"), "not enough memory: D"),
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory: CUDA out of memory"),
        (MemoryError(), "not enough memory: MemoryError"),
        (ValueError("info: x: expected\n  two lines"), "x: expected two lines"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value[:9],
)
def test_what_happens_during_the_work_is_one_line_too(error, line, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("maestro_kernels.cli.info.collect", fail)
    assert main(["info"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"maestro-kernels info: {line}")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def fail():
        raise RuntimeError("an invariant")

    monkeypatch.setattr("maestro_kernels.cli.info.collect", fail)
    with pytest.raises(RuntimeError, match="an invariant"):
        main(["info"])


# --- how a process ends ----------------------------------------------------------------------


def start(*words, **options):
    command = [sys.executable, "-m", "maestro_kernels", *words]
    # Who is started in the background ignores Ctrl-C, and so do all that it starts.
    listening = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=listening, **options
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full, start("info", stdout=full) as process:
        error = process.stderr.read()
    assert error == "maestro-kernels info: No space left on device\n"
    assert process.returncode == 2


def test_a_closed_pipe_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    with start("info", stdout=write) as process:
        os.close(write)
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_an_interrupt_is_one_line(tmp_path):
    words = ["bench", "--shape", "4,64,64,8", "--seconds", "600", "--no-compile"]
    with start(*words, "--out", str(tmp_path / "out"), stdout=subprocess.PIPE) as process:
        plan = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert plan.startswith("maestro-kernels bench: 1 case on ")
    assert (out, err) == ("", "maestro-kernels bench: interrupted\n")
    assert process.returncode == 130
    assert not (tmp_path / "out").exists()


# --- what is said ----------------------------------------------------------------------------


def test_plans_come_before_the_work(monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    said = []

    def work(*_, **__):
        said.append(capsys.readouterr().err)
        raise ValueError("enough")

    monkeypatch.setattr("maestro_kernels.benchmark.encoder.quiet_transformers", work)
    monkeypatch.setattr("maestro_kernels.compression.job.find", work)
    monkeypatch.setattr("maestro_kernels.benchmark.run.run", work)
    monkeypatch.setattr("maestro_kernels.search.tuning.tune", work)
    monkeypatch.setattr("maestro_kernels.search.layer_profile.profile", work, raising=False)
    monkeypatch.setattr("maestro_kernels.training.runner.Run", work)
    config = tmp_path / "run.json"
    config.write_text('{"task": "mine:make", "train": {"epochs": 1}}')
    monkeypatch.chdir(tmp_path)
    for words, plan in (
        (["bench", "--shape", "1,8,8,2", "--shape", "2,8,8,2"], "bench: 2 cases on "),
        (["profile", str(tmp_path)], f"profile: reading {tmp_path}\n"),
        (["tune", "--shape", "64,64", "--rows", "1", "--device", "cpu"], "tune: 1 call on "),
        (["compress", "minilm", "--budget", "0.5", "--out", "o"], "compress: reading minilm\n"),
        (["train", str(config)], "train: mine:make, 1 epoch, in reports/train/run\n"),
    ):
        capsys.readouterr()
        assert main(words) == 2
        assert said.pop().startswith(f"maestro-kernels {plan}")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (3, "a few seconds"),
        (42, "about 40 seconds"),
        (91, "about 2 minutes"),
        (60 * 61, "about 61 minutes"),
        (3600 * 2.2, "about 2 hours"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds, words):
    assert output.about(seconds) == words


def test_estimates_grow_with_the_work(monkeypatch):
    sizes = [(64, 64)]
    assert 0 < compress._seconds(sizes, 0) < compress._seconds(sizes, 100)
    assert compress._seconds(sizes, 0) < compress._seconds(sizes * 2, 0)


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 40.0, 41.0, 100.0])
    monkeypatch.setattr(output.time, "monotonic", lambda: next(clock))
    with output.progress("tune") as advance:
        for done in (0, 1, 2, 4):
            advance(f"call {done}", done, 4)
    assert capsys.readouterr().err == (
        "maestro-kernels tune: 1 of 4 done, about 2 minutes left; now call 1\n"
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_any_locale_can_be_printed_to(encoding, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    output.spell_in_any_locale()
    output.show("1.5× in 3 µs · 384→96→1536 ✓")
    stream.flush()
    text = stream.buffer.getvalue().decode(encoding)
    assert text in ("1.5x in 3 us . 384->96->1536 ?\n", "1.5× in 3 µs · 384->96->1536 ?\n")


def test_other_libraries_stay_silent(tmp_path, monkeypatch, capfd):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=40,
    )  # fmt: skip
    # A classifier's weights in an encoder: transformers has a load report for that.
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    capfd.readouterr()
    profile.load_target([str(tmp_path)])
    assert capfd.readouterr() == ("", "")
