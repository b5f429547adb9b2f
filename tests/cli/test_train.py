"""`maestro-kernels train`: configuration, killed runs that go on, metrics, report, errors."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from places import ROOT, SUPPORT

import maestro_kernels as mk
from maestro_kernels import training
from maestro_kernels.cli import main
from maestro_kernels.cli.train import html_report, verdict
from maestro_kernels.training.config import TrainConfig, load_config
from maestro_kernels.training.runner import Run, Task, learning_rate

EXAMPLES = ROOT / "examples"

TABLE = {
    "task": "training_task:make",
    "train": {"epochs": 4, "batch_size": 8, "lr": 0.05, "log_steps": 1, "checkpoint_steps": 3},
    "maestro": {"lam": 0.05, "threshold": 0.3, "freeze_period": 2},
}
STEPS = 4 * 5


def table(**sections):
    merged = {
        key: dict(value) if isinstance(value, dict) else value for key, value in TABLE.items()
    }
    for name, values in sections.items():
        merged[name] = {**merged.get(name, {}), **values} if isinstance(values, dict) else values
    return merged


def write_config(folder, **sections):
    shutil.copy(SUPPORT / "training_task.py", folder)
    path = folder / "run.json"
    path.write_text(json.dumps(table(**sections)))
    return path


def load_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(config, folder, *, beside, resume=False, progress=lambda *_: None):
    return Run(config, folder, beside, "cpu").train(resume, progress)


def timeless(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_same_run(folder, other):
    rows = load_rows(folder / "metrics.jsonl")
    assert timeless(rows) == timeless(load_rows(other / "metrics.jsonl"))
    assert [r["step"] for r in rows if r["event"] == "step"] == list(range(1, STEPS + 1))
    states = [torch.load(d / "checkpoint.pt", weights_only=True) for d in (folder, other)]
    for key in ("model", "optimizer"):
        torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=0)
    assert states[0]["maestro"] == states[1]["maestro"]
    randoms = [state["random"] for state in states]
    assert torch.equal(randoms[0]["torch"], randoms[1]["torch"])
    assert torch.equal(randoms[0]["numpy"][1], randoms[1]["numpy"][1])
    assert randoms[0]["python"] == randoms[1]["python"]
    models = [(d / "model" / "model.safetensors").read_bytes() for d in (folder, other)]
    assert models[0] == models[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    path = write_config(folder)
    train(load_config(path), folder / "run", beside=folder)
    return folder / "run"


def test_the_undisturbed_run_shrinks_and_logs_every_step(whole):
    rows = load_rows(whole / "metrics.jsonl")
    assert [row["event"] for row in rows] == ["start"] + 4 * (5 * ["step"] + ["epoch"])
    first, last = rows[6], rows[-1]
    assert sum(last["stored_ranks"].values()) < sum(first["stored_ranks"].values())
    assert last["weights"] < last["dense_weights"]
    assert first["metrics"]["loss"] > 0
    steps = [row["loss"] for row in rows if row["event"] == "step"]
    assert first["train_loss"] == pytest.approx(sum(steps[:5]) / 5)


def killed(config, folder, when):
    command = [sys.executable, "-m", "maestro_kernels", "train", config, "--out", folder]
    done = subprocess.run(
        [*map(str, command), "--resume"],
        env={**os.environ, "KILL": when},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_run_killed_twice_ends_with_the_same_bits(whole, tmp_path, capsys):
    config = write_config(tmp_path)
    folder = tmp_path / "run"
    # An epoch is 5 losses of training, 5 of BatchNorm and 5 of the test: this is step 8, with the
    # checkpoint from step 6, and the metrics are ahead of it.
    killed(config, folder, "loss:18")
    assert load_rows(folder / "metrics.jsonl")[-1]["step"] == 7
    killed(config, folder, "replace:2")
    assert len(list(folder.glob(".maestro-*.partial"))) == 1
    assert main(["train", str(config), "--out", str(folder), "--resume", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert 0 < result["resumed_at"] < STEPS
    assert_same_run(folder, whole)
    assert not list(folder.glob(".maestro-*"))


class Interrupted(BaseException):
    """Nothing in the package may catch this."""


@pytest.mark.parametrize(
    ("steps", "stops"), [(0, (4, 6, 11)), (3, (1, 2, 3, 4, 5, 6, 8, 12, 19, 20))]
)
def test_a_run_stopped_at_any_step_goes_on_with_nothing_lost(whole, tmp_path, steps, stops):
    sections = {"train": {"checkpoint_steps": steps}}
    config = TrainConfig(**table(**sections))
    write_config(tmp_path)
    reference = whole
    if steps == 0:
        reference = tmp_path / "reference"
        train(config, reference, beside=tmp_path)
    for stop in stops:

        def stopping(text, step, steps, stop=stop):
            if step == stop:
                raise Interrupted

        folder = tmp_path / f"run{stop}"
        with pytest.raises(Interrupted):
            train(config, folder, beside=tmp_path, progress=stopping)
        resumed_at = train(config, folder, resume=True, beside=tmp_path)
        every_three = (stop - 1) // 3 * 3 if steps else 0
        assert resumed_at == max(every_three, (stop - 1) // 5 * 5)
        assert_same_run(folder, reference)


def test_a_finished_run_resumed_changes_nothing(whole, tmp_path):
    write_config(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "model")
    train(TrainConfig(**TABLE), copy, resume=True, beside=tmp_path)
    assert_same_run(copy, whole)


def test_a_folder_with_a_run_and_another_configuration_are_refused(whole, tmp_path):
    write_config(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    before = {path.name: path.read_bytes() for path in copy.glob("*.*")}
    with pytest.raises(ValueError, match=r"train: folder: expected a new one, got .* resume it"):
        train(TrainConfig(**TABLE), copy, beside=tmp_path)
    other = TrainConfig(**table(maestro={"lam": 0.5}))
    with pytest.raises(ValueError, match=r"train: maestro.lam: expected 0.05 .*got 0.5"):
        train(other, copy, resume=True, beside=tmp_path)
    # The same configuration, but the user's function makes another model now.
    source = tmp_path / "training_task.py"
    source.write_text(source.read_text().replace("classes=4", "classes=5"))
    sys.modules.pop("training_task", None)
    with pytest.raises(ValueError, match="expected a checkpoint of this architecture"):
        train(TrainConfig(**TABLE), copy, resume=True, beside=tmp_path)
    sys.modules.pop("training_task", None)
    assert before == {path.name: path.read_bytes() for path in copy.glob("*.*")}


def test_rows_after_the_checkpoint_are_cut_and_fewer_than_it_counted_refused(whole, tmp_path):
    write_config(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    metrics = copy / "metrics.jsonl"
    written = metrics.read_text()
    metrics.write_text(written + '{"event": "step"}\n{"event": "st')
    train(TrainConfig(**TABLE), copy, resume=True, beside=tmp_path)
    assert metrics.read_text() == written
    metrics.write_text(written[:-1])
    short = rf"metrics.jsonl: expected at least the {len(written)} bytes .* got {len(written) - 1};"
    with pytest.raises(ValueError, match=short):
        train(TrainConfig(**TABLE), copy, resume=True, beside=tmp_path)
    assert metrics.read_text() == written[:-1]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, capsys):
    config = write_config(tmp_path, options={"nan_at": 9})
    folder = tmp_path / "run"
    assert main(["train", str(config), "--out", str(folder)]) == 1
    error = capsys.readouterr().err
    assert "got nan at step 9" in error
    assert "no parameter and no layer's output: the loss itself" in error
    assert "the checkpoint of step 6" in error
    assert f"report {folder / 'report.html'}" in error
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["extra"]["step"] == 6
    assert all(t.isfinite().all() for t in saved["model"].values())
    page = (folder / "report.html").read_text()
    assert "Stopped early: " in page
    assert "got nan at step 9" in page


def test_the_command_leaves_model_metrics_and_page(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    shutil.copy(EXAMPLES / "digits_task.py", tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    tasks = importlib.import_module("digits_task")
    path = tmp_path / "digits.toml"
    path.write_text('task = "digits_task:make"\n[train]\nepochs = 2\n[maestro]\nlam = 1e-3\n')
    if sys.version_info < (3, 11):
        path = path.with_suffix(".json")
        path.write_text(
            '{"task": "digits_task:make", "train": {"epochs": 2}, "maestro": {"lam": 1e-3}}'
        )
    folder = tmp_path / "run"
    assert main(["train", str(path), "--out", str(folder)]) == 0
    text = capsys.readouterr()
    assert text.out.startswith("After 2 of 2 epochs")
    assert "model    " in text.out
    torch.manual_seed(0)
    model = mk.load_pretrained(folder / "model", tasks.dense_model("mlp"))
    task = tasks.make()
    with torch.no_grad():
        found = tasks.accuracy(model.eval(), [task.test.tensors])
    last = load_rows(folder / "metrics.jsonl")[-1]
    assert last["metrics"]["accuracy"] == pytest.approx(found["accuracy"])
    assert found["accuracy"] > 0.2  # two epochs; guessing gives 0.1
    page = (folder / "report.html").read_text()
    assert page.count("<svg") >= 5
    assert "http" not in page
    assert main(["train", str(path), "--out", str(folder)]) == 2
    assert "expected a new one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({"trian": {}}, r"trian: expected one of .*did you mean train\?"),
        ({"train": {"lerning": 1}}, r"train.lerning: expected one of epochs, .* unknown key$"),
        ({"maestro": {"lambda": 1}}, r"maestro.lambda: .*did you mean maestro.lam\?"),
        ({"task": None}, r"task: expected a valid string, got None"),
        ({"train": 3}, r"train: expected a valid dictionary .*, got 3"),
        ({"train": {"epochs": 2.5}}, r"train.epochs: expected a valid integer, got 2.5"),
        ({"train": {"epochs": True}}, r"train.epochs: expected a valid integer, got True"),
        ({"train": {"epochs": "3"}}, r"train.epochs: expected a valid integer, got '3'"),
        ({"train": {"lr": "fast"}}, r"train.lr: expected a valid number, got 'fast'"),
        ({"train": {"lr": True}}, r"train.lr: expected a valid number, got True"),
        ({"train": {"lr": 0}}, r"train.lr: expected greater than 0, got 0"),
        ({"train": {"lr": float("nan")}}, r"train.lr: expected a finite number, got nan"),
        ({"train": {"momentum": 1.5}}, r"train.momentum: expected less than .* 1, got 1.5"),
        ({"train": {"optimizer": "lion"}}, r"train.optimizer: expected 'sgd'.* got 'lion'"),
        ({"convert": {"include": "a"}}, r"convert.include: expected a valid list, got 'a'"),
        ({"convert": {"include": [1]}}, r"convert.include.0: expected a valid string, got 1"),
        ({"maestro": {"fraction": 0}}, r"maestro.fraction: expected greater than 0, got 0"),
        ({"train": {"lr": 0, "lerning": 1}}, r"train.lr: .*; train.lerning: "),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(sections, match, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**TABLE, **sections}))
    with pytest.raises(ValueError, match=rf"^load_config: {match}"):
        load_config(path)


def test_a_configuration_without_a_task_or_a_table_is_named(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"^load_config: task: expected a value, got none$"):
        load_config(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"^load_config: file: .*got \[1\]$"):
        load_config(path)


def test_configurations_are_read_from_toml_and_json(tmp_path):
    toml = tmp_path / "a.toml"
    toml.write_text('task = "m:f"\n[train]\nlr = 1\n[convert]\nexclude = ["4"]\n')
    sample = tmp_path / "a.json"
    sample.write_text('{"task": "m:f", "train": {"lr": 1}, "convert": {"exclude": ["4"]}}')
    assert load_config(toml) == load_config(sample)
    assert load_config(sample).convert.exclude == ["4"]
    assert TrainConfig(**load_config(sample).model_dump()) == load_config(sample)
    with pytest.raises(FileNotFoundError, match=r"b.toml"):
        load_config(tmp_path / "b.toml")
    for name, kind in (("c.json", "JSON"), ("c.toml", "TOML")):
        (tmp_path / name).write_text("{")
        with pytest.raises(ValueError, match=f"{name}: expected {kind}"):
            load_config(tmp_path / name)
    (tmp_path / "c.yaml").write_text("")
    with pytest.raises(ValueError, match=r"expected a .toml or .json file, got 'c.yaml'"):
        load_config(tmp_path / "c.yaml")


def test_the_packages_it_needs_are_named_in_one_line(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path)
    monkeypatch.delitem(sys.modules, "maestro_kernels.training.config")
    monkeypatch.setitem(sys.modules, "pydantic", None)
    assert main(["train", str(config), "--out", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == (
        "maestro-kernels train: expected the package pydantic, got none; "
        "pip install 'maestro-kernels[train]'"
    )
    assert not (tmp_path / "run").exists()


def test_the_example_configuration_is_valid():
    example = load_config(EXAMPLES / "digits.toml")
    assert example.task == "digits_task:make"
    assert (EXAMPLES / "digits_task.py").is_file()


def test_the_page_lists_every_key_with_its_default():
    page = (ROOT / "docs" / "guide" / "train-command.md").read_text()
    found = TrainConfig(task="m:f").model_dump()
    for section in ("convert", "train", "maestro"):
        for key, default in found[section].items():
            (line,) = (ln for ln in page.splitlines() if ln.startswith(f"| `{section}.{key}` |"))
            shown = line.split("|")[2].strip().strip("`")
            words = {"include": "all", "exclude": "none"}
            assert shown == words.get(key, json.dumps(default)), line


def test_tasks_are_found_and_checked(tmp_path):
    def make(name, **options):
        return Run(TrainConfig(task=name, options=options), tmp_path / "run", tmp_path, "cpu")

    with pytest.raises(ValueError, match=r"train: task: expected 'module:function', got 'digits'"):
        make("digits")
    with pytest.raises(ValueError, match="No module named 'no_such_module'"):
        make("no_such_module:f")
    with pytest.raises(ValueError, match=r"got 'json:nothing': .*has no attribute 'nothing'"):
        make("json:nothing")
    with pytest.raises(TypeError, match=r"task: expected a training.Task, got str"):
        make("json:dumps", obj=1)
    (tmp_path / "their_task.py").write_text(
        "def make(depth=1):\n    return {}['a key of theirs']\n"
    )
    with pytest.raises(TypeError, match=r"make\(\) got an unexpected keyword argument 'width'"):
        make("their_task:make", width=3)
    with pytest.raises(KeyError, match="a key of theirs"):
        make("their_task:make")
    (tmp_path / "needs_more.py").write_text("import no_such_dependency\n")
    with pytest.raises(ValueError, match="No module named 'no_such_dependency'"):
        make("needs_more:f")
    assert str(tmp_path) not in sys.path
    assert not (tmp_path / "run").exists()


def test_schedules():
    def rates(schedule):
        config = TrainConfig(**table(train={"schedule": schedule, "lr": 1.0, "epochs": 8}))
        return [learning_rate(config, epoch) for epoch in range(8)]

    assert rates("constant") == [1.0] * 8
    assert rates("steps") == pytest.approx([1.0] * 4 + [0.1] * 2 + [0.01] * 2)
    cosine = rates("cosine")
    assert (cosine[0], cosine[4]) == (1.0, pytest.approx(0.5))
    assert cosine == sorted(cosine, reverse=True)


def rows_of(ranks, metrics, epochs=2):
    layers = {f"l{i}": {"N": 64, "K": 64, "kind": "lod_linear", "rank": 64} for i in range(2)}
    config = TrainConfig(task="m:f", train={"epochs": epochs}).model_dump()
    start = {
        **{"event": "start", "config": config, "layers": layers, "samples": 9, "device": "cpu"},
        **{"threads": 1, "versions": {"torch": "2", "commit": None}},
    }
    epoch = {
        **{"event": "epoch", "step": 3, "train_loss": 0.1, "weights": 10, "dense_weights": 40},
        **{"parameters": 9, "seconds": 1.0, "metrics": metrics, "ranks": ranks},
    }
    return [start, {**epoch, "epoch": 1}]


def test_the_verdict_says_what_happened_and_what_did_not():
    rows = rows_of({"l0": 64, "l1": 8}, {"accuracy": 0.5})
    assert verdict(rows) == [
        "After 1 of 2 epochs 25% of the dense weights are left, with test accuracy 0.5.",
        "1 of 2 factorised layers lost rank; most of all 'l1', from 64 to 8.",
    ]
    assert "No layer lost rank" in verdict(rows_of({"l0": 64, "l1": 64}, {}))[1]
    assert verdict(rows[:1]) == ["No epoch was finished."]
    page = html_report(rows_of({"l0": 64, "l1": 8}, {"f1 <score>": None}))
    assert "f1 &lt;score&gt; not finite" in page


def test_training_exports_what_a_task_needs():
    assert training.Task is Task
