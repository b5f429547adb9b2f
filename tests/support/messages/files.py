"""Wrong calls: files."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import maestro_kernels as mk
from maestro_kernels import search, tables, training
from maestro_kernels.benchmark import rows
from maestro_kernels.training.config import TrainConfig
from maestro_kernels.training.runner import Run
from messages import Row


def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def model():
    return mk.convert(dense(), rank={"0": 3})


def save(place):
    return mk.save_pretrained(model(), place)


def saved(folder):
    return save(folder / "m")


def over(folder, name, content="mine"):
    """Save where a file of somebody else's has the name."""
    (folder / name).write_text(content)
    save(folder)


def over_weights(folder):
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    save(folder)


def over_fifo(folder, name):
    os.mkfifo(folder / name)
    save(folder / name if name == "out" else folder)


def below_a_file(folder):
    (folder / "file").write_text("")
    save(folder / "file" / "deep")


def loop(folder):
    (folder / "a").symlink_to(folder / "a")
    save(folder / "a")


def parametrised(folder):
    changed = model()
    nn.utils.parametrizations.weight_norm(changed[0], "u")
    mk.save_pretrained(changed, folder)


def with_more_state(folder):
    changed = model()
    changed[0].register_buffer("scale", torch.ones(()))
    mk.save_pretrained(changed, folder)


class Own(mk.LoDLinear):
    """A layer that does something else."""


class Extra(nn.Linear):
    """State that is neither parameter nor buffer."""

    def get_extra_state(self):
        return torch.zeros(1)

    def set_extra_state(self, state):
        pass


def load(folder, into=None):
    return mk.load_pretrained(folder, dense() if into is None else into)


def rewritten(folder, old, new):
    """Load a save in whose header a piece of text was replaced by one of the same length."""
    path = saved(folder) / "model.safetensors"
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    load(path.parent)


def cut(folder, size):
    path = saved(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    load(path.parent)


def old_json(folder, text):
    """Load a folder of the old format, with this JSON."""
    save_file({"x": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "maestro.json").write_text(text)
    load(folder)


def old(**changes):
    layer = {"kind": "lod_linear", "max_rank": 3, "rank": 3, "bias": True}
    head = {"format": "maestro_kernels", "version": 1, "ties": {}, "grouped": False}
    return json.dumps({**head, "layers": {"0": layer}, **changes})


def compiled(folder):
    other = dense()
    other[0] = torch.compile(other[0])
    load(saved(folder), other)


def checkpoint(path):
    layers = model()
    training.save_checkpoint(layers, path, torch.optim.SGD(layers.parameters(), 0.1))


def run_in_use(folder):
    """A second run in the folder of one that is still going on."""
    from maestro_kernels.files import sole_user

    with sole_user("train", "folder", folder):
        run(folder)


def run(folder):
    Run(TrainConfig(task="training_task:make"), folder, folder, "cpu").train(True, print)


def made(folder, name):
    (folder / name).mkdir()
    return folder / name


SAVE, LOAD = "save_pretrained: directory: expected", "load_pretrained: directory: expected"
DENSE, FILE = (
    "load_pretrained: dense_model: expected",
    "load_pretrained: model.safetensors: expected",
)
WIDE = torch.complex128
JSON = "load_pretrained: maestro.json: expected"
RECORD = {"kind": "lod_linear", "max_rank": 3, "bias": True}

ROWS = [
    Row("save: no path", lambda _: save(3), TypeError, f"{SAVE} a path, got int"),
    Row("save: bytes", lambda f: save(os.fsencode(f)), TypeError, f"{SAVE} a path, got bytes"),
    Row("save: nothing", lambda _: save(""), ValueError, f"{SAVE} a path, got ''"),
    Row("save: a NUL", lambda _: save("a\0b"), ValueError, f"{SAVE} a path, got 'a\\x00b'"),
    Row("save: below a file", below_a_file, ValueError, f"{SAVE} a place in a folder, got"),
    Row("save: a FIFO", lambda f: over_fifo(f, "out"), ValueError, f"{SAVE} a folder, got a FIFO"),
    Row("save: a link to itself", loop, ValueError, f"{SAVE} a folder, got a link to itself"),
    Row(
        "save: a device",
        lambda _: save("/dev/null"),
        ValueError,
        f"{SAVE} a folder, got a device or socket '/dev/null'",
    ),
    Row(
        "save: weights of the user's",
        over_weights,
        ValueError,
        f"{SAVE} a folder without a model.safetensors of another origin, got",
    ),
    Row(
        "save: JSON of the user's",
        lambda f: over(f, "maestro.json", "{}"),
        ValueError,
        f"{SAVE} a folder without a maestro.json of another origin, got",
    ),
    Row(
        "save: a FIFO of our name",
        lambda f: over_fifo(f, "model.safetensors"),
        ValueError,
        f"{SAVE} a folder without other things of our names, got a FIFO",
    ),
    Row(
        "save: a folder of our name",
        lambda f: (made(f, "maestro.json"), save(f)),
        ValueError,
        f"{SAVE} a folder without other things of our names, got a folder",
    ),
    Row(
        "save: a sharded checkpoint",
        lambda f: over(f, "model.safetensors.index.json"),
        ValueError,
        f"{SAVE} a folder without another checkpoint, got",
    ),
    Row(
        "save: a parametrised layer",
        parametrised,
        ValueError,
        "got ParametrizedLoDLinear at '0', parametrised (torch.nn.utils.parametrize",
    ),
    Row(
        "save: a subclass",
        lambda f: mk.save_pretrained(nn.Sequential(Own(8, 8)), f),
        ValueError,
        "save_pretrained: model: expected factorised layers of the classes of maestro_kernels, "
        "got Own at '0'",
    ),
    Row(
        "save: a buffer on a factorised layer",
        with_more_state,
        ValueError,
        "save_pretrained: model: expected the tensors ['active_rank', 'bias', 'u', 'v'] in the "
        "factorised layer '0', got ['active_rank', 'bias', 'scale', 'u', 'v']",
    ),
    Row(
        "save: extra state",
        lambda f: mk.save_pretrained(nn.Sequential(Extra(2, 2)), f),
        ValueError,
        "got Tensor at '0._extra_state', which is none of them",
    ),
    Row(
        "save: a lazy layer",
        lambda f: mk.save_pretrained(nn.Sequential(nn.LazyLinear(2)), f),
        ValueError,
        "save_pretrained: model: expected values, got '0.weight', which is lazy",
    ),
    Row(
        "save: no values",
        lambda f: mk.save_pretrained(nn.Linear(2, 2, device="meta"), f),
        ValueError,
        "save_pretrained: model: expected values, got 'weight' on the meta device",
    ),
    Row(
        "save: a sparse weight",
        lambda f: mk.save_pretrained(nn.ParameterDict({"w": torch.eye(2).to_sparse()}), f),
        NotImplementedError,
        "save_pretrained: model: expected plain dense tensors, got 'w', a torch.sparse_coo",
    ),
    Row(
        "save: a dtype of no file",
        lambda f: mk.save_pretrained(nn.ParameterDict({"w": torch.eye(2).to(WIDE)}), f),
        TypeError,
        "save_pretrained: model: expected a dtype that safetensors holds, got torch.complex128",
    ),
    Row("load: no path", lambda _: load(None), TypeError, f"{LOAD} a path, got NoneType"),
    Row("load: no folder", lambda f: load(f / "n"), ValueError, f"{LOAD} a folder with model.safe"),
    Row("load: a file", lambda _: load(Path(__file__)), ValueError, f"{LOAD} a folder, got a file"),
    Row(
        "load: a FIFO",
        lambda f: (os.mkfifo(f / "model.safetensors"), load(f)),
        ValueError,
        "with a FIFO of that name",
    ),
    Row(
        "load: weights of the user's",
        lambda f: (save_file({"a": torch.zeros(1)}, f / "model.safetensors"), load(f)),
        ValueError,
        f"{FILE} the header that save_pretrained writes, got",
    ),
    Row("load: half a file", lambda f: cut(f, -9), ValueError, f"{FILE} a whole safetensors file"),
    Row("load: seven bytes", lambda f: cut(f, 7), ValueError, "a header of"),
    Row("load: no byte", lambda f: cut(f, 0), ValueError, f"{FILE} a whole safetensors file"),
    Row(
        "load: another rank in the header",
        lambda f: rewritten(f, rb"\"rank\": 3", rb"\"rank\": 2"),
        ValueError,
        "got a damaged one (content that does not match its digest)",
    ),
    Row(
        "load: old, no JSON", lambda f: old_json(f, "["), ValueError, f"{JSON} JSON, got a damaged"
    ),
    Row(
        "load: old, deep JSON",
        lambda f: old_json(f, "[" * 200_000),
        ValueError,
        f"{JSON} JSON, got a damaged file (",
    ),
    Row(
        "load: old, foreign JSON",
        lambda f: old_json(f, "{}"),
        ValueError,
        f"{JSON} a file written by save_pretrained, got another file",
    ),
    Row(
        "load: JSON without its tensors",
        lambda f: old_json(f, old(version=2)),
        ValueError,
        f"{FILE} the header that save_pretrained writes, got",
    ),
    Row(
        "load: old, ties as a list",
        lambda f: old_json(f, old(ties=[])),
        ValueError,
        f"{JSON} 'ties' to be a dict, got list",
    ),
    Row(
        "load: old, ties of numbers",
        lambda f: old_json(f, old(ties={"a": 1})),
        ValueError,
        f"{JSON} names in 'ties', got 1",
    ),
    Row(
        "load: old, rank true",
        lambda f: old_json(f, old(layers={"0": {**RECORD, "rank": True}})),
        ValueError,
        f"{JSON} kind, max_rank, rank, bias for layer '0', got",
    ),
    Row(
        "load: old, half a rank",
        lambda f: old_json(f, old(layers={"0": {**RECORD, "rank": 1.5}})),
        ValueError,
        f"{JSON} kind, max_rank, rank, bias for layer '0', got",
    ),
    Row(
        "load: old, rank 99",
        lambda f: old_json(f, old(layers={"0": {**RECORD, "rank": 99}})),
        ValueError,
        f"{JSON} 0 <= rank <= max_rank for '0', got max_rank 3 and rank 99",
    ),
    Row(
        "load: old, rank -1",
        lambda f: old_json(f, old(layers={"0": {**RECORD, "rank": -1}})),
        ValueError,
        f"{JSON} 0 <= rank <= max_rank for '0', got max_rank 3 and rank -1",
    ),
    Row(
        "load: old, activation as a list",
        lambda f: old_json(f, old(layers={"0": {**RECORD, "rank": 1, "activation": ["relu"]}})),
        ValueError,
        f"{JSON} an activation of",
    ),
    Row(
        "load: another architecture",
        lambda f: load(saved(f), nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))),
        ValueError,
        f"{DENSE} a linear layer of 8 x 8 at '0', got Linear of 4 x 8",
    ),
    Row(
        "load: integers for numbers",
        lambda f: load(
            mk.save_pretrained(nn.BatchNorm1d(2), f), nn.ParameterDict({"weight": torch.ones(2)})
        ),
        ValueError,
        f"{DENSE} a place for 'bias'",
    ),
    Row("load: a compiled layer", compiled, ValueError, f"{DENSE} a layer that is not compiled"),
    Row(
        "checkpoint: a folder",
        lambda f: checkpoint(f),
        ValueError,
        "save_checkpoint: path: expected a file to write, got a folder",
    ),
    Row(
        "checkpoint: no path",
        lambda _: checkpoint(1),
        TypeError,
        "save_checkpoint: path: expected a path, got int",
    ),
    Row(
        "train: a run that is still going on",
        run_in_use,
        ValueError,
        "train: folder: expected a folder that no other process uses, got",
    ),
    Row(
        "train: a file as its folder",
        lambda _: run("/etc/passwd"),
        ValueError,
        "train: folder: expected a folder, got a file '/etc/passwd'",
    ),
    Row(
        "table: a folder",
        lambda f: tables.save(tables.Table({}, {}, (), "", ""), f),
        ValueError,
        "save: path: expected a file to write, got a folder",
    ),
    Row(
        "rows: a FIFO",
        lambda f: (os.mkfifo(f / "r"), rows.append(f / "r", [])),
        ValueError,
        "append: path: expected a file to write, got a FIFO",
    ),
    Row(
        "sensitivity: a folder",
        lambda f: search.Sensitivity("svd", "", {}).save(f),
        ValueError,
        "Sensitivity.save: path: expected a file to write, got a folder",
    ),
]
