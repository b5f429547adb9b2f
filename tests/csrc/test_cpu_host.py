"""The CPU kernels without torch: every instruction set here, NEON by emulation, other compilers.

`host_cpu/kernels_test.cpp` compares them with the formula in double.
"""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
from places import ROOT

SOURCES = ROOT / "csrc" / "cpu"
TEST = ROOT / "tests" / "support" / "host_cpu" / "kernels_test.cpp"
COMMON = ("cut", "forward", "isa", "kernel", "kernels_portable")
WARNINGS = ("-Wall", "-Wextra", "-Wshadow", "-Werror")
CROSS = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
needs_zig = pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None, reason="ziglang is not installed (PyPI)"
)
needs_qemu = pytest.mark.skipif(QEMU is None, reason="qemu-user is not installed (Debian)")


def files(*sets):
    return [str(SOURCES / f"{name}.cpp") for name in (*COMMON, *sets)]


def zig(target, *arguments, folder):
    # Its own cache, unless the user has one that is filled: a first link compiles libc and libc++.
    command = [sys.executable, "-m", "ziglang", "c++", "-target", target, "-std=c++17"]
    done = subprocess.run(
        [*command, *WARNINGS, f"-I{ROOT / 'csrc'}", *arguments],
        capture_output=True,
        text=True,
        timeout=3600,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr


def run(*command, isa=None):
    environment = {k: v for k, v in os.environ.items() if k != "MK_CPU_ISA"}
    if isa is not None:
        environment["MK_CPU_ISA"] = isa
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    return done.returncode, done.stdout


def check(*command, isa, name):
    code, text = run(*command, isa=isa)
    assert code == 0, text
    assert text.split(":")[0].split() == [name] * 3
    assert text.rstrip().endswith(" 0 failures")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_portable_kernels_of_this_machine(tmp_path):
    program = tmp_path / "kernels_test"
    command = ["g++", "-std=c++17", "-O1", *WARNINGS, "-pthread", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(TEST), *files(), "-o", str(program)], check=True, timeout=300)
    for threads in (1, 3):
        check(program, threads, isa=None, name="portable")
    code, text = run(program, isa="avx9000")
    assert code == 2
    assert "MK_CPU_ISA: expected one of portable (what this build has" in text


def run_on_aarch64(program):
    check(QEMU, program, 1, isa=None, name="neon")
    check(QEMU, program, 3, isa="neon", name="neon")
    check(QEMU, program, 1, isa="portable", name="portable")
    code, text = run(QEMU, program, isa="avx2")
    assert code == 2
    assert "MK_CPU_ISA: expected one of portable, neon (what this build has" in text
    assert "got 'avx2'" in text


@needs_qemu
@pytest.mark.skipif(CROSS is None, reason="g++-aarch64-linux-gnu is not installed (Debian)")
def test_neon_kernels_under_emulation(tmp_path):
    program = tmp_path / "kernels_test"
    command = [CROSS, "-std=c++17", "-O2", *WARNINGS, "-static", "-pthread", "-DMK_HAVE_NEON"]
    command += [f"-I{ROOT / 'csrc'}", str(TEST), *files("kernels_neon"), "-o", str(program)]
    subprocess.run(command, check=True, timeout=300)
    run_on_aarch64(program)


@needs_zig
@needs_qemu
@pytest.mark.exhaustive
def test_neon_kernels_of_clang_under_emulation(tmp_path):
    program = tmp_path / "kernels_test"
    arguments = ["-O2", "-static", "-DMK_HAVE_NEON", str(TEST), *files("kernels_neon")]
    zig("aarch64-linux-musl", *arguments, "-o", str(program), folder=tmp_path)
    run_on_aarch64(program)


@needs_zig
@pytest.mark.parametrize("target", ["aarch64-linux-gnu", "aarch64-macos", "x86_64-macos"])
def test_clang_compiles_for_other_systems_without_a_warning(target, tmp_path):
    arm = target.startswith("aarch64")
    flags = ["-DMK_HAVE_NEON"] if arm else []
    sources = files("kernels_neon") if arm else files()
    # To objects: for less and for more than that zig first makes its libc++, minutes of it.
    flags += ["-c", "-Wno-unused-command-line-argument"]
    zig(target, *flags, *sources, folder=tmp_path)
