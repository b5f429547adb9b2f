"""The built wheels are whole: they install into an empty environment and run there."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
needs_compiler = pytest.mark.skipif(
    shutil.which("cmake") is None or not (shutil.which("g++") or shutil.which("clang++")),
    reason="needs cmake and a C++ compiler",
)


def build_wheel(tmp_path_factory, **environment):
    # A copy, so that the build leaves nothing in the work tree.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in ("maestro_kernels", "csrc"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "-w", str(out), str(source)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def install(wheel, folder):
    """Python of a new environment that has the wheel, and sees the libraries of this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "-q", str(wheel)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    # Folders named in a .pth file come last and bring no .pth files of their own.
    (site / "libraries.pth").write_text(str(Path(torch.__file__).resolve().parents[1]))
    return python


def run(python, *arguments, cwd):
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")
    }
    done = subprocess.run(
        [str(python), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CALL = (
    "import torch, maestro_kernels as mk; print(mk.__file__);"
    "print(mk.lod_linear(torch.ones(2, 8), torch.ones(6, 4), torch.ones(4, 8)).sum().item())"
)


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory, MK_NATIVE="0")


@pytest.fixture(scope="module")
def native_wheel(tmp_path_factory):
    # nvcc takes minutes and is tested with the kernels.
    return build_wheel(tmp_path_factory, MK_NATIVE="1", MK_CMAKE_ARGS="-DMK_CUDA=OFF")


def test_without_a_compiler_the_wheel_is_pure_python(pure_wheel):
    assert pure_wheel.name.endswith("py3-none-any.whl")


def test_wheel_holds_every_module_and_data_file(pure_wheel):
    packed = set(zipfile.ZipFile(pure_wheel).namelist())
    wanted = {
        str(path.relative_to(ROOT))
        for pattern in ("*.py", "*.html", "*.json", "py.typed")
        for path in (ROOT / "maestro_kernels").rglob(pattern)
        if "__pycache__" not in path.parts
    }
    assert "maestro_kernels/py.typed" in packed
    assert wanted - packed == set()


def test_installed_pure_wheel_runs_and_says_what_is_missing(pure_wheel, tmp_path):
    python = install(pure_wheel, tmp_path / "env")
    where, total = run(python, "-c", CALL, cwd=tmp_path).split()
    assert where.startswith(str(tmp_path))
    assert float(total) == 2 * 6 * 4 * 8
    info = json.loads(run(python, "-m", "maestro_kernels", "info", "--json", cwd=tmp_path))
    backends = info["devices"][0]["backends"]
    assert backends["matmul"] is None
    assert backends["reference"] is None
    assert "no compiled library" in backends["native"]
    assert "CUDA" in backends["triton"] or "not installed" in backends["triton"]


@needs_compiler
def test_native_wheel_serves_every_python_3_of_this_platform(native_wheel):
    stem = native_wheel.name.removesuffix(".whl")
    assert "-py3-none-" in stem
    assert not stem.endswith("-any")
    names = zipfile.ZipFile(native_wheel).namelist()
    assert "maestro_kernels/_native.so" in names
    assert not any(name.startswith("csrc") for name in names)


@needs_compiler
def test_installed_native_wheel_runs_on_its_own_library(native_wheel, tmp_path):
    python = install(native_wheel, tmp_path / "env")
    where, total = run(python, "-c", CALL, cwd=tmp_path).split()
    assert where.startswith(str(tmp_path))
    assert float(total) == 2 * 6 * 4 * 8
    info = json.loads(run(python, "-m", "maestro_kernels", "info", "--json", cwd=tmp_path))
    assert info["devices"][0]["backends"]["native"] is None
    assert set(info["native_isa"]) == {"float32", "bfloat16", "float16"}


@needs_compiler
def test_the_library_needs_no_python_and_no_cuda(native_wheel, tmp_path):
    zipfile.ZipFile(native_wheel).extract("maestro_kernels/_native.so", tmp_path)
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(tmp_path / "maestro_kernels/_native.so")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    strong = [line.split()[-1] for line in symbols if " U " in line]
    assert not [name for name in strong if name.startswith(("Py", "_Py", "cuda", "cu"))]
    # The C++ part of libtorch is not stable from one version to the next.
    assert not [name for name in strong if "2at" in name or "c10" in name]
