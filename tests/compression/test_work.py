"""A killed run goes on where it was, ends with the same bits, and touches nobody's files."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from maestro_kernels.cli import main
from maestro_kernels.compression import choosing, decomposition, job, work

WHOLE = ["--params", "0.6", "--passes", "20", "--recover", "4"]


def words(language, out):
    text = str(language / "text.txt")
    return ["compress", str(language), *WHOLE, "--data", text, "--samples", "16", "--out", str(out)]


@pytest.fixture(scope="session")
def uninterrupted(language, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "small"
    assert main(words(language, out)) == 0
    return out


def assert_same(out, other):
    found, wanted = (load_file(folder / "model.safetensors") for folder in (out, other))
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        assert torch.equal(value, wanted[key]), key
    assert (out / "compression.json").read_text() == (other / "compression.json").read_text()


def test_a_killed_process_leaves_nothing_but_work_to_go_on_with(
    language, uninterrupted, tmp_path, monkeypatch
):
    out = tmp_path / "small"
    command = [sys.executable, "-m", "maestro_kernels", *words(language, out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    place = work.folder_for(out)
    give_up = time.monotonic() + 120
    while not (place / "layer-00004.stage").exists() and time.monotonic() < give_up:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    before = {path: path.stat().st_mtime_ns for path in place.glob("layer-*.stage")}
    assert len(before) >= 5

    def kept(names, *rest):
        assert len(names) <= 14 - len(before)
        return together(names, *rest)

    together = decomposition._together
    monkeypatch.setattr(decomposition, "_together", kept)
    assert main(words(language, out)) == 0
    assert_same(out, uninterrupted)
    assert not place.exists()


@pytest.mark.parametrize("at", ["choose", "assemble", "compared", "save_pretrained"])
def test_every_stage_is_gone_on_from(language, uninterrupted, at, tmp_path, monkeypatch):
    out = tmp_path / "small"
    holder, name = {
        "choose": (choosing.Chooser, "ranks"),
        "assemble": (decomposition, "assemble"),
        "compared": (job._Run, "compared"),
        "save_pretrained": (job, "save_pretrained"),
    }[at]

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, killed)
        assert main(words(language, out)) == 130
    assert not out.exists()
    assert work.folder_for(out).exists()
    with monkeypatch.context() as patch:
        # What is finished is not made again.
        patch.setattr(decomposition, "_decomposed", killed)
        if at != "choose":
            patch.setattr(choosing.Chooser, "ranks", killed)
        if at in ("compared", "save_pretrained"):
            patch.setattr("maestro_kernels.training.distillation.distil", killed)
        assert main(words(language, out)) == 0
    assert_same(out, uninterrupted)


def test_other_options_do_not_take_what_is_not_theirs(language, tmp_path, monkeypatch):
    place = work.Work(tmp_path)
    place.write("one", "key", {"a": torch.ones(2)}, {"b": 1})
    tensors, values = place.read("one", "key")
    assert torch.equal(tensors["a"], torch.ones(2))
    assert values == {"b": 1}
    assert place.read("one", "other") is None
    assert place.read("two", "key") is None
    content = (tmp_path / "one.stage").read_bytes()
    (tmp_path / "one.stage").write_bytes(content[: len(content) // 2])
    assert place.read("one", "key") is None


def test_files_of_others_stay(language, tmp_path, capsys):
    out = tmp_path / "small"
    place = work.folder_for(out)
    place.mkdir()
    (place / "thesis.txt").write_text("mine")
    assert main(words(language, out)) == 2
    assert "expected a free name for unfinished work beside it" in capsys.readouterr().err
    assert [path.name for path in place.iterdir()] == ["thesis.txt"]
    (place / "thesis.txt").unlink()
    with work.opened(out) as mine:
        mine.write("one", "key", {}, {})
        (place / "thesis.txt").write_text("mine")
        mine.clear()
    assert [path.name for path in place.iterdir()] == ["thesis.txt"]


def test_one_process_at_a_time(language, tmp_path, capsys):
    out = tmp_path / "small"
    with work.opened(out):
        script = "import sys; from maestro_kernels.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", script, *words(language, out)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2
    assert "expected a folder that no other process uses" in done.stderr
    assert not out.exists()
