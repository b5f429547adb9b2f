"""The small benchmarks of bench/: they run, and print what they promise."""

import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from places import ROOT
from triton_support import compiling_environment, needs_triton

from bench import compress_memory, cpu_kernels, prepack_choice
from maestro_kernels.backends import native

needs_library = pytest.mark.skipif(native.load_error() is not None, reason="no compiled library")


@needs_library
@pytest.mark.parametrize("zentorch", [None, "No module named 'zentorch'"])
def test_cpu_kernels_compares_with_zentorch_where_it_is(zentorch, monkeypatch, capsys):
    def pair(x, u, v, bias):
        return lambda: F.linear(F.linear(x, v), u, bias)

    monkeypatch.setattr(cpu_kernels, "zentorch", lambda: zentorch)
    monkeypatch.setattr(cpu_kernels, "zentorch_pair", pair)
    threads = ["--threads", str(torch.get_num_threads())]
    cpu_kernels.main(
        ["--rows", "3", "--ranks", "8", "--models", "MiniLM", "--seconds", "0.001", *threads]
    )
    text = capsys.readouterr().out
    means = text.splitlines()[-1]
    assert means.startswith("M 1..16: best x")
    assert means.endswith("3 cases")
    assert ("zentorch x" in means) == (zentorch is None)
    assert (f"without zentorch: {zentorch}" in text) == (zentorch is not None)


def test_zentorch_that_refuses_this_cpu_is_told(monkeypatch):
    def refuses(name):
        raise RuntimeError(f"{name} needs AVX-512\nmore")

    monkeypatch.setattr(cpu_kernels.importlib, "import_module", refuses)
    assert cpu_kernels.zentorch() == "zentorch needs AVX-512"


@needs_library
def test_prepack_choice_compares_what_it_chose_with_every_form():
    case = partial(prepack_choice.case, 48, 32, 12, 4, torch.float32, 0.001)
    chosen, spent = case()
    assert {"prepacked", "two nn.Linear", "unpacked", "fused", "merged dense"} <= spent.keys()
    assert chosen in spent


@needs_triton
def test_host_cost_prints_calls_and_a_ratio_for_each_kernel():
    command = [sys.executable, "-m", "bench.host_cost", "--rounds", "1"]
    done = subprocess.run(
        command, cwd=ROOT, env=compiling_environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.count(" calls ") == 3 * 3
    assert done.stdout.count("time over two F.linear and kernel[grid]: ") == 3


def test_tiny_calls_prints_a_ratio_for_every_kind_of_call():
    command = [sys.executable, "-m", "bench.tiny_calls", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 15
    assert all(float(line.split()[-1]) > 0 for line in lines)


def test_compress_memory_tells_the_peak_beside_the_size(tmp_path, capsys):
    assert compress_memory.main(["--model", "tiny", "--folder", str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("tiny: ")
    assert "of the weights of its linear layers are left" in first
    assert second.startswith("peak 0.")
    assert " GB for a model of 0.00 GB (" in second
    assert list(tmp_path.iterdir()) == []
