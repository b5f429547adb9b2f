import dataclasses
import platform
import subprocess
import sys

import pytest
import torch

from maestro_kernels import hardware


def test_current_device_describes_the_cpu_without_timing_it():
    device = hardware.current_device("cpu")
    assert (device.kind, device.num_cores) == ("cpu", torch.get_num_threads())
    assert device.name
    assert device.arch.startswith(platform.machine())
    assert (device.source, device.bandwidth, device.peak(torch.float32)) == ("unknown", None, None)
    assert hash(device) == hash(dataclasses.replace(device))
    assert hardware.current_device() is device


def test_a_device_that_is_neither_is_refused():
    with pytest.raises(ValueError, match="device: expected 'cpu' or 'cuda', got 'meta'"):
        hardware.current_device("meta")


def test_recorded_h100_is_labelled_as_assumed():
    h100 = hardware.H100
    assert (h100.num_cores, h100.shared_memory, h100.l2_bytes) == (132, 227 << 10, 50 << 20)
    assert (h100.bandwidth, h100.peak("bfloat16"), h100.source) == (3.0e12, 800e12, "assumed")
    assert h100.peak(torch.float64) is None
    assert h100.last_level_cache == 50 << 20


def test_measured_device_probes_once(monkeypatch):
    hardware._measure.cache_clear()
    probes = []
    monkeypatch.setattr(hardware, "_probe_flops", lambda d, _: probes.append(d) or 1e9)
    monkeypatch.setattr(hardware, "_probe_bandwidth", lambda size, _: probes.append(size) or 2e9)
    first = hardware.measured_device("cpu")
    assert (first.source, first.bandwidth, first.peak("float16")) == ("measured", 2e9, 1e9)
    assert len(probes) == 5
    assert hardware.measured_device("cpu") is first
    assert len(probes) == 5
    hardware._measure.cache_clear()


def test_probes_give_plausible_ceilings():
    cpu = torch.device("cpu")
    assert 1e8 < hardware._probe_flops(torch.float32, cpu, 128) < 1e15
    assert 1e8 < hardware._probe_bandwidth(4 << 20, cpu) < 1e14


def test_versions_name_software_and_no_host():
    found = hardware.versions()
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert {"maestro_kernels", "commit", "dirty", "triton", "driver", "cuda", "os"} <= found.keys()
    assert platform.node() not in "".join(map(str, found.values()))


def test_commit_and_dirty_follow_the_work_tree(tmp_path, monkeypatch):
    def git(*words):
        identity = ("-c", "user.name=t", "-c", "user.email=t@t")
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "maestro_kernels"
    package.mkdir()
    monkeypatch.setattr(hardware, "__file__", str(package / "hardware.py"))
    assert hardware._git_state() == (None, None)
    git("init", "-q")
    (package / "hardware.py").write_text("a")
    git("add", ".")
    git("commit", "-q", "-m", "m")
    commit = git("rev-parse", "HEAD")
    assert hardware._git_state() == (commit, False)
    (tmp_path / "untracked").write_text("x")
    assert hardware._git_state() == (commit, False)
    (package / "hardware.py").write_text("b")
    assert hardware._git_state() == (commit, True)


def test_import_probes_nothing():
    code = (
        "import builtins, subprocess, time\n"
        "import torch\n"
        "subprocess.run = None; time.perf_counter = None\n"
        "import maestro_kernels.hardware as h\n"
        "assert h._cpu.cache_info().currsize == h._measure.cache_info().currsize == 0\n"
        "assert h.versions.cache_info().currsize == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
