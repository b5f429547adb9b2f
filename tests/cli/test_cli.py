"""The command line itself: help, info, exit codes. The commands' work is tested beside it."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from maestro_kernels.backends import native
from maestro_kernels.cli import main, output, parser


def commands():
    (group,) = (a for a in parser()._actions if a.dest == "command")
    return group.choices


@pytest.mark.parametrize("name", ["info", "bench", "compress", "train", "tune", "profile"])
def test_every_command_has_help_with_an_example_and_json(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"maestro-kernels {name}" in text.split("example", 1)[1]
    assert "--json" in text


def test_commands_that_do_not_exist_yet_are_not_offered():
    assert set(commands()) == {"info", "bench", "compress", "train", "tune", "profile"}


def test_info_says_why_a_backend_is_missing(capsys, monkeypatch, no_library):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "matmul     available" in text
    assert "native     not here: this installation has no compiled library" in text
    assert "compiled library: this installation has no compiled library: nothing has built" in text
    assert main(["info", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["devices"][0]["backends"]["reference"] is None
    assert record["devices"][0]["auto"] == "matmul"


@pytest.mark.skipif(native.load_error() is not None, reason="no compiled library")
def test_info_names_the_instruction_set_of_each_dtype(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"native     available: float32 on {native.isa(torch.float32)}, bfloat16 on" in text
    assert main(["info", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["native_isa"]["float16"] == native.isa(torch.float16)
    assert tuple(record["library"]["instruction_sets"]) == native.available_isas()
    assert record["library"]["error"] is None
    assert record["library"]["cuda_error"] == native.cuda_error()
    cuda = native.cuda_error()
    assert ("with CUDA kernels" if cuda is None else f"no CUDA kernels: {cuda}") in text


def test_what_repeats_a_measurement_names_all_that_matters_and_no_folder():
    given = {
        "command": "x", "shape": ["1,2", "3,4"], "rows": [1, 64], "mode": None, "quick": True,
        "no_compile": False, "dtype": "float32", "seconds": 2.0, "out": Path("/secret"),
    }  # fmt: skip
    names = ("shape", "rows", "mode", "quick", "no_compile", "dtype", "seconds", "threads")
    assert output.repeats(argparse.Namespace(**given), *names, targets=["a b"]) == (
        "maestro-kernels x 'a b' --shape 1,2 --shape 3,4 --rows 1,64 --quick --dtype float32 "
        f"--seconds 2 --threads {torch.get_num_threads()}"
    )
