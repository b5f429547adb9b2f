import dataclasses
import platform
import subprocess
import sys

import pytest
import torch

import maestro_kernels as mk
from maestro_kernels import hardware
from maestro_kernels.measure import probes as probe
from maestro_kernels.testing import make_inputs


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


@pytest.fixture
def probes(monkeypatch):
    """What is probed; nothing is timed, and nothing is remembered from or for other tests."""
    found = []
    monkeypatch.setattr(hardware, "_peaks", {})
    monkeypatch.setattr(probe, "flops", lambda d, _: found.append(d) or 1e9)
    monkeypatch.setattr(probe, "bandwidth", lambda size, _: found.append(size) or 2e9)
    caches = hardware._measure, hardware._bandwidths
    for cache in caches:
        cache.cache_clear()
    yield found
    for cache in caches:
        cache.cache_clear()


def test_measured_device_probes_what_is_asked_for_once(probes):
    bare = hardware.measured_device("cpu")
    assert (bare.source, bare.bandwidth, bare.peak("float16")) == ("measured", 2e9, None)
    assert len(probes) == 2
    half = hardware.measured_device("cpu", torch.float16)
    assert half.peak_flops == (("float16", 1e9),)
    assert probes[2:] == [torch.float16]
    both = hardware.measured_device("cpu", "float16", "float32")
    assert dict(both.peak_flops) == {"float16": 1e9, "float32": 1e9}
    assert probes[3:] == [torch.float32]
    assert hardware.measured_device("cpu", "float16") is half
    assert hash(half) != hash(both)
    assert len(probes) == 4


def test_the_bandwidth_probe_takes_a_share_of_the_memory_that_is_free(probes, monkeypatch):
    monkeypatch.setattr(probe, "free_bytes", lambda kind: 512 << 20)
    hardware.measured_device("cpu")
    assert probes[0] == 64 << 20


def test_explain_times_nothing_until_it_is_asked_how_long(probes):
    x, u, v, _ = make_inputs(64, 96, 128, 32)
    explanation = mk.explain(x, u, v)
    assert "at best   not known before .seconds measured" in str(explanation)
    assert hardware.known_device("cpu", "float32") is hardware.current_device("cpu")
    assert probes == []
    assert explanation.seconds > 0
    assert 0 < explanation.roofline_share <= 1
    assert probes[2:] == [torch.float32]
    text = str(mk.explain(x, u, v))
    assert "(roofline, measured peaks), where one fused pass could take" in text
    assert len(probes) == 3


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
    monkeypatch.delenv("MAESTRO_KERNELS_COMMIT", raising=False)
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


def test_a_copy_of_a_work_tree_is_told_its_commit(monkeypatch):
    for told, expected in (("abc", ("abc", False)), ("abc-dirty", ("abc", True))):
        monkeypatch.setenv("MAESTRO_KERNELS_COMMIT", told)
        assert hardware._git_state() == expected


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
